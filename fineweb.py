"""Turn text into shards of tokens: FineWeb-Edu, another data set of the hub, or files of your own.

    python fineweb.py                       # 10 billion tokens of FineWeb-Edu -> edu_fineweb10B/
    python fineweb.py --pretokenized --max_tokens 1000000000       # tokenised by someone else
    python fineweb.py --files a.txt texts/ 'more/*.jsonl.gz' --shard_size 1000000 --out my_text
    python fineweb.py --verify              # check every shard against manifest.json

The main thread reads rows of text, one file after the other, and packs them into pieces of about a
megabyte. Worker threads turn the pieces into tokens. The main thread takes the tokens in order and
writes them into shards of equal size: each document starts with <|endoftext|>, a document may run
on into the next shard, and the first shard is the validation data.

Whenever a shard is finished, manifest.json notes the place in the source where the next one begins.
The same command goes on from there, and makes the shards that an undisturbed run would have made.
"""

import argparse
import bz2
import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from textwrap import shorten

import filelock
import numpy as np
import tiktoken
from tqdm import tqdm

DATASET = "HuggingFaceFW/fineweb-edu"
CONFIG = "sample-10BT"
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"
SEPARATOR = "<|endoftext|>"
PIECE = 2**20  # characters of a piece: 100 ms of work for a worker
DOWNLOADS = "downloads"  # folder in --out that keeps files of the hub while they are needed

# --------------------------------------------------------------------------------------------------
# What is printed


def say(message, stream=None):
    """Print a line to stdout, or to another stream, above the progress bar if there is one.

    A closed pipe, a lost terminal or a full disk costs the line, but never the work.
    """
    stream = stream or sys.stdout
    try:
        tqdm.write(message, file=stream)
        stream.flush()
    except (OSError, ValueError, AttributeError):
        # Python flushes its streams when it exits, which would fail once more, with a message and
        # an exit code of its own. So the rest goes nowhere.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def one_line(text):
    """Return a text, or what an exception says, on one line that is not too long."""
    return shorten(str(text), 300, placeholder=" …")


# --------------------------------------------------------------------------------------------------
# Encodings

# GPT-2 splits text into contractions, words, numbers and runs of other signs, each with a space
# before it, and into white space; tokens never cross these borders. This pattern splits exactly as
# OpenAI's does, but tiktoken runs it almost twice as fast.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"


def get_encoding(name) -> tiktoken.Encoding:
    """Return a new encoding: "gpt2", or "bytes", where a token is a byte of UTF-8.

    Raises SystemExit for another name, and where OpenAI's files for "gpt2" can't be had.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
        pattern = r"[\s\S]{1,32}"
    elif name == "gpt2":
        pattern = GPT2_PATTERN
        try:
            # tiktoken downloads two files the first time, and keeps them in a cache.
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"error: the GPT-2 tokenizer can't be downloaded ({one_line(error)}); connect to "
                "the network once, or let TIKTOKEN_CACHE_DIR name a folder that tiktoken has filled"
            ) from error
    else:
        raise SystemExit(f"error: there is no encoding {name}; choose gpt2 or bytes")
    special = {SEPARATOR: len(ranks)}  # 256 or 50256
    return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


# --------------------------------------------------------------------------------------------------
# Reading files
#
# A reader takes an open file and yields (whether a document starts here, text) for each of its
# rows. The text of a row that has none is None.

# Python's own white space has characters like \x1c, which tiktoken takes for text.
WHITE_SPACE = " \t\n\r\v\f"
# No token of GPT-2 goes on from a character that is not white space into a space or a line break.
# So text is cut there, at the last such place within 100,000 characters. Text without one is cut
# all the same, since tiktoken slows down on long words and gives up on long white space.
STRETCH = re.compile(r".{1,100000}(?:\Z|(?<=\S)(?=[ \n]))|.{1,100000}", re.DOTALL)


def mark_broken(error):
    """An error handler for decoding: what is not UTF-8 becomes one lone surrogate.

    Valid text has no surrogates, so that `tokenize` can tell a broken byte from a U+FFFD that was
    there before. Lone surrogates that are escaped in JSON are counted in the same way.
    """
    return "\udcff", error.end


def read_text(path, file, column):
    """Text is one document, or several with <|endoftext|> between them. White space beside
    <|endoftext|> belongs to no document."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("mark")
    rest = ""
    starts = True
    to_strip = ""  # white space, once a separator stands before the text
    block = None
    while block != b"":
        block = file.read(PIECE)
        if b"\0" in block:
            raise SystemExit(
                f"error: {path} has NUL bytes, so it is not UTF-8; convert it (if it is UTF-16, "
                "with iconv -f UTF-16 -t UTF-8), or remove them (tr -d '\\0')"
            )
        rest += decoder.decode(block, final=not block)
        documents = rest.split(SEPARATOR)
        rest = documents.pop()
        for document in documents:
            text = document.rstrip(WHITE_SPACE).lstrip(to_strip)
            if text:
                yield starts, text
            starts = True
            to_strip = WHITE_SPACE
        # The last two stretches wait for the next block, which may go on with a token or complete
        # a separator.
        stretches = STRETCH.findall(rest.lstrip(to_strip))
        for text in stretches[:-2]:
            yield starts, text
            starts = False
            to_strip = ""
        rest = "".join(stretches[-2:])
    if rest:
        yield starts, rest


