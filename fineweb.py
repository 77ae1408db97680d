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
The same command continues from there, and makes the shards that an undisturbed run would make.
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
DOWNLOADS = "downloads"  # the folder in --out where files of the hub are kept while they are read

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
    except (OSError, ValueError):
        # Python flushes its streams when it exits, which would fail once more, with a message and
        # an exit code of its own. So what is left goes nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --------------------------------------------------------------------------------------------------
# Encodings

# GPT-2 splits text into contractions, words, numbers and runs of other signs, each with a space
# before it, and into white space; tokens never cross these borders. This pattern splits exactly as
# OpenAI's does, but tiktoken runs it almost twice as fast.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"


def get_encoding(name):
    """Return a new tiktoken.Encoding: "gpt2", or "bytes", where a token is a byte of UTF-8.

    Raises SystemExit for any other name, or if OpenAI's files for "gpt2" can't be downloaded.
    """
    if name == "bytes":
        ranks = {bytes([i]): i for i in range(256)}
    elif name == "gpt2":
        try:
            # tiktoken downloads two files the first time, and keeps them in a cache.
            ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        except (OSError, ValueError) as error:
            raise SystemExit(
                f"error: the GPT-2 tokenizer can't be downloaded ({shorten(str(error), 300)}); "
                f"make room in {os.environ.get('TIKTOKEN_CACHE_DIR', 'its cache')}, connect once, "
                "or let TIKTOKEN_CACHE_DIR name a folder that tiktoken has filled"
            ) from error
    else:
        raise SystemExit(f"error: there is no encoding {name}; choose gpt2 or bytes")
    return tiktoken.Encoding(
        name,
        pat_str=GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={SEPARATOR: len(ranks)},  # 50256 or 256
    )


# --------------------------------------------------------------------------------------------------
# Reading files
#
# A reader takes an open file (a text file, except for Parquet) and the name of a column. For each
# row it yields whether a document starts there, and the row's text, or None if it has no text. It
# raises ValueError for a file that it can't make sense of.

# Python also counts characters like \x1c as white space, but to tiktoken they are text.
WHITE_SPACE = " \t\n\r\v\f"
# No token of GPT-2 extends from a character that is not white space into a space or a line break.
# So text is cut there, at the last such place within 100,000 characters. Text without one is cut
# all the same, since tiktoken slows down on long words and gives up on long white space.
STRETCH = re.compile(r".{1,100000}(?:\Z|(?<=\S)(?=[ \n]))|.{1,100000}", re.DOTALL)


def mark_broken(error):
    """An error handler for decoding: what is not UTF-8 becomes one lone surrogate.

    Valid text has no surrogates, so that `tokenize` can tell a broken character from a U+FFFD that
    was there before. Lone surrogates that are escaped in JSON are counted in the same way.
    """
    return "\udcff", error.end


def read_text(file, column):
    """Text is one document, or several with <|endoftext|> between them. White space beside
    <|endoftext|> belongs to no document."""
    rest = ""
    starts = True
    to_strip = ""  # becomes WHITE_SPACE after the first separator
    for block in iter(partial(file.read, PIECE), ""):
        if "\0" in block:
            raise ValueError(
                "it has NUL bytes, so it is not UTF-8; convert UTF-16 with `iconv -f UTF-16 -t "
                "UTF-8`, or remove the bytes with `tr -d '\\0'`"
            )
        documents = (rest + block).split(SEPARATOR)
        rest = documents.pop()
        for document in documents:
            text = document.rstrip(WHITE_SPACE).lstrip(to_strip)
            if text:
                yield starts, text
            starts = True
            to_strip = WHITE_SPACE
        # The last two stretches wait for the next block, which may continue a token or complete
        # a separator.
        stretches = STRETCH.findall(rest.lstrip(to_strip))
        for text in stretches[:-2]:
            yield starts, text
            starts = False
            to_strip = ""
        rest = "".join(stretches[-2:])
    if rest:
        yield starts, rest


def read_json(file, column):
    """Each line of JSON is a document, or each object of one list, which is read whole."""
    if re.match(rb"[\s\xef\xbb\xbf]*\[", file.buffer.peek(64)):  # perhaps after a byte order mark
        return read_rows(json.load(file), column)
    return read_rows(parse_lines(file), column)


