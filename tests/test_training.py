"""The training loop, run as a user runs it: through the command line, on small data."""

import functools
import io
import json
import math
import re
import shutil
import signal
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import PROGRAM, TINY, python, read_log, write_hellaswag, write_shards
from torch.overrides import TorchFunctionMode

import fineweb
import hellaswag
import train_gpt2
from train_gpt2 import GPT2, GPT2Config, TrainConfig, get_lr, main

RUN = ["--data", "data", *TINY]


def losses(log_dir):
    return list(read_log(log_dir)["train"].values())


def load(path):
    return torch.load(path, weights_only=True)


def assert_said(out, **settings):
    """What was left to auto is printed."""
    for name, value in settings.items():
        assert re.search(rf"\b{name}[ =]'?{value}\b", out), out


def assert_same_weights(a, b):
    one, other = load(a)["model"], load(b)["model"]
    assert all(weight.equal(other[name]) for name, weight in one.items())


def test_learning_rate_by_hand():
    cfg = TrainConfig(min_lr=6e-5)
    assert get_lr(0, cfg) == pytest.approx(6e-4 / 715)
    assert get_lr(12, cfg) == pytest.approx(1.0909e-05, rel=1e-4)
    assert get_lr(714, cfg) == pytest.approx(6e-4)
    assert get_lr(715, cfg) == pytest.approx(6e-4)
    assert get_lr(715 + (19073 - 715) // 2, cfg) == pytest.approx(3.3e-4)
    assert get_lr(19073, cfg) == pytest.approx(6e-5)


def test_run_is_that_of_a_plain_loop_over_the_reference_optimiser(here):
    """Forty lines of textbook PyTorch, in float64, see the same losses."""
    assert main([*RUN, "--log_dir", "log", "--micro_batch_size", "2"]) == 0
    torch.manual_seed(1337)
    sizes = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model = GPT2(GPT2Config(**sizes, attention="manual")).double()
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    shards = [np.load(here / "data" / f"text_train_00000{i}.npy") for i in (1, 2)]
    windows = [s[k * 16 : k * 16 + 17] for s in shards for k in range((len(s) - 1) // 16)]
    dice = [np.random.RandomState(np.random.MT19937([1337, epoch])) for epoch in (0, 1)]
    order = np.concatenate([d.permutation(len(windows)) for d in dice])
    logged = read_log("log")
    for t in range(20):
        picked = [windows[order[s]] for s in range(t * 8, t * 8 + 8)]
        tokens = torch.from_numpy(np.stack(picked).astype(np.int64))
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        cosine = 0.5 * (1 + math.cos(math.pi * (t - 2) / 18))
        lr = 1e-2 * (t + 1) / 2 if t < 2 else 1e-3 + cosine * 9e-3
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert logged["train"][t] == pytest.approx(loss.item(), abs=1e-4)
        assert logged["norm"][t] == pytest.approx(norm, rel=1e-3)
        assert logged["lr"][t] == pytest.approx(lr)


def test_it_learns(here):
    assert main([*RUN, "--log_dir", "log", "--max_steps", "150", "--val_every", "150"]) == 0
    val = read_log("log")["val"]
    assert list(val) == [0, 150]
    assert val[0] == pytest.approx(math.log(257), abs=0.2)
    assert val[150] < 2  # the text has three equally likely next tokens at best, ln 3 = 1.1


def test_train_needs_no_command_line(here):
    """What is left to auto is found in train() itself, and the run is that of the flags."""
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, total_batch_size=128)
    plan = dict(max_steps=20, warmup_steps=2, max_lr=1e-2, device="cpu", dtype="fp32")
    off = dict(val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0)
    cfg = TrainConfig(data="data", **sizes, **plan, **off)
    assert train_gpt2.train(cfg) == 0  # into log/, as by default
    assert main([*RUN, "--log_dir", "flags"]) == 0
    assert losses("log") == losses("flags")


@pytest.mark.parametrize("pad", ["--pad_vocab", "--no-pad_vocab"])
def test_logits_beside_a_loss_carry_a_gradient_or_are_none(pad):
    config = GPT2Config(257, 1, 2, 32, 16, pad_vocab=pad == "--pad_vocab")
    idx = torch.arange(12).view(2, 6)
    logits, loss = GPT2(config)(idx, idx)
    assert loss.requires_grad and (logits is None or logits.requires_grad)


@pytest.mark.parametrize(
    "flags",
    ["--micro_batch_size 1", "--micro_batch_size 4", "--attention manual", "--no-fused_adamw",
     "--activation_checkpointing", "--deterministic"],
)  # fmt: skip
def test_what_changes_only_the_way_of_computing_leaves_the_losses(here, flags):
    assert main([*RUN, "--log_dir", "plain"]) == 0
    try:
        assert main([*RUN, "--log_dir", "other", *flags.split()]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses("other") == pytest.approx(losses("plain"), abs=1e-4)


def test_vocabulary_is_padded_unless_told_not_to(here):
    for flag, rows in ("--pad_vocab", 384), ("--no-pad_vocab", 257):
        run = [*RUN, f"--log_dir={rows}", flag, "--max_steps=2", "--checkpoint_every=2"]
        assert main(run) == 0
        weights = load(f"{rows}/model_00002.pt")["model"]
        assert len(weights["transformer.wte.weight"]) == rows


def test_attention_is_the_faster_one_unless_told_otherwise(here, capsys):
    """How the weights a run begins with were computed doesn't matter."""
    for flags, expected in (
        ("--dtype fp32", "flash"),
        ("--dtype bf16 --checkpoint_every 1", "manual"),
        ("--dtype bf16 --attention flash", "flash"),
        ("--dtype fp32 --init_from manual/model_00001.pt", "flash"),
    ):
        run = [*RUN, "--log_dir", expected, "--max_steps=1", "--warmup_steps=0"]
        assert main([*run, *flags.split()]) == 0
        assert_said(capsys.readouterr().out, attention=expected)


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_follows_float32(here, dtype, tolerance):
    assert main([*RUN, "--log_dir", "plain"]) == 0
    every = ["--val_every", "10", "--sample_every", "10"]
    assert main([*RUN, "--log_dir", "half", "--dtype", dtype, *every]) == 0
    assert losses("half") == pytest.approx(losses("plain"), abs=tolerance)
    assert losses("half") != losses("plain")


def test_loss_scaling_keeps_gradients_that_fp16_would_lose(here, monkeypatch):
    """fp16 holds nothing below 6e-8: gradients are lifted over it, and the step is that of the
    gradients as they are."""
    scales, scale = [], torch.amp.GradScaler.scale

    def watched(self, loss):
        scales.append(self.get_scale())
        return scale(self, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", watched)
    assert main([*RUN, "--log_dir", "half", "--dtype", "fp16", "--max_steps", "5"]) == 0
    assert min(scales) >= 1024
    assert max(read_log("half")["norm"].values()) < 50  # norms are those of unscaled gradients


def test_output_has_the_summary_the_step_line_and_the_first_loss(here, capsys):
    flags = ["--micro_batch_size", "2", "--val_every", "20"]
    assert main([*RUN, "--log_dir", "log", *flags]) == 0
    out, err = capsys.readouterr()
    assert_said(out, model="demo", device="cpu", dtype="fp32", micro_batch_size=2, compile=False)
    assert "34,208 parameters" in out and "knowing nothing costs ln V = 5.5491" in out
    assert "2 sequences × 16 tokens × 4 micro-steps × 1 processes" in out
    lines = [line for line in out.splitlines() if line.startswith("step ") and "| loss" in line]
    pattern = r"step +#/# \| loss #.# \| lr #.#e-# \| norm #.# \| # ms \| [#,]+ tok/s \| eta #m#s"
    pattern = pattern.replace("#", r"\d+")
    assert len(lines) == 20 and not err
    for t, line in enumerate(lines):
        assert re.fullmatch(pattern, line) and line.startswith(f"step {t:5d}/20 "), line
    assert set(read_log("log")) == {"train", "val", "lr", "norm", "tps"}


@pytest.mark.parametrize("flags, shown", [(["--print_every=7"], [0, 7, 14]), ([], [0, 10])])
def test_print_every_spares_the_screen_and_not_the_log(here, capsys, flags, shown):
    """The demo brings 10."""
    run = [flag for flag in RUN if not flag.startswith("--print_every")]
    assert main([*run, *flags, "--log_dir", "log"]) == 0
    steps = re.findall(r"^step +(\d+)/20 \| loss", capsys.readouterr().out, re.MULTILINE)
    assert [int(t) for t in steps] == [*shown, 19]  # and the last, always
    assert {len(values) for values in read_log("log").values()} == {20}


def test_schedule_of_everything_that_happens_once_in_a_while(here, capsys):
    flags = ["--val_every=8", "--sample_every=16", "--checkpoint_every=5", "--keep_checkpoints=0"]
    assert main([*RUN, "--log_dir=log", *flags, "--num_samples=3", "--max_new_tokens=5"]) == 0
    assert list(read_log("log")["val"]) == [0, 8, 16, 20]
    assert capsys.readouterr().out.count("--- sample") == 2 * 3  # after 16 and after 20 steps
    kept = sorted(path.name for path in (here / "log").glob("*.pt"))
    assert kept == [f"model_{t:05d}.pt" for t in (5, 10, 15, 20)]


def test_curves_are_drawn_with_each_checkpoint_and_at_the_end(here, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_gpt2, "draw_curves", lambda *_: drawn.append(len(losses("log"))))
    assert main([*RUN, "--log_dir=log", "--checkpoint_every=8", "--val_every=2"]) == 0
    assert drawn == [8, 16, 20]


def test_only_the_newest_checkpoints_are_kept(here):
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "3"]) == 0
    names = {path.name for path in (here / "log").iterdir()} - {".lock"}
    assert names == {"log.txt", "model_00018.pt", "model_00020.pt"}


def test_checkpoint_holds_what_it_should(here):
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "20", "--val_every", "10"]) == 0
    state = load("log/model_00020.pt")
    assert {"model", "optimizer", "scaler", "step", "config", "train_config"} <= set(state)
    assert (state["format"], state["step"], state["config"]["n_layer"]) == (2, 20, 2)
    assert state["train_config"]["max_lr"] == 0.01
    assert state["val_loss"] == pytest.approx(read_log("log")["val"][20], rel=1e-6)


