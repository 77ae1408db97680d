"""Whatever a file's header says, reading it ends in a UserError or in what the file holds, and
takes little memory.

To add a format: a function that writes a good file, and one that reads it."""

import io
import json
import tracemalloc
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch._dynamo
from conftest import llmc_header, write_hellaswag
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hellaswag import read_questions
from train_gpt2 import (
    GPT2,
    GPT2Config,
    load_checkpoint,
    load_weights,
    read_manifest,
    read_shard,
)

TOKENS = np.arange(300, dtype=np.uint16)
CONFIG = GPT2Config(vocab_size=7, n_layer=1, n_head=1, n_embd=4, block_size=4, pad_vocab=False)


def write_checkpoint(path):
    model = GPT2(CONFIG)
    state = dict(format=2, step=5, config=asdict(CONFIG), model=model.state_dict())
    torch.save(state, path)


def check_shard(tokens):
    assert tokens.dtype == np.uint16 and tokens.ndim == 1
    tokens.sum()  # all of it is there


def check_hellaswag(examples):
    for context, endings, label in examples:
        assert len(context) and len(endings) == 4 and all(map(len, endings)) and 0 <= label < 4


def check_checkpoint(state):
    """Its sizes are those of its weights, so that a model of them can be built and asked."""
    load_weights(GPT2(GPT2Config(**state["config"])), state["model"], "it")
    assert type(state["step"]) is int and state["step"] >= 0


def write_bin(path):
    path.write_bytes(llmc_header(20240520, 300) + TOKENS.tobytes())


def write_questions(path):
    write_hellaswag(path, [([1, 2], [[3], [4, 5], [6], [7]], 2), ([1], [[3], [4], [6], [7]], 0)])


# By suffix: how to write one, how to read it, what must then be so, and the bytes of its header
FORMATS = {
    ".npy": (lambda path: np.save(path, TOKENS), read_shard, check_shard, 128),
    ".bin": (write_bin, read_shard, check_shard, 16),
    ".hellaswag": (write_questions, read_questions, check_hellaswag, 1100),
    ".pt": (write_checkpoint, load_checkpoint, check_checkpoint, 4000),
}


def assert_error_or_correct_read(path, read, check):
    tracemalloc.start()
    try:
        check(read(path))
    except ValueError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**27, f"{peak:,} bytes"


def edits(size):
    """Places in the first bytes of a file, and what stands there instead; often the largest and
    smallest numbers."""
    telling = [b"\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\0" * 4, b"9" * 6]
    what = st.binary(min_size=1, max_size=8) | st.sampled_from(telling)
    edit = st.tuples(st.integers(0, size), what)
    return st.lists(edit, min_size=1, max_size=4)


how = dict(suppress_health_check=[HealthCheck.function_scoped_fixture])
fuzz = settings(deadline=None, max_examples=100, derandomize=True, **how)


@pytest.mark.parametrize("suffix", FORMATS)
@fuzz
@given(data=st.data())
def test_damaged_header(tmp_path, suffix, data):
    write, read, check, header = FORMATS[suffix]
    path = tmp_path / f"file{suffix}"
    write(path)
    assert_error_or_correct_read(path, read, check)
    damaged = bytearray(path.read_bytes())
    for at, what in data.draw(edits(min(header, len(damaged)))):
        damaged[at : at + len(what)] = what
    path.write_bytes(damaged[: data.draw(st.none() | st.integers(0, len(damaged)))])
    assert_error_or_correct_read(path, read, check)


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
    assert_error_or_correct_read(path, read_shard, check_shard)


HEADER = st.integers(-(2**31), 2**31 - 1) | st.sampled_from([20240520, 20240522, 1, 300])


@fuzz
@given(numbers=st.lists(HEADER, max_size=4))
@example([20240520, 1, 300])
@example([20240522, 1, 2**31 - 1])
def test_bin_header_that_claims_anything(tmp_path, numbers):
    path = tmp_path / "file.bin"
    header = np.array(numbers + [0] * (256 - len(numbers)), dtype="<i4")
    path.write_bytes(header.tobytes() + TOKENS.tobytes())
    assert_error_or_correct_read(path, read_shard, check_shard)
    assert_error_or_correct_read(path, read_questions, check_hellaswag)


@fuzz
@given(data=st.data())
def test_checkpoint_whose_checksums_are_right_but_whose_pickle_is_not(tmp_path, data):
    whole, path = io.BytesIO(), tmp_path / "file.pt"
    write_checkpoint(whole)
    with zipfile.ZipFile(whole) as archive, zipfile.ZipFile(path, "w") as other:
        for entry in archive.infolist():
            content = bytearray(archive.read(entry))
            if entry.filename.endswith(".pkl"):
                for at, what in data.draw(edits(len(content))):
                    content[at : at + len(what)] = what
            other.writestr(zipfile.ZipInfo(entry.filename), bytes(content))
    assert_error_or_correct_read(path, load_checkpoint, check_checkpoint)


NUMBERS = st.booleans() | st.integers() | st.floats()
JUNK = st.none() | NUMBERS | st.text(max_size=5) | st.lists(st.integers())
FIELDS = st.sampled_from(["format", "step", "config", "model"])


@settings(fuzz, max_examples=50)
@given(FIELDS, JUNK, st.text(max_size=9), st.booleans())
@example("step", 5.0, "", False)
def test_checkpoint_with_other_values(tmp_path, field, value, key, gone):
    path = tmp_path / "file.pt"
    write_checkpoint(path)
    state = torch.load(path, weights_only=True)
    sizes = [{**state["config"], **wrong} for wrong in (dict(n_embd=value), dict(n_layer=10**9))]
    for wrong in value, {key: value}, *sizes:
        other = {**state, field: wrong}
        if gone:
            del other[field]
        torch.save(other, path)
        assert_error_or_correct_read(path, load_checkpoint, check_checkpoint)


def test_zip_that_unpacks_to_more_than_it_is(tmp_path):
    path = tmp_path / "model_00001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError):
        load_checkpoint(path)
    assert_error_or_correct_read(path, load_checkpoint, check_checkpoint)


@fuzz
@given(manifest=st.dictionaries(st.just("encoding") | st.text(max_size=5), JUNK, max_size=3) | JUNK)
def test_manifest(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.json is no manifest"):
        read_manifest(tmp_path)