def parse_lines(file):
    """Yield the value of each line of JSON that is not empty."""
    for number, line in enumerate(map(str.rstrip, file), 1):
        try:
            if line:
                yield json.loads(line)
        except (ValueError, RecursionError) as error:
            # To the parser, every line is the first one.
            problem = str(error).replace("line 1 ", "")
            raise ValueError(f"line {number} is not JSON: {problem}") from error


def read_csv(file, column):
    """Each row of a table is a document. The first line names the columns."""
    table = csv.DictReader(file, strict=True)
    csv.field_size_limit(2**31 - 1)  # 131,072 characters otherwise
    try:
        yield from read_rows(table, column)
    except csv.Error as error:
        raise ValueError(
            f"from line {table.line_num + 1} on, it is not CSV ({error}); a quotation mark may not "
            "be closed there, or not be doubled in quoted text"
        ) from error


def read_rows(rows, column):
    """Each row, a dict by column, is a document."""
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object with a column {column}")
        if number == 1:
            check_column(column, row)
        text = row.get(column)
        yield True, text if isinstance(text, str) else None


def check_column(column, names):
    if column not in names:
        raise ValueError(
            f"it has no column {column}; choose --text_column from {', '.join(map(str, names))}"
        )


def read_parquet(file, column):
    """Each row is a document. Of the file's columns only this one is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Without pre_buffer and threads, Arrow reads no more than it is asked for.
    table = pq.ParquetFile(file, pre_buffer=False, buffer_size=PIECE)
    check_column(column, table.schema_arrow.names)
    for batch in table.iter_batches(64, columns=[column], use_threads=False):
        texts = batch.column(0)
        # list<string> is not text. A dictionary is, if all it does is number the strings.
        if not re.match("(dictionary<values=)?(large_)?string", str(texts.type)):
            raise ValueError(
                f"column {column} is {texts.type}, not text; choose another --text_column"
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
KINDS = f"{', '.join(READERS)}, also compressed as {', '.join(COMPRESSED)}"
# What libraries raise for a file that is cut short or damaged; Arrow's errors are ValueErrors.
DAMAGE = (OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError)


def find_reader(path):
    """Return (reader, function that unpacks or None) for a file's name; None for other kinds."""
    stem, suffix = os.path.splitext(path.lower())
    unpack = COMPRESSED.get(suffix)
    if unpack:
        suffix = os.path.splitext(stem)[1]
    if suffix not in READERS or os.path.basename(path) == "manifest.json":
        return None
    return READERS[suffix], unpack


def read_file(path, column, first_row):
    """Cut a file into pieces of about a megabyte. Yields, for each of them, the number of its first
    row, the share of the file that has been read, and its rows.

    Raises SystemExit if the file can't be opened or is damaged.
    """
    reader, unpack = find_reader(path)
    try:
        with open(path, "rb") as packed:
            # Git LFS leaves a few lines of text in place of a file that it has not fetched.
            if packed.peek(64).startswith(b"version https://git-lfs.github.com/spec/"):
                raise ValueError("it is a Git LFS pointer; `git lfs pull` fetches the file")
            file = unpack(packed) if unpack else packed
            # The position in the packed file shows how much of it has been read.
            if reader is not read_parquet:
                file = io.TextIOWrapper(file, "utf-8-sig", "mark", newline="")
            rows = []
            length = 0
            for starts, text in islice(reader(file, column), first_row, None):
                rows.append((starts, text))
                length += len(text or "") + 1
                if length > PIECE:
                    yield first_row, packed.tell() / os.path.getsize(path), rows
                    first_row += len(rows)
                    rows = []
                    length = 0
            yield first_row, 1, rows
    except DAMAGE as error:
        raise SystemExit(
            f"error: {path} can't be read: {shorten(str(error), 300)}; put that right, and run the "
            "same command again"
        ) from error


# --------------------------------------------------------------------------------------------------
# Local files


