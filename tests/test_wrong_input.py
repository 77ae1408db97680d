"""What a user can get wrong ends in one line that says what to do, with exit code 2 and nothing
written."""

import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from conftest import PROGRAM, TINY, llmc_header, python, write_hellaswag, write_shards

import fineweb
from hellaswag import read_questions
from train_gpt2 import TrainConfig, UserError, fields, load_checkpoint, main

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
    "auto said aloud": ["--micro_batch_size", "auto"],
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
    "nothing to export": ["--export", "out", "--log_dir", "nowhere"],
    "export over something": ["--export", "data"],
    "data is a file": ["--data", "data/manifest.json"],
    "data is a loop of links": ["--data", "loop"],
    "log folder is a loop of links": ["--log_dir", "loop"],
    "log folder in a loop of links": ["--log_dir", "loop/log"],
    "weights are a loop of links": ["--init_from", "loop"],
    "weights are a folder of shards": ["--init_from", "data"],
    "weights are a shard": ["--init_from", "data/text_val_000000.npy"],
    "weights of a model nobody published": ["--init_from", "gpt5"],
    "two devices": ["--device", "cpu:1"],
    "device without a number": ["--device", "cuda:x"],
    "device with a negative number": ["--device", "cuda:-1"],
    "value for a switch": ["--shuffle=maybe"],
    "one switch both ways, misspelt": ["--no-shuffel"],
    "a flag without its dashes": ["max_steps=5"],
    "float that is text": ["--max_lr", "fast"],
    "float with a comma": ["--max_lr", "0,001"],
    "temperature below zero": ["--temperature", "-0.5"],
    "minus infinity": ["--grad_clip", "-inf"],
    "model too deep for any machine": ["--n_layer", "1000000000"],
    "model too wide for any machine": ["--n_embd", "1000000000"],
    "context too long for any machine": ["--block_size", "1000000000000"],
}
# Every flag: what is too small, not of its kind, empty, or beyond 64 bits; any prompt will do
for f in (f for f in fields(TrainConfig) if f.metadata and f.name not in ("prompt", "generate")):
    if f.metadata["kind"] is bool:
        FLAGS[f"--{f.name} with a value"] = [f"--{f.name}=1"]
        continue
    FLAGS[f"--{f.name} is empty"] = [f"--{f.name}="]
    FLAGS[f"--{f.name} without its value"] = [f"--{f.name}"]
    if f.metadata["kind"] in (int, float):
        FLAGS[f"--{f.name} is text"] = [f"--{f.name}=many"]
        FLAGS[f"--{f.name} is too small"] = [f"--{f.name}={f.metadata['low'] - 1}"]
        FLAGS[f"--{f.name} is huge"] = [f"--{f.name}={10**30}"]
        FLAGS[f"--{f.name} is not a number"] = [f"--{f.name}=nan"]


RUN = ["--data", "data", *TINY, "--log_dir", "log"]


def files(folder):
    """All but the lock, which has to be held before a run can look."""
    paths = [path for path in folder.rglob("*") if path.name != ".lock"]
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def assert_one_error(here, capsys, argv, *words):
    (here / "loop").is_symlink() or (here / "loop").symlink_to("loop")
    before = files(here)
    assert main([*RUN, *argv]) == 2
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


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def truncated(path):
    np.save(path, np.arange(4000, dtype=np.uint16) % 50)
    path.write_bytes(path.read_bytes()[:-1000])


U2 = "{'descr': '<u2', 'fortran_order': False, 'shape': (%s,), }"
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
    "a loop of links.npy": lambda path: path.symlink_to(path),
    "absurd shape.npy": raw(npy_header(U2 % "10000000000000")),
    "negative shape.npy": raw(npy_header(U2 % "-5") + bytes(8000)),
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
    assert_one_error(here, capsys, [], f"holds no {missing} shard", "--shard_size")


def test_shards_too_short_for_a_window(here, capsys):
    """Together they may have enough: a window lies in one shard."""
    for name, lengths in dict(short=(10, 10), train=(200, 16, 16, 16), val=(16, 200)).items():
        write_shards(here / name, lengths=lengths)
        advice = "each shard", "16 + 1", "--sequence_length", "--shard_size"
        assert_one_error(here, capsys, ["--data", name], "too few", *advice)