def read_json(path, file, column):
    """Each line of JSON is a document, or each object of one list, which is read whole."""
    if file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        rows = json.loads(file.read().decode("utf-8-sig", "mark"))
    else:
        rows = parse_lines(path, file)
    return read_rows(path, rows, column)


def parse_lines(path, file):
    """Yield the value of each line that is not empty."""
    for number, line in enumerate(file, 1):
        text = line.decode("utf-8-sig", "mark").strip()
        try:
            if text:
                yield json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SystemExit(
                f"error: {path}, line {number} is not JSON ({one_line(error)}); mend or remove it"
            ) from error


def read_csv(path, file, column):
    """Each row of a table is a document. The first line names the columns."""
    csv.field_size_limit(2**31 - 1)
    lines = io.TextIOWrapper(file, "utf-8-sig", "mark", newline="")
    return read_rows(path, csv.DictReader(lines), column)


def read_rows(path, rows, column):
    """Each row is a document, and a dict by column."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise SystemExit(
                f"error: {path}, row {number} is no JSON object with a column {column}; remove it"
            )
        if number == 1:
            check_column(path, column, row)
        text = row.get(column)
        yield True, text if isinstance(text, str) else None


def check_column(path, column, names):
    if column not in names:
        raise SystemExit(
            f"error: {path} has no column {column}, but {', '.join(map(str, names))}; "
            "choose one with --text_column"
        )


def read_parquet(path, file, column):
    """Each row is a document. Of the file's columns only this one is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Without pre_buffer and threads, Arrow reads no more than it is asked for.
    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=PIECE)
    check_column(path, column, table.schema_arrow.names)
    for batch in table.iter_batches(64, columns=[column], use_threads=False):
        texts = batch.column(0)
        if not re.search("string|null", str(texts.type)):
            raise SystemExit(
                f"error: {path}: column {column} is {texts.type}, no text; see --text_column"
            )
        for text in texts.cast(pa.large_binary()).to_pylist():
            yield True, text if text is None else text.decode("utf-8", "mark")


def open_zstd(file):
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"), PIECE)


READERS = {
    ".parquet": read_parquet,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": read_csv,
    ".txt": read_text,
    ".md": read_text,
}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstd}
KINDS = f"{', '.join(READERS)} (all but the first with {', '.join(COMPRESSED)}, too)"
# What libraries raise for a file that is cut short or damaged; Arrow's errors are ValueErrors.
DAMAGE = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error)


def find_reader(path):
    """Return (reader, function that unpacks or None) for a file's name; None for other kinds."""
    stem, suffix = os.path.splitext(path.lower())
    unpack = COMPRESSED.get(suffix)
    if unpack:
        suffix = os.path.splitext(stem)[1]
    if suffix not in READERS or os.path.basename(path) == "manifest.json":
        return None
    if unpack and suffix == ".parquet":
        return None
    return READERS[suffix], unpack