@pytest.mark.parametrize(
    "first, dtype", [(1, "fp32"), (7, "fp32"), (19, "fp32"), (11, "fp16"), (11, "bf16")]
)
def test_resumed_run_ends_like_an_uninterrupted_one(here, capsys, first, dtype):
    run = [*RUN, "--dtype", dtype, "--val_every=4", "--sample_every=4", "--max_new_tokens=8"]
    run.append("--checkpoint_every")
    assert main([*run, "20", "--log_dir", "whole"]) == 0
    assert main([*run, str(first), "--log_dir", "parts", "--keep_checkpoints", "0"]) == 0
    for path in (here / "parts").glob("model_*.pt"):
        if path.name != f"model_{first:05d}.pt":
            path.unlink()  # as if the run had been killed soon after this one
    with open("parts/log.txt", "a") as log:
        log.write("20 trai")
    capsys.readouterr()
    assert main([*run, "20", "--log_dir", "parts"]) == 0
    assert f"resuming parts after {first} steps" in capsys.readouterr().out
    assert_same_weights("whole/model_00020.pt", "parts/model_00020.pt")
    moments = [load(f"{name}/model_00020.pt")["optimizer"]["state"] for name in ("whole", "parts")]
    for i, state in moments[0].items():
        assert all(value.equal(moments[1][i][key]) for key, value in state.items())
    a, b = read_log("whole"), read_log("parts")
    assert all(a[stream] == b[stream] for stream in ("train", "val", "norm", "lr"))