def find_files(patterns, out):
    """Return the files that --files means, as {real path: path}. A pattern is a file, a folder,
    which stands for everything in it, or a glob.

    A file that is found twice is read once, whatever links lead to it. `out` is not a source.
    Raises SystemExit if a pattern finds nothing that can be read.
    """
    found = {}  # real path: path as it was found first
    for pattern in patterns:
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        entered = {out.resolve()}
        paths = []
        for match in sorted(matches):
            paths += walk(Path(match), entered)
        for path in keep_readable(paths, f"--files {pattern}"):
            if not os.path.isfile(path):
                raise SystemExit(f"error: {path} is a broken link, or no file; name other files")
            found.setdefault(os.path.realpath(path), path)
    return found


def walk(path, entered):
    """Yield a file, or the files in a folder, without hidden ones. No folder is entered twice, so
    that links which lead back up are harmless."""
    if not path.is_dir():
        yield str(path)
    elif path.resolve() not in entered:
        entered.add(path.resolve())
        try:
            children = sorted(path.iterdir())
        except OSError as error:
            raise SystemExit(
                f"error: {path} can't be read ({error.strerror}); fix its permissions"
            ) from error
        for child in children:
            if not child.name.startswith("."):
                yield from walk(child, entered)


def keep_readable(paths, where):
    """Return the paths that there is a reader for, and say which others are left out."""
    readable = [path for path in paths if find_reader(path)]
    others = [path for path in paths if not find_reader(path)]
    names = shorten(", ".join(others), 300)
    if not readable:
        raise SystemExit(f"error: {where}: {names or 'no such file'}; name files of {KINDS}")
    if others:
        say(f"{where}: {len(others):,} of {len(paths):,} files left out, of another kind: {names}")
    return readable


def take_fingerprint(paths, number):
    """Return a hash by which a later run recognises what was read up to the file of this number. It
    covers the names of all files, the size and both ends of the files before that one, and the
    beginning of the file itself. What comes later may still be repaired, or grow."""
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


# Trying again does not help if the disk is full or can't be written to (Python's errors then end
# with the name of a file, and Xet's are nothing but text), if a name is wrong, if a data set needs
# a permission, has no data or is a program, or if HF_HUB_OFFLINE is set.
LASTING_FAILURE = (
    r"No space left|[Nn]ot enough disk space|quota exceeded|\[Errno \d+\] [^:]+: ['\"]"
    r"|os error (13|30|36)\b|\b40[14] (Client Error|Not Found|Unauthorized)|ValueError"
    "|ValidationError|UnicodeDecodeError|GatedRepo|EmptyDatasetError|DataFilesNotFound"
    "|Dataset scripts|OfflineModeIsEnabled"
)


def in_background(function):
    """Call a function in a daemon thread, and return the future of its result.

    Ctrl-C interrupts a main thread that waits for a future, but not one that is inside a library
    written in another language. And a daemon thread does not keep a program from ending.
    """
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:  # It is raised where the result is asked for.
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def download(what, fetch, seconds=None):
    """Return the result of fetch(), which downloads `what` and may take this many seconds.

    After a failure, it tries again until three minutes have passed since the first one. Raises
    SystemExit then, or at once if trying again does not help.
    """
    deadline = None
    while True:
        try:
            return in_background(fetch).result(seconds)
        except Exception as error:  # Lost connections come in a dozen types, Xet's as RuntimeError.
            # The clients raise their own exception from the one that says what happened.
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {shorten(str(cause), 300)}"
            failure = f"{type(error)} {type(cause)} {cause}"
            deadline = deadline or time.monotonic() + 180
            if re.search(LASTING_FAILURE, failure) or time.monotonic() > deadline:
                raise SystemExit(
                    f"error: {what} can't be downloaded ({reason}); check the name and the network"
                    ", make room on a full disk, or log in with `hf auth login`, and run it again"
                ) from error
        say(f"{what}: {reason}; trying again in 10 s")
        time.sleep(10)


def describe_repository(name):
    """Return what the hub knows about a data set: its newest commit, and its files."""
    from huggingface_hub import HfApi

    return download(name, partial(HfApi().dataset_info, name, timeout=10))