def read_file(path, column, first_row):
    """Yield (row number, share of the file that was read, (whether a document starts here, text)).

    Raises SystemExit where the file can't be opened or is damaged.
    """
    reader, unpack = find_reader(path)
    try:
        with open(path, "rb") as packed:
            size = os.path.getsize(path) or 1
            file = unpack(packed) if unpack else packed
            for number, row in islice(enumerate(reader(path, file, column)), first_row, None):
                yield number, packed.tell() / size, row
    except DAMAGE as error:
        raise SystemExit(
            f"error: {path} can't be read ({one_line(error)}); mend or replace it, and the same "
            "command goes on"
        ) from error


# --------------------------------------------------------------------------------------------------
# Local files


def find_files(patterns, out):
    """Return the files that --files means: files, folders with all that lies in them, and globs.

    A file that is found twice is read once, whatever links lead to it. `out` is no source. Raises
    SystemExit where a pattern finds nothing that can be read.
    """
    found = {}  # real path: path as it was found first
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        entered = {out.resolve()}
        paths = []
        for match in sorted(map(Path, matches)):
            paths += walk(match, entered)
        for path in keep_readable(paths, f"--files {pattern}"):
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def walk(path, entered):
    """Return a file, or the files in a folder, without hidden ones. No folder is entered twice, so
    that links which lead back up are harmless."""
    if not path.is_dir():
        return [str(path)]
    found = []
    if path.resolve() not in entered:
        entered.add(path.resolve())
        try:
            children = sorted(path.iterdir())
        except OSError as error:
            raise SystemExit(
                f"error: {path} can't be read ({error.strerror}); mend that"
            ) from error
        for child in children:
            if not child.name.startswith("."):
                found += walk(child, entered)
    return found


def keep_readable(paths, where):
    """Return the paths that there is a reader for, and say which others are left out."""
    readable = [path for path in paths if find_reader(path)]
    others = [path for path in paths if not find_reader(path)]
    names = one_line(", ".join(others))
    if not readable:
        raise SystemExit(f"error: {where}: {names or 'no such file'}; name files of {KINDS}")
    if others:
        say(f"{where}: {len(others):,} of {len(paths):,} files can't be read, left out: {names}")
    return readable


def take_fingerprint(paths, number):
    """Return a hash by which a later run knows what was read until the given file was reached: all
    names, size and both ends of the files before, and the beginning of the file itself. What comes
    behind may still be mended, or grow."""
    known = hashlib.sha256(repr([os.path.basename(path) for path in paths]).encode())
    for i, path in enumerate(paths[: number + 1]):
        with open(path, "rb") as file:
            known.update(file.read(2**16))
            if i < number:
                size = os.path.getsize(path)
                file.seek(max(0, size - 2**16))
                known.update(b"%d" % size + file.read())
    return known.hexdigest()


# --------------------------------------------------------------------------------------------------
# The hub


def in_background(function):
    """Call a function in a daemon thread, and return the future of its result.

    A main thread that waits for a future can be interrupted; inside a library written in another
    language it can't. And a daemon thread does not keep a program alive that wants to end.
    """
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:  # It is raised where the result is asked for.
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def download(what: str, fetch, seconds=None):
    """Return the result of fetch(), which downloads `what` and may take so many seconds.

    A failure is tried again until three minutes have passed since the first one. Raises SystemExit
    after that, and at once where trying again is of no use.
    """
    deadline = None
    pause = 1
    while True:
        try:
            return in_background(fetch).result(seconds)
        except (TypeError, AttributeError, NameError):
            raise  # This is no failure of the network, but a mistake in a program.
        except Exception as error:  # Lost connections come in a dozen types, Xet's as RuntimeError.
            reason, is_final = explain(error)
            deadline = deadline or time.monotonic() + 180
            if is_final or time.monotonic() + pause > deadline:
                raise SystemExit(
                    f"error: {what} can't be downloaded ({reason}); check the name and the "
                    "network, or log in with `hf auth login`, and run the same command again"
                ) from error
            say(f"{what}: {reason}; trying again in {pause} s")
        time.sleep(pause)
        pause = min(2 * pause, 60)


# Names that can't be ones or are not there, and what the clients refuse to do
FINAL = "HFValidationError OfflineModeIsEnabled GatedRepoError DataFilesNotFoundError ValueError"