def test_blank_and_broken_lines_of_the_log_are_dropped(here):
    """A kill, a crash of the machine or an editor leaves them."""
    run = [*RUN, "--log_dir=log", "--checkpoint_every=10"]
    assert main(run) == 0
    log, whole = here / "log/log.txt", read_log("log")
    (here / "log/model_00020.pt").unlink()
    lines = log.read_bytes().splitlines(keepends=True)
    lines[5:5] = [b"\n", b"  \n", b"1 trai\n", b"\0\0\0\n", b"1 train 4.51 norm 2\n", b"caf\xe9\n"]
    log.write_bytes(b"".join(lines) + b"9 tra")
    assert main(run) == 0
    mended = read_log("log")
    assert all(whole[stream] == mended[stream] for stream in ("train", "norm", "lr"))
    assert log.read_text().count("\n") == 4 * 20


def test_signals_are_handled_as_before_once_main_has_returned(here, monkeypatch):
    before = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda *_: None)
    for signum, handler in before.items():
        signal.signal(signum, handler)

    def interrupted(t, cfg):
        if t == 5:
            signal.raise_signal(signum)
        return get_lr(t, cfg)

    monkeypatch.setattr(train_gpt2, "get_lr", interrupted)
    for signum in before:
        assert main([*RUN, f"--log_dir={signum}"]) == 128 + signum
        assert {s: signal.getsignal(s) for s in before} == before


def test_log_of_a_run_without_checkpoints_is_kept_beside_the_new_one(here):
    for steps in (5, 3):
        assert main([*RUN, "--log_dir", "log", "--max_steps", str(steps)]) == 0
    (old,) = (here / "log").glob("log_*.txt")
    assert len(losses("log")) == 3 and old.read_text().count("train") == 5