def find_hub_files(dataset, name, out):
    """Return the newest commit of a data set, and the files of its train split. For a data set that
    is a local folder, these are None and paths."""
    import datasets

    commit = None
    if not os.path.isdir(dataset):
        commit = describe_repository(dataset).sha
    where = f"--dataset {dataset}, --name {name}, split train"
    load = partial(datasets.load_dataset_builder, dataset, name, revision=commit)
    files = download(where, load, 120).config.data_files
    names = [re.sub("hf://datasets/.+?@[^/]+/", "", str(url)) for url in files.get("train", [])]
    if not commit:
        # `datasets` skips folders that are links or can't be read, and counts a file and a link
        # to it as two.
        found = find_files([dataset], out)
        names = [found.pop(path) for path in map(os.path.realpath, names) if path in found]
        if found:
            say(f"{where}: {len(found)} left out: {shorten(', '.join(found.values()), 300)}")
    return commit, keep_readable(names, where)


def download_file(dataset, commit, name, folder):
    """Download a file of the hub into a folder, unless it is already there. Returns its path."""
    # Most files come through Xet, which would otherwise try again for minutes without a word. It
    # reads this variable when it is imported.
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_DURATION", "30s")
    from huggingface_hub import hf_hub_download

    fetch = partial(hf_hub_download, dataset, name, repo_type="dataset", revision=commit)
    return download(folder / name, partial(fetch, local_dir=folder))


def fetch_files(dataset, commit, names, folder):
    """Yield the path of each file, downloaded whole. While one is read, the next is on its way."""
    # huggingface_hub does not resume what an earlier run has left unfinished.
    for path in folder.rglob("*.incomplete"):
        path.unlink()
    tasks = (partial(download_file, dataset, commit, name, folder) for name in names)
    return results_of(map(in_background, tasks), 1)


def results_of(futures, count):
    """Yield the results of futures in their order, while the next `count` of them are under way."""
    waiting = list(islice(futures, count))  # Taking a future from the iterator starts its work.
    while waiting:
        result = waiting.pop(0).result()
        waiting += islice(futures, 1)
        yield result


# --------------------------------------------------------------------------------------------------
# Threads that tokenise

WORKER = threading.local()


def start_worker(encoding_name):
    # Each thread has an encoding of its own. Threads that share one wait for each other, because
    # only one of them at a time can use the regex inside.
    WORKER.encoding = get_encoding(encoding_name)


def tokenize(place, share, rows):
    """Turn the rows of a piece into tokens. `<|endoftext|>` in a text is text like any other.

    Returns place, share, the tokens, (T,) in uint16, how many rows had no text, and how many
    characters were broken.
    """
    encode = partial(WORKER.encoding.encode_to_numpy, disallowed_special=())
    start = np.array([WORKER.encoding.eot_token], np.uint32)
    arrays = [start[:0]]  # so that there is something to join for rows without text
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
                # It has surrogates, which UTF-8 can't encode: see mark_broken.
                repaired, count = re.subn("[\ud800-\udfff]", "\ufffd", stretch)
                arrays.append(encode(repaired))
                broken += count
    return place, share, np.concatenate(arrays).astype(np.uint16), skipped, broken


def read_pieces(paths, sizes, column, place):
    """Yield (place, share of the source that has been read, rows) for each piece, starting at a
    place. No piece spans two files. `sizes` has all files of the source."""
    ends = np.cumsum(sizes)
    first_row = place["row"]
    # `paths` begins with the file of that place, whose earlier rows are read again and dropped.
    for number, path in enumerate(paths, place["file"]):
        for row, share, rows in read_file(path, column, first_row):
            done = ends[number] - (1 - share) * sizes[number]
            yield dict(file=number, row=row), done / ends[-1], rows
        first_row = 0


def fill_shards(results, manifest, start, limit, bar):
    """Yield (place in the source where a shard ends, its tokens) until there are `limit` tokens.

    The first shard begins with the tokens `start`. The last one is short, and empty if no tokens
    are left for it.
    """
    count = count_tokens(manifest["shards"])  # tokens in finished shards
    arrays = [start]  # tokens of the shard that is being filled
    filled = len(start)
    used = manifest["place"]["tokens"]  # tokens of the piece that are in shards
    for place, share, tokens, skipped, broken in results:
        while used < len(tokens):
            # A piece may end one shard, or several small ones, and begin the next.
            size = min(manifest["shard_size"], limit - count)
            taken = tokens[used:][: size - filled]
            arrays.append(taken)
            used += len(taken)
            filled += len(taken)
            bar.update(len(taken))
            if filled == size:
                yield {**place, "tokens": used}, np.concatenate(arrays)
                arrays = [start[:0]]
                filled = 0
                count += size
            if count == limit:
                return
        used -= len(tokens)
        # These are counted with the last token of a piece, since a later run that begins within
        # the piece tokenises all of it again.
        manifest["skipped"] += skipped
        manifest["broken"] += broken
        bar.total = min(round(bar.n / share), limit)
    yield dict(file=len(manifest["files"]), row=0, tokens=0), np.concatenate(arrays)