def explain(error):
    """Return why a download failed, and whether it would fail again.

    The clients wrap one exception in another, and only the innermost says what happened.
    """
    while True:
        kind = type(error).__name__
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP status {status}" if status else f"{kind}: {one_line(error)}"
        if status in (401, 404) or kind in FINAL:
            return reason, True
        cause = error.__cause__ or error.__context__
        if cause is None:
            return reason, False
        error = cause


def find_hub_files(dataset, name):
    """Return the newest commit of a data set and the files of its train split in it. For a data set
    that is a local folder, these are None and paths."""
    import datasets
    from huggingface_hub import HfApi

    commit = None
    if not os.path.isdir(dataset):
        commit = download(dataset, partial(HfApi().dataset_info, dataset, timeout=10)).sha
    where = f"--dataset {dataset}, --name {name}"
    load = partial(datasets.load_dataset_builder, dataset, name, revision=commit)
    config = download(where, load, seconds=120).config
    urls = (config.data_files or {}).get("train", [])
    names = [re.sub("hf://datasets/.+?@[^/]+/", "", str(url)) for url in urls]
    return commit, keep_readable(names, f"{where}, split train")


def fetch_files(dataset, commit, names, folder):
    """Yield the path of each file, downloaded whole. While one is read, the next is on its way."""
    from huggingface_hub import hf_hub_download

    def start(name):
        options = dict(repo_type="dataset", revision=commit, local_dir=folder)
        fetch = partial(hf_hub_download, dataset, name, **options)
        return in_background(partial(download, name, fetch))

    # huggingface_hub does not go on with what an earlier run has left.
    for path in folder.rglob("*.incomplete"):
        path.unlink()
    coming = start(names[0])
    for name in names[1:]:
        path = coming.result()
        coming = start(name)
        yield path
    yield coming.result()


# --------------------------------------------------------------------------------------------------
# Threads that tokenise

WORKER = threading.local()


def start_worker(encoding_name):
    # Threads that share an encoding wait for each other, since the regex inside has one owner.
    WORKER.encoding = get_encoding(encoding_name)


def tokenize(rows):
    """Return the tokens of rows, (T,) in uint16, and how many rows had no text and how many
    characters were broken. `<|endoftext|>` in a text is text like any other."""
    encode = partial(WORKER.encoding.encode_to_numpy, disallowed_special=())
    start = np.array([WORKER.encoding.eot_token], np.uint32)
    arrays = [start[:0]]
    skipped = 0
    broken = 0
    for starts, text in rows:
        if text is None:
            skipped += 1
            continue
        if starts:
            arrays.append(start)
        for stretch in STRETCH.findall(text):
            try:
                arrays.append(encode(stretch))
            except UnicodeEncodeError:
                mended, count = re.subn("[\ud800-\udfff]", "\ufffd", stretch)
                arrays.append(encode(mended))
                broken += count
    return np.concatenate(arrays).astype(np.uint16), skipped, broken


def read_pieces(paths, sizes, column, place):
    """Yield (place, share of the source that was read, rows) of pieces, from a place on. A piece
    is of one file, and its rows are about a megabyte."""
    first_row = place["row"]
    total = sum(sizes) or 1
    done = sum(sizes[: place["file"]])
    for number, path in enumerate(paths, place["file"]):
        rows = []
        length = 0
        for row, share, (starts, text) in read_file(path, column, first_row):
            if not rows:
                place = dict(file=number, row=row)
            rows.append((starts, text))
            length += len(text or "") + 1
            if length > PIECE:
                yield place, (done + share * sizes[number]) / total, rows
                rows = []
                length = 0
        done += sizes[number]
        if rows:
            yield place, done / total, rows
        first_row = 0


def tokenize_pieces(pool, pieces, in_flight):
    """Yield (place, share, result of `tokenize`) of pieces in order, with so many under way."""
    waiting = deque()
    for place, share, rows in pieces:
        waiting.append((place, share, pool.submit(tokenize, rows)))
        if len(waiting) > in_flight:
            place, share, future = waiting.popleft()
            yield place, share, future.result()
    for place, share, future in waiting:
        yield place, share, future.result()


# --------------------------------------------------------------------------------------------------
# Shards and their manifest


