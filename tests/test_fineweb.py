"""Text to token shards: the bytes of a plain loop over tiktoken, whatever the source."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from conftest import ROOT, TIKTOKEN_CACHE, TINY, python
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fineweb
from train_gpt2 import find_shards

GPT2 = fineweb.get_encoding("gpt2")
BYTES = fineweb.get_encoding("bytes")
INTERRUPTS = int(os.environ.get("INTERRUPTS", 50))
ODD = [
    "", "plain text", "a<|endoftext|>b", "<|endoftext|>", "👩‍👩‍👧‍👦 é",
    "  two\n\n\n  spaces\t \r\n",
    "汉字。没有空格",
    "it's 123abc 'll", "\0",
]  # fmt: skip
LETTERS = [*"ab1 \n😀é'。<|endoftext|>", "<|endoftext|>"]
FOX = "the quick brown fox's 12th jump 😀 "
DOCUMENTS = [*ODD, *(f"document {i}: " + FOX * (i % 7) + " " * (i % 5) for i in range(60))]


def shards_of(documents, shard_size, encoding=GPT2, limit=None):
    """What build-nanogpt's script would write: one thread, token by token."""
    tokens = []
    for document in documents:
        tokens += [encoding.eot_token, *encoding.encode_ordinary(document)]
    tokens = np.array(tokens[:limit], dtype=np.uint16)
    return [tokens[i : i + shard_size] for i in range(0, len(tokens), shard_size)]


def documents_in(text):
    """The documents of a text file, as <|endoftext|> separates them."""
    return [document for document in re.split(r"(?a:\s*)<\|endoftext\|>(?a:\s*)", text) if document]


def read(out):
    """The shards of a folder in order, the first val; only manifest.json and a lock lie beside."""
    paths = sorted((path for path in Path(out).glob("*.npy")), key=lambda path: path.stem[-6:])
    assert {path.name for path in Path(out).iterdir()} - {".lock"} == {
        "manifest.json",
        *(path.name for path in paths),
    }
    assert [re.sub(r".*_(val|train)_", r"\1", path.stem) for path in paths] == [
        f"{'train' if i else 'val'}{i:06d}" for i in range(len(paths))
    ]
    return [np.load(path) for path in paths]


def assert_shards(out, expected):
    found = read(out)
    assert [len(shard) for shard in found] == [len(shard) for shard in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.uint16
        np.testing.assert_array_equal(a, b)


def as_nobody(*args, cwd, imports="mmap"):
    """Run the program as a user without rights. What it imports is read before."""
    script = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb, locale, {imports}\n"
        "os.setegid(65534); os.seteuid(65534)\n"
        "sys.exit(fineweb.main(sys.argv[1:]))"
    )
    for folder in (cwd, *cwd.parents):
        if "pytest-" in str(folder):  # pytest's folders are open to their owner only
            folder.chmod(0o755)
    return python("-c", script, *args, cwd=cwd, check=False)


def run(*args, code=0):
    assert fineweb.main([*map(str, args)]) == code


def write_jsonl(path, documents, **more):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps({"text": d, "id": i, **more}) + "\n" for i, d in enumerate(documents)
        )
    return path


def write_parquet(path, documents, row_group_size=7, **more):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array(documents, more.pop("type", pa.string()))
    columns = {"text": texts, "id": [str(i) for i in range(len(documents))]}
    columns |= {"score": [0.5] * len(documents), "int_score": [3] * len(documents)}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, **more)
    return path


def write_csv(path, documents):
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wt", encoding="utf-8-sig", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["id", "text"], *enumerate(documents)])
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --------------------------------------------------------------------------------------------------
# Encodings and the demo data


def test_byte_encoding_is_utf8():
    encoding = BYTES
    text = "def naïve():\n\treturn '😀'\r\n\0" + "x" * 1000
    assert encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.encode("a<|endoftext|>b", allowed_special="all") == [97, 256, 98]
    assert encoding.encode_ordinary("<|endoftext|>") == list(b"<|endoftext|>")
    assert (encoding.decode(list(text.encode())), encoding.n_vocab, encoding.eot_token) == (
        text,
        257,
        256,
    )


def test_gpt2_encoding_is_openai_s():
    encoding = fineweb.get_encoding("gpt2")
    assert encoding.encode("Hello, I'm a language model,") == [
        15496,
        11,
        314,
        1101,
        257,
        3303,
        2746,
        11,
    ]
    assert (encoding.n_vocab, encoding.eot_token) == (50257, 50256)
    text = "It's 1,000 — naïve 😀\n\n\n  don't   stop  "
    assert encoding.decode(encoding.encode(text)) == text


PIECES = [*" \n\t\r\u00a0\u3000\x1c\x85'aé汉1²½!。😀\u0301", "'s", "'LL", "  ", " a", "12", "'re"]
# Of OpenAI's encoder.py
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OPENAIS = tiktoken.Encoding(
    "published",
    pat_str=PATTERN,
    mergeable_ranks=GPT2._mergeable_ranks,
    special_tokens=GPT2._special_tokens,
)


@settings(deadline=None, max_examples=1000)
@given(st.lists(st.sampled_from(PIECES)).map("".join) | st.text())
def test_our_form_of_the_pattern_splits_as_openai_s(text):
    tokens = GPT2.encode_ordinary(text)
    assert tokens == OPENAIS.encode_ordinary(text)
    assert tokens == tiktoken.get_encoding("gpt2").encode_ordinary(text)


def test_gpt2_encoding_says_what_to_do_where_its_files_are_missing(tmp_path, monkeypatch):
    def no_network(url):
        raise ConnectionError("no route to host")

    def downloaded(url):
        return Path(TIKTOKEN_CACHE.name, hashlib.sha1(url.encode()).hexdigest()).read_bytes()

    monkeypatch.setattr(tiktoken.load, "read_file", no_network)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(SystemExit, match=r"no route to host.*let TIKTOKEN_CACHE_DIR name a folder"):
        fineweb.get_encoding("gpt2")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tiktoken.load, "read_file", downloaded)
    with pytest.raises(SystemExit, match=r"Not a directory.*make room in .*/file/cache, connect"):
        fineweb.get_encoding("gpt2")
    with pytest.raises(SystemExit, match="error: there is no encoding p50k; choose gpt2 or bytes"):
        fineweb.get_encoding("p50k")


def test_demo_data_are_the_standard_library_in_bytes(tmp_path):
    fineweb.write_demo_data(tmp_path / "python_stdlib")
    manifest = json.loads((tmp_path / "python_stdlib/manifest.json").read_text())
    assert (manifest["encoding"], manifest["vocab_size"], manifest["finished"]) == (
        "bytes",
        257,
        True,
    )
    texts = []
    for shard in manifest["shards"]:
        path = tmp_path / "python_stdlib" / shard["name"]
        tokens = np.load(path)
        assert (len(tokens), hashlib.sha256(path.read_bytes()).hexdigest()) == (
            shard["tokens"],
            shard["sha256"],
        )
        assert tokens.dtype == np.uint16 and tokens[0] == 256
        documents = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
        texts += [document[1:].astype(np.uint8).tobytes() for document in documents]
    assert len(set(texts)) > 100 and sum(map(len, texts)) > 5e6
    assert Path(json.decoder.__file__).read_bytes() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["python_stdlib"]