# --------------------------------------------------------------------------------------------------
# Shards and their manifest


def write_file(path, content):
    """Write a file that appears whole or not at all. Raises SystemExit if that fails."""
    # A rename replaces a file at once, but only what was flushed survives a loss of power.
    unfinished = path.with_name(path.name + ".tmp")
    try:
        os.makedirs(path.parent, exist_ok=True)
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
        with contextlib.suppress(OSError):
            unfinished.unlink()


def write_shard(path, tokens):
    """Write tokens, (T,) in uint16, as np.save does. Returns the shard's entry in the manifest."""
    content = io.BytesIO()
    np.save(content, tokens)
    write_file(path, content.getbuffer())
    return describe_shard(path)


def describe_shard(path):
    """Return a shard's entry in the manifest, computed from its file."""
    content = np.memmap(path, np.uint8, "r")
    header = 1024 if path.suffix == ".bin" else 128
    return dict(
        name=path.name,
        tokens=(len(content) - header) // 2,
        sha256=hashlib.sha256(content).hexdigest(),
    )


def write_manifest(out, manifest):
    write_file(out / "manifest.json", json.dumps(manifest, indent=1).encode())


def shard_name(number):
    """The first shard is for validation, and all others are for training."""
    return f"text_{'train' if number else 'val'}_{number:06d}.npy"


def count_tokens(shards):
    return sum(shard["tokens"] for shard in shards)


def read_manifest(out, new):
    """Return the manifest that an earlier run of the same command has left, or else `new`. If `new`
    is None, there must be a manifest, and any command may have made it.

    Raises SystemExit if the manifest is damaged, if shards are missing, or if the folder holds
    shards that are not in the manifest, or have another source, encoding or size.
    """
    advice = f"choose another --out, or remove {out}"
    manifest = new
    names = []
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
        names = [shard["name"] for shard in manifest["shards"]]
        # A run that was killed may have had no time to note its last shard.
        names += manifest.get("published", [shard_name(len(names))])
    except FileNotFoundError:
        if not new:
            raise SystemExit(
                f"error: {out} has no manifest.json to check shards against; see --out"
            ) from None
    except NotADirectoryError:
        raise SystemExit(f"error: --out {out} is a file, or lies in one; name a folder") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(
            f"error: {out}/manifest.json is no manifest ({error!r}); {advice}"
        ) from error
    # The trainer would read every shard in the folder, whoever made it.
    for file in out.glob("*"):
        if file.suffix in (".npy", ".bin") and file.name not in names:
            raise SystemExit(f"error: {out} holds other shards ({file.name}); {advice}")
    if not manifest["shards"]:
        return new or manifest
    for key in "source", "encoding", "shard_size":
        if new and manifest.get(key) != new.get(key):
            raise SystemExit(
                f"error: {out} holds shards of another run: the {key} is {new.get(key)}, and was "
                f"{manifest.get(key)}; {advice}"
            )
    for shard in manifest["shards"]:
        path = out / shard["name"]
        if new and "published" in manifest and not path.exists():
            continue  # It is downloaded again.
        # It is longer if a run was killed before it noted that the last shard has grown.
        if not path.exists() or path.stat().st_size < 2 * shard["tokens"]:
            raise SystemExit(f"error: {path} is gone or too short; put it back, or remove {out}")
    return manifest