def write_file(path: Path, content: bytes):
    """Write a file that appears whole or not at all. Raises SystemExit where that fails."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise SystemExit(
            f"error: {path} can't be written ({error.strerror}); put that right, and run the same "
            "command again"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_shard(path, tokens):
    """Write tokens, (T,) in uint16, as np.save does. Returns the shard's entry in the manifest."""
    content = io.BytesIO()
    np.save(content, tokens)
    write_file(path, content.getbuffer())
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    return dict(name=path.name, tokens=len(tokens), sha256=digest)


def write_manifest(out, manifest):
    write_file(out / "manifest.json", json.dumps(manifest, indent=1).encode())


def shard_name(prefix, number):
    split = "train" if number else "val"
    return f"{prefix}_{split}_{number:06d}.npy"


def count_tokens(shards):
    return sum(shard["tokens"] for shard in shards)


def read_manifest(out, new=None):
    """Return the manifest of an earlier run of the same command, or a new one.

    Raises SystemExit where the manifest is damaged, and where the folder holds shards that it does
    not know, or those of another source, encoding or size.
    """
    path = out / "manifest.json"
    help = f"choose another --out, or remove {out}"
    manifest = None
    names = []
    if path.exists():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            names = [shard["name"] for shard in manifest["shards"]]
            # A run that was killed may have had no time to note its last shard.
            names.append(shard_name(manifest.get("prefix"), len(names)))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SystemExit(f"error: {path} is no manifest ({error!r}); {help}") from error
    for file in sorted(out.glob("*_*.*")):
        if file.suffix in (".npy", ".bin") and file.name not in names:
            raise SystemExit(f"error: {out} holds other shards ({file.name}); {help}")
    if not names[1:]:
        return new
    for key in ("source", "encoding", "shard_size") if new else ():
        if manifest.get(key) != new.get(key):
            raise SystemExit(
                f"error: {out} holds shards of another run: {key} is {new.get(key)}, and was "
                f"{manifest.get(key)}; {help}"
            )
    return manifest


def header_size(name):
    """Return the bytes before the tokens in a shard's file."""
    return 1024 if name.endswith(".bin") else 128


def check_sizes(out, shards):
    """Raise SystemExit unless each shard is there, and as long as the manifest says.

    The last one may be longer, if a run was killed before it noted that the shard has grown.
    """
    for shard in shards:
        path = out / shard["name"]
        size = path.stat().st_size if path.exists() else 0
        if size < header_size(path.name) + 2 * shard["tokens"]:
            raise SystemExit(
                f"error: {path} is gone, or not as long as manifest.json says; put it back, or "
                f"remove {out} and start again"
            )


@contextlib.contextmanager
def locked(out):
    """Keep other runs from writing into a folder. Raises SystemExit where another is at work."""
    lock = filelock.FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=1)
    except filelock.Timeout as error:
        raise SystemExit(
            f"error: another fineweb.py is at work in {out}; wait for it, or choose another --out"
        ) from error
    except (OSError, NotImplementedError):
        pass  # Nobody can write there, or the file system has no locks.
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(out) == [".lock"]:  # Nothing came of it.
                (out / ".lock").unlink()
                out.rmdir()


def fill_shards(results, manifest, start, limit, bar):
    """Yield (place in the source where a shard ends, its tokens) until there are `limit` tokens.

    The first shard begins with `start`. The last one is short, and empty if there is nothing left.
    """
    count = count_tokens(manifest["shards"]) + len(start)
    arrays = [start]
    room = manifest["shard_size"] - len(start)  # tokens that the shard still lacks
    to_skip = manifest["place"]["tokens"]
    for place, share, (tokens, skipped, broken) in results:
        used = min(to_skip, len(tokens))
        to_skip -= used
        while used < len(tokens):
            taken = tokens[used:][: min(room, limit - count)]
            arrays.append(taken)
            used += len(taken)
            count += len(taken)
            room -= len(taken)
            if room == 0 or count == limit:
                yield {**place, "tokens": used}, np.concatenate(arrays)
                arrays = [start[:0]]
                room = manifest["shard_size"]
            if count == limit:
                return
        # These are counted with the last token of a piece, since a later run that begins within
        # the piece tokenises all of it again.
        manifest["skipped"] += skipped
        manifest["broken"] += broken
        bar.total = min(round(count / share), limit)
        bar.update(count - bar.n)
    yield dict(file=len(manifest["files"]), row=0, tokens=0), np.concatenate(arrays)