def test_settings_of_today_apply_to_a_resumed_run(here):
    """All but what makes it this run (tests/test_wrong_input.py) may change from start to start."""
    run = [*RUN, "--log_dir=log", "--checkpoint_every=5", "--val_every=5"]
    for steps, flags in (
        (5, "--warmup_steps=1"),
        (10, "--dtype=fp16 --micro_batch_size=2 --attention=manual --max_lr=2e-2"),
        (15, "--dtype=bf16 --no-fused_adamw --min_lr=0 --grad_clip=0.5 --val_tokens=50"),
        (20, "--weight_decay=0.3 --activation_checkpointing --prompt=x --keep_checkpoints=1"),
    ):
        assert main([*run, *flags.split(), f"--max_steps={steps}"]) == 0
    assert list(read_log("log")["train"]) == list(range(20))
    groups = load("log/model_00020.pt")["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]


def test_data_that_are_still_being_made_are_said_in_one_line(here, capsys):
    manifest = here / "data/manifest.json"
    for finished in False, True:
        said = dict(encoding="bytes", vocab_size=257, finished=finished)
        manifest.write_text(json.dumps(said))
        assert main([*RUN, "--log_dir", "log"]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "not finished" in line]
        assert len(lines) == (not finished) and all("data" in x and "4,777" in x for x in lines)


# Sizes come with the weights
TUNE = [f for f in RUN if not f.startswith(("--n_", "--block_size", "--model"))]
TUNE += ["--log_dir", "second", "--val_every", "20"]


class TestInitFrom:
    @pytest.fixture
    def first(self, here):
        """A run to take weights from."""
        run = [*RUN, "--log_dir", "first", "--checkpoint_every", "20", "--val_every", "20"]
        assert main(run) == 0
        return here / "first/model_00020.pt"

    def test_weights_of_another_run_start_a_new_one_and_are_read_once(self, first, monkeypatch):
        """And left on the disk until used, or eight processes would hold gpt2-xl eight times."""
        reads, torch_load = [], torch.load

        def watched(path, *args, **options):
            reads.append(options.get("mmap"))
            return torch_load(path, *args, **options)

        monkeypatch.setattr(torch, "load", watched)
        assert main([*TUNE, "--init_from", str(first)]) == 0
        assert reads == [True]
        val, before = read_log("second")["val"][0], read_log("first")["val"][20]
        assert val == pytest.approx(before, abs=1e-5)

    def test_a_local_folder_is_preferred_to_a_name_on_the_hub(self, first, monkeypatch, capsys):
        reads, load_file = [], safetensors.torch.load_file
        assert main(["--export", "gpt2", "--log_dir", "first", "--device", "cpu"]) == 0
        watched = lambda *args: reads.append(1) or load_file(*args)  # noqa: E731
        monkeypatch.setattr(safetensors.torch, "load_file", watched)
        assert main([*TUNE, "--init_from", "gpt2"]) == 0
        val, before = read_log("second")["val"][0], read_log("first")["val"][20]
        assert val == pytest.approx(before, abs=1e-5)
        assert len(reads) == 1

    def test_checkpoints_of_format_1_serve_as_before(self, first, here, capsys):
        """They don't say whose data they are; and attention was always said."""
        state = load(first)
        del state["run"]
        config = {**state["config"], "attention": "flash"}
        state.update(format=1, config=config)
        (here / "old").mkdir()
        torch.save(state, "old/model_00020.pt")
        capsys.readouterr()
        assert main(["--generate=some", "--log_dir=old", "--device=cpu", "--num_samples=1"]) == 0
        assert "--- sample 0\nsome" in capsys.readouterr().out
        assert main(["--export=folder", "--log_dir=old", "--device=cpu"]) == 0
        assert (here / "folder/model.safetensors").exists()
        assert main([*TUNE, "--init_from=old/model_00020.pt"]) == 0
        val, before = read_log("second")["val"][0], read_log("first")["val"][20]
        assert val == pytest.approx(before, abs=1e-5)
        run = [*RUN, "--max_steps=30", "--checkpoint_every=30"]
        assert main([*run, "--log_dir=old"]) == main([*run, "--log_dir=first"]) == 0
        assert_same_weights("old/model_00030.pt", "first/model_00030.pt")
        assert load("old/model_00030.pt")["format"] == 2


def test_the_trainer_alone_in_a_folder_trains_on_shards(here):
    """And says in a line each what it does without, with --sample_every and --hellaswag_every at
    their defaults."""
    shutil.copy(PROGRAM, here)
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2")
    off = ("--sample_every", "--hellaswag_every", "--model")
    tiny = [flag for flag in TINY if not flag.startswith(off)]
    run = ["--data=gpt2", *tiny, "--n_embd=16", "--log_dir=log", "--checkpoint_every=20"]
    done = python("train_gpt2.py", *run, cwd=here, env=dict(PYTHONPATH="", PYTHONSAFEPATH=""))
    for what in "samples", "HellaSwag":
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"no {what}")]
        assert len(lines) == 1, done.stdout
    assert not done.stderr and len(losses("log")) == 20