@contextlib.contextmanager
def locked(out):
    """Keep other runs from writing into a folder. Raises SystemExit if one already does."""
    lock = filelock.FileLock(out / ".lock")
    try:
        os.makedirs(out, exist_ok=True)
        lock.acquire(timeout=1)
    except filelock.Timeout:
        raise SystemExit(
            f"error: another fineweb.py is writing to {out}; wait for it, or choose another --out"
        ) from None
    except (OSError, NotImplementedError):
        pass  # The folder can't be written to, or the file system has no locks.
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(out) == [".lock"]:  # Nothing came of it.
                shutil.rmtree(out)


# --------------------------------------------------------------------------------------------------
# What the command line asks for


def prepare(args):
    """Tokenise a source into shards in --out, starting where an earlier run stopped."""
    out = args.out
    paths = list(find_files(args.files, out).values())
    new = dict(
        encoding=args.encoding,
        source=f"{args.dataset or 'local files'}, {args.name or 'all'}, column {args.text_column}",
        commit=None,
        shard_size=args.shard_size,
        place=dict(file=0, row=0, tokens=0),
        skipped=0,
        broken=0,
        shards=[],
    )
    manifest = read_manifest(out, new)
    shards = manifest["shards"]
    if paths:
        manifest["files"] = paths
    elif not manifest["commit"]:
        # Both are noted, so that a later run reads the same files, even if newer ones are there.
        manifest["commit"], manifest["files"] = find_hub_files(args.dataset, args.name, out)
    commit = manifest["commit"]
    files = manifest["files"]
    first_file = manifest["place"]["file"]
    # The text that was made into shards must be unchanged, or the next shards would not continue
    # it. The files of a commit on the hub can't change.
    known = manifest.get("fingerprint")
    if known and known != take_fingerprint(files, first_file):
        raise SystemExit(
            f"error: {out} holds shards of a different text: the files, or what was read of them, "
            f"have changed; choose another --out, or remove {out}"
        )
    first_count = count_tokens(shards)
    if first_file == len(files) or first_count >= args.max_tokens:
        say(f"{out} is already finished")
        finish(out, manifest)
        return

    # From here on, the folder is being filled.
    encoding = get_encoding(args.encoding)
    manifest.update(finished=False, vocab_size=encoding.n_vocab)
    start = np.array([], np.uint16)
    if shards:
        say(f"{out}: resuming after {first_count:,} tokens")
        write_manifest(out, manifest)
        if shards[-1]["tokens"] < args.shard_size:
            # --max_tokens cut this shard short. It is filled up and written again.
            last = shards.pop()
            start = np.load(out / last["name"])[: last["tokens"]]
    paths = files[first_file:]
    if commit:
        paths = fetch_files(args.dataset, commit, paths, out / DOWNLOADS)
    # Files of the hub are assumed to be of equal size, as they are in most data sets.
    sizes = [1 if commit else os.path.getsize(path) + 1 for path in files]

    codecs.register_error("mark", mark_broken)
    pool = ThreadPoolExecutor(args.num_workers, initializer=start_worker, initargs=[args.encoding])
    bar = tqdm(initial=first_count, unit=" tokens", unit_scale=True, disable=None)
    try:
        pieces = read_pieces(paths, sizes, args.text_column, manifest["place"])
        tasks = (pool.submit(tokenize, *piece) for piece in pieces)
        # Enough pieces are under way to keep the workers busy while a shard is written.
        results = results_of(tasks, 8 * args.num_workers)
        for place, tokens in fill_shards(results, manifest, start, args.max_tokens, bar):
            # A shard is written before its entry in the manifest, so a run that is killed between
            # the two makes the same shard again.
            if len(tokens):
                if not shards:
                    manifest["val_files"] = place["file"] + 1
                    write_manifest(out, manifest)  # No shard is ever without a manifest.
                shards.append(write_shard(out / shard_name(len(shards)), tokens))
                shards[-1]["documents"] = int(np.count_nonzero(tokens == encoding.eot_token))
            if not shards:
                raise SystemExit(
                    f"error: there is no text in the source ({manifest['skipped']:,} rows without "
                    "text were skipped); name another"
                )
            manifest["place"] = place
            if not commit:
                manifest["fingerprint"] = take_fingerprint(files, place["file"])
            write_manifest(out, manifest)
            if commit:
                for name in files[: place["file"]]:
                    (out / DOWNLOADS / name).unlink(missing_ok=True)
            if len(tokens):
                say(f"{out / shards[-1]['name']}: {len(tokens):,} tokens")
    finally:
        # After an error or a signal, the pieces that are still waiting are not tokenised.
        bar.close()
        pool.shutdown(cancel_futures=True)
    finish(out, manifest)