def test_demo_data_are_split_by_the_names_of_files_alone(tmp_path):
    """The README's loss depends on the split. Held against another way to put the files in order:
    folder by folder, the files of each before its folders."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    files = []
    for parent, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = sorted(set(folders) - left_out - {"pydoc_data"})
        files += [Path(parent, name) for name in sorted(names) if name.endswith(".py")]
    np.random.RandomState(0).shuffle(files)
    fineweb.write_demo_data(tmp_path / "data")
    tokens = np.load(tmp_path / "data" / "text_val_000000.npy")
    text = b"".join(b"\0" + path.read_bytes() for path in files[: len(files) // 40])
    tokens[tokens == 256] = 0
    assert tokens.astype(np.uint8).tobytes() == text


def test_ranks_that_write_the_demo_data_at_once_leave_one_folder(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb, pathlib\n"
    script += "fineweb.write_demo_data(pathlib.Path('data'))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "RANK": r}
        )
        for r in "01"
    ]
    assert [rank.wait(timeout=60) for rank in ranks] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    run("--verify", f"--out={tmp_path / 'data'}")


# --------------------------------------------------------------------------------------------------
# The same bytes


def test_the_shards_of_every_kind_of_file_are_those_of_one_thread(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    thirds = [DOCUMENTS[:20], DOCUMENTS[20:40], DOCUMENTS[40:60]]
    write_parquet(tmp_path / "a.parquet", thirds[0])
    write_jsonl(tmp_path / "b.jsonl", thirds[1])
    write_jsonl(tmp_path / "c.JSONL.gz", thirds[2])
    texts = DOCUMENTS[60:]
    (tmp_path / "d").mkdir()
    for i, document in enumerate(texts):
        (tmp_path / "d" / f"{i:02d}.txt").write_bytes(document.encode())
    (tmp_path / "d" / "notes.pdf").write_text("not this one")
    run("--files", "a.parquet", "[bc].*", "d", "--out=out", "--shard_size=500", "--num_workers=2")
    assert_shards("out", shards_of(DOCUMENTS, 500))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["encoding"], manifest["vocab_size"]) == ("gpt2", 50257)
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert len(np.load(path)) == shard["tokens"]
    # The very bytes of np.save
    np.save(tmp_path / "saved.npy", np.load(path))
    assert (tmp_path / "saved.npy").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "suffix", ["jsonl.zst", "jsonl.bz2", "jsonl.xz", "json", "json.gz", "csv", "csv.zst", "md"]
)
def test_every_kind_of_file_is_read_and_gone_on_with(suffix, here, monkeypatch):
    import pyarrow as pa

    documents = [d.replace("\r", "") for d in DOCUMENTS]
    if sys.version_info < (3, 11) and suffix.startswith("csv"):
        documents.remove("\0")  # Python's csv could neither write nor read it
    path = here / f"a.{suffix}"
    if suffix == "md":
        content = "\n".join(documents).replace("\0", "")
        content, documents = content.encode(), documents_in(content)
    elif suffix.startswith("csv"):
        content = write_csv(here / "b.csv", documents).read_bytes()
    elif suffix.startswith("json."):
        content = json.dumps([{"text": d, "id": i} for i, d in enumerate(documents)]).encode()
    elif suffix == "json":
        content = json.dumps([{"text": d} for d in documents], indent=1).encode()
    else:
        content = write_jsonl(here / "b.jsonl", documents).read_bytes()
    pack = dict(
        zst=lambda b: pa.compress(b, "zstd", asbytes=True),
        bz2=bz2.compress,
        xz=lzma.compress,
        gz=gzip.compress,
    )
    path.write_bytes(pack.get(suffix.split(".")[-1], bytes)(content))
    monkeypatch.setattr(fineweb, "PIECE", 300)
    for limit in (900, 2100, 5000):  # each goes on where the last one stopped
        run(
            "--files",
            path,
            "--out=out",
            "--shard_size=500",
            f"--max_tokens={limit}",
            "--num_workers=1",
        )
        assert_shards("out", shards_of(documents, 500, limit=limit))


def test_what_is_left_out_is_named_and_counted(here, capsys):
    (here / "corp" / "sub").mkdir(parents=True)
    for name in ["a.txt", "b.md", "sub/c.jsonl", "d.csv", "sub/e.txt.gz"]:
        content = dict(c='{"text": "c"}\n', d="text\nd\n").get(name.split("/")[-1][0], name)
        opener = gzip.open if name.endswith("gz") else open
        with opener(here / "corp" / name, "wt") as file:
            file.write(content)
    for name in "x.pdf", "y.docx", "sub/manifest.json", ".hidden.txt":
        (here / "corp" / name).write_bytes(b"\0")
    run("--files", "corp/*", "--out=out", "--shard_size=1000")
    out = capsys.readouterr().out
    assert (
        "--files corp/*: 3 of 8 files left out, of another kind: "
        "corp/sub/manifest.json, corp/x.pdf, corp/y.docx\n" in out
    )
    assert " 5 documents" in out
    error = error_of(capsys, "--files", "corp/x.pdf", "--out=out2")
    assert "--files corp/x.pdf: corp/x.pdf; name files of .parquet, .jsonl" in error


def test_a_data_set_in_a_folder_gives_the_shards_of_its_files(here):
    (here / "set").mkdir()
    for i in range(3):
        write_parquet(here / "set" / f"{i:03d}.parquet", DOCUMENTS[i * 23 : i * 23 + 23])
    run("--dataset=set", "--out=out", "--shard_size=500", "--max_tokens=1100")
    run("--dataset=set", "--out=out", "--shard_size=500")
    assert_shards("out", shards_of(DOCUMENTS[:69], 500))


def test_a_manifest_says_whether_the_data_are_finished(here, monkeypatch):
    def finished():
        return json.loads((here / "out" / "manifest.json").read_text())["finished"]

    write_jsonl(here / "a.jsonl", DOCUMENTS)
    command = ["--files", "a.jsonl", "--out=out", "--shard_size=500"]
    run(*command, "--max_tokens=1200")
    assert finished() is True
    write_shard, states = fineweb.write_shard, []

    def note(path, tokens):
        states.append(finished())
        return write_shard(path, tokens)

    monkeypatch.setattr(fineweb, "write_shard", note)
    run(*command)
    assert states and not any(states) and finished() is True


def test_the_bytes_encoding_needs_no_file(here):
    documents = ["héllo", "", "<|endoftext|>"]
    write_jsonl(here / "a.jsonl", documents)
    run("--files", "a.jsonl", "--out=out", "--encoding=bytes", "--shard_size=10")
    assert_shards("out", shards_of(documents, 10, BYTES))


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "csv", "json"])
def test_interrupted_anywhere_it_ends_with_the_same_shards(kind, here, monkeypatch):
    """Random documents, shard sizes, piece sizes and interruptions: Ctrl-C between two pieces."""
    counter = iter(range(10**9))
    tokenize = fineweb.tokenize

    @settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.lists(st.sampled_from(LETTERS), max_size=80), min_size=1, max_size=12),
        st.integers(2, 60),
        st.lists(st.tuples(st.integers(0, 12), st.integers(1, 60)), max_size=4),
        st.integers(1, 9),
    )  # fmt: skip
    def check(documents, shard_size, interruptions, group):
        documents = ["".join(letters) for letters in documents]
        folder = here / str(next(counter))
        folder.mkdir()
        if kind == "txt":
            for i, document in enumerate(documents):
                (folder / f"{i:02d}.txt").write_bytes(document.encode())
            documents = [part for document in documents for part in documents_in(document)]
            assume(documents)
        elif kind == "jsonl":
            write_jsonl(folder / "a.jsonl.gz", documents[:5])
            write_jsonl(folder / "b.jsonl", documents[5:])
        elif kind == "csv":
            write_csv(folder / "a.csv", documents[:5])
            write_csv(folder / "b.csv.xz", documents[5:])
        elif kind == "json":
            (folder / "a.json").write_text(json.dumps([{"text": d} for d in documents], indent=1))
        else:
            paths = [folder / f"{i:02d}.parquet" for i in range(0, len(documents), 5)]
            for i, path in enumerate(paths):
                write_parquet(path, documents[5 * i :][:5], group)
        command = [
            "--files",
            folder,
            f"--out={folder}.out",
            f"--shard_size={shard_size}",
            "--num_workers=1",
        ]
        for after, piece in interruptions:
            left = [after]

            def tokenize_or_stop(*args, left=left):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return tokenize(*args)

            with monkeypatch.context() as patch:
                patch.setattr(fineweb, "PIECE", piece)
                patch.setattr(fineweb, "tokenize", tokenize_or_stop)
                assert fineweb.main([*map(str, command)]) in (0, 130)
        run(*command)
        assert_shards(f"{folder}.out", shards_of(documents, shard_size))
        run("--verify", f"--out={folder}.out")

    check()


KILLED = """
import os, signal, sys
sys.dont_write_bytecode = True
sys.path.insert(0, {root!r})
import fineweb