def test_shards_of_any_vocabulary_train(here, capsys):
    """Samples and HellaSwag are left out, in one line; an export has no tokenizer."""
    folder, every = here / "own", ["--sample_every=2", "--hellaswag_every=2", "--val_every=2"]
    folder.mkdir()
    sizes = dict(gpt2=300, bytes=60, my=2**16, german=50257, letters=257)
    for encoding, V in sizes.items():
        for split in ("train", "val"):
            tokens = np.arange(500) * 7919 % V
            np.save(folder / f"my_{split}_000000.npy", tokens.astype(np.uint16))
        manifest = dict(encoding=encoding, vocab_size=V)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        run = ["--data=own", *TINY, "--n_embd=8", f"--log_dir={encoding}", "--checkpoint_every=2"]
        run += [*every, "--val_tokens=32", "--total_batch_size=16", "--max_steps=4"]
        assert main([*run, "--max_steps=2"]) == main(run) == 0
        out, err = capsys.readouterr()
        said = [line for line in out.splitlines() if line.startswith("no ")]
        assert len(said) == 2 and said[0] == said[1] and not err, out
        assert "no samples, no HellaSwag" in said[0] and repr(encoding) in said[0]
        assert "resuming" in out and len(losses(encoding)) == 4
        assert load(f"{encoding}/model_00004.pt")["config"]["vocab_size"] == V
        assert main([f"--export={V}", f"--log_dir={encoding}", "--device=cpu"]) == 0
        assert "gets no tokenizer" in capsys.readouterr().out
        assert len(list((here / str(V)).iterdir())) == 3
        assert json.loads((here / f"{V}/config.json").read_text())["eos_token_id"] is None
        if encoding not in train_gpt2.ENCODINGS:
            assert main(["--generate=x", f"--log_dir={encoding}", "--device=cpu"]) == 2
            assert f"error: unknown encoding {encoding}; there are" in capsys.readouterr().err


@pytest.mark.parametrize("stdout", [io.StringIO(), None])
def test_no_docstrings_and_a_stdout_that_is_no_file_will_do(here, monkeypatch, stdout):
    """As with `python -OO`; in Jupyter's %run, or closed as by `>&-`."""
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *RUN, "--log_dir=log", "--max_steps=2"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    program = compile(PROGRAM.read_text(encoding="utf-8"), str(PROGRAM), "exec", optimize=2)
    with pytest.raises(SystemExit, match="0"):
        exec(program, dict(__name__="__main__", __file__=str(PROGRAM)))
    assert len(losses("log")) == 2 and (not stdout or "step     1/2" in stdout.getvalue())


def test_what_a_stdout_can_not_encode_is_replaced(here, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    samples = ["--sample_every=20", "--prompt=né", "--num_samples=1"]
    assert main([*RUN, "--log_dir=dä ta", "--checkpoint_every=20", *samples]) == 0
    assert main(["--log_dir=dä ta", "--export=pö", "--device=cpu"]) == 0
    fineweb.say("what is said while the trainer asks, é, is lost at worst")
    with pytest.raises(SystemExit):
        main(["--help"])
    stdout.flush()
    text = stdout.buffer.getvalue().decode("ascii")
    assert "8 sequences ? 16 tokens" in text and "d? ta" in text and "--- sample 0\nn?" in text
    assert "p?: 34,208 parameters" in text
    assert "--init_from" in text


@pytest.mark.parametrize("source", [[], ["--init_from", "log/model_00020.pt"]])
def test_generate_continues_a_prompt(here, capsys, source):
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "20"]) == 0
    capsys.readouterr()
    flags = ["--log_dir=log", "--num_samples=2", "--max_new_tokens=9", "--temperature=0"]
    assert main(["--generate", "some", *flags, "--device=cpu", *source]) == 0
    samples = capsys.readouterr().out.split("--- sample ")[1:]
    assert len(samples) == 2 and all(s[2:].startswith("some") for s in samples)
    assert samples[0][2:] == samples[1][2:]  # greedy


@pytest.mark.parametrize("prompt", ["ab", "", "<|endoftext|>ab", "a<|endoftext|>"])
def test_a_sample_ends_with_its_document(here, capsys, monkeypatch, prompt):
    """What is in the prompt does not end it."""

    def generate(self, idx, max_new_tokens, *how):
        new = [b"one\xfftwo", b"three", b"\xfffour"]  # 0xff stands for the end
        width = max(map(len, new))
        rows = [[256 if c == 255 else c for c in text.ljust(width, b"z")] for text in new]
        return torch.cat((idx, torch.tensor(rows)), dim=1)

    monkeypatch.setattr(GPT2, "generate", generate)
    samples = ["--sample_every=20", f"--prompt={prompt}", "--num_samples=3"]
    assert main([*RUN, "--log_dir=log", "--checkpoint_every=20", *samples]) == 0
    trained = capsys.readouterr().out
    flags = [f"--generate={prompt}", "--num_samples=3", "--log_dir=log", "--device=cpu"]
    assert main(flags) == 0
    expected = [prompt or "<|endoftext|>"] * 3
    expected = [p + end for p, end in zip(expected, ("one", "threezz", ""), strict=True)]
    for out in trained, capsys.readouterr().out:
        assert re.findall(r"^--- sample \d\n(.*)$", out, re.MULTILINE) == expected