@pytest.mark.parametrize("size", [0, 1, 4001])
def test_nanogpt_file_of_half_a_token_is_none(here, capsys, size):
    (here / "data/train.bin").write_bytes(b"\1" * size)
    assert_one_error(here, capsys, [], "train.bin is no token shard")


def test_llmc_header_counts_under_nanogpt_s_name_too(here, capsys):
    for header in llmc_header(20240520, 4000), llmc_header(20240520, 3500, version=2):
        (here / "data/train.bin").write_bytes(header + bytes(7000))
        assert_one_error(here, capsys, [], "train.bin has a wrong header")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", "\xff", '{"encoding": "bytes"}', '{"encoding": [], "vocab_size": 257}',
    '{"encoding": "my", "vocab_size": 257.0}',
])  # fmt: skip
def test_manifest_that_is_none(here, capsys, text):
    (here / "data/manifest.json").write_bytes(text.encode("latin-1"))
    assert_one_error(here, capsys, [], "manifest.json")


def test_gpt2_tokens_are_not_read_as_bytes(here, capsys):
    write_shards(here / "gpt2")
    np.save(here / "gpt2/text_train_000003.npy", np.array([50256] * 100, np.uint16))
    assert json.loads((here / "gpt2/manifest.json").read_text())["encoding"] == "bytes"
    assert_one_error(here, capsys, ["--data", "gpt2"], "text_train_000003.npy", "50256")


@pytest.mark.parametrize("log_dir", ["data/manifest.json", "data/manifest.json/log"])
def test_log_folder_that_cannot_be_written(here, capsys, log_dir):
    assert_one_error(here, capsys, ["--log_dir", log_dir], "--log_dir")


def test_run_that_is_past_its_end_already(here, capsys):
    assert main([*RUN, "--checkpoint_every", "20"]) == 0
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
    assert main([*RUN, "--max_steps", "4", "--checkpoint_every", "4"]) == 0
    (here / "log/log.txt").write_text("my notes\n")
    capsys.readouterr()
    assert_one_error(here, capsys, [], "--log_dir log")


@pytest.mark.parametrize("state", [dict(model={}, config=None, step=5), torch.zeros(5)])
def test_log_folder_with_checkpoints_that_are_not_ours(here, capsys, state, recwarn):
    """There is nothing to generate from, but a new run starts; tests/test_pretrained.py."""
    (here / "log").mkdir()
    torch.save(state, here / "log/model_05000.pt")
    assert_one_error(here, capsys, ["--generate=x"], "no checkpoint in log; train first")
    assert_one_error(here, capsys, ["--init_from=log/model_05000.pt"], "model_05000.pt can't be")
    assert not recwarn.list
    assert main(RUN) == 0


HELLASWAG = {
    "junk": b"junk",
    "empty": b"",
    "headerless": bytes(4000),
    "no examples": llmc_header(20240522, 0, 0),
    "fewer than promised": llmc_header(20240522, 5, 100),
    "a negative number": llmc_header(20240522, -1, 100) + bytes(100),
    "an absurd number": llmc_header(20240522, 2**31 - 1, 100) + bytes(100),
    "cut in the middle of a number": llmc_header(20240522, 1, 100) + b"\xff\xff\x01",
    "example of no length": llmc_header(20240522, 1, 100) + b"\xff\xff" + bytes(100),
}


@pytest.mark.parametrize("case", HELLASWAG)
def test_hellaswag_file_that_is_none(here, capsys, case):
    write_shards(here / "gpt2", encoding="gpt2")
    (here / "hellaswag").mkdir()
    (here / "hellaswag/hellaswag_val.bin").write_bytes(HELLASWAG[case])
    flags = ["--data", "gpt2", "--hellaswag_every", "5"]
    assert_one_error(here, capsys, flags, "hellaswag_val.bin")