def finish(out, manifest):
    """Note that the data are finished, remove what is left of the source, and print a summary."""
    if not manifest["finished"]:
        manifest["finished"] = True
        write_manifest(out, manifest)
    shutil.rmtree(out / DOWNLOADS, ignore_errors=True)
    shards = manifest["shards"]
    if len(shards) == 1:
        say(
            "warning: all tokens are in the val shard, and none are left to train on; remove "
            f"{out}, and run the same command with "
            f"--shard_size {max(2, count_tokens(shards) // 10)}",
            sys.stderr,
        )
    else:
        names = manifest["files"][: manifest["val_files"]]
        say(
            f"{out}: the val shard is the beginning of the text, from {len(names):,} of "
            f"{len(manifest['files']):,} files: {shorten(', '.join(names), 300)}; to choose, "
            "change the order of --files, or --shard_size"
        )
    say(
        f"{out}: {len(shards)} shards, {sum(shard['documents'] for shard in shards):,} documents, "
        f"{count_tokens(shards):,} tokens; {manifest['skipped']:,} rows without text were skipped, "
        f"{manifest['broken']:,} broken characters were replaced by U+FFFD"
    )


def verify(out):
    """Compare every shard with the manifest. Raises SystemExit if one does not match."""
    shards = read_manifest(out, None)["shards"]
    for shard in shards:
        path = out / shard["name"]
        if describe_shard(path)["sha256"] != shard["sha256"]:
            raise SystemExit(f"error: {path} is not what manifest.json says; remove {out}")
    say(f"{out}: {len(shards)} shards, {count_tokens(shards):,} tokens, as manifest.json says")


def fetch_published(repository, out, limit):
    """Download shards that someone else has tokenised, until there are `limit` tokens."""
    manifest = read_manifest(
        out, dict(encoding="gpt2", vocab_size=50257, source=repository, shards=[])
    )
    shards = manifest["shards"]
    if not shards:
        info = describe_repository(repository)
        names = [
            file.rfilename
            for file in info.siblings
            if re.fullmatch(r"(.*_)?(val|train)(_\d+)?\.(npy|bin)", file.rfilename)
        ]
        names.sort(key=lambda name: ("val" not in name, name))  # val first
        if len(names) < 2:
            raise SystemExit(
                f"error: {repository} has no val and train shards (NAME_train_000001.bin); name "
                "another repository"
            )
        manifest.update(commit=info.sha, published=names)
    manifest["finished"] = False
    for number, name in enumerate(manifest["published"]):
        # However low the limit is, there is a shard to train on.
        if number > 1 and count_tokens(shards[:number]) >= limit:
            break
        if number == len(shards) or not (out / name).exists():
            # This comes first, so that the manifest knows a file before it is there.
            write_manifest(out, manifest)
            download_file(repository, manifest["commit"], name, out)
            shards[number : number + 1] = [describe_shard(out / name)]
    manifest["finished"] = True
    write_manifest(out, manifest)
    shutil.rmtree(out / ".cache", ignore_errors=True)  # huggingface_hub's own notes
    say(f"{out}: {len(shards)} shards, {count_tokens(shards):,} tokens")