# --------------------------------------------------------------------------------------------------
# What the command line asks for


def prepare(args):
    """Tokenise a source into shards in --out, from where an earlier run stopped."""
    out = Path(args.out)
    limit = args.max_tokens or 2**63
    source = f"{args.dataset}, {args.name}"
    prefix = "edufineweb" if args.dataset == DATASET else "text"
    if args.files:
        paths = find_files(args.files, out)
        names = ", ".join(os.path.basename(path) for path in paths)
        source = f"{len(paths)} files: {one_line(names)}"
        prefix = "text"
    new = dict(
        encoding=args.encoding,
        vocab_size=None,
        source=f"{source}, column {args.text_column}",
        commit=None,
        files=[],
        prefix=prefix,
        shard_size=args.shard_size,
        finished=False,
        place=dict(file=0, row=0, tokens=0),
        skipped=0,
        broken=0,
        shards=[],
    )
    manifest = read_manifest(out, new)
    shards = manifest["shards"]
    check_sizes(out, shards)
    if args.files:
        manifest["files"] = paths
    elif not manifest["commit"]:
        # Both are noted, so that a later run reads the same files.
        manifest["commit"], manifest["files"] = find_hub_files(args.dataset, args.name)
    files = manifest["files"]
    place = manifest["place"]
    is_local = manifest["commit"] is None
    if is_local and shards and manifest["fingerprint"] != take_fingerprint(files, place["file"]):
        raise SystemExit(
            f"error: {out} holds shards of other text: the files, or what was read of them, have "
            f"changed; choose another --out, or remove {out}"
        )
    first_count = count_tokens(shards)
    if place["file"] == len(files) or first_count >= limit:
        finish(out, manifest, "finished before")
        return

    encoding = get_encoding(args.encoding)
    manifest.update(finished=False, vocab_size=encoding.n_vocab)
    start = np.zeros(0, np.uint16)
    if shards:
        say(f"{out}: going on after {first_count:,} tokens")
        write_manifest(out, manifest)
        if shards[-1]["tokens"] < args.shard_size:
            # --max_tokens had cut this shard short.
            last = shards.pop()
            start = np.load(out / last["name"])[: last["tokens"]]
    downloads = out / DOWNLOADS
    if is_local:
        paths = files[place["file"] :]
        sizes = [os.path.getsize(path) for path in files]
    else:
        paths = fetch_files(args.dataset, manifest["commit"], files[place["file"] :], downloads)
        sizes = [1] * len(files)  # unknown, but about equal in most data sets

    codecs.register_error("mark", mark_broken)
    start_time = time.perf_counter()
    pool = ThreadPoolExecutor(args.num_workers, initializer=start_worker, initargs=[args.encoding])
    bar = tqdm(initial=first_count, unit=" tokens", unit_scale=True, disable=None)
    try:
        pieces = read_pieces(paths, sizes, args.text_column, place)
        # So many are under way that the workers are busy while a shard is written.
        results = tokenize_pieces(pool, pieces, 8 * args.num_workers)
        for place, tokens in fill_shards(results, manifest, start, limit, bar):
            if len(tokens):
                if not shards:
                    write_manifest(out, manifest)  # No shard is ever without a manifest.
                    manifest["val_files"] = place["file"] + 1
                path = out / shard_name(manifest["prefix"], len(shards))
                shards.append(write_shard(path, tokens))
                shards[-1]["documents"] = int(np.count_nonzero(tokens == encoding.eot_token))
                say(f"{path}: {len(tokens):,} tokens")
            elif not shards:
                skipped = f"{manifest['skipped']:,} rows without text were skipped"
                raise SystemExit(
                    f"error: there is no text in {source} ({skipped}); name other files"
                )
            manifest["place"] = place
            if is_local:
                manifest["fingerprint"] = take_fingerprint(files, place["file"])
            write_manifest(out, manifest)
            if not is_local:
                for name in files[: place["file"]]:
                    (downloads / name).unlink(missing_ok=True)
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    seconds = time.perf_counter() - start_time
    speed = (count_tokens(shards) - first_count) / seconds
    finish(out, manifest, f"{seconds:.1f} s, {speed:,.0f} tokens a second")