def test_as_many_samples_as_asked_for_at_any_temperature(here, capsys):
    assert main([*RUN, "--max_steps=3", "--checkpoint_every=3", "--log_dir=log"]) == 0
    capsys.readouterr()
    for temperature in ("0", "1e-310", "1e-3", "1e9"):
        flags = ["--num_samples=35", "--max_new_tokens=3", f"--temperature={temperature}"]
        assert main(["--generate=ab", *flags, "--log_dir=log", "--device=cpu"]) == 0
        out = capsys.readouterr().out
        samples = re.findall(r"^--- sample (\d+)\nab", out, re.MULTILINE)
        assert samples == [str(i) for i in range(35)]


def test_sampling_does_not_disturb_training(here):
    assert main([*RUN, "--log_dir", "quiet"]) == 0
    every = ["--sample_every=1", "--val_every=3", "--max_new_tokens=20"]
    assert main([*RUN, "--log_dir", "chatty", *every]) == 0
    assert losses("quiet") == losses("chatty")


def test_signal_during_hellaswag_stops_it_and_it_is_done_again(here, monkeypatch):
    write_shards(here / "gpt2", lengths=(500, 5000), encoding="gpt2")
    examples = [([1] * n, [[2], [3], [4], [5]], n % 4) for n in range(1, 12)]
    write_hellaswag(here / "hellaswag/hellaswag_val.bin", examples)
    run = ["--data", "gpt2", *TINY, "--hellaswag_every=4", "--max_steps=8", "--checkpoint_every=8"]
    assert main([*run, "--log_dir", "whole"]) == 0
    count_hits, calls = hellaswag.count_hits, []

    def interrupted(model, questions, device, progress):
        def first(batches):
            if calls.append(1) or len(calls) != 3:
                return progress(batches)
            signal.raise_signal(signal.SIGTERM)
            assert not list(progress(batches))
            return []

        return count_hits(model, questions, device, first)

    monkeypatch.setattr(hellaswag, "count_hits", interrupted)
    assert main([*run, "--log_dir", "parts"]) == 128 + signal.SIGTERM
    assert list(read_log("parts")["hella"]) == [0, 4] and (here / "parts/model_00008.pt").exists()
    assert main([*run, "--log_dir", "parts"]) == 0
    whole, parts = read_log("whole"), read_log("parts")
    assert whole["hella"] == parts["hella"] and whole["train"] == parts["train"]


def test_numbers_gone_wrong_stop_the_run_and_are_not_saved(here, capsys, monkeypatch):
    forward, calls = GPT2.forward, []

    def broken(self, idx, targets=None):
        loss = forward(self, idx, targets)[1]
        calls.append(1)
        return None, loss * (math.nan if len(calls) == 9 else 1)

    monkeypatch.setattr(GPT2, "forward", broken)
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "5"]) == 2
    # Two calls were the trial of the micro-batch
    assert "error: step 6: loss nan" in capsys.readouterr().err
    assert [p.name for p in (here / "log").glob("*.pt")] == ["model_00005.pt"]


@pytest.mark.parametrize("overflows, code", [(3, 0), (100, 2)])
def test_steps_that_the_loss_scaler_skips_stop_a_run_only_where_no_scaling_helps(
    here, capsys, monkeypatch, overflows, code
):
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad * math.inf if 6 < len(calls) <= 6 + overflows else grad

    calls, forward = [], GPT2.forward
    monkeypatch.setattr(GPT2, "forward", lambda *args: (None, Overflow.apply(forward(*args)[1])))
    run = [*RUN, "--dtype=fp16", "--log_dir=log", "--checkpoint_every=4", "--max_steps=40"]
    assert main(run) == code
    if code:
        assert re.search("error: step (19|20): loss 4.", capsys.readouterr().err)  # 2^16 / 2^16
    else:
        assert losses("log")[-1] < 4.5 and (here / "log/model_00040.pt").exists()


def run_out_of_memory(monkeypatch, most):
    """Let more sequences at a time than `most` be too many."""
    forward = GPT2.forward

    def hungry(self, idx, targets=None):
        if idx.size(0) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT2, "forward", hungry)