def die(where, owner, name, number):
    calls, original = [], getattr(owner, name)
    def call(*args, **options):
        calls.append(1)
        if where == "before" and len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if where == "after" and len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(owner, name, call)

if __name__ == "__main__":
    where, owner, name, number, *argv = sys.argv[1:]
    fineweb.PIECE = 700
    die(where, dict(os=os, fineweb=fineweb)[owner], name, int(number))
    code = fineweb.main(argv)
    assert "torch" not in sys.modules
    sys.exit(code)
"""
POINTS = [  # in the order in which a shard passes them
    ("before", "fineweb", "tokenize", 2),
    ("after", "fineweb", "tokenize", 9),
    ("before", "fineweb", "write_shard", 1),
    ("before", "os", "replace", 1),
    ("after", "os", "replace", 1),
    ("after", "os", "replace", 2),
    ("before", "os", "replace", 3),
    ("after", "fineweb", "write_shard", 1),
    ("after", "fineweb", "write_manifest", 3),
]


def test_killed_anywhere_it_ends_with_the_same_shards(tmp_path):
    """SIGKILL at each point of a shard's life, in run after run of the same command."""
    documents = [f"{i} " + "lorem ipsum " * (i % 40) for i in range(120)]
    expected = shards_of(documents, 3000, BYTES)
    write_jsonl(tmp_path / "a.jsonl", documents)
    (tmp_path / "run.py").write_text(KILLED.format(root=str(ROOT)))
    command = [
        "--files",
        "a.jsonl",
        "--out=out",
        "--encoding=bytes",
        "--shard_size=3000",
        "--num_workers=2",
    ]
    for point in POINTS:
        done = python("run.py", *point, *command, cwd=tmp_path, check=False, timeout=60)
        assert done.returncode == -9, (point, done.stdout, done.stderr)
        for path in tmp_path.glob("out/*.npy"):  # what has a shard's name is whole
            np.testing.assert_array_equal(np.load(path), expected[int(path.stem[-6:])])
    python("run.py", "after", "os", "replace", 10**6, *command, cwd=tmp_path)
    assert_shards(tmp_path / "out", expected)
    python("run.py", "after", "os", "replace", 10**6, "--verify", "--out=out", cwd=tmp_path)