def finish(out, manifest, ending):
    """Note that the data are finished, remove what is left of the source, and print what there is
    and what one should know about it."""
    if not manifest["finished"]:
        write_manifest(out, {**manifest, "finished": True})
    shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
    shards = manifest["shards"]
    files = manifest["files"]
    tokens = count_tokens(shards)
    if manifest["skipped"]:
        say(f"warning: {manifest['skipped']:,} rows without text were skipped", sys.stderr)
    if manifest["broken"]:
        say(f"warning: {manifest['broken']:,} broken characters are now U+FFFD", sys.stderr)
    if len(shards) == 1:
        say(
            f"warning: all tokens are in the val shard, none are left to train on; remove {out}, "
            f"and run the same command with --shard_size {max(2, tokens // 10)}",
            sys.stderr,
        )
    else:
        count = manifest["val_files"]
        say(
            f"{out}: the val shard is the beginning of the text, from {count:,} of {len(files):,} "
            f"files: {one_line(', '.join(files[:count]))}; to choose, change the order of --files, "
            "or --shard_size"
        )
    documents = sum(shard["documents"] for shard in shards)
    say(f"{out}: {len(shards)} shards, {documents:,} documents, {tokens:,} tokens, {ending}")


def verify(args):
    """Compare every shard with the manifest. Raises SystemExit where one is not as it says."""
    out = Path(args.out)
    manifest = read_manifest(out)
    if manifest is None:
        raise SystemExit(f"error: {out} has no manifest.json to check shards against; see --out")
    shards = manifest["shards"]
    check_sizes(out, shards)
    for shard in shards:
        path = out / shard["name"]
        if hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest() != shard["sha256"]:
            raise SystemExit(
                f"error: {path} is not what manifest.json says; remove {out} and make it again"
            )
    say(f"{out}: {len(shards)} shards, {count_tokens(shards):,} tokens, as manifest.json says")


def fetch_published(args):
    """Download shards that someone else has tokenised, as far as they are missing here."""
    from huggingface_hub import HfApi, hf_hub_download

    out = Path(args.out)
    repository = args.pretokenized
    new = dict(encoding="gpt2", vocab_size=50257, source=repository, finished=False, shards=[])
    manifest = read_manifest(out, new)
    if "published" not in manifest:
        options = dict(files_metadata=True, timeout=10)
        info = download(repository, partial(HfApi().dataset_info, repository, **options))
        manifest.update(commit=info.sha, published=choose_shards(info.siblings))
    # As many as make up --max_tokens are taken, a val shard and a train shard at least.
    wanted = []
    for shard in manifest["published"]:
        if len(wanted) < 2 or count_tokens(wanted) < (args.max_tokens or 2**63):
            wanted.append(shard)
    if len(wanted) > len(manifest["shards"]):
        manifest.update(shards=wanted, finished=False)
        write_manifest(out, manifest)
    shards = manifest["shards"]
    for shard in shards:
        if not (out / shard["name"]).exists():
            options = dict(repo_type="dataset", revision=manifest["commit"], local_dir=out)
            fetch = partial(hf_hub_download, repository, shard["name"], **options)
            download(shard["name"], fetch)
    check_sizes(out, shards)
    if not manifest["finished"]:
        write_manifest(out, {**manifest, "finished": True})
    shutil.rmtree(out / ".cache", ignore_errors=True)  # what huggingface_hub notes of its own
    say(f"{out}: {len(shards)} shards, {count_tokens(shards):,} tokens")


def choose_shards(files):
    """Return the entries in the manifest of the shards among a repository's files, val first."""
    found = {"val": [], "train": []}
    for file in sorted(files, key=lambda file: file.rfilename):
        name = file.rfilename
        match = re.fullmatch(r"(.*_)?(train|val)(_\d+)?\.(npy|bin)", name)
        if match:
            tokens = (file.size - header_size(name)) // 2
            found[match[2]].append(dict(name=name, tokens=tokens, sha256=file.lfs.sha256))
    if not found["val"] or not found["train"]:
        raise SystemExit(
            "error: --pretokenized: the repository holds no val and train shards; name one with "
            "files like NAME_train_000001.bin"
        )
    return found["val"] + found["train"]


