"""Benchmarks, run by hand on a machine that does nothing else.

python tests/benchmark.py tokenize                    # fineweb.py against plain tiktoken and the pool scheme
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def print_table(header: list[str], rows: list[list]) -> None:
    """A table as Markdown, numbers to the right."""
    rows = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    columns = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(columns)]
    for row in [header, rule, *rows]:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, columns, strict=True))]
        print("| " + " | ".join(cells) + " |")


# ----------------------------------------------------------------------------------------------------------------------
# tokenize: three ways from the same text to tokens, each timed from when its workers are up


def english(megabytes: int, seed: int = 0) -> list[str]:
    """Documents of a few kilobytes, as web pages are, of English paragraphs: the docstrings of Python's library."""
    rng, paragraphs = random.Random(seed), []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        with contextlib.suppress(OSError):
            source = path.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r'"""(.*?)"""', source, re.DOTALL)
            paragraphs += [re.sub(r"\s+", " ", p) for text in found for p in text.split("\n\n") if len(p) > 80]
    documents, size = [], 0
    while size < megabytes * 2**20:
        document = "\n\n".join(rng.choices(paragraphs, k=rng.randint(2, 30)))
        documents.append(document)
        size += len(document)
    return documents


def own_encoding():
    """What tiktoken.get_encoding("gpt2") returns, with or without a network: the pattern is tiktoken's own."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from train_gpt2 import gpt2_encoding

    special, ranks = {"<|endoftext|>": 50256}, gpt2_encoding()._mergeable_ranks
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def plain(documents: list[str], barrier, results) -> None:
    """A process that does nothing but run tiktoken."""
    encoding = own_encoding()
    barrier.wait()
    start, count = time.perf_counter(), 0
    for document in documents:
        count += len(encoding.encode_to_numpy(document, disallowed_special=()))
    results.put((count, start, time.perf_counter()))


def plain_tiktoken(documents: list[str], processes: int) -> tuple[int, float]:
    """(tokens, seconds) of independent processes that share the documents out among them."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    args = [(documents[i::processes], barrier, results) for i in range(processes)]
    workers = [context.Process(target=plain, args=a) for a in args]
    for worker in workers:
        worker.start()
    counts, starts, ends = zip(*[results.get() for _ in workers], strict=True)
    for worker in workers:
        worker.join()
    return sum(counts) + len(documents), max(ends) - min(starts)


def pool_worker(text: str) -> np.ndarray:
    """A document's tokens the way of the pool scheme: a list, checked, then an array."""
    tokens = [POOL_ENCODING._special_tokens["<|endoftext|>"]]
    tokens.extend(POOL_ENCODING.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def pool_scheme(documents: list[str], processes: int, shard_size: int, folder: str) -> tuple[int, float]:
    """(tokens, seconds) of a pool that gets documents in chunks of 16 and sends arrays back, which one process copies
    into shards: the scheme in use today."""
    global POOL_ENCODING
    POOL_ENCODING = own_encoding()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(len, [""] * processes)  # they are up
        start, total, shard, used = time.perf_counter(), 0, np.empty(shard_size, np.uint16), 0
        for tokens in pool.imap(pool_worker, documents, chunksize=16):
            total += len(tokens)
            while used + len(tokens) >= shard_size:
                room = shard_size - used
                shard[used:] = tokens[:room]
                np.save(os.path.join(folder, "shard.npy"), shard)
                tokens, used = tokens[room:], 0
            shard[used : used + len(tokens)] = tokens
            used += len(tokens)
        np.save(os.path.join(folder, "shard.npy"), shard[:used])
        return total, time.perf_counter() - start


def our_shards(path: Path, processes: int, shard_size: int, folder: str) -> tuple[int, float]:
    """(tokens, seconds) of fineweb.py on a file, as it reports them: from when its workers are up to when the last
    shard is on the disk."""
    flags = [f"--out={folder}/{time.monotonic_ns()}", f"--num_workers={processes}", f"--shard_size={shard_size}"]
    command = [sys.executable, ROOT / "fineweb.py", "--files", path, *flags]
    line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    tokens, seconds = re.search(r"([\d,]+) tokens, .*, ([\d.]+) s,", line).groups()
    return int(tokens.replace(",", "")), float(seconds)


def tokenize(args) -> None:
    """Tokens a second, all ways in turn within each round, so that whatever the machine does meanwhile hits them alike;
    the ratios are medians of the rounds'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cores, documents = args.processes, english(args.megabytes)
    megabytes = sum(map(len, documents)) / 1e6
    print(f"{cores} processes, {len(documents):,} documents, {megabytes:.0f} MB, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "plain tiktoken, a process a core": lambda: plain_tiktoken(documents, cores),
            "pool, half the cores": lambda: pool_scheme(documents, max(1, cores // 2), args.shard_size, folder),
            "pool, all cores": lambda: pool_scheme(documents, cores, args.shard_size, folder),
        }
        table = pa.table({"text": documents, "id": [str(i) for i in range(len(documents))]})
        pq.write_table(table, Path(folder, "text.parquet"), row_group_size=1000)
        Path(folder, "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        for kind in ("parquet", "jsonl"):
            path = Path(folder, f"text.{kind}")
            ways[f"fineweb.py, .{kind}"] = lambda path=path: our_shards(path, cores, args.shard_size, folder)
        speeds = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                tokens, seconds = run()
                speeds[way].append(tokens / seconds / 1e6)
    plain_speeds, half = speeds["plain tiktoken, a process a core"], speeds["pool, half the cores"]
    rows = []
    for way, values in speeds.items():
        ratio = [float(np.median(np.divide(values, reference))) for reference in (plain_speeds, half)]
        rows.append([way, float(np.median(values)), float(min(values)), float(max(values)), *ratio])
    print_table(["", "Mtok/s, median", "lowest", "highest", "of plain tiktoken", "of the pool, half"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    command = commands.add_parser("tokenize", help="fineweb.py against plain tiktoken and the pool scheme")
    command.add_argument("--megabytes", type=int, default=60, help="of text (%(default)s)")
    command.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    command.add_argument("--processes", type=int, default=cores, help="(all cores: %(default)s)")
    command.add_argument("--shard_size", type=int, default=10_000_000, help="tokens a shard (%(default)s)")
    command.set_defaults(run=tokenize)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