def test_ctrl_c_and_sigterm_stop_at_once_and_leave_nothing_unfinished(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 2_000_000)
    command = [
        sys.executable,
        ROOT / "fineweb.py",
        "--files",
        "a.txt",
        "--encoding=bytes",
        "--shard_size=200000",
    ]
    for i, (signum, code) in enumerate([(signal.SIGINT, 130), (signal.SIGTERM, 143)] * 2):
        out = tmp_path / f"out{i}"
        process = subprocess.Popen(
            [*command, f"--out={out}"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()  # the first shard
        time.sleep(0.05 * i)
        process.send_signal(signum)
        _, err = process.communicate(timeout=120)
        assert process.returncode == code and "Traceback" not in err, err
        assert 0 < len(read(out)) < 110  # whole shards and a manifest, nothing else


def test_interrupted_at_any_instruction_nothing_unfinished_is_left(here):
    """Ctrl-C at random instructions of what writes shards: whole shards stay."""
    documents = [f"{i} " + "words " * (i % 9) for i in range(40)]
    write_jsonl(here / "a.jsonl", documents)
    expected = shards_of(documents, 300, BYTES)
    writing = {
        "prepare",
        "finish",
        "fill_shards",
        "results_of",
        "write_manifest",
        "write_file",
        "write_shard",
        "describe_shard",
    }
    left, dice = 0, random.Random(0)

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename != fineweb.__file__ or frame.f_code.co_name not in writing:
            return None
        frame.f_trace_opcodes = True
        left -= 1
        if left == 0:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    def run_until(instruction, out):
        nonlocal left
        left = instruction
        sys.settrace(trace)
        try:
            code = fineweb.main(
                ["--files", "a.jsonl", f"--out={out}", "--encoding=bytes", "--shard_size=300"]
            )
        finally:
            sys.settrace(None)
        return code

    assert run_until(10**9, "whole") == 0
    count = 10**9 - left
    for i, instruction in enumerate(dice.sample(range(1, count + 1), min(INTERRUPTS, count))):
        out = here / f"out{i}"
        assert run_until(instruction, out) == 130
        left = {path.suffix for path in out.glob("[!.]*")}
        assert left <= {".npy", ".json"}, instruction
        for path in out.glob("*.npy"):
            np.testing.assert_array_equal(np.load(path), expected[int(path.stem[-6:])])
        assert run_until(10**9, out) == 0
        assert_shards(out, expected)


def test_a_resumed_run_tokenises_only_what_is_left(here, monkeypatch):
    monkeypatch.setattr(fineweb, "PIECE", 1000)
    write_jsonl(here / "a.jsonl", ["some words " * 9] * 1000)
    command = ["--files", "a.jsonl", "--shard_size=2000", "--num_workers=1"]
    sizes, tokenize, write_shard = [], fineweb.tokenize, fineweb.write_shard

    def count_and_tokenize(place, share, rows):
        sizes.append(sum(len(text) for _, text in rows))
        return tokenize(place, share, rows)

    monkeypatch.setattr(fineweb, "tokenize", count_and_tokenize)
    run(*command, "--out=whole")
    whole, number = sum(sizes), len(read("whole"))
    sizes.clear()

    def stop(path, tokens):
        if path.stem.endswith(f"{number * 3 // 4:06d}"):
            raise KeyboardInterrupt
        return write_shard(path, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shard", stop)
        run(*command, "--out=out", code=130)
    sizes.clear()
    run(*command, "--out=out")
    assert sum(sizes) <= whole * 0.3 + 1100  # and the piece in which the seventh shard ended
    for a, b in zip(read("out"), read("whole"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_progress_bar_has_an_end(here, monkeypatch):
    """From its first step on, also where the files are not equal in size."""
    totals = []

    class Bar(fineweb.tqdm):
        def __init__(self, **options):
            super().__init__(**{**options, "disable": False, "file": io.StringIO()})

        def update(self, count):
            totals.append(self.total)
            super().update(count)

    monkeypatch.setattr(fineweb, "tqdm", Bar)
    monkeypatch.setattr(fineweb, "PIECE", 20_000)
    (here / "a.txt").write_text("some words\n" * 10)
    write_jsonl(here / "b.jsonl", ["some words " * 100] * 1000)
    command = ["--files", "a.txt", "b.jsonl", "--encoding=bytes"]
    run(*command, "--out=out")
    assert all(0.8 < total / 1_100_000 < 1.2 for total in totals[5:])
    totals.clear()
    run(*command, "--out=out2", "--max_tokens=100000")
    assert totals[-1] == 100_000


def test_a_finished_run_says_so_at_once(here, capsys, monkeypatch):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    command = ["--files", "a.jsonl", "--out=out", "--shard_size=500"]
    run(*command)
    monkeypatch.setattr(fineweb, "get_encoding", None)  # not even that
    run(*command)
    assert "out is already finished" in capsys.readouterr().out


def test_max_tokens_cuts_and_a_later_run_with_more_goes_on(here, capsys):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    command = ["--files", "a.jsonl", "--out=out", "--shard_size=500"]
    for limit in (100, 499, 500, 730, 730, 1500, 1501):
        run(*command, f"--max_tokens={limit}")
        assert_shards("out", shards_of(DOCUMENTS, 500, limit=limit))
        documents = sum(int((shard == 50256).sum()) for shard in read("out"))
        assert f" {documents:,} documents, {limit:,} tokens" in capsys.readouterr().out
        run("--verify", "--out=out")
    run(*command)
    assert_shards("out", shards_of(DOCUMENTS, 500))
    run(*command, "--max_tokens=100")  # there are more: nothing to do
    assert_shards("out", shards_of(DOCUMENTS, 500))


@pytest.mark.parametrize("limit", [100, 600])
def test_stopped_while_a_cut_shard_grows_on_no_token_is_lost(limit, here, monkeypatch):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    command = ["--files", "a.jsonl", "--out=out", "--shard_size=500"]
    run(*command, f"--max_tokens={limit}")

    def stop(path, tokens):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shard", stop)
        run(*command, code=130)
    run(*command)
    assert_shards("out", shards_of(DOCUMENTS, 500))


# --------------------------------------------------------------------------------------------------
# Long documents


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "text",
    ["lorem ipsum 😀 dolor\n" * 50_000, "x" * 99_999, " " * 90_000 + "y", "汉字，\n" * 60_000],
)
def test_long_documents_are_cut_without_a_trace(suffix, text, here):
    documents = ["before", text, "after"]
    if suffix == "txt":
        for i, document in enumerate(documents):
            (here / f"{i}.txt").write_bytes(document.encode())
    else:
        dict(jsonl=write_jsonl, parquet=write_parquet)[suffix](here / f"a.{suffix}", documents)
    run("--files", f"*.{suffix}", "--out=out", "--shard_size=30000")
    assert_shards("out", shards_of(documents, 30_000))


@pytest.mark.parametrize("text", ["a", " ", "ab1", "汉"])
def test_megabytes_without_a_place_to_cut_are_cut_each_hundred_thousand(text, here):
    """tiktoken alone would need minutes for them, or give up."""
    text = text * (3_000_000 // len(text)) + "end"
    write_jsonl(here / "a.jsonl", [text])
    run("--files", "a.jsonl", "--out=out", "--shard_size=1000000")
    parts = [text[i : i + 100_000] for i in range(0, len(text), 100_000)]
    tokens = [50256] + [token for part in parts for token in GPT2.encode_ordinary(part)]
    np.testing.assert_array_equal(np.concatenate(read("out")), tokens)
    (here / "a.txt").write_text(text)
    run("--files", "a.txt", "--out=out2", "--shard_size=1000000")
    tokens = np.concatenate(read("out2"))
    assert GPT2.decode(tokens[1:].tolist()) == text


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [*" \n\t\r\x1c\x1f'aé汉1²!。”»à😀", *"\u0085\u00a0\u1680\u2000\u2028\u202f\u3000"]
            + ["'s", "'ll", "  ", " a", "12", "<|endoftext|>"]
        ),
        max_size=40,
    ),
    st.integers(1, 9),
)
def test_no_token_spans_a_cut(parts, longest):
    """With the pattern of STRETCH, for shorter stretches, wherever there is a place to cut."""
    text = "".join(parts)
    stretch = re.compile(fineweb.STRETCH.pattern.replace("100000", str(longest)), re.DOTALL)
    stretches = stretch.findall(text)
    assert "".join(stretches) == text and max(map(len, stretches), default=0) <= longest
    # Join again what was cut although there was no place
    joined = stretches[:1]
    for part in stretches[1:]:
        if part[0] in " \n" and not joined[-1][-1].isspace():
            joined.append(part)
        else:
            joined[-1] += part
    tokens = [token for part in joined for token in GPT2.encode_ordinary(part)]
    assert tokens == GPT2.encode_ordinary(text)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_bounded_by_pieces_not_documents(tmp_path):
    """A document of 40 MB takes little more memory than a small one."""
    script = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb\n"
        "assert fineweb.main(sys.argv[1:]) == 0\n"
        "own = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "print(max(own, resource.getrusage(-1).ru_maxrss) // 1024)"
    )
    (tmp_path / "a.txt").write_text("some words " * 3_700_000)
    flags = ["--out=out", "--encoding=bytes", "--shard_size=1000000"]
    peak = python("-c", script, "--files", "a.txt", *flags, cwd=tmp_path).stdout.split()[-1]
    assert int(peak) < 150  # MB


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_every_arrow_type_of_text_is_read(kind, here):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = ["", None, "abc", "é", "", "xyz", "xyz"] * 30
    array = pa.array(rows, getattr(pa, kind, pa.string)() if kind != "dictionary" else pa.string())
    array = array.dictionary_encode() if kind == "dictionary" else array
    pq.write_table(pa.table({"text": array}), "a.parquet", row_group_size=40)
    run("--files", "a.parquet", "--out=out", "--encoding=bytes")
    documents = [row for row in rows if row is not None]
    assert_shards("out", shards_of(documents, 10**6, BYTES))


# --------------------------------------------------------------------------------------------------
# Wrong input


def error_of(capsys, *args):
    run(*args, code=1)
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[-1].startswith("error: ") and sum(line.startswith("error: ") for line in lines) == 1
    )
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def test_wrong_input_is_one_line(here, capsys):
    import pyarrow as pa

    write_jsonl(here / "good.jsonl", ["x"] * 30)
    write_parquet(here / "good.parquet", ["x"] * 30)
    (here / "bad.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    (here / "list.jsonl").write_text('{"text": "x"}\n[1]\n')
    (here / "empty.jsonl").write_text("\n")
    (here / "nulls.jsonl").write_text('{"text": null}\n{"text": 7}\n')
    write_parquet(here / "empty.parquet", [])
    write_parquet(here / "numbers.parquet", [1, 2], type=pa.int64())
    (here / "bad.parquet").write_bytes(b"PAR1 but not really")
    (here / "bad.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}\n' * 100)[:-12])
    (here / "folder").mkdir()
    (here / "notes.pdf").write_text("x")
    (here / "rows.csv").write_text("id,body\n1,x\n")
    (here / "list.json").write_text('[{"text": "x"}, 2]')
    (here / "cut.json").write_text('[{"text": "x"}, {"te')
    for args, message in {
        "--files none.txt": "--files none.txt: no such file",
        "--files *.tsv": "--files *.tsv: no such file",
        "--files folder": "--files folder: no such file; name files of .parquet",
        "--files notes.pdf": "--files notes.pdf: notes.pdf; name files of .parquet",
        "--files rows.csv": "rows.csv can't be read: it has no column text; "
        "choose --text_column from id, body",
        "--files list.json": "list.json can't be read: row 2 is not a JSON object",
        "--files cut.json": "cut.json can't be read",
        "--files good.jsonl --text_column=body": "good.jsonl can't be read: it has no column body",
        "--files good.parquet --text_column=body": "it has no column body; "
        "choose --text_column from text, id, score",
        "--files bad.jsonl": "bad.jsonl can't be read: line 3 is not JSON: Expecting value",
        "--files list.jsonl": "list.jsonl can't be read: row 2 is not a JSON object",
        "--files nulls.jsonl": "there is no text in the source (2 rows without text were skipped)",
        "--files empty.jsonl": "there is no text in the source",
        "--files empty.parquet": "there is no text in the source",
        "--files numbers.parquet": "numbers.parquet can't be read: column text is int64, not text",
        "--files bad.parquet": "bad.parquet can't be read",
        "--files bad.jsonl.gz": "bad.jsonl.gz can't be read",
        "--verify": "has no manifest.json",
    }.items():
        assert message in error_of(capsys, *args.split(), "--out=out"), args
        assert not (here / "out").exists(), args


def test_an_error_in_json_names_its_line_once(here, capsys):
    (here / "a.jsonl").write_text('{"text": "x"}\n\n  {"text": y}\n')
    (here / "b.jsonl").write_text('{"text": "x"}\n{"text":\n')  # cut at the end of a line
    (here / "c.json").write_text('[\n{"text": "x"},\n{"text": y}\n]')
    for name, where in {
        "a.jsonl": "line 3 is not JSON: Expecting value: column 12",
        "b.jsonl": "line 2 is not JSON: Expecting value: column 9",
        "c.json": "c.json can't be read: Expecting value: line 3 column 10",
    }.items():
        error = error_of(capsys, "--files", name, "--out=out")
        assert where in error and error.count("line ") == 1


LFS = """version https://git-lfs.github.com/spec/v1
oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393
size 12345
"""


@pytest.mark.parametrize("suffix", ["txt", "md", "jsonl", "json", "csv", "parquet", "txt.gz"])
def test_what_git_lfs_has_not_fetched_is_an_error_that_says_how_to(suffix, here, capsys):
    (here / f"a.{suffix}").write_text(LFS)
    error = error_of(capsys, "--files", ".", "--out=out")
    assert f"a.{suffix} can't be read: it is a Git LFS pointer; `git lfs pull` fetches" in error
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    "rows, line",
    [
        ('one,1\n"two,2\nthree,3\n', 3),  # not closed at all
        ('one,1\n\n"two\nlines",2\n"three,3\n"four",4\n', 6),  # closed by the next one
        ('one,1\n"says \\"two\\"",2\n', 3),  # as MySQL writes it
    ],
)
def test_a_quotation_mark_that_is_not_closed_is_an_error_that_names_the_line(
    rows, line, here, capsys
):
    (here / "a.csv").write_text("text,id\n" + rows)
    error = error_of(capsys, "--files", "a.csv", "--out=out")
    assert f"a.csv can't be read: from line {line} on, it is not CSV" in error
    assert "a quotation mark may not be closed there" in error


def test_csv_is_read_as_spreadsheets_write_it(here):
    """Excel's mark and line ends, and quotes that are doubled or in the middle of a field."""
    lines = ["id,text", '1,"She said ""no"", twice"', '2,"two\nlines, and ""', '"""', '3,5" pipe']
    lines += ["4,", '5,""', '6,"a\r\nb"']
    (here / "a.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    run("--files", "a.csv", "--out=out", "--encoding=bytes")
    documents = ['She said "no", twice', 'two\nlines, and "\r\n"', '5" pipe', "", "", "a\r\nb"]
    assert_shards("out", shards_of(documents, 1000, BYTES))


def test_a_column_of_another_type_is_named_with_its_type(here, capsys):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for kind, array in {
        "list<element: string>": pa.array([["x"]]),
        "struct<a: string>": pa.array([{"a": "x"}]),
        "map<string, string": pa.array([[("x", "y")]], pa.map_(pa.string(), pa.string())),
        "binary": pa.array([b"x"]),
        "double": pa.array([0.5]),
        "null": pa.array([None]),
    }.items():
        pq.write_table(pa.table({"text": array}), "a.parquet")
        error = error_of(capsys, "--files", "a.parquet", "--out=out")
        assert f"a.parquet can't be read: column text is {kind}" in error
        assert "not text; choose another --text_column" in error


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_what_is_no_file_is_an_error_before_anything_is_read(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words")
    odd = tmp_path / "texts" / "b.txt"
    for source, make in [
        ("--dataset", lambda: os.mkfifo(odd)),
        ("--files", lambda: os.mkfifo(odd)),
        ("--files", lambda: odd.symlink_to("nowhere")),
        ("--files", lambda: odd.symlink_to("b.txt")),
        ("--files", lambda: odd.symlink_to("/dev/zero")),
    ]:
        make()
        command = [ROOT / "fineweb.py", source, "texts", "--out=out", "--encoding=bytes"]
        done = python(*command, cwd=tmp_path, check=False, timeout=60)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "error: texts/b.txt is a broken link, or no file" in done.stderr
        assert not (tmp_path / "out").exists()
        odd.unlink()


@pytest.mark.parametrize("out", ["notes.pdf", "notes.pdf/data", "/dev/null"])
def test_an_out_that_is_a_file_is_an_error_that_asks_for_a_folder(out, here, capsys):
    write_jsonl(here / "a.jsonl", ["x"] * 30)
    (here / "notes.pdf").write_text("precious")
    for source in "--files=a.jsonl", "--dataset=some/texts", "--pretokenized", "--verify":
        error = error_of(capsys, source, f"--out={out}")
        assert f"error: --out {out} is a file, or lies in one; name a folder" in error
    assert (here / "notes.pdf").read_text() == "precious"


def test_shards_of_a_local_data_set_go_to_a_folder_named_after_it(here):
    (here / "sets" / "texts").mkdir(parents=True)
    write_jsonl(here / "sets" / "texts" / "a.jsonl", DOCUMENTS)
    run("--dataset=sets/texts/", "--shard_size=500")
    for folder in "sets/texts", "sets/texts/", str(here / "sets" / "texts"):
        run(f"--dataset={folder}", "--verify")
    assert_shards("texts_tokens", shards_of(DOCUMENTS, 500))
    assert {path.name for path in here.iterdir()} == {"sets", "texts_tokens"}


@pytest.mark.parametrize("more", [[], ["--verify"]])
def test_files_have_no_folder_of_their_own(more, here, capsys):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    with pytest.raises(SystemExit) as stopped:
        fineweb.main(["--files", "a.jsonl", *more])
    assert stopped.value.code == 2
    assert "--files needs a folder for its shards; name one with --out" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["a.jsonl"]


def test_wrong_flags_are_usage_errors(here, capsys):
    for args, message in {
        "--shard_size=1": "--shard_size is at least 2",
        "--max_tokens=0": "--max_tokens and --num_workers at least 1",
        "--num_workers=0": "--num_workers at least 1",
        "--shard_size=x": "--shard_size: invalid int value: 'x'",
        "--files a.txt --dataset=x": "argument --dataset: not allowed with argument --files",
        "--files a.txt --pretokenized": "argument --pretokenized: not allowed with",
        "--pretokenized --encoding=bytes": "GPT-2 tokens; leave out --encoding",
        "--nonsense": "unrecognized arguments: --nonsense",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            fineweb.main([*args.split(), "--out=out"])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
        assert not (here / "out").exists()


def test_rows_without_text_are_skipped_and_broken_text_is_replaced(here, capsys):
    rows = [
        {"text": "first"},
        {"text": None},
        {"text": 7},
        {"id": 1},
        {"text": "half \ud83d emoji"},
        {"text": ""},
    ]
    lines = [json.dumps(row).encode() for row in rows] + [b'{"text": "bro\xffken \xe6\xb1"}']
    (here / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    (here / "b.txt").write_bytes(b"mis\xf0\x9f\x98sing \xef\xbf\xbd")
    write_parquet(here / "c.parquet", ["x", None, "y"])
    run("--files", "a.jsonl", "b.txt", "c.parquet", "--out=out", "--shard_size=20")
    documents = [
        "first",
        "half \ufffd emoji",
        "",
        "bro\ufffdken \ufffd",
        "mis\ufffdsing \ufffd",
        "x",
        "y",
    ]
    assert_shards("out", shards_of(documents, 20))
    out = capsys.readouterr().out
    assert "4 rows without text were skipped, 4 broken characters were replaced" in out


def test_another_runs_shards_are_never_mixed_with(here, capsys):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    write_jsonl(here / "b.jsonl", DOCUMENTS[1:])
    (here / "other").mkdir()
    np.save(here / "other" / "text_val_000000.npy", np.zeros(5, np.uint16))
    command = ["--files=a.jsonl", "--out=out", "--shard_size=500"]
    run(*command)
    before = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    for change, message in {
        "--shard_size=600": "the shard_size is 600, and was 500",
        "--encoding=bytes": "the encoding is bytes, and was gpt2",
        "--text_column=id": "column id, and was local files, all, column text",
        "--files=b.jsonl": "a different text: the files, or what was read of them, have changed",
        "--dataset=set": "the source is set, all, column text, and was local",
        "--out=other": "other holds other shards (text_val_000000.npy)",
    }.items():
        if change.startswith("--dataset"):
            command = command[1:]
        assert message in error_of(capsys, *command, change), change
    with open(here / "a.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    assert "what was read of them, have changed" in error_of(capsys, "--files=a.jsonl", *command)
    assert before == {path.name: path.read_bytes() for path in (here / "out").iterdir()}


def test_verify_finds_what_is_not_as_it_was(here, capsys):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    run("--files", "a.jsonl", "--out=out", "--shard_size=500")
    run("--verify", "--out=out")
    assert "as manifest.json says" in capsys.readouterr().out
    path = here / "out" / "text_train_000001.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert "text_train_000001.npy is not what manifest.json says" in error_of(
        capsys, "--verify", "--out=out"
    )
    for size in len(whole) // 2, 0:
        path.write_bytes(whole[:size])
        error = error_of(capsys, "--verify", "--out=out")
        assert "text_train_000001.npy is gone or too short" in error
    path.unlink()
    assert "text_train_000001.npy is gone or too short" in error_of(capsys, "--verify", "--out=out")
    path.write_bytes(whole)
    np.save(here / "out" / "x_train_000009.npy", np.zeros(5, np.uint16))
    assert "holds other shards (x_train_000009.npy)" in error_of(capsys, "--verify", "--out=out")
    (here / "out" / "manifest.json").write_text("{}")
    assert "is no manifest" in error_of(capsys, "--verify", "--out=out")


@pytest.mark.parametrize("shards", [0, 2])
def test_verify_takes_a_shard_that_a_killed_run_had_no_time_to_note(shards, here, monkeypatch):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    command = ["--files", "a.jsonl", "--out=out", "--shard_size=500"]
    write_shard = fineweb.write_shard

    def killed(path, tokens):
        entry = write_shard(path, tokens)
        if path.stem.endswith(str(shards)):
            raise KeyboardInterrupt
        return entry

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shard", killed)
        run(*command, code=130)
    assert len(list(Path("out").glob("*.npy"))) == shards + 1
    run("--verify", "--out=out")
    run(*command)
    run("--verify", "--out=out")


def test_verify_leaves_a_folder_without_a_manifest_in_peace(here, capsys):
    (here / "data").mkdir()
    (here / "data" / "train.bin").write_bytes(b"12")
    error = error_of(capsys, "--verify", "--out=data")
    assert "has no manifest.json to check shards against" in error and "remove" not in error


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on the size of files")
def test_a_full_disk_leaves_what_is_finished_and_is_gone_on_from(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 30_000)
    command = ["--files", "a.txt", "--out=out", "--encoding=bytes", "--shard_size=100000"]
    limited = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import fineweb\n"
        "write_shard = fineweb.write_shard\n"
        "def full(path, tokens):\n"
        "    if path.stem.endswith('1'): resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, -1))\n"
        "    return write_shard(path, tokens)\n"
        "fineweb.write_shard = full\n"
        "sys.exit(fineweb.main(sys.argv[1:]))"
    )
    done = python("-c", limited, *command, cwd=tmp_path, check=False)
    assert (
        done.returncode == 1
        and "text_train_000001.npy can't be written (File too large)" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "text_val_000000.npy",
        "manifest.json",
        ".lock",
    }
    run("--files", tmp_path / "a.txt", f"--out={tmp_path / 'out'}", *command[3:])
    assert_shards(tmp_path / "out", shards_of(["some words " * 30_000], 100_000, BYTES))


def test_json_that_is_nested_too_deeply_is_an_error(here, capsys):
    for name in "a.json", "a.jsonl":
        (here / name).write_text("[" * 100_000)
        assert f"{name} can't be read: " in error_of(capsys, "--files", name, "--out=out")


# --------------------------------------------------------------------------------------------------
# Text as it is


STORIES = "Once\n\nupon.\n<|endoftext|>\nA cat.\r\n<|endoftext|>\r\n\r\n<|endoftext|>The end.\n"


@pytest.mark.parametrize("suffix", ["txt", "md", "txt.gz"])
def test_a_separator_in_a_text_file_begins_a_document(suffix, here, capsys, monkeypatch):
    """White space around it is not text, wherever the blocks end that are read."""
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(here / f"a.{suffix}", "wb") as file:
        file.write(STORIES.encode())
    for piece in 1, 2, 5, 7, 2**20:
        monkeypatch.setattr(fineweb, "PIECE", piece)
        run("--files", f"a.{suffix}", f"--out=out{piece}", "--shard_size=5")
        assert_shards(f"out{piece}", shards_of(["Once\n\nupon.", "A cat.", "The end.\n"], 5))
        assert " 3 documents" in capsys.readouterr().out.splitlines()[-1]


def test_a_separator_at_either_end_of_a_file_makes_no_empty_document(here):
    (here / "a.txt").write_text("<|endoftext|>\nA\n<|endoftext|>\n")
    (here / "b.txt").write_text(" B ")
    (here / "c.txt").write_text("\n<|endoftext|>\n\n<|endoftext|>")
    (here / "d.txt").write_text("")
    write_jsonl(here / "e.jsonl", ["C\n<|endoftext|>\nD"])
    run("--files", ".", "--out=out", "--shard_size=9")
    assert_shards("out", shards_of(["A", " B ", "C\n<|endoftext|>\nD"], 9))


@pytest.mark.parametrize("suffix", ["txt", "md.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_in_another_encoding_is_an_error_that_says_how_to_convert_it(
    encoding, suffix, here, capsys
):
    opener = gzip.open if suffix.endswith("gz") else open
    with opener(here / f"a.{suffix}", "wb") as file:
        file.write("é, a text\n".encode(encoding))
    error = error_of(capsys, "--files", f"a.{suffix}", "--out=out")
    assert "it has NUL bytes, so it is not UTF-8; convert UTF-16 with `iconv" in error
    assert not (here / "out").exists()


def test_a_mark_of_utf8_is_no_text(here):
    (here / "a.txt").write_text("one", encoding="utf-8-sig")
    (here / "b.txt").write_text("<|endoftext|>two \ufeff", encoding="utf-8-sig")
    run("--files", "a.txt", "b.txt", "--out=out")
    assert_shards("out", shards_of(["one", "two \ufeff"], 100))


def test_hidden_files_and_folders_are_no_source_unless_they_are_named(here, capsys):
    for name in "a.txt", "._a.txt", ".git/README.md", ".ipynb_checkpoints/a.txt":
        (here / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "texts" / name).write_text(name)
    run("--files", "texts", "--out=out")
    assert "left out" not in capsys.readouterr().out
    assert_shards("out", shards_of(["a.txt"], 100))
    run("--files", "texts/.git", "--out=out2")
    assert_shards("out2", shards_of([".git/README.md"], 100))


def test_a_file_is_read_once_however_often_it_is_named(here):
    (here / "texts").mkdir()
    for name in "ab":
        (here / "texts" / f"{name}.txt").write_text(name)
    (here / "link.txt").symlink_to("texts/a.txt")
    run("--files", "texts/a.txt", "texts", "./texts/*.txt", "link.txt", "--out=out")
    assert_shards("out", shards_of(["a", "b"], 100))


def test_linked_folders_are_read_and_loops_of_links_are_harmless(here):
    for name in "texts", "books":
        (here / name).mkdir()
        (here / name / f"{name}.txt").write_text(name)
    (here / "texts" / "more").symlink_to("../books")
    (here / "books" / "back").symlink_to("../texts")
    (here / "texts" / "self").symlink_to(".")
    run("--files", "texts", "--out=out")
    assert_shards("out", shards_of(["books", "texts"], 100))


def test_a_linked_folder_in_a_data_set_is_said_to_be_left_out(here, capsys):
    """`datasets` passes over it. A file and a link to it are read once."""
    for name in "texts/a.txt", "texts/b.txt", "books/c.txt":
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text(name)
    (here / "texts" / "link.txt").symlink_to("a.txt")
    (here / "texts" / "more").symlink_to("../books")
    (here / "texts" / "self").symlink_to(".")
    (here / "texts" / ".git").mkdir()
    (here / "texts" / ".git" / "d.txt").write_text("hidden")
    run("--dataset=texts", "--out=out")
    assert "split train: 1 left out: texts/more/c.txt\n" in capsys.readouterr().out
    assert_shards("out", shards_of(["texts/a.txt", "texts/b.txt"], 100))


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="root can be others")
@pytest.mark.parametrize("source", ["--files=texts", "--dataset=texts"])
def test_a_folder_that_cannot_be_read_is_an_error(source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "texts" / "closed").chmod(0)
    done = as_nobody(source, "--out=out", cwd=tmp_path, imports="datasets, encodings.idna")
    assert done.returncode == 1
    assert "error: texts/closed can't be read (Permission denied)" in done.stderr


def test_the_output_folder_is_no_source(here):
    (here / "a.txt").write_text("a")
    (here / "out").mkdir()
    (here / "out" / "b.txt").write_text("not this one")
    run("--files", ".", "--out=out")
    (here / "out" / "b.txt").unlink()
    assert_shards("out", shards_of(["a"], 100))


def test_a_name_that_is_not_utf8_is_a_name(here):
    path = os.fsdecode(b"caf\xe9.txt")
    Path(path).write_text("some text")
    command = [ROOT / "fineweb.py", "--files", path, "--out=out", "--encoding=bytes"]
    done = python(*command, "--shard_size=5", cwd=here)
    assert "of 1 files: caf\\udce9.txt" in done.stdout
    python(*command, "--shard_size=5", cwd=here)
    assert_shards("out", shards_of(["some text"], 5, BYTES))


@pytest.mark.parametrize("content", ["", "\ufeff", "\n<|endoftext|>\n"])
def test_an_empty_source_is_an_error(content, here, capsys):
    (here / "a.txt").write_text(content, encoding="utf-8")
    assert "there is no text in the source" in error_of(capsys, "--files", "a.txt", "--out=out")
    assert not (here / "out").exists()


def test_the_last_lines_say_which_files_the_val_shard_is_made_of(here, capsys):
    for name in "abcd":
        (here / f"{name}.txt").write_text("some words " * 20)
    command = ["--files", "d.txt", "c.txt", "b.txt", "a.txt", "--out=out", "--encoding=bytes"]
    command.append("--shard_size=300")
    for more in ["--max_tokens=400"], [], []:  # the last one has nothing to do
        run(*command, *more)
        line = capsys.readouterr().out.splitlines()[-2]
        assert "from 2 of 4 files: d.txt, c.txt; to choose, change the order of --files" in line
    run(*command[:-1], "--shard_size=221", "--out=other")
    assert "from 1 of 4 files: d.txt;" in capsys.readouterr().out.splitlines()[-2]


def test_a_lone_val_shard_is_a_warning_whose_advice_helps(here, capsys):
    (here / "a.txt").write_text("some words " * 20)
    command = ["--files", "a.txt", "--out=out"]
    run(*command)
    advice = re.search(r"remove out, and run .* with (--shard_size \d+)", capsys.readouterr().err)
    shutil.rmtree("out")
    run(*command, *advice[1].split())
    assert "warning" not in capsys.readouterr().err
    assert_shards("out", shards_of(["some words " * 20], int(advice[1].split()[1])))


@pytest.mark.parametrize("source", ["--files=set", "--dataset=set"])
def test_what_lies_behind_the_place_may_be_mended_or_grow(source, here, capsys, monkeypatch):
    """What lies before it may not."""
    monkeypatch.setattr(fineweb, "PIECE", 2000)  # little of a file is under way
    texts = {name: [f"{name}{i} " + "words " * 9 for i in range(2000)] for name in "abc"}
    (here / "set").mkdir()
    for name, suffix in zip("abc", ["", "", ".gz"], strict=True):
        write_jsonl(here / "set" / f"{name}.jsonl{suffix}", texts[name])
    first, second, third = sorted((here / "set").iterdir())
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    command = [source, "--out=out", "--encoding=bytes", "--shard_size=200000", "--num_workers=1"]
    assert "c.jsonl.gz can't be read" in error_of(capsys, *command)
    # The second shard will begin in b.
    before = first.read_bytes()
    new = b'{"text": "new"}\n'
    for changed in before + new, b" " + before[1:], before[:-2] + b" \n":
        first.write_bytes(changed)
        assert "have changed" in error_of(capsys, *command)
    first.write_bytes(before)
    second.write_bytes(second.read_bytes() + new)
    third.write_bytes(whole + gzip.compress(new))
    run(*command)
    documents = texts["a"] + [*texts["b"], "new"] + [*texts["c"], "new"]
    assert_shards("out", shards_of(documents, 200_000, BYTES))


# --------------------------------------------------------------------------------------------------
# Programs: what they print, the signals they get, and others like them


def shell(command, **options):
    how = dict(shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60)
    command = command.replace("PROGRAM", f"{sys.executable} {ROOT}")
    return subprocess.run(f"set -o pipefail; {command}", **how, **options)


needs_bash = pytest.mark.skipif(sys.platform != "linux", reason="needs bash and /dev/full")
MAKE = "fineweb.py --files a.txt --encoding bytes --shard_size 50000 --num_workers 1 --out"


@needs_bash
@pytest.mark.parametrize("output", ["2>&1 | head -n 1", ">/dev/full 2>&1", ">&- 2>&-"])
def test_what_cannot_be_printed_is_dropped_and_the_work_goes_on(output, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 50_000)
    done = shell(f"PROGRAM/{MAKE} out {output}", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert_shards(tmp_path / "out", shards_of(["some words " * 50_000], 50_000, BYTES))
    done = shell(f"PROGRAM/fineweb.py --files none.txt --out none {output}", cwd=tmp_path)
    assert done.returncode == 1 and "Exception ignored" not in done.stdout + done.stderr


@needs_bash
def test_a_terminal_that_is_gone_does_not_end_the_work(tmp_path):
    import pty

    (tmp_path / "a.txt").write_text("some words " * 50_000)
    terminal, end = pty.openpty()
    command = [sys.executable, *f"{ROOT}/{MAKE} out".split()]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=end, stderr=end)
    os.close(end)
    os.read(terminal, 1)
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert_shards(tmp_path / "out", shards_of(["some words " * 50_000], 50_000, BYTES))


@needs_bash
def test_names_the_terminal_cannot_show_and_no_docstrings(tmp_path):
    (tmp_path / "a.txt").write_text("some words")
    program = f"PYTHONIOENCODING=ascii {sys.executable} -OO {ROOT}/{MAKE} 'dä ta'"
    done = shell(program, cwd=tmp_path)
    assert done.returncode == 0 and r"d\xe4 ta: 1 shards" in done.stdout, done.stderr
    assert (tmp_path / "dä ta" / "manifest.json").exists()
    done = shell(f"{program} --shard_size 1", cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP")
@pytest.mark.parametrize("nohup, code", [(False, 129), (True, 0)])
def test_sighup_stops_as_sigterm_does_unless_it_is_ignored(nohup, code, tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 500_000)
    command = [sys.executable, *f"{ROOT}/{MAKE} out".split()]
    how = dict(cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if nohup:
        command = ["nohup", *command]
    # The tests may run under nohup themselves.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command, start_new_session=True, **how)
    signal.signal(signal.SIGHUP, before)
    process.stdout.readline()  # the first shard
    os.killpg(process.pid, signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err and "error" not in err, err
    assert (len(read(tmp_path / "out")) == 111) == nohup


def test_main_leaves_the_signals_alone(here):
    """Only the program has handlers of its own."""

    def mine(*_):
        pass

    names = [name for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.signal(getattr(signal, name), mine) for name in names}
    try:
        write_jsonl(here / "a.jsonl", DOCUMENTS)
        run("--files", "a.jsonl", "--out=out", "--encoding=bytes")
        assert all(signal.getsignal(signum) is mine for signum in before)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_main_leaves_nothing_behind_in_its_process(here, capsys):
    """After a run that ends well, and one that does not."""

    def state():
        files = {os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()}
        threads = {thread.name for thread in threading.enumerate()}
        return files, threads, dict(os.environ), os.getcwd()

    write_csv(here / "a.csv", DOCUMENTS[len(ODD) :])
    (here / "b.csv").write_text('text\n"open')
    run("--files", "a.csv", "--out=first")
    before = state()
    run("--files", "a.csv", "--out=out", "--max_tokens=900")
    run("--files", "b.csv", "--out=out2", code=1)
    run("--verify", "--out=out")
    assert state() == before


def test_main_runs_in_any_thread(here):
    write_jsonl(here / "a.jsonl", DOCUMENTS)
    codes = []
    command = ["--files", "a.jsonl", "--out=out", "--encoding=bytes", "--shard_size=500"]
    thread = threading.Thread(target=lambda: codes.append(fineweb.main(command)))
    thread.start()
    thread.join(60)
    assert codes == [0]
    assert_shards("out", shards_of(DOCUMENTS, 500, BYTES))


def test_a_second_run_in_a_folder_says_that_another_is_at_work_there(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some words " * 2_000_000)
    out, command = tmp_path / "out", [sys.executable, *f"{ROOT}/{MAKE} out".split()]
    how = dict(cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    first = subprocess.Popen(command, **how)
    first.stdout.readline()
    first.send_signal(signal.SIGSTOP)
    for source in f"--files={tmp_path / 'a.txt'}", "--pretokenized=a/b":
        error = error_of(capsys, source, f"--out={out}")
        assert f"another fineweb.py is writing to {out}; wait for it" in error
    run("--verify", f"--out={out}")
    first.kill()
    second = subprocess.Popen(command, **how)  # a killed one is in nobody's way
    assert "resuming after" in second.stdout.readline()
    for process in first, second:
        process.kill()
        process.communicate()
    assert {path.suffix for path in find_shards(out, "val")} == {".npy"}


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="root can be others")
def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path):
    (tmp_path / "a.txt").write_text("some words " * 20)
    command = ["--files", tmp_path / "a.txt", f"--out={tmp_path / 'out'}", "--encoding=bytes"]
    run(*command)
    (tmp_path / "out" / ".lock").unlink()
    for more, word in ([], "already finished"), (["--verify"], "as manifest.json says"):
        done = as_nobody(*command, *more, cwd=tmp_path)
        assert done.returncode == 0 and word in done.stdout, done.stderr


# --------------------------------------------------------------------------------------------------
# What comes of it


def test_importing_is_quick_and_does_nothing():
    heavy = {"torch", "datasets", "huggingface_hub", "fsspec", "pyarrow", "requests"}
    script = f"import sys, fineweb; print({heavy} & set(sys.modules))"
    assert python("-c", script, cwd=ROOT).stdout.strip() == "set()"


def test_the_trainer_trains_on_the_result(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["to be or not to be, that is the question"] * 300)
    make = ["--files", "a.jsonl", "--out=shards", "--shard_size=1500"]
    done = python(ROOT / "fineweb.py", *make, cwd=tmp_path)
    assert re.search(r"300 documents, 3,\d{3} tokens; 0 rows", done.stdout)
    trained = python(ROOT / "train_gpt2.py", *TINY, "--data=shards", "--max_steps=3", cwd=tmp_path)
    assert "step     2/3" in trained.stdout
