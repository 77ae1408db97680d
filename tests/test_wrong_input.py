"""What a user can get wrong ends in one line that says what to do, with exit code 1 and nothing
written."""

import json
import os
import pickle
import re
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import TINY, llmc_header, write_shards

from train_gpt2 import GPT2, main

RUN = TINY + ["--data", "data", "--log_dir", "log"]


def contents(folder):
    """All that is in a folder but locks, which have to be held before a run can look."""
    result = {}
    for path in folder.rglob("*"):
        if path.name != ".lock":
            result[path] = path.read_bytes() if path.is_file() else None
    return result


def one_error(capsys):
    """What main() has printed to stderr, which has to be one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def assert_one_error(here, capsys, argv, *words):
    before = contents(here)
    capsys.readouterr()
    assert main(RUN + argv) == 1
    error = one_error(capsys)
    for word in words:
        assert word in error
    assert contents(here) == before


# --------------------------------------------------------------------------------------------------
# Flags

FLAGS = {
    "unknown flag": ["--learning_rate", "1"],
    "a flag that is gone": ["--tf32"],
    "abbreviated flag": ["--max_step", "1"],
    "stray word": ["train"],
    "a flag without its dashes": ["max_steps=5"],
    "not an integer": ["--max_steps", "1.5"],
    "float that is text": ["--max_lr", "fast"],
    "float with a comma": ["--max_lr", "0,001"],
    "infinite": ["--weight_decay", "inf"],
    "minus infinity": ["--grad_clip", "-inf"],
    "temperature below zero": ["--temperature", "-0.5"],
    "value for a switch": ["--shuffle=maybe"],
    "one switch both ways, misspelt": ["--no-shuffel"],
    "auto said aloud": ["--micro_batch_size", "auto"],
    "unknown model": ["--model", "gpt3"],
    "unknown dtype": ["--dtype", "fp8"],
    "unknown attention": ["--attention", "linear"],
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
    "two devices": ["--device", "cpu:1"],
    "device without a number": ["--device", "cuda:x"],
    "device with a negative number": ["--device", "cuda:-1"],
    "prompt longer than the context": ["--sample_every", "5", "--prompt", "seventeen letters"],
    "no data": ["--data", "nowhere"],
    "data is a file": ["--data", "data/manifest.json"],
    "data is a loop of links": ["--data", "loop"],
    "log folder is a loop of links": ["--log_dir", "loop"],
    "log folder in a loop of links": ["--log_dir", "loop/log"],
    "log folder is a file": ["--log_dir", "data/manifest.json"],
    "log folder in a file": ["--log_dir", "data/manifest.json/log"],
    "no checkpoint to start from": ["--init_from", "nowhere/checkpoint_00001.pt"],
    "weights that are no checkpoint": ["--init_from", "data/manifest.json"],
    "weights are a loop of links": ["--init_from", "loop"],
    "weights are a folder of shards": ["--init_from", "data"],
    "weights are a shard": ["--init_from", "data/text_val_000000.npy"],
    "weights of a model nobody published": ["--init_from", "gpt5"],
    "nothing to generate from": ["--generate", "x", "--log_dir", "nowhere"],
    "nothing to export": ["--export", "out", "--log_dir", "nowhere"],
}

SWITCHES = ["shuffle", "pad_vocab", "compile", "deterministic", "activation_checkpointing"]
TEXTS = ["data", "init_from", "log_dir", "device", "model", "attention", "dtype", "export"]
ANY_TEXT = ["prompt", "generate"]  # may be empty, too
# The smallest value of each
INTEGERS = dict(
    n_layer=1,
    n_head=1,
    n_embd=1,
    block_size=1,
    total_batch_size=1,
    micro_batch_size=1,
    sequence_length=1,
    warmup_steps=0,
    max_steps=1,
    val_every=0,
    val_tokens=1,
    hellaswag_every=0,
    sample_every=0,
    print_every=1,
    checkpoint_every=0,
    keep_checkpoints=0,
    seed=0,
    num_samples=1,
    max_new_tokens=1,
    top_k=0,
)
FLOATS = dict(max_lr=0, min_lr=0, weight_decay=0, grad_clip=0, temperature=0)
NUMBERS = INTEGERS | FLOATS

for name in SWITCHES:
    FLAGS[f"--{name} with a value"] = [f"--{name}=1"]
for name in TEXTS + list(NUMBERS):
    FLAGS[f"--{name} is empty"] = [f"--{name}="]
for name in TEXTS + ANY_TEXT + list(NUMBERS):
    FLAGS[f"--{name} without its value"] = [f"--{name}"]
for name, lowest in NUMBERS.items():
    FLAGS[f"--{name} is text"] = [f"--{name}=many"]
    FLAGS[f"--{name} is too small"] = [f"--{name}={lowest - 1}"]
    FLAGS[f"--{name} is huge"] = [f"--{name}={10**30}"]
    FLAGS[f"--{name} is not a number"] = [f"--{name}=nan"]


@pytest.mark.parametrize("case", FLAGS)
def test_flags(here, capsys, case):
    (here / "loop").symlink_to("loop")
    assert_one_error(here, capsys, FLAGS[case])


def test_no_flag_is_left_out_here(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    flags = set(re.findall(r"^  --(?!no-)(\w+)", capsys.readouterr().out, re.MULTILINE))
    assert flags == set(SWITCHES + TEXTS + ANY_TEXT + list(NUMBERS))


def test_a_run_that_is_shorter_than_its_warm_up_names_both_numbers(here, capsys):
    flags = ["--model", "gpt2", "--warmup_steps", "715", "--max_steps", "10"]
    assert_one_error(here, capsys, flags, "--warmup_steps 715", "--max_steps 10")


def test_a_log_folder_that_is_a_file_is_not_another_run_s(here, capsys):
    for name in ("data/manifest.json", "data/manifest.json/log"):
        assert main(RUN + ["--log_dir", name]) == 1
        error = one_error(capsys)
        assert f"--log_dir {name} can't be written" in error
        assert "another run" not in error


def test_a_fresh_folder_stays_empty(tmp_path, monkeypatch, capsys):
    """Also where the demo data would have to be written first."""
    monkeypatch.chdir(tmp_path)
    for wrong in (["--prompt", "x" * 999], ["--n_head", "5"], ["--warmup_steps", "9999"]):
        assert main(["--device", "cpu"] + wrong) == 1
        one_error(capsys)
        assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Data


def npy(array):
    return lambda path: np.save(path, array)


def raw(content):
    return lambda path: path.write_bytes(content)


def npy_header(shape):
    text = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({shape},), }}"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


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
    "a loop of links.npy": lambda path: path.symlink_to(path),
    "absurd shape.npy": raw(npy_header("10000000000000")),
    "negative shape.npy": raw(npy_header("-5") + bytes(8000)),
    "header that is code.npy": raw(npy_header("__import__('os').mkdir('pwned')") + bytes(8000)),
    "header of four gigabytes.npy": raw(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(8000)),
    "big-endian.npy": npy(np.zeros(4000, ">u2")),
    "a folder.bin": lambda path: path.mkdir(),
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
    assert_one_error(here, capsys, [], f"has no {missing} shard", "--shard_size")


def test_shards_too_short_for_a_window(here, capsys):
    """Together they may have enough: a window lies in one shard."""
    lengths = dict(short=(10, 10), train=(200, 16, 16, 16), val=(16, 200))
    for name in lengths:
        write_shards(here / name, lengths=lengths[name])
        assert_one_error(here, capsys, ["--data", name], "16 + 1", "--sequence_length")


@pytest.mark.parametrize("size", [0, 1, 4001])
def test_nanogpt_file_of_half_a_token_is_none(here, capsys, size):
    (here / "data/train.bin").write_bytes(b"\1" * size)
    assert_one_error(here, capsys, [], "train.bin is not a token shard")


def test_llmc_header_counts_under_nanogpt_s_name_too(here, capsys):
    for header in (llmc_header(20240520, 4000), llmc_header(20240520, 3500, version=2)):
        (here / "data/train.bin").write_bytes(header + bytes(7000))
        assert_one_error(here, capsys, [], "train.bin is not a token shard", "header")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "\xff",
        '{"encoding": "bytes"}',
        '{"vocab_size": 257}',
        '{"encoding": [], "vocab_size": 257}',
        '{"encoding": null, "vocab_size": 257}',
        '{"encoding": "my", "vocab_size": 257.0}',
        '{"encoding": "my", "vocab_size": "257"}',
        '{"encoding": "my", "vocab_size": 0}',
        '{"encoding": "my", "vocab_size": -5}',
        '{"encoding": "my", "vocab_size": 1e999}',
        '{"encoding": "my", "vocab_size": 65537}',
    ],
)
def test_manifest_that_is_none(here, capsys, text):
    (here / "data/manifest.json").write_bytes(text.encode("latin-1"))
    assert_one_error(here, capsys, [], "manifest.json")


def test_manifest_that_is_a_folder(here, capsys):
    (here / "data/manifest.json").unlink()
    (here / "data/manifest.json").mkdir()
    assert_one_error(here, capsys, [], "manifest.json")


def test_nanogpt_folder_of_characters_needs_a_manifest_and_the_error_says_which(here, capsys):
    """And meta.pkl, which is a pickle, is not opened."""
    (here / "data/manifest.json").unlink()
    (here / "data/meta.pkl").write_bytes(pickle.dumps(Hostile()))
    assert_one_error(here, capsys, [], "meta.pkl", "write data/manifest.json with")
    main(RUN)
    manifest = re.search(r"with (\{.*\})", one_error(capsys)).group(1)
    (here / "data/manifest.json").write_text(manifest)
    assert main(RUN) == 0
    assert "ln 65 = " in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_outside_the_vocabulary_names_its_shard(here, capsys, split):
    """Noticed when a step or a validation sees it, since shards are not read beforehand."""
    write_shards(here / "gpt2")
    assert json.loads((here / "gpt2/manifest.json").read_text())["encoding"] == "bytes"
    number = dict(val=0, train=1)[split]
    np.save(here / f"gpt2/text_{split}_{number:06d}.npy", np.full(3000, 50256, np.uint16))
    assert main(RUN + ["--data", "gpt2", "--val_every", "5"]) == 1
    error = one_error(capsys)
    assert f"text_{split}_{number:06d}.npy" in error
    assert "50256" in error and "257" in error


# --------------------------------------------------------------------------------------------------
# Questions

QUESTION = dict(ctx="A cat", endings=["sits", "flies", "is a dog", "sings"], label="0")
QUESTIONS = {
    "junk": b"junk",
    "empty": b"",
    "bytes that are not UTF-8": b"\xff\xfe",
    "a list": b"[]",
    "three endings": json.dumps(QUESTION | dict(endings=["a", "b", "c"])).encode(),
    "an ending without text": json.dumps(QUESTION | dict(endings=["a", "b", "c", ""])).encode(),
    "a fifth label": json.dumps(QUESTION | dict(label="4")).encode(),
    "no label": json.dumps(QUESTION | dict(label="")).encode(),
    "cut in the middle": json.dumps(QUESTION).encode()[:-10],
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_hellaswag_file_that_is_none_is_an_error_before_a_run_begins(here, capsys, case):
    write_shards(here / "gpt2", encoding="gpt2")
    (here / "hellaswag").mkdir()
    (here / "hellaswag/hellaswag_val.jsonl").write_bytes(QUESTIONS[case])
    flags = ["--data", "gpt2", "--hellaswag_every", "5"]
    assert_one_error(here, capsys, flags, "hellaswag_val.jsonl")


# --------------------------------------------------------------------------------------------------
# Checkpoints


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_a_loop(path):
    path.unlink()
    path.symlink_to(path)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "one bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "a folder": replace_by_a_folder,
    "a loop of links": replace_by_a_loop,
    "another program's": lambda path: torch.save(dict(model={}, step=10), path),
    "no dictionary": lambda path: torch.save(["format"], path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(dict(step=10))),
    "a zip of something else": lambda path: zipfile.ZipFile(path, "w").close(),
}


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def rename_a_shard(data):
    (data / "text_train_000001.npy").rename(data / "other_train_000001.npy")


def change_one_token(split, position):
    def change(data):
        path = next(data.glob(f"text_{split}_*.npy"))
        tokens = np.load(path)
        tokens[position] += 1
        np.save(path, tokens)

    return change


def swap_two_shards(data):
    first = data / "text_train_000001.npy"
    second = data / "text_train_000002.npy"
    tokens = np.load(first)
    np.save(first, np.load(second))
    np.save(second, tokens)


def add_a_shard(data):
    np.save(data / "text_train_000003.npy", np.zeros(900, np.uint16))


# Ways in which data become other data, although their numbers of tokens may stay the same
OTHER_DATA = {
    "a shard of another name": rename_a_shard,
    "another token at the start of a train shard": change_one_token("train", 0),
    "another token at the end of a train shard": change_one_token("train", -1),
    "another token in the val shard": change_one_token("val", 3),
    "shards in another order": swap_two_shards,
    "a shard more": add_a_shard,
}


# A run that saves itself twice
SAVING = ["--max_steps", "10", "--checkpoint_every", "5"]


@pytest.fixture
def saved(here, capsys):
    """The last checkpoint of a run that has saved itself after 5 and after 10 steps."""
    assert main(RUN + SAVING) == 0
    capsys.readouterr()
    return here / "log/checkpoint_00010.pt"


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_newest_is_named_and_the_one_before_it_used(saved, capsys, damage):
    """And it does not count among those to keep."""
    DAMAGE[damage](saved)
    flags = ["--checkpoint_every", "1", "--keep_checkpoints", "1", "--max_steps", "8"]
    assert main(RUN + flags) == 0
    out = capsys.readouterr().out
    assert "log/checkpoint_00010.pt is not " in out
    assert "resuming log after 5 steps" in out
    left = sorted(path.name for path in saved.parent.glob("checkpoint_*"))
    assert left == ["checkpoint_00008.pt", "checkpoint_00010.pt"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_when_none_can_be_read_it_is_an_error(saved, here, capsys, damage):
    DAMAGE[damage](saved)
    DAMAGE[damage](saved.with_name("checkpoint_00005.pt"))
    assert_one_error(here, capsys, SAVING, "no checkpoint in log can be read")
    assert_one_error(here, capsys, ["--generate", "x"], "no checkpoint in log can be read")
    shutil.copytree("log", "damaged", symlinks=True)
    flags = ["--init_from", "damaged/checkpoint_00010.pt", "--log_dir", "new"]
    assert_one_error(here, capsys, flags, "damaged/checkpoint_00010.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_that_is_a_program_runs_nothing(here, capsys, zipped):
    (here / "log").mkdir()
    hostile = here / "log/checkpoint_00005.pt"
    state = dict(step=5, model=Hostile(), identity={})
    torch.save(state, hostile, _use_new_zipfile_serialization=zipped)
    torch.load(hostile, weights_only=False)
    (here / "pwned").rmdir()  # it would have run, were it let
    for argv in ([], ["--generate", "x"], ["--export", "out"]):
        assert_one_error(here, capsys, argv, "no checkpoint in log can be read")
    flags = ["--init_from", str(hostile), "--log_dir", "new"]
    assert_one_error(here, capsys, flags, "log/checkpoint_00005.pt is not ")


def test_any_flipped_bit_is_detected_or_harmless(saved):
    good = torch.load(saved, weights_only=True)["model"]
    content = saved.read_bytes()
    storage = good["transformer.wpe.weight"].numpy().tobytes()
    first = content.index(storage)
    bits = [8 * first + i for i in range(0, 8 * len(storage), 97)]  # within a tensor
    inside = len(bits)
    bits += np.random.default_rng(0).integers(0, 8 * len(content), 150).tolist()
    for n, bit in enumerate(bits):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        saved.write_bytes(damaged)
        try:
            model = GPT2.from_pretrained(str(saved))
        except SystemExit:
            continue
        assert n >= inside
        for name, value in model.state_dict().items():
            assert torch.equal(value, good[name]), name


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--n_layer=3", "n_layer"),
        ("--n_embd=34", "n_embd"),
        ("--n_head=4", "n_head"),
        ("--block_size=32 --sequence_length=16", "block_size"),
        ("--no-pad_vocab", "pad_vocab"),
        ("--seed=1", "seed"),
        ("--no-shuffle", "shuffle"),
        ("--sequence_length=8", "sequence_length"),
        ("--total_batch_size=64", "total_batch_size"),
    ],
)
def test_another_run_s_folder_is_refused(saved, here, capsys, flags, name):
    """And what differs is named. What may change: tests/test_training.py."""
    words = ("log holds another run", name, "--log_dir")
    assert_one_error(here, capsys, SAVING + flags.split(), *words)


def test_another_vocabulary_is_another_run(saved, here, capsys):
    write_shards(here / "other", vocab_size=300, encoding="my")
    flags = SAVING + ["--data", "other"]
    assert_one_error(here, capsys, flags, "log holds another run", "vocab_size")


@pytest.mark.parametrize("case", OTHER_DATA)
def test_other_data_are_another_run(saved, here, capsys, case):
    flags = SAVING + ["--max_steps", "12"]
    shutil.copytree("data", "moved")
    OTHER_DATA[case](here / "data")
    words = ("log holds another run", "data", "--log_dir")
    assert_one_error(here, capsys, flags, *words)
    assert main(RUN + flags + ["--data", "moved"]) == 0


def test_a_run_that_is_past_its_end_already(saved, here, capsys):
    assert_one_error(here, capsys, SAVING + ["--max_steps", "9"], "--max_steps 9")


def test_log_folder_with_checkpoints_that_are_not_ours(here, capsys, recwarn):
    """There is nothing to generate from, but a new run starts."""
    (here / "log").mkdir()
    torch.save(dict(model={}, config=None, step=5), here / "log/model_05000.pt")
    assert_one_error(here, capsys, ["--generate=x"], "no checkpoint in log; train first")
    flags = ["--init_from=log/model_05000.pt"]
    assert_one_error(here, capsys, flags, "log/model_05000.pt does not hold a GPT-2")
    assert not recwarn.list
    assert main(RUN) == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
def test_permission_denied(here, capsys):
    assert main(RUN + ["--checkpoint_every", "20"]) == 0
    write_shards(here / "locked")
    (here / "readonly").mkdir()
    (here / "readonly").chmod(0o500)
    for name in ("locked/text_train_000001.npy", "log/checkpoint_00020.pt"):
        (here / name).chmod(0)
    capsys.readouterr()
    for argv in (["--log_dir=readonly/log"], ["--log_dir=readonly"], ["--data=locked"], []):
        assert main(RUN + argv) == 1
        one_error(capsys)