def write_demo_data(folder):
    """Write the source of Python's standard library as shards of bytes, for a first try.

    Tests and generated tables are left out, and one file in forty is for validation. The folder
    appears when it is whole. Raises SystemExit where that fails.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    left_out = "site-packages dist-packages test tests idle_test encodings pydoc_data"
    files = []
    for path in stdlib.rglob("*.py"):
        if not set(left_out.split()) & set(path.relative_to(stdlib).parts):
            files.append(path)
    if len(files) < 100:
        raise SystemExit(f"error: {stdlib} has no source of Python's library; use --data")
    # The split depends on the order of the files, and each file system has another one.
    files.sort(key=lambda path: (path.parent.parts, path.name))
    np.random.RandomState(0).shuffle(files)
    held_out = len(files) // 40
    shards = []
    # Each rank may write the data, and the first one that is ready gives its folder the name.
    unfinished = folder.with_suffix(f".{os.environ.get('RANK', os.getpid())}.tmp")
    try:
        for number, part in enumerate([files[:held_out], files[held_out:]]):
            texts = [np.frombuffer(path.read_bytes(), np.uint8) for path in part]
            tokens = [np.insert(text.astype(np.uint16), 0, 256) for text in texts]
            path = unfinished / shard_name("python", number)
            shards.append(write_shard(path, np.concatenate(tokens)))
        source = f"standard library of Python {sys.version.split()[0]}"
        manifest = dict(encoding="bytes", vocab_size=257, source=source, finished=True)
        write_manifest(unfinished, {**manifest, "shards": shards})
        with contextlib.suppress(OSError):
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv):
    """Return the command line, checked."""
    parser = argparse.ArgumentParser(
        description="Turn text into shards of tokens.", allow_abbrev=False
    )
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--dataset", help=f"text data set on the Hugging Face hub ({DATASET})")
    source.add_argument(
        "--files", nargs="+", help=f"local text instead: files, folders and globs of {KINDS}"
    )
    source.add_argument(
        "--pretokenized",
        nargs="?",
        const=PRETOKENIZED,
        metavar="REPOSITORY",
        help=f"download ready GPT-2 shards from the hub instead ({PRETOKENIZED})",
    )
    add = parser.add_argument
    add("--name", help=f"configuration of --dataset ({CONFIG} with the default one)")
    add("--text_column", default="text", help="column that holds the text of a row (%(default)s)")
    add("--encoding", default="gpt2", choices=["gpt2", "bytes"], help="of text (%(default)s)")
    add("--out", default="edu_fineweb10B", metavar="DIR", help="folder of shards (%(default)s)")
    add("--shard_size", type=int, default=100_000_000, help="tokens a shard (%(default)s)")
    add("--max_tokens", type=int, help="stop after so many; a later run with more goes on (all)")
    add("--num_workers", type=int, default=cores, help="threads that tokenise (one a core)")
    add("--verify", action="store_true", help="compare the shards in --out with their manifest")
    args = parser.parse_args(argv)
    for name, lowest in ("shard_size", 2), ("max_tokens", 1), ("num_workers", 1):
        value = getattr(args, name)
        if value is not None and value < lowest:
            parser.error(f"--{name} {value} is less than {lowest}")
    if args.pretokenized and args.encoding != "gpt2":
        parser.error("--pretokenized shards are GPT-2 tokens; leave out --encoding")
    if args.dataset is None:
        args.dataset = DATASET
        args.name = args.name or CONFIG
    return args


@contextlib.contextmanager
def stopped_by_signals():
    """Have SIGTERM and SIGHUP raise SystemExit, so that what is under way is cleaned up."""

    def stop(signum, frame):
        sys.exit(128 + signum)

    before = {}
    for name in "SIGTERM", "SIGHUP":
        signum = getattr(signal, name, None)  # Windows has no SIGHUP.
        if signum and signal.getsignal(signum) != signal.SIG_IGN:  # as nohup wants it
            before[signum] = signal.signal(signum, stop)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def main(argv=None):
    """Run the command line. Returns the exit code."""
    try:
        args = parse_args(argv)
        if args.verify:
            verify(args)
            return 0
        with stopped_by_signals(), locked(Path(args.out)):
            if args.pretokenized:
                fetch_published(args)
            else:
                prepare(args)
        return 0
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        say(stop.code, sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command goes on from the last finished shard", sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    if sys.stdout:
        # A file's name may hold characters that the terminal does not know.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