class TestMicroBatch:
    def test_running_out_of_memory_halves_it_and_the_losses_stay(self, here, capsys, monkeypatch):
        assert main([*RUN, "--log_dir", "plain"]) == 0
        run_out_of_memory(monkeypatch, 2)
        capsys.readouterr()
        assert main([*RUN, "--log_dir", "halved"]) == 0
        out = capsys.readouterr().out
        assert "micro-batches of 8 sequences" in out and "micro-batches of 4 sequences" in out
        assert "2 sequences × 16 tokens × 4 micro-steps" in out
        assert losses("halved") == pytest.approx(losses("plain"), abs=1e-5)

    def test_no_room_for_a_single_sequence_is_one_error(self, here, capsys, monkeypatch):
        run_out_of_memory(monkeypatch, 0)
        assert main([*RUN, "--log_dir", "log"]) == 2
        assert "error: no room for one sequence" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "total, asked, taken", [(16 * 6, None, 6), (16 * 7, 7, 7), (16 * 300, None, 150)]
    )
    def test_it_divides_the_batch(self, here, capsys, total, asked, taken):
        flags = [f"--micro_batch_size={asked}"] if asked else []
        run = [*RUN, "--log_dir=log", f"--total_batch_size={total}", "--max_steps=2", *flags]
        assert main(run) == 0
        expected = f"{taken} sequences × 16 tokens × {total // 16 // taken} micro-steps"
        assert expected in capsys.readouterr().out


class TestCompile:
    """On the CPU, with the graphs run as they are where only their number matters."""

    most = 8

    @pytest.fixture
    def graphs(self, monkeypatch):
        """Sequences of each call of a graph, by graph. More than `most` are too many."""
        graphs, compiler = [], torch.compile

        def backend(graph, inputs):
            graphs.append(calls := [])

            def run(*args):
                calls.append(next(z.size(0) for z in args if z.dtype == torch.int64))
                if calls[-1] > self.most:
                    raise torch.OutOfMemoryError("CUDA out of memory.")
                return graph(*args)

            return run

        monkeypatch.setattr(torch, "compile", functools.partial(compiler, backend=backend))
        torch._dynamo.reset()
        yield graphs
        torch._dynamo.reset()

    @pytest.mark.parametrize("B", ["4", "1"])
    def test_nothing_recompiles_whatever_happens_in_between(self, here, graphs, B):
        """One graph to train, one to validate; samples and HellaSwag add none."""
        write_shards(here / "gpt2", lengths=(16 * 23 + 5, 5000), encoding="gpt2")
        examples = [([1] * n, [[2] * n, [3], [4] * 3, [5]], 0) for n in range(1, 9)]
        write_hellaswag(here / "hellaswag/hellaswag_val.bin", examples)
        run = ["--data", "gpt2", *TINY, "--compile", "--log_dir", "log", "--micro_batch_size", B]
        run += ["--val_every=3", "--hellaswag_every=4", "--sample_every=5", "--checkpoint_every=6"]
        assert main([*run, "--max_new_tokens=20"]) == 0
        assert len(graphs) == 2
        assert set(read_log("log")) >= {"train", "val", "hella"}

    @torch._dynamo.config.patch(recompile_limit=2)
    def test_trials_of_the_micro_batch_leave_the_compiler_fresh(self, here, graphs):
        """It compiles a function a few times and then leaves it as it is: eight times by default,
        here twice, for training and validation."""
        self.most = 1
        run = [*RUN, "--compile", "--max_steps=2", "--val_every=1", "--val_tokens=48"]
        assert main([*run, "--log_dir", "log"]) == 0
        trials, training, validation = graphs[:3], graphs[3], graphs[4]
        assert [calls[0] for calls in trials] == [8, 4, 2]
        assert training == [1] * (2 + 2 * 8) and validation == [1] * (3 * 3)

    @pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
    def test_compiled_losses_are_the_eager_ones(self, here):
        run = [*RUN, "--n_layer", "1"]
        assert main([*run, "--log_dir", "eager"]) == 0
        env = dict(TORCHINDUCTOR_CACHE_DIR=str(here / "cache"))
        compiled = ["--log_dir", "compiled", "--compile"]
        done = python(PROGRAM, *run, *compiled, cwd=here, env=env)
        assert_said(done.stdout, compile=True)
        assert losses("compiled") == pytest.approx(losses("eager"), abs=1e-4)

    def test_without_a_compiler_one_line_says_so_and_training_goes_on(self, here):
        env = dict(CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(here / "cache"))
        done = python(PROGRAM, *RUN, "--log_dir", "log", "--compile", cwd=here, env=env)
        assert done.stdout.count("torch.compile can't be used here") == 1
        assert_said(done.stdout, compile=False)
        assert len(losses("log")) == 20


def test_a_bug_in_another_file_keeps_its_traceback(here, monkeypatch):
    """A ValueError may be a user's mistake, which fineweb's UserError is, or ours."""
    monkeypatch.setattr("fineweb.get_encoding", lambda name: int("none"))
    with pytest.raises(ValueError, match="invalid literal"):
        main([*RUN, "--sample_every=5"])