def test_hellaswag_file_of_another_vocabulary_or_with_a_fifth_ending(tmp_path):
    file, endings = tmp_path / "h.bin", [[1], [2], [3], [70]]
    for example in ([1, 2, 50257], endings, 0), ([1, 2], endings, 4):
        write_hellaswag(file, [example])
        with pytest.raises(fineweb.UserError, match="is no HellaSwag token file"):
            read_questions(file)
    write_hellaswag(file, [([1, 2], endings, 3)])
    with pytest.raises(fineweb.UserError, match="beyond a vocabulary of 60"):
        read_questions(file, vocab_size=60)


def test_hellaswag_of_full_size_is_read_whole(tmp_path):
    """Positions in the file outgrow its 16-bit numbers."""
    examples = [([i] * 50, [[i % 7], [8], [9] * 20, [10]], i % 4) for i in range(3000)]
    write_hellaswag(tmp_path / "h.bin", examples)
    for read, written in zip(read_questions(tmp_path / "h.bin"), examples, strict=True):
        endings = [ending.tolist() for ending in read[1]]
        assert (read[0].tolist(), endings, read[2]) == written


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "one bit flipped": flip,
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path)),
    "another program's": lambda path: torch.save(dict(model={}, step=10, format=1), path),
    "no dictionary": lambda path: torch.save(["format"], path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(dict(format=1))),
    "a zip of something else": lambda path: zipfile.ZipFile(path, "w").close(),
}


class TestCheckpoints:
    """Those of a run that has saved itself after 5 and after 10 steps."""

    SAVING = ("--max_steps", "10", "--checkpoint_every", "5")

    @pytest.fixture
    def saved(self, here, capsys):
        assert main([*RUN, *self.SAVING]) == 0
        capsys.readouterr()
        return here / "log/model_00010.pt"

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_damaged_newest_is_named_and_the_one_before_it_used(self, saved, capsys, damage):
        """And it does not count among those to keep."""
        DAMAGE[damage](saved)
        run = [*RUN, "--checkpoint_every", "1", "--keep_checkpoints", "1"]
        assert main([*run, "--max_steps", "8"]) == 0
        out = capsys.readouterr().out
        assert "model_00010.pt can't be read" in out and "resuming log after 5 steps" in out
        left = sorted(path.name for path in saved.parent.glob("model_*"))
        assert left == ["model_00008.pt", "model_00010.pt"]

    @pytest.mark.parametrize("damage", DAMAGE)
    def test_when_none_can_be_read_it_is_an_error(self, saved, here, capsys, damage):
        for path in saved, saved.with_name("model_00005.pt"):
            DAMAGE[damage](path)
        assert_one_error(here, capsys, self.SAVING, "no checkpoint in log can be read")
        assert_one_error(here, capsys, ["--init_from", "log/model_00010.pt"])
        assert_one_error(here, capsys, ["--generate", "x"])

    @pytest.mark.parametrize("zipped", [True, False])
    def test_checkpoint_that_is_a_program_runs_nothing(self, here, capsys, zipped):
        class Hostile:
            def __reduce__(self):
                return os.mkdir, ("pwned",)

        (here / "log").mkdir()
        hostile = here / "log/model_00005.pt"
        state, how = dict(format=1, step=5, model=Hostile()), "_use_new_zipfile_serialization"
        torch.save(state, hostile, **{how: zipped})
        with pytest.raises(FileExistsError):  # it would, were it let
            (here / "pwned").mkdir()
            torch.load(hostile, weights_only=False)
        (here / "pwned").rmdir()
        for argv in [], ["--generate", "x"], ["--export", "out"]:
            assert_one_error(here, capsys, argv, "no checkpoint")
        assert_one_error(here, capsys, ["--init_from", str(hostile)], "can't be read")

    def test_any_flipped_bit_is_detected_or_harmless(self, saved):
        good, data = torch.load(saved, weights_only=True), saved.read_bytes()
        storage = good["model"]["transformer.wpe.weight"].numpy().tobytes()
        first = data.index(storage)
        bits = [8 * first + i for i in range(0, 8 * len(storage), 97)]  # within a tensor
        bits += np.random.default_rng(0).integers(0, 8 * len(data), 150).tolist()
        for n, bit in enumerate(bits):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            saved.write_bytes(damaged)
            try:
                read = load_checkpoint(saved)
            except UserError:
                continue
            assert n >= len(bits) - 150
            assert all(read["model"][name].equal(w) for name, w in good["model"].items())

    @pytest.mark.parametrize(
        "flags, what",
        [
            ("--n_layer=3", "n_layer is 2, and here 3"), ("--n_embd=34", "n_embd is 32"),
            ("--n_head=4", "n_head is 2"), ("--block_size=32", "block_size is 16"),
            ("--no-pad_vocab", "pad_vocab is True"), ("--seed=1", "seed is 1337, and here 1"),
            ("--no-shuffle", "shuffle is True"), ("--sequence_length=8", "sequence_length is 16"),
            ("--total_batch_size=64", "total_batch_size is 128, and here 64"),
            ("--data=other", "windows is 298"), ("--data=more", "tokens is 4777, and here 4780"),
            ("--data=grown", "windows is 298"), ("--max_steps=9", "past --max_steps 9"),
        ],
    )  # fmt: skip
    def test_another_run_s_folder_is_refused(self, saved, here, capsys, flags, what):
        """And what differs is named. What may change: tests/test_training.py."""
        write_shards(here / "other", lengths=(200, 5000))
        write_shards(here / "more", lengths=(200, 3000, 1780))  # as many windows
        write_shards(here / "grown", lengths=(200, 3000, 1777, 900))
        assert_one_error(here, capsys, [*self.SAVING, flags], "error: log ", what)

    def test_many_differences_are_one_line(self, saved, here, capsys):
        write_shards(here / "other", lengths=(200, 5000), seed=7)
        flags = ["--data=other", "--seed=1", "--total_batch_size=64"]
        assert_one_error(here, capsys, [*self.SAVING, *flags], "log holds another run", "--log_dir")

    def test_format_1_knows_its_flags_if_not_its_data(self, saved, here, capsys):
        state = torch.load(saved, weights_only=True)
        del state["run"]
        torch.save({**state, "format": 1}, saved)
        assert_one_error(here, capsys, [*self.SAVING, "--seed=1"], "its seed is 1337, and here 1")

    def test_weights_without_the_rest_of_a_run(self, saved, here, capsys):
        state = torch.load(saved, weights_only=True)
        for optimizer in {}, dict(state={0: 1}, param_groups=3), 7:
            torch.save({**state, "optimizer": optimizer}, saved)
            assert_one_error(here, capsys, self.SAVING, "holds no run to go on with")
        weights = {name: state[name] for name in ("step", "config", "model")}
        torch.save({**weights, "format": 1}, saved)
        assert_one_error(here, capsys, self.SAVING, "holds no run to go on with")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
