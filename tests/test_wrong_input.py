"""What a user can get wrong ends in one line that says what to do, with exit code 2 and nothing written."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, llmc_header, write_shards

from train_gpt2 import main

FLAGS = {
    "unknown flag": ["--learning_rate", "1"],
    "abbreviated flag": ["--max_step", "1"],
    "stray word": ["train"],
    "not a number": ["--max_steps", "many"],
    "not an integer": ["--max_steps", "1.5"],
    "negative": ["--max_steps", "-1"],
    "zero": ["--n_layer", "0"],
    "nan": ["--max_lr", "nan"],
    "infinite": ["--weight_decay", "inf"],
    "unknown model": ["--model", "gpt3"],
    "unknown dtype": ["--dtype", "fp8"],
    "unknown attention": ["--attention", "linear"],
    "missing value": ["--max_steps"],
    "auto where nothing is": ["--max_steps", "auto"],
    "heads do not divide width": ["--n_head", "3"],
    "batch is not divisible": ["--total_batch_size", "100"],
    "batch is not divisible by the micro-batch": ["--micro_batch_size", "3"],
    "batch is shorter than a sequence": ["--total_batch_size", "8"],
    "sequence is longer than the block": ["--sequence_length", "17"],
    "warm-up is longer than the run": ["--warmup_steps", "21"],
    "rate ends above its peak": ["--min_lr", "1"],
    "no such device": ["--device", "tpu9"],
    "device of another kind": ["--device", "meta"],
    "device that is not there": ["--device", "cuda:99"],
    "device is empty": ["--device", ""],
    "prompt longer than the context": ["--sample_every", "5", "--prompt", "seventeen letters"],
    "no data": ["--data", "nowhere"],
    "no checkpoint to start from": ["--init_from", "nowhere/model_00001.pt"],
    "weights that are no checkpoint": ["--init_from", "data/manifest.json"],
    "nothing to generate from": ["--generate", "x", "--log_dir", "nowhere"],
}


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_one_error(here, capsys, argv, *words):
    before = files(here)
    assert main(["--data", "data", *TINY, "--log_dir", "log", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    for word in words:
        assert word in error
    assert files(here) == before


@pytest.mark.parametrize("case", FLAGS)
def test_flags(here, capsys, case):
    assert_one_error(here, capsys, FLAGS[case])


def npy(array):
    def write(path):
        np.save(path, array)

    return write


def raw(data):
    return lambda path: path.write_bytes(data)


def truncated(path):
    np.save(path, np.arange(4000, dtype=np.uint16) % 50)
    path.write_bytes(path.read_bytes()[:-1000])


SHARDS = {
    "empty file.npy": raw(b""),
    "binary junk.npy": raw(bytes(range(256)) * 20),
    "truncated.npy": truncated,
    "int32.npy": npy(np.zeros(4000, np.int32)),
    "float.npy": npy(np.zeros(4000)),
    "two-dimensional.npy": npy(np.zeros((40, 100), np.uint16)),
    "no dimension.npy": npy(np.uint16(7)),
    "pickled.npy": npy(np.array([{}, 1], dtype=object)),
    "beyond the vocabulary.npy": npy(np.full(4000, 300, np.uint16)),
    "empty file.bin": raw(b""),
    "short header.bin": raw(b"\0" * 100),
    "nanoGPT's headerless tokens.bin": raw(np.zeros(4000, np.uint16).tobytes()),
    "wrong magic.bin": raw(llmc_header(20240522, 4000) + bytes(8000)),
    "wrong version.bin": raw(llmc_header(20240520, 4000, version=2) + bytes(8000)),
    "truncated.bin": raw(llmc_header(20240520, 4000) + bytes(7000)),
    "negative count.bin": raw(llmc_header(20240520, -1) + bytes(8000)),
    "absurd count.bin": raw(llmc_header(20240520, 2**31 - 1) + bytes(8000)),
    "folder.npy": lambda path: path.mkdir(),
    "an npz.npy": lambda path: np.savez(open(path, "wb"), np.zeros(4000, np.uint16)),
    "broken zip.npy": raw(b"PK\x03\x04 and then nothing of the kind"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", SHARDS)
def test_shard_that_is_none_is_named(here, capsys, case, split):
    name = f"text_{split}_000009.{case.split('.')[-1]}"
    SHARDS[case](here / "data" / name)
    assert_one_error(here, capsys, [], name)


@pytest.mark.parametrize("missing", ["train", "val"])
def test_folder_without_one_of_the_splits(here, capsys, missing):
    for path in (here / "data").glob(f"*_{missing}_*"):
        path.unlink()
    assert_one_error(here, capsys, [], f"holds no {missing} shard")


def test_shards_too_short_for_a_window(here, capsys):
    write_shards(here / "short", lengths=(10, 10))
    assert_one_error(here, capsys, ["--data", "short"], "too few")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"encoding": "rot13"}', '{"encoding": []}', "\xff"])
def test_manifest_that_is_none(here, capsys, text):
    (here / "data/manifest.json").write_bytes(text.encode("latin-1"))
    assert_one_error(here, capsys, [], "manifest.json")


def test_gpt2_tokens_are_not_read_as_bytes(here, capsys):
    write_shards(here / "gpt2", vocab_size=50257)
    np.save(here / "gpt2/text_train_000003.npy", np.array([50256] * 100, np.uint16))
    assert json.loads((here / "gpt2/manifest.json").read_text())["encoding"] == "bytes"
    assert_one_error(here, capsys, ["--data", "gpt2"], "text_train_000003.npy", "50256")


@pytest.mark.parametrize("log_dir", ["data/manifest.json", "data/manifest.json/log"])
def test_log_folder_that_cannot_be_written(here, capsys, log_dir):
    assert_one_error(here, capsys, ["--log_dir", log_dir], "--log_dir")


def test_run_that_is_past_its_end_already(here, capsys):
    assert main(["--data", "data", *TINY, "--log_dir", "log", "--checkpoint_every", "20"]) == 0
    capsys.readouterr()
    assert_one_error(here, capsys, ["--max_steps", "10"], "--max_steps 10")


def test_fresh_folder_stays_empty(tmp_path, monkeypatch, capsys):
    """Also where the demo data would have to be written first."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for wrong in (["--prompt", "x" * 999], ["--log_dir", "file/log"], ["--n_head", "5"]):
        assert main(["--device", "cpu", *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_log_that_is_none(here, capsys):
    assert main(["--data", "data", *TINY, "--log_dir", "log", "--max_steps", "4", "--checkpoint_every", "4"]) == 0
    (here / "log/log.txt").write_text("my notes\n")
    capsys.readouterr()
    assert_one_error(here, capsys, [], "--log_dir log")


def test_log_folder_of_another_model(here, capsys):
    assert main(["--data", "data", *TINY, "--log_dir", "log", "--checkpoint_every", "20"]) == 0
    capsys.readouterr()
    assert_one_error(here, capsys, ["--n_layer", "3"], "another model", "n_layer 2, not 3")


def test_log_folder_with_checkpoints_that_are_not_ours(here, capsys):
    (here / "log").mkdir()
    torch.save(dict(model={}, config=None, step=5), here / "log/model_05000.pt")
    assert_one_error(here, capsys, [], "no checkpoint in log can be read")


def test_hellaswag_file_that_is_none(here, capsys):
    write_shards(here / "gpt2", encoding="gpt2")
    (here / "hellaswag").mkdir()
    (here / "hellaswag/hellaswag_val.bin").write_bytes(b"junk")
    assert_one_error(here, capsys, ["--data", "gpt2", "--hellaswag_every", "5"], "hellaswag_val.bin")