class StandIn(TorchFunctionMode):
    """For CUDA, on a CPU: tensors sent there stay where they are, and what would make a program
    wait for a GPU is noted in `events`, beside the losses computed."""

    waits = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__")

    def __init__(self):
        super().__init__()
        self.events, self.patch = [], pytest.MonkeyPatch()

    def __enter__(self):
        events = self.events

        class Event:
            def record(self):
                events.append("figures")

            def synchronize(self):
                events.append("synchronize")

        answers = dict(device_count=1, set_device=None, mem_get_info=(8e10, 8e10))
        answers.update(get_device_name="NVIDIA H200", is_bf16_supported=True)
        for name, answer in answers.items():
            answer = functools.partial(lambda answer, *args, **options: answer, answer)
            self.patch.setattr(torch.cuda, name, answer)
        self.patch.setattr(torch.cuda, "Event", Event)
        # The figures, kept on the CPU, say that they are on the GPU
        self.patch.setattr(torch.Tensor, "is_cuda", True)
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        copied = name == "to" and "cpu" in args and not kwargs.get("non_blocking")
        if name == "cross_entropy" or name in self.waits or copied:
            self.events.append(name)

        def here(z):
            return "cpu" if isinstance(z, torch.device) and z.type == "cuda" else z

        return func(*map(here, args), **{key: here(z) for key, z in kwargs.items()})


@pytest.mark.filterwarnings("ignore:CUDA is not available")
class TestLoopOfAGpu:
    # Autocast for CUDA does nothing on a CPU: these are float32's losses
    gpu = ("--device", "cuda", "--dtype", "bf16", "--no-tf32", "--no-compile")

    def test_figures_are_read_a_step_late_and_nothing_else_waits(self, here, capsys):
        run = [*RUN, "--micro_batch_size", "4", "--log_dir"]
        with StandIn() as cuda:
            assert main([*run, "log", *self.gpu]) == 0
        reading = ["synchronize", "tolist"]  # once the next step's first micro-step is queued
        first = ["cross_entropy", "cross_entropy", "figures"]
        other = ["cross_entropy", *reading, "cross_entropy", "figures"]
        trial = 2 * ["cross_entropy"]  # of the micro-batch
        assert cuda.events == trial + first + 19 * other + reading
        assert capsys.readouterr().out.count("% | eta ") == 20  # MFU, since the card is known
        assert main([*run, "cpu"]) == 0
        ours, plain = read_log("log"), read_log("cpu")
        assert all(ours[stream] == plain[stream] for stream in ("train", "norm", "lr"))

    def test_stopped_run_goes_on_to_the_same_weights(self, here, monkeypatch):
        def interrupt(t, cfg):
            if t == 7:
                signal.raise_signal(signal.SIGTERM)
            return get_lr(t, cfg)

        run = [*RUN, "--checkpoint_every", "20", "--log_dir"]
        assert main([*run, "cpu"]) == 0
        with StandIn():
            monkeypatch.setattr(train_gpt2, "get_lr", interrupt)
            assert main([*run, "log", *self.gpu]) == 128 + signal.SIGTERM
            # Step 8 was under way when the figures of 7 were read
            assert (here / "log/model_00009.pt").exists()
            monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
            assert main([*run, "log", *self.gpu]) == 0
        assert_same_weights("log/model_00020.pt", "cpu/model_00020.pt")
        assert losses("log") == losses("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestCuda:
    def test_bf16_compile_flash_fused_follow_float32_on_the_cpu(self, here):
        gpu = ["--device=cuda", "--compile", "--no-tf32", "--val_every=10", "--sample_every=10"]
        assert main([*RUN, "--log_dir", "cpu"]) == 0
        for dtype, tolerance in (("fp32", 0.01), ("bf16", 0.1), ("fp16", 0.05)):
            assert main([*RUN, "--log_dir", dtype, *gpu, "--dtype", dtype]) == 0
            assert losses(dtype) == pytest.approx(losses("cpu"), abs=tolerance)

    def test_resumed_run_is_the_same_to_the_last_bit_with_deterministic(self, here):
        run = [*RUN, "--device=cuda", "--deterministic", "--val_every=4", "--checkpoint_every"]
        try:
            assert main([*run, "20", "--log_dir", "whole"]) == 0
            assert main([*run, "7", "--log_dir", "parts", "--keep_checkpoints", "0"]) == 0
            for step in 14, 20:
                (here / f"parts/model_{step:05d}.pt").unlink()
            assert main([*run, "20", "--log_dir", "parts"]) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        assert_same_weights("whole/model_00020.pt", "parts/model_00020.pt")

    def test_a_small_card_gets_a_micro_batch_that_fits(self, here):
        write_shards(here / "gpt2", lengths=(3000, 200_000), encoding="gpt2")
        torch.cuda.empty_cache()
        share = 6 * 2**30 / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            run = ["--data=gpt2", "--log_dir=log", "--model=gpt2", "--total_batch_size=65536"]
            run += ["--max_steps=2", "--warmup_steps=1", "--no-compile"]
            off = ["--val_every=0", "--sample_every=0", "--checkpoint_every=0"]
            assert main([*run, *off]) == 0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
