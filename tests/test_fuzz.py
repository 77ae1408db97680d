"""Whatever a file holds, reading it ends in one line of an error or in what the file holds, and
takes little memory.

To add a format: a function that writes a good file, and one that reads it."""

import io
import json
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
import torch._dynamo  # it is imported lazily, and would count as memory of a file
from conftest import TINY, llmc_header, write_shards
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fineweb import get_encoding
from hellaswag import read_questions
from train_gpt2 import GPT2, main, read_shard

TOKENS = np.arange(300, dtype=np.uint16)
QUESTION = dict(ctx="A cat", endings=["sits", "flies", "is a dog", "sings"], label="0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The checkpoint of a tiny run."""
    folder = tmp_path_factory.mktemp("run")
    write_shards(folder / "data")
    flags = TINY + ["--n_layer=1", "--n_embd=4", "--max_steps=2", "--checkpoint_every=2"]
    assert main(flags + [f"--data={folder / 'data'}", f"--log_dir={folder / 'log'}"]) == 0
    return folder / "log/checkpoint_00002.pt"


def npy():
    file = io.BytesIO()
    np.save(file, TOKENS)
    return file.getvalue()


def check_shard(path):
    tokens = read_shard(path)
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    tokens.sum()  # all of it is there


def check_questions(path):
    for context, endings, label in read_questions(path, get_encoding("bytes")):
        assert len(context) > 0 and len(endings) == 4
        assert all(len(ending) > 0 for ending in endings)
        assert 0 <= label < 4


def check_checkpoint(path):
    """A model can be built of it, and asked."""
    model = GPT2.from_pretrained(str(path))
    assert model(torch.zeros(1, 2, dtype=torch.long)).shape == (1, 2, model.config.vocab_size)


def assert_error_or_correct_read(path, check):
    tracemalloc.start()
    try:
        check(path)
    except SystemExit as error:
        assert error.code.startswith("error: ") and str(path) in error.code
        assert "\n" not in error.code
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**27, f"{peak:,} bytes"


# By suffix: what a good file holds (a checkpoint comes from a run), how to read it, and how many
# bytes from its start are worth damaging
FORMATS = {
    ".npy": (npy(), check_shard, 128),
    ".bin": (llmc_header(20240520, 300) + TOKENS.tobytes(), check_shard, 16),
    ".jsonl": ((json.dumps(QUESTION).encode() + b"\n") * 2, check_questions, 200),
    ".pt": (None, check_checkpoint, 4000),
}


def edits(size):
    """Places in the first bytes of a file, and what stands there instead, often the largest and
    smallest numbers."""
    telling = [b"\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 4, b"9" * 6]
    what = st.binary(min_size=1, max_size=8) | st.sampled_from(telling)
    edit = st.tuples(st.integers(0, size), what)
    return st.lists(edit, min_size=1, max_size=4)


fuzz = settings(
    deadline=None,
    max_examples=100,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("suffix", FORMATS)
@fuzz
@given(data=st.data())
def test_damaged_header(tmp_path, checkpoint, suffix, data):
    good, check, header = FORMATS[suffix]
    path = tmp_path / f"file{suffix}"
    damaged = bytearray(good or checkpoint.read_bytes())
    path.write_bytes(damaged)
    check(path)
    for at, what in data.draw(edits(min(header, len(damaged)))):
        damaged[at : at + len(what)] = what
    path.write_bytes(damaged[: data.draw(st.none() | st.integers(0, len(damaged)))])
    assert_error_or_correct_read(path, check)


KINDS = ["<u2", "|u1", ">u2", "<i8", "<f4", "|O", "<U7", "<u2,<u2", "", "V2"]
LENGTHS = st.integers(-(2**70), 2**70) | st.sampled_from([0, 300, 10**13])


@fuzz
@given(
    descr=st.sampled_from(KINDS) | st.text(max_size=5),
    order=st.booleans() | st.integers(),
    shape=st.none() | st.lists(LENGTHS, max_size=3).map(tuple),
)
@example("<u2", False, (2**62,))
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_npy_header_that_claims_anything(tmp_path, descr, order, shape):
    text = repr(dict(descr=descr, fortran_order=order, shape=shape)).encode()
    path = tmp_path / "file.npy"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    path.write_bytes(header + TOKENS.tobytes())
    assert_error_or_correct_read(path, check_shard)


INT32 = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([20240520, 20240522, 1, 300])


@fuzz
@given(numbers=st.lists(INT32, max_size=4))
@example([20240520, 1, 300])
@example([20240520, 1, 2**31 - 1])
def test_bin_header_that_claims_anything(tmp_path, numbers):
    path = tmp_path / "file.bin"
    header = np.zeros(256, dtype="<i4")
    header[: len(numbers)] = numbers
    path.write_bytes(header.tobytes() + TOKENS.tobytes())
    assert_error_or_correct_read(path, check_shard)


NUMBERS = st.booleans() | st.integers() | st.floats()
JUNK = st.none() | NUMBERS | st.text(max_size=5) | st.lists(st.integers() | st.text(max_size=3))


@fuzz
@given(
    row=JUNK | st.dictionaries(st.text(max_size=5), JUNK, max_size=3),
    changes=st.dictionaries(st.sampled_from(["ctx", "endings", "label"]), JUNK),
)
def test_question_of_anything(tmp_path, row, changes):
    path = tmp_path / "file.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert_error_or_correct_read(path, check_questions)
    path.write_text(json.dumps(QUESTION | changes), encoding="utf-8")
    assert_error_or_correct_read(path, check_questions)


def test_zip_that_unpacks_to_more_than_it_is(tmp_path):
    path = tmp_path / "checkpoint_00001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    assert path.stat().st_size < 2**20
    assert_error_or_correct_read(path, check_checkpoint)


@fuzz
@given(manifest=st.dictionaries(st.just("encoding") | st.text(max_size=5), JUNK, max_size=3) | JUNK)
def test_manifest_of_anything(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stderr)
        assert main(TINY + [f"--data={tmp_path}", f"--log_dir={tmp_path / 'log'}"]) == 1
    error = stderr.getvalue()
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "manifest.json" in error