def test_permission_denied(here, capsys):
    assert main([*RUN, "--checkpoint_every", "20"]) == 0
    write_shards(here / "locked")
    (here / "readonly").mkdir()
    capsys.readouterr()
    (here / "readonly").chmod(0o500)
    for name in "locked/text_train_000001.npy", "log/model_00020.pt":
        (here / name).chmod(0)
    for argv in ["--log_dir", "readonly/log"], ["--log_dir", "readonly"], ["--data", "locked"], []:
        assert main([*RUN, *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX only")
def test_names_that_are_not_utf8(here):
    program = """
import os, sys, train_gpt2
sys.stdout.reconfigure(errors="replace")
name, run = os.fsdecode(b"caf\\xe9"), sys.argv[1:]
for flag in "--data=", "--init_from=", "--model=", "--log_dir=data/manifest.json/":
    assert train_gpt2.main([*run, flag + name]) == 2
assert not os.path.exists(name)
for steps in 3, 6:
    assert train_gpt2.main([*run, f"--max_steps={steps}", "--log_dir", name]) == 0
assert os.path.exists(os.path.join(name, "model_00006.pt"))
"""
    flags = ["--data=data", *TINY, "--checkpoint_every=3"]
    done = python("-c", program, *flags, cwd=here, env=dict(PYTHONPATH=str(PROGRAM.parent)))
    assert done.stderr.count("\n") == done.stderr.count("error: ") == 4, done.stderr
    assert "after 3 steps" in done.stdout