def write_demo_data(folder):
    """Write the source code of Python's standard library as shards of bytes, for a first try.

    Tests and generated tables are left out, and one file in forty is for validation. The folder
    appears only when it is complete. Raises SystemExit if that fails.
    """
    stdlib = Path(sysconfig.get_path("stdlib"))
    left_out = r"(^|/)(site-packages|dist-packages|test|tests|idle_test|encodings|pydoc_data)/"
    files = [
        path
        for path in stdlib.rglob("*.py")
        if not re.search(left_out, path.relative_to(stdlib).as_posix())
    ]
    held_out = len(files) // 40
    if held_out == 0:
        raise SystemExit(f"error: {stdlib} has no source of Python's library; use --data")
    # The split depends on the order of the files, which differs between file systems.
    files.sort(key=lambda path: (path.parent.parts, path.name))
    np.random.RandomState(0).shuffle(files)
    start = np.array([256], np.uint16)
    shards = []
    # Every rank may write the data. The first to finish gives its folder the final name.
    unfinished = folder.with_suffix(f".{os.environ.get('RANK', os.getpid())}.tmp")
    try:
        for number, part in enumerate([files[:held_out], files[held_out:]]):
            documents = []
            for path in part:
                documents += [start, np.frombuffer(path.read_bytes(), np.uint8)]
            shards.append(write_shard(unfinished / shard_name(number), np.concatenate(documents)))
        manifest = dict(
            encoding="bytes",
            vocab_size=257,
            source=f"standard library of Python {sys.version.split()[0]}",
            finished=True,
            shards=shards,
        )
        write_manifest(unfinished, manifest)
        with contextlib.suppress(OSError):
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv):
    """Parse the command line, and check it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    add = parser.add_mutually_exclusive_group().add_argument
    add("--dataset", help=f"text data set on the Hugging Face hub ({DATASET})")
    add("--files", nargs="+", default=[], help=f"files, folders and globs of {KINDS}; needs --out")
    add(
        "--pretokenized",
        nargs="?",
        const=PRETOKENIZED,
        help=f"repository with ready GPT-2 shards to download instead ({PRETOKENIZED})",
    )
    add = parser.add_argument
    add("--name", help=f"configuration of --dataset ({CONFIG} with the default one)")
    add("--text_column", default="text", help="column that holds the text of a row (%(default)s)")
    add("--encoding", default="gpt2", help="gpt2, or bytes of UTF-8 (%(default)s)")
    add(
        "--out", type=Path, help="folder of shards (edu_fineweb10B; NAME_tokens for another source)"
    )
    add("--shard_size", type=int, default=100_000_000, help="tokens per shard (%(default)s)")
    add(
        "--max_tokens",
        type=int,
        default=2**63,
        help="stop after this many; a later run may raise it (all)",
    )
    add("--num_workers", type=int, default=cores, help="threads that tokenise (one per core)")
    add("--verify", action="store_true", help="compare the shards in --out with their manifest")
    args = parser.parse_args(argv)
    if min(args.shard_size - 1, args.max_tokens, args.num_workers) < 1:
        parser.error("--shard_size is at least 2, --max_tokens and --num_workers at least 1")
    if args.pretokenized and args.encoding != "gpt2":
        parser.error("--pretokenized shards are GPT-2 tokens; leave out --encoding")
    if args.files and not args.out:
        parser.error("--files needs a folder for its shards; name one with --out")
    if not args.dataset and not args.files:
        args.dataset = DATASET
        args.name = args.name or CONFIG
    if not args.out:
        source = args.pretokenized or args.dataset
        args.out = Path(f"{Path(source).name}_tokens")
        if source in (DATASET, PRETOKENIZED) and args.name == CONFIG:
            args.out = Path("edu_fineweb10B")
    return args


def main(argv=None):
    """Run the command line. Returns the exit code."""
    try:
        args = parse_args(argv)
        if args.verify:
            verify(args.out)
        else:
            with locked(args.out):
                if args.pretokenized:
                    fetch_published(args.pretokenized, args.out, args.max_tokens)
                else:
                    prepare(args)
        return 0
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        say(stop.code, sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("stopped; the same command continues from the last finished shard", sys.stderr)
        return 130


def end_by_signal(signum, frame):
    """End the program by an exception, so that it cleans up. A second signal of the same kind does
    not disturb that."""
    signal.signal(signum, signal.SIG_IGN)
    sys.exit(128 + signum)


if __name__ == "__main__":
    # A stream that was closed with `>&-` is None.
    nowhere = open(os.devnull, "w")
    sys.stdout = sys.stdout or nowhere
    sys.stderr = sys.stderr or nowhere
    # A file's name may have characters that the terminal can't show.
    sys.stdout.reconfigure(errors="backslashreplace")
    for signum in {signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:  # not on Windows
        if signal.getsignal(signum) != signal.SIG_IGN:  # nohup ignores SIGHUP.
            signal.signal(signum, end_by_signal)
    sys.exit(main())
