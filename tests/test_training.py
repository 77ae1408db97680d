"""The training loop, run as a user runs it: through the command line, on small data."""

import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import (
    PROGRAM,
    TINY,
    assert_same_weights,
    load,
    losses,
    python,
    read_log,
    train,
    write_questions,
    write_shards,
)
from torch.overrides import TorchFunctionMode

import hellaswag
import train_gpt2
from train_gpt2 import GPT2, MLP, GPT2Config, TrainConfig, get_lr, main, resolve_config

STEP_LINE = (
    r"step +(\d+)/(\d+) \| loss \d+\.\d{4} \| lr \d\.\d{4}e-\d\d \| norm \d+\.\d\d "
    r"\| \d+ ms \| [\d,]+ tok/s \| (mfu \d+\.\d% \| )?eta \d+m\d\ds"
)


def flags_without(*names):
    """The flags of a tiny run, but for those that begin like this."""
    return [flag for flag in ["--data=data"] + TINY if not flag.startswith(names)]


def shown_settings(out):
    """The settings that a run prints, one a line: {name: text}."""
    return dict(re.findall(r"^  (\w+) +(.*)$", out, re.MULTILINE))


def lines_that_start(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def signal_at(monkeypatch, step, signum):
    """Send a signal to this process in the middle of a step."""

    def interrupt(now, cfg):
        if now == step:
            signal.raise_signal(signum)
        return get_lr(now, cfg)

    monkeypatch.setattr(train_gpt2, "get_lr", interrupt)


# --------------------------------------------------------------------------------------------------
# What is computed


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
    assert train("--log_dir=log", "--micro_batch_size=2") == 0
    logged = read_log("log")

    torch.manual_seed(1337)
    sizes = dict(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32)
    model = GPT2(GPT2Config(attention="manual", **sizes)).double()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)

    windows = []
    for name in ("text_train_000001.npy", "text_train_000002.npy"):
        shard = np.load(here / "data" / name).astype(np.int64)
        for k in range((len(shard) - 1) // 16):
            windows.append(shard[16 * k : 16 * k + 17])
    order = []
    for epoch in (0, 1):
        generator = np.random.RandomState(np.random.MT19937([1337, epoch]))
        order.extend(generator.permutation(len(windows)))

    for step in range(20):
        tokens = torch.from_numpy(np.stack([windows[k] for k in order[8 * step : 8 * step + 8]]))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        if step < 2:
            lr = 1e-2 * (step + 1) / 2
        else:
            lr = 1e-3 + 0.5 * (1 + math.cos(math.pi * (step - 2) / 18)) * 9e-3
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert logged["train"][step] == pytest.approx(loss.item(), abs=1e-4)
        assert logged["norm"][step] == pytest.approx(norm, rel=1e-3)
        assert logged["lr"][step] == pytest.approx(lr)


def test_it_learns(here):
    assert train("--log_dir=log", "--max_steps=150", "--val_every=150") == 0
    val = read_log("log")["val"]
    assert list(val) == [0, 150]
    assert val[0] == pytest.approx(math.log(257), abs=0.2)
    assert val[150] < 2  # The text has three equally likely next tokens at best: ln 3 = 1.1.


def test_a_run_can_be_started_from_python(here):
    assert train("--log_dir=flags") == 0
    sizes = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, total_batch_size=128)
    schedule = dict(max_steps=20, warmup_steps=2, max_lr=1e-2, device="cpu", dtype="fp32")
    off = dict(val_every=0, hellaswag_every=0, sample_every=0, checkpoint_every=0)
    cfg, checkpoint, pretrained = resolve_config(dict(data="data") | sizes | schedule | off)
    assert train_gpt2.train(cfg, checkpoint, pretrained) == 0  # into log/, which is the default
    assert losses("log") == losses("flags")


def test_what_changes_only_how_it_is_computed_leaves_the_losses(here):
    assert train("--log_dir=plain") == 0
    ways = [
        "--micro_batch_size=1",
        "--micro_batch_size=4",
        "--attention=manual",
        "--activation_checkpointing",
        "--deterministic",
        "--dtype=tf32",
    ]
    for way in ways:
        assert train(f"--log_dir={way}", way) == 0
        assert losses(way) == pytest.approx(losses("plain"), abs=1e-4), way
    assert losses("--dtype=tf32") == losses("plain")  # A CPU has no TF32.


@pytest.mark.parametrize("flag, rows", [("--pad_vocab", 384), ("--no-pad_vocab", 257)])
def test_vocabulary_is_padded_unless_told_not_to(here, flag, rows):
    assert train("--log_dir=log", flag, "--max_steps=2", "--checkpoint_every=2") == 0
    weights = load("log/checkpoint_00002.pt")["model"]
    assert len(weights["transformer.wte.weight"]) == rows


@pytest.mark.parametrize(
    "flags, attention",
    [
        ("--dtype=fp32", "flash"),
        ("--dtype=bf16", "manual"),
        ("--dtype=bf16 --attention=flash", "flash"),
        ("--dtype=fp32 --init_from=first/checkpoint_00001.pt", "flash"),
    ],
)
def test_attention_is_the_faster_one_unless_told_otherwise(here, flags, attention):
    """How the weights a run begins with were computed does not matter."""
    one_step = ["--max_steps=1", "--warmup_steps=0", "--checkpoint_every=1"]
    assert train("--log_dir=first", "--dtype=bf16", *one_step) == 0
    assert train("--log_dir=log", *one_step, *flags.split()) == 0
    assert load("log/checkpoint_00001.pt")["train_config"]["attention"] == attention


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_follows_float32(here, dtype, tolerance):
    assert train("--log_dir=plain") == 0
    evaluations = ["--val_every=10", "--sample_every=10", "--max_new_tokens=8"]
    assert train("--log_dir=half", f"--dtype={dtype}", *evaluations) == 0
    assert losses("half") == pytest.approx(losses("plain"), abs=tolerance)
    assert losses("half") != losses("plain")


def test_loss_scaling_keeps_gradients_that_fp16_would_lose(here, monkeypatch):
    """fp16 holds nothing below 6e-8. Gradients are lifted over it, and the step is that of the
    gradients as they are."""
    scales = []
    scale = torch.amp.GradScaler.scale

    def watched(self, loss):
        scales.append(self.get_scale())
        return scale(self, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", watched)
    assert train("--log_dir=half", "--dtype=fp16", "--max_steps=5") == 0
    assert min(scales) >= 1024
    assert max(read_log("half")["norm"].values()) < 50  # The norms are those without the scale.


def test_a_reader_s_dropout_is_on_in_training_and_off_in_evaluations(here, monkeypatch):
    write_shards(here / "gpt2", encoding="gpt2")
    write_questions(here)
    seen = []
    forward = MLP.forward

    def watched(self, x):
        seen.append((torch.is_grad_enabled(), self.training))
        return forward(self, x)

    monkeypatch.setattr(MLP, "forward", watched)
    run = ["--data=gpt2", "--n_embd=8", "--log_dir=log", "--max_steps=5", "--checkpoint_every=5"]
    evaluations = ["--val_every=2", "--hellaswag_every=2", "--sample_every=2"]
    assert train("--max_new_tokens=4", *run, *evaluations) == 0
    assert set(seen) == {(True, True), (False, False)}
    seen.clear()
    assert main(["--generate=x", "--log_dir=log", "--device=cpu", "--num_samples=1"]) == 0
    assert set(seen) == {(False, False)}


# --------------------------------------------------------------------------------------------------
# What is printed, and what is left in the folder


def test_output_has_the_settings_the_first_loss_and_a_line_for_each_step(here, capsys):
    assert train("--log_dir=log", "--micro_batch_size=2", "--val_every=20") == 0
    out, err = capsys.readouterr()
    assert not err
    settings = shown_settings(out)
    assert settings["model"] == "demo"
    assert settings["device"] == "cpu"
    assert settings["dtype"] == "fp32"
    assert settings["micro_batch_size"] == "2"
    assert "34,208 parameters" in out
    assert "2 sequences × 16 tokens × 4 micro-steps × 1 processes" in out
    assert "ln 257 = 5.5491" in out
    lines = [line for line in lines_that_start(out, "step ") if "| loss" in line]
    assert len(lines) == 20
    for step, line in enumerate(lines):
        assert re.fullmatch(STEP_LINE, line), line
        assert line.startswith(f"step {step:5d}/20 ")
    assert len([line for line in lines_that_start(out, "step ") if "val loss" in line]) == 2
    assert set(read_log("log")) == {"train", "val", "lr", "norm", "tps"}


@pytest.mark.parametrize("flags, shown", [(["--print_every=7"], [0, 7, 14]), ([], [0, 10])])
def test_print_every_spares_the_screen_and_not_the_log(here, capsys, flags, shown):
    """The demo brings 10."""
    assert main(flags_without("--print_every") + flags + ["--log_dir=log"]) == 0
    steps = re.findall(r"^step +(\d+)/20 \| loss", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step in steps] == shown + [19]  # The last is always shown.
    assert {len(values) for values in read_log("log").values()} == {20}


def test_schedule_of_everything_that_happens_once_in_a_while(here, capsys):
    every = ["--val_every=8", "--sample_every=16", "--checkpoint_every=5", "--keep_checkpoints=0"]
    assert train("--log_dir=log", "--num_samples=3", "--max_new_tokens=5", *every) == 0
    assert list(read_log("log")["val"]) == [0, 8, 16, 20]
    assert capsys.readouterr().out.count("--- sample") == 2 * 3  # after 16 and after 20 steps
    kept = sorted(path.name for path in (here / "log").glob("*.pt"))
    assert kept == [f"checkpoint_{step:05d}.pt" for step in (5, 10, 15, 20)]


def test_checkpoint_of_a_step_comes_before_its_evaluations(here, monkeypatch):
    """Whatever goes wrong in an evaluation, the weights are there."""
    found = []

    def watched(*args):
        found.append([path.name for path in (here / "log").glob("*.pt")])
        return 1.0

    monkeypatch.setattr(train_gpt2, "validation_loss", watched)
    assert train("--log_dir=log", "--val_every=10", "--checkpoint_every=10") == 0
    assert found[0] == []
    assert found[1] == ["checkpoint_00010.pt"]
    assert "checkpoint_00020.pt" in found[2]


def test_only_the_newest_checkpoints_are_kept(here):
    assert train("--log_dir=log", "--checkpoint_every=3") == 0
    names = {path.name for path in (here / "log").iterdir()} - {".lock"}
    assert names == {"log.txt", "checkpoint_00018.pt", "checkpoint_00020.pt"}


def test_checkpoint_holds_tensors_and_plain_values(here):
    assert train("--log_dir=log", "--checkpoint_every=20") == 0
    checkpoint = load("log/checkpoint_00020.pt")
    assert set(checkpoint) == {
        "step",
        "model",
        "optimizer",
        "scaler",
        "config",
        "train_config",
        "identity",
    }
    assert checkpoint["step"] == 20
    assert checkpoint["config"]["n_layer"] == 2
    assert checkpoint["train_config"]["max_lr"] == 0.01
    assert checkpoint["identity"]["seed"] == 1337


def test_log_of_a_run_without_checkpoints_is_kept_beside_the_new_one(here):
    for steps in (5, 3):
        assert train("--log_dir=log", f"--max_steps={steps}") == 0
    (old,) = (here / "log").glob("log_*.txt")
    assert len(losses("log")) == 3
    assert old.read_text().count("train") == 5


def test_data_that_are_still_being_made_are_said_in_one_line(here, capsys):
    for finished in (False, True):
        manifest = dict(encoding="bytes", vocab_size=257, finished=finished)
        (here / "data/manifest.json").write_text(json.dumps(manifest))
        assert train("--log_dir=log", "--max_steps=2") == 0
        lines = [x for x in capsys.readouterr().out.splitlines() if "still being made" in x]
        if finished:
            assert not lines
        else:
            assert len(lines) == 1
            assert "data" in lines[0]
            assert "4,777" in lines[0]


# --------------------------------------------------------------------------------------------------
# Going on


@pytest.mark.parametrize(
    "first, dtype", [(1, "fp32"), (7, "fp32"), (19, "fp32"), (11, "fp16"), (11, "bf16")]
)
def test_resumed_run_ends_like_an_uninterrupted_one(here, capsys, first, dtype):
    run = [f"--dtype={dtype}", "--val_every=4", "--sample_every=4", "--max_new_tokens=8"]
    assert train(*run, "--log_dir=whole", "--checkpoint_every=20") == 0
    saving = [f"--checkpoint_every={first}", "--keep_checkpoints=0"]
    assert train(*run, "--log_dir=parts", *saving) == 0
    for path in (here / "parts").glob("checkpoint_*.pt"):
        if path.name != f"checkpoint_{first:05d}.pt":
            path.unlink()  # as if the run had been killed soon after this one
    with open("parts/log.txt", "a") as log:
        log.write("20 trai")
    capsys.readouterr()

    assert train(*run, "--log_dir=parts", "--checkpoint_every=20") == 0
    assert f"resuming parts after {first} steps" in capsys.readouterr().out
    assert_same_weights("whole/checkpoint_00020.pt", "parts/checkpoint_00020.pt")
    whole_moments = load("whole/checkpoint_00020.pt")["optimizer"]["state"]
    moments = load("parts/checkpoint_00020.pt")["optimizer"]["state"]
    assert moments.keys() == whole_moments.keys()
    for i, state in moments.items():
        for name, value in state.items():
            assert value.equal(whole_moments[i][name])
    whole_log = read_log("whole")
    log = read_log("parts")
    for stream in ("train", "val", "norm", "lr"):
        assert log[stream] == whole_log[stream]


def test_evaluations_of_the_first_step_are_made_again_when_a_run_goes_on(here):
    """A kill may have come before them. Their lines replace those that are there."""
    run = ["--log_dir=log", "--checkpoint_every=10", "--val_every=10", "--val_tokens=64"]
    assert train(*run) == 0
    before = read_log("log")
    assert train(*run) == 0  # The run has all its steps, and only evaluates.
    assert {t: read_log("log")[t] for t in ("train", "val")} == {
        t: before[t] for t in ("train", "val")
    }
    assert train(*run, "--val_tokens=128") == 0
    after = read_log("log")["val"]
    assert [after[0], after[10]] == [before["val"][0], before["val"][10]]
    assert after[20] != before["val"][20]


def test_blank_and_broken_lines_of_the_log_are_dropped(here):
    """A kill, a crash of the machine or an editor leaves them."""
    run = ["--log_dir=log", "--checkpoint_every=10"]
    assert train(*run) == 0
    whole = read_log("log")
    (here / "log/checkpoint_00020.pt").unlink()
    path = here / "log/log.txt"
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [b"\n", b"  \n", b"1 trai\n", b"\0\0\0\n", b"1 train 4.51 norm 2\n", b"caf\xe9\n"]
    path.write_bytes(b"".join(lines[:5] + odd + lines[5:]) + b"9 tra")
    assert train(*run) == 0
    mended = read_log("log")
    for stream in ("train", "norm", "lr"):
        assert mended[stream] == whole[stream]
    assert path.read_text().count("\n") == 4 * 20


def test_settings_of_today_apply_to_a_resumed_run_and_one_line_says_what_changed(here, capsys):
    """All but what makes it this run (tests/test_wrong_input.py) may change from start to start."""
    run = ["--log_dir=log", "--checkpoint_every=5", "--val_every=5"]
    starts = {
        5: ["--warmup_steps=1"],
        10: ["--dtype=fp16", "--micro_batch_size=2", "--attention=manual", "--max_lr=2e-2"],
        15: ["--dtype=bf16", "--min_lr=0", "--grad_clip=0.5", "--val_tokens=50"],
        20: ["--weight_decay=0.3", "--activation_checkpointing", "--prompt=x"],
    }
    changes = []
    for max_steps, flags in starts.items():
        assert train(*run, *flags, f"--max_steps={max_steps}") == 0
        changes += lines_that_start(capsys.readouterr().out, "changed since the last start: ")
    assert list(read_log("log")["train"]) == list(range(20))
    groups = load("log/checkpoint_00020.pt")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert len(changes) == 3
    for change in ("dtype fp32 -> fp16", "max_lr 0.01 -> 0.02", "max_steps 5 -> 10"):
        assert change in changes[0]
    assert "grad_clip 1.0 -> 0.5" in changes[1]
    assert "micro_batch_size 2 -> 8" in changes[1]
    assert "seed" not in "".join(changes)

    assert train(*run, *starts[20], "--max_steps=20") == 0
    assert not lines_that_start(capsys.readouterr().out, "changed")


def test_a_stopped_run_goes_on_to_the_same_weights(here, monkeypatch, capsys):
    run = ["--checkpoint_every=20"]
    assert train(*run, "--log_dir=whole") == 0
    signal_at(monkeypatch, 7, signal.SIGTERM)
    assert train(*run, "--log_dir=parts") == 128 + signal.SIGTERM
    assert "stopped after 8 steps" in capsys.readouterr().out
    assert (here / "parts/checkpoint_00008.pt").exists()
    monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
    assert train(*run, "--log_dir=parts") == 0
    assert_same_weights("whole/checkpoint_00020.pt", "parts/checkpoint_00020.pt")
    assert losses("parts") == losses("whole")


def test_signals_are_handled_as_before_once_main_has_returned(here, monkeypatch):
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {signum: (lambda *args: None) for signum in signals}
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    for signum in signals:
        signal_at(monkeypatch, 5, signum)
        assert train(f"--log_dir={signum}") == 128 + signum
        assert {signum: signal.getsignal(signum) for signum in signals} == handlers


def test_what_a_run_sets_is_as_before_once_main_has_returned(here):
    """So that neither the next run of a process nor other code of a notebook inherits it."""

    def state():
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            torch.is_autocast_enabled("cpu"),
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.distributed.is_initialized(),
            threading.active_count(),
            len(os.listdir("/dev/fd")),
        )

    # Some things are made once and stay, such as the thread that watches progress bars.
    train("--log_dir=before", "--checkpoint_every=20", "--val_every=5")
    before = state()
    for flags in ("--deterministic", "--dtype=bf16", "--dtype=tf32", "--checkpoint_every=1"):
        assert train("--log_dir=log", flags, "--val_every=5") == 0
        assert state() == before, flags
    for flags in ("--max_steps=1", "--n_head=3", "--data=nowhere"):
        assert train("--log_dir=log", "--deterministic", flags) == 1
        assert state() == before, flags


def test_second_ctrl_c_is_python_s(here, monkeypatch):
    """So that it ends a notebook's cell, and not its kernel."""

    def interrupt(step, cfg):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        return get_lr(step, cfg)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(train_gpt2, "get_lr", interrupt)
    assert train("--log_dir=log") == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_run_in_a_thread_trains(here):
    """There, Python allows no signal handlers."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(train("--log_dir=log")))
    thread.start()
    thread.join()
    assert codes == [0]
    assert len(losses("log")) == 20


def test_an_error_does_not_load_the_compiler_which_takes_seconds(here):
    flags = ["--data=data"] + TINY + ["--n_head=3"]
    program = f"import sys, train_gpt2; train_gpt2.main({flags}); "
    program += "print([name for name in sys.modules if name.startswith('torch._inductor')])"
    done = python("-c", program, cwd=here, env={"PYTHONPATH": str(PROGRAM.parent)})
    assert done.stderr.startswith("error: --n_embd 32"), done.stderr
    assert done.stdout == "[]\n"


def test_signal_during_hellaswag_ends_it_and_it_is_done_again(here, monkeypatch):
    write_shards(here / "gpt2", lengths=(500, 5000), encoding="gpt2")
    write_questions(here)
    run = ["--data=gpt2", "--n_embd=8", "--hellaswag_every=4", "--max_steps=8"]
    run.append("--checkpoint_every=8")
    assert train(*run, "--log_dir=whole") == 0
    count_hits = hellaswag.count_hits
    calls = []

    def interrupted(model, questions, device, progress):
        def stop_at_once(batches):
            signal.raise_signal(signal.SIGTERM)
            assert not list(progress(batches))
            return []

        calls.append(1)
        if len(calls) == 3:
            return count_hits(model, questions, device, stop_at_once)
        return count_hits(model, questions, device, progress)

    monkeypatch.setattr(hellaswag, "count_hits", interrupted)
    assert train(*run, "--log_dir=parts") == 128 + signal.SIGTERM
    assert list(read_log("parts")["hella"]) == [0, 4]
    assert (here / "parts/checkpoint_00008.pt").exists()
    assert train(*run, "--log_dir=parts") == 0
    for stream in ("hella", "train"):
        assert read_log("parts")[stream] == read_log("whole")[stream]


class TestInitFrom:
    TUNE = tuple(flags_without("--n_", "--block_size", "--model"))  # Sizes come with the weights.

    @pytest.fixture
    def first(self, here):
        """A run to take weights from."""
        assert train("--log_dir=first", "--checkpoint_every=20", "--val_every=20") == 0
        return here / "first/checkpoint_00020.pt"

    def tune(self, *flags):
        return main(list(self.TUNE + ("--log_dir=second", "--val_every=20") + flags))

    def assert_begins_where_the_first_ended(self):
        val = read_log("second")["val"][0]
        assert val == pytest.approx(read_log("first")["val"][20], abs=1e-5)

    def test_weights_of_another_run_start_a_new_one_and_are_read_once(self, first, monkeypatch):
        """And from the disk as they are used, or eight processes would hold gpt2-xl eight times."""
        reads = []
        torch_load = torch.load

        def watched(path, *args, **options):
            reads.append(options.get("mmap"))
            return torch_load(path, *args, **options)

        monkeypatch.setattr(torch, "load", watched)
        assert self.tune(f"--init_from={first}") == 0
        assert reads == [True]
        self.assert_begins_where_the_first_ended()

    def test_a_local_folder_is_preferred_to_a_name_on_the_hub(self, first):
        assert main(["--export=gpt2", "--log_dir=first", "--device=cpu"]) == 0
        assert self.tune("--init_from=gpt2") == 0
        self.assert_begins_where_the_first_ended()

    def test_a_run_goes_on_though_the_weights_it_began_with_are_gone(self, first, capsys):
        flags = [f"--init_from={first}", "--checkpoint_every=10"]
        assert self.tune("--max_steps=10", *flags) == 0
        first.unlink()
        assert self.tune("--max_steps=20", *flags) == 0
        assert "resuming second after 10 steps" in capsys.readouterr().out
        assert self.tune("--max_steps=20", "--n_embd=32", *flags) == 0
        assert self.tune("--max_steps=20", "--n_embd=64", *flags) == 1
        assert "n_embd" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Other data, other surroundings


def test_the_trainer_alone_in_a_folder_trains_on_shards(here):
    """And says in one line what it does without, with --sample_every and --hellaswag_every at their
    defaults."""
    shutil.copy(PROGRAM, here)
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2")
    flags = flags_without("--sample_every", "--hellaswag_every", "--model", "--data")
    run = ["--data=gpt2", "--n_embd=16", "--log_dir=log", "--checkpoint_every=20"]
    env = dict(PYTHONPATH="", PYTHONSAFEPATH="")
    done = python("train_gpt2.py", *flags, *run, cwd=here, env=env)
    lines = [line for line in done.stdout.splitlines() if "fineweb.py" in line]
    assert len(lines) == 1, done.stdout
    assert "samples" in lines[0]
    assert "HellaSwag" in lines[0]
    assert not done.stderr
    assert len(losses("log")) == 20


@pytest.mark.parametrize(
    "encoding, V", [("gpt2", 300), ("bytes", 60), ("my", 2**16), ("german", 50257), ("abc", 257)]
)
def test_shards_of_any_vocabulary_train(here, capsys, encoding, V):
    """Where no tokenizer belongs to them, samples and HellaSwag are left out, in one line."""
    for split in ("train", "val"):
        tokens = np.arange(500) * 7919 % V
        np.save(here / f"data/text_{split}_000000.npy", tokens.astype(np.uint16))
    manifest = dict(encoding=encoding, vocab_size=V)
    (here / "data/manifest.json").write_text(json.dumps(manifest))
    run = ["--n_embd=8", "--total_batch_size=16", "--log_dir=log", "--checkpoint_every=2"]
    run += ["--val_every=2", "--sample_every=2", "--hellaswag_every=2", "--val_tokens=32"]
    for steps in (2, 4):
        assert train(*run, f"--max_steps={steps}") == 0
        out, err = capsys.readouterr()
        assert not err
        if encoding not in ("gpt2", "bytes"):
            lines = [line for line in out.splitlines() if encoding in line and "samples" in line]
            assert len(lines) == 1, out
    assert len(losses("log")) == 4
    assert load("log/checkpoint_00004.pt")["config"]["vocab_size"] == V
    assert main(["--export=out", "--log_dir=log", "--device=cpu"]) == 0
    if encoding not in ("gpt2", "bytes"):
        assert not (here / "out/vocab.json").exists()
        assert json.loads((here / "out/config.json").read_text())["eos_token_id"] is None
        assert main(["--generate=x", "--log_dir=log", "--device=cpu"]) == 1
        assert encoding in capsys.readouterr().err


@pytest.mark.parametrize("stdout", [io.StringIO(), None])
def test_no_docstrings_and_a_stdout_that_is_no_file_will_do(here, monkeypatch, stdout):
    """As with `python -OO`; in Jupyter's %run, or closed as by `>&-`."""
    monkeypatch.setattr(sys, "stdout", stdout)
    flags = ["--data=data"] + TINY + ["--log_dir=log", "--max_steps=2"]
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py"] + flags)
    source = PROGRAM.read_text(encoding="utf-8")
    assert source.count("logger.draw_curves()") == 2
    source = source.replace("logger.draw_curves()", "pass")  # which takes long
    program = compile(source, str(PROGRAM), "exec", optimize=2)
    with pytest.raises(SystemExit, match="0"):
        exec(program, dict(__name__="__main__", __file__=str(PROGRAM)))
    assert len(losses("log")) == 2
    if stdout:
        assert "step     1/2" in stdout.getvalue()


def test_what_a_stdout_can_not_encode_is_replaced(here, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    samples = ["--sample_every=20", "--prompt=né", "--num_samples=1"]
    assert train("--log_dir=dä ta", "--checkpoint_every=20", *samples) == 0
    assert main(["--log_dir=dä ta", "--export=pö", "--device=cpu"]) == 0
    with pytest.raises(SystemExit):
        main(["--help"])
    stdout.flush()
    text = stdout.buffer.getvalue().decode("ascii")
    assert "8 sequences ? 16 tokens" in text
    assert "d? ta" in text
    assert "--- sample 0\nn?" in text
    assert re.search(r"34,208 parameters.* p\?", text)
    assert "--init_from" in text


def test_help_has_a_phrase_for_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for group in ("model size", "batch", "hardware", "instead of training"):
        assert f"\n{group}:\n" in text
    flags = re.findall(r"^  --(\w+)", text, re.MULTILINE)
    assert len(flags) == len(set(flags)) == 40
    for name, phrase in re.findall(r"^  --(\w+).*?(?:\n {5,}|  )(\w[^\n]+)", text, re.MULTILINE):
        assert len(phrase.split()) >= 2, name


def test_a_bug_in_another_file_keeps_its_traceback(here, monkeypatch):
    monkeypatch.setattr("fineweb.get_encoding", lambda name: int("none"))
    with pytest.raises(ValueError, match="invalid literal"):
        train("--sample_every=5")


# --------------------------------------------------------------------------------------------------
# Samples


@pytest.mark.parametrize("source", ["--log_dir=log", "--init_from=log/checkpoint_00020.pt"])
def test_generate_continues_a_prompt(here, capsys, source):
    assert train("--log_dir=log", "--checkpoint_every=20") == 0
    capsys.readouterr()
    flags = ["--num_samples=2", "--max_new_tokens=9", "--temperature=0", "--device=cpu"]
    assert main(["--generate=some", source] + flags) == 0
    samples = re.findall(r"^--- sample \d\n(some.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(samples) == 2
    assert samples[0] == samples[1]  # It takes the likeliest tokens.


def test_generate_takes_the_newest_checkpoint_of_log_and_log_demo_and_says_which(here, capsys):
    for log_dir in ("log", "log_demo", "log"):
        assert train(f"--log_dir={log_dir}", "--checkpoint_every=20", "--max_steps=20") == 0
    (here / "log/checkpoint_00020.pt").touch()
    for newest, other in [("log", "log_demo"), ("log_demo", "log")]:
        (here / newest / "checkpoint_00020.pt").touch()
        capsys.readouterr()
        assert main(["--generate=some", "--device=cpu", "--num_samples=1"]) == 0
        said = capsys.readouterr().out.split("--- sample")[0]
        assert re.search(rf"\b{newest}\b", said)
        assert not re.search(rf"\b{other}\b", said)


@pytest.mark.parametrize("prompt", ["ab", "", "<|endoftext|>ab", "a<|endoftext|>"])
def test_a_sample_ends_with_its_document(here, capsys, monkeypatch, prompt):
    """What is in the prompt does not end it."""

    def generate(self, idx, *args):
        rows = []
        for text in (b"one\xfftwo", b"three\0\0", b"\xfffour\0\0"):  # 0xff stands for the end
            rows.append([256 if byte == 0xFF else byte for byte in text.replace(b"\0", b"z")])
        return torch.cat((idx, torch.tensor(rows)), dim=1)

    monkeypatch.setattr(GPT2, "generate", generate)
    samples = ["--sample_every=20", f"--prompt={prompt}", "--num_samples=3"]
    assert train("--log_dir=log", "--checkpoint_every=20", *samples) == 0
    from_training = capsys.readouterr().out
    flags = ["--num_samples=3", "--log_dir=log", "--device=cpu"]
    assert main([f"--generate={prompt}"] + flags) == 0
    begin = prompt or "<|endoftext|>"
    expected = [begin + "one", begin + "threezz", begin]
    for out in (from_training, capsys.readouterr().out):
        assert re.findall(r"^--- sample \d\n(.*)$", out, re.MULTILINE) == expected


def test_as_many_samples_as_asked_for_at_any_temperature(here, capsys):
    assert train("--max_steps=3", "--checkpoint_every=3", "--log_dir=log") == 0
    capsys.readouterr()
    for temperature in ("0", "1e-310", "1e-3", "1e9"):
        flags = ["--num_samples=35", "--max_new_tokens=3", f"--temperature={temperature}"]
        assert main(["--generate=ab", "--log_dir=log", "--device=cpu"] + flags) == 0
        out = capsys.readouterr().out
        samples = re.findall(r"^--- sample (\d+)\nab", out, re.MULTILINE)
        assert samples == [str(i) for i in range(35)]


def test_sampling_and_validation_do_not_disturb_training(here):
    assert train("--log_dir=quiet") == 0
    every = ["--sample_every=1", "--val_every=3", "--max_new_tokens=20"]
    assert train("--log_dir=chatty", *every) == 0
    assert losses("quiet") == losses("chatty")


# --------------------------------------------------------------------------------------------------
# Numbers gone wrong


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(here, capsys, monkeypatch):
    forward = GPT2.forward
    calls = []

    def broken(self, idx, targets=None):
        calls.append(1)
        loss = forward(self, idx, targets)
        return loss * math.nan if len(calls) == 7 else loss

    monkeypatch.setattr(GPT2, "forward", broken)
    assert train("--log_dir=log", "--checkpoint_every=5") == 1
    assert "error: step 6 has loss nan" in capsys.readouterr().err
    assert [path.name for path in (here / "log").glob("*.pt")] == ["checkpoint_00005.pt"]


def test_weights_that_are_not_finite_are_not_saved(here, capsys, monkeypatch):
    step = torch.optim.AdamW.step

    def broken(self, *args):
        step(self, *args)
        with torch.no_grad():
            self.param_groups[1]["params"][0][0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    assert train("--log_dir=log", "--checkpoint_every=1") == 1
    assert "not finite" in capsys.readouterr().err
    assert not list((here / "log").glob("*.pt"))


@pytest.mark.parametrize("overflows, code", [(3, 0), (100, 1)])
def test_steps_that_the_loss_scaler_skips_end_a_run_only_where_no_scaling_helps(
    here, capsys, monkeypatch, overflows, code
):
    calls = []
    forward = GPT2.forward

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            calls.append(1)
            return grad * math.inf if 4 < len(calls) <= 4 + overflows else grad

    monkeypatch.setattr(GPT2, "forward", lambda *args: Overflow.apply(forward(*args)))
    run = ["--dtype=fp16", "--log_dir=log", "--checkpoint_every=4", "--max_steps=40"]
    assert train(*run) == code
    if code:
        # The scale begins at 2^16, and each overflow halves it.
        error = capsys.readouterr().err
        assert re.search(r"error: step (19|20) has loss 4\.\d+ and gradient norm (inf|nan)", error)
    else:
        assert losses("log")[-1] < 4.5
        assert (here / "log/checkpoint_00040.pt").exists()


class TestMemory:
    def let_more_sequences_be_too_many(self, monkeypatch, most):
        forward = GPT2.forward

        def hungry(self, idx, targets=None):
            if idx.size(0) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return forward(self, idx, targets)

        monkeypatch.setattr(GPT2, "forward", hungry)

    def test_running_out_of_it_names_the_micro_batch_to_try(self, here, capsys, monkeypatch):
        assert train("--log_dir=plain") == 0
        self.let_more_sequences_be_too_many(monkeypatch, 2)
        capsys.readouterr()
        flags = []
        for tried, advice in [("8", "--micro_batch_size 4"), ("4", "--micro_batch_size 2")]:
            assert train("--log_dir=log", *flags) == 1
            error = capsys.readouterr().err
            assert error.startswith("error: out of memory")
            assert error.count("\n") == 1
            assert f"of {tried} sequences" in error
            assert advice in error
            flags = advice.split()
        assert train("--log_dir=log", *flags) == 0
        assert losses("log") == pytest.approx(losses("plain"), abs=1e-5)

    def test_no_room_for_a_single_sequence_is_one_line_too(self, here, capsys, monkeypatch):
        self.let_more_sequences_be_too_many(monkeypatch, 0)
        assert train("--log_dir=log", "--micro_batch_size=1") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "out of memory" in error
        assert "--activation_checkpointing" in error

    def test_a_bug_is_not_taken_for_it(self, here, monkeypatch):
        def broken(self, idx, targets=None):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        monkeypatch.setattr(GPT2, "forward", broken)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            train("--log_dir=log")

    @pytest.mark.parametrize(
        "total, asked, taken", [(16 * 6, None, 6), (16 * 7, 7, 7), (16 * 300, None, 150)]
    )
    def test_micro_batch_divides_the_batch(self, here, capsys, total, asked, taken):
        flags = [f"--micro_batch_size={asked}"] if asked else []
        run = ["--log_dir=log", f"--total_batch_size={total}", "--max_steps=2"]
        assert train(*run, *flags) == 0
        expected = f"{taken} sequences × 16 tokens × {total // 16 // taken} micro-steps"
        assert expected in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# GPUs


class StandIn(TorchFunctionMode):
    """For CUDA, on a CPU: tensors that are sent there stay where they are, and what would make a
    program wait for a GPU is noted in `events`, beside the losses that are computed."""

    WAITS = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__")

    def __init__(self, gigabytes=80, name="NVIDIA H200"):
        super().__init__()
        self.events = []
        self.patch = pytest.MonkeyPatch()
        self.answers = dict(
            device_count=1,
            set_device=None,
            mem_get_info=(gigabytes * 10**9, gigabytes * 10**9),
            get_device_name=name,
            is_bf16_supported=True,
        )

    def __enter__(self):
        for name, answer in self.answers.items():
            self.patch.setattr(torch.cuda, name, lambda *args, answer=answer, **options: answer)
        return super().__enter__()

    def __exit__(self, *exception):
        self.patch.undo()
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if name == "cross_entropy" or name in self.WAITS:
            self.events.append(name)
        args = [self.on_cpu(arg) for arg in args]
        kwargs = {key: self.on_cpu(arg) for key, arg in kwargs.items()}
        return func(*args, **kwargs)

    def on_cpu(self, arg):
        """Devices come as such, or as their names."""
        is_device = isinstance(arg, torch.device | str)
        return "cpu" if is_device and str(arg).startswith("cuda") else arg


@pytest.mark.filterwarnings("ignore:CUDA is not available")
class TestLoopOfAGpu:
    # Autocast for CUDA does nothing on a CPU, so these are float32's losses.
    gpu = ("--device=cuda", "--dtype=bf16", "--no-compile")

    def test_figures_are_read_after_the_step_and_nothing_else_waits(self, here, capsys):
        with StandIn() as cuda:
            assert train("--micro_batch_size=4", "--log_dir=log", *self.gpu) == 0
        assert cuda.events == 20 * ["cross_entropy", "cross_entropy", "tolist"]
        assert capsys.readouterr().out.count("% | eta ") == 20  # It knows the peak of this card.
        assert train("--micro_batch_size=4", "--log_dir=cpu") == 0
        for stream in ("train", "norm", "lr"):
            assert read_log("log")[stream] == read_log("cpu")[stream]

    @pytest.mark.parametrize("name", ["NVIDIA RTX A1000", "NVIDIA T400 4GB", "Something 9000"])
    def test_mfu_is_left_out_where_the_card_is_unknown(self, here, capsys, name):
        """The A1000 is no A100, and the T400 no T4."""
        with StandIn(name=name):
            assert train("--log_dir=log", "--max_steps=2", *self.gpu) == 0
        assert "mfu" not in capsys.readouterr().out

    @pytest.mark.parametrize(
        "gigabytes, flags, B",
        [
            (80, dict(), 128),
            (80, dict(compile=False), 32),
            (80, dict(dtype="fp32"), 64),
            (141, dict(), 128),
            (48, dict(), 64),
            (24, dict(), 32),
            (6, dict(compile=False), 2),
            (0, dict(), 1),
        ],
    )
    def test_micro_batch_is_what_fits_by_the_free_memory(
        self, here, monkeypatch, gigabytes, flags, B
    ):
        write_shards(here / "gpt2", encoding="gpt2")
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        given = dict(data="gpt2", device="cuda", dtype="bf16", hellaswag_every=0) | flags
        with StandIn(gigabytes):
            cfg, _, _ = resolve_config(given)
        assert cfg.micro_batch_size == B

    def test_without_a_compiler_auto_says_so_in_one_line_and_trains(
        self, here, capsys, monkeypatch
    ):
        def no_compiler(*args, **options):
            raise RuntimeError("no C compiler\nand a long story")

        monkeypatch.setattr(torch, "compile", no_compiler)
        with StandIn():
            run = ["--device=cuda", "--dtype=bf16", "--log_dir=log", "--max_steps=3"]
            assert main(flags_without("--model") + run) == 0
        out, err = capsys.readouterr()
        assert not err
        lines = [line for line in out.splitlines() if "no C compiler" in line]
        assert len(lines) == 1
        assert "torch.compile" in lines[0]
        assert "long story" not in out
        assert len(losses("log")) == 3

    def test_tf32_is_for_cuda_and_for_all_but_fp32(self):
        cuda = torch.device("cuda")
        expected = dict(fp32="highest", tf32="high", bf16="high", fp16="high")
        try:
            for dtype, precision in expected.items():
                train_gpt2.set_precision(cuda, dtype)
                assert torch.get_float32_matmul_precision() == precision
                train_gpt2.set_precision(torch.device("cpu"), dtype)
                assert torch.get_float32_matmul_precision() == "highest"
        finally:
            torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestCuda:
    def test_compiled_steps_in_each_dtype_follow_float32_on_the_cpu(self, here):
        gpu = ["--device=cuda", "--compile", "--val_every=10", "--sample_every=10"]
        assert train("--log_dir=cpu") == 0
        for dtype, tolerance in dict(fp32=0.01, tf32=0.02, bf16=0.1, fp16=0.05).items():
            assert train(f"--log_dir={dtype}", f"--dtype={dtype}", *gpu) == 0
            assert losses(dtype) == pytest.approx(losses("cpu"), abs=tolerance)

    def test_resumed_run_is_the_same_to_the_last_bit_with_deterministic(self, here):
        run = ["--device=cuda", "--deterministic", "--val_every=4"]
        assert train(*run, "--checkpoint_every=20", "--log_dir=whole") == 0
        saving = ["--checkpoint_every=7", "--keep_checkpoints=0"]
        assert train(*run, *saving, "--log_dir=parts") == 0
        for step in (14, 20):
            (here / f"parts/checkpoint_{step:05d}.pt").unlink()
        assert train(*run, "--checkpoint_every=20", "--log_dir=parts") == 0
        assert_same_weights("whole/checkpoint_00020.pt", "parts/checkpoint_00020.pt")

    @pytest.mark.parametrize("compile_flag", ["--compile", "--no-compile"])
    @pytest.mark.parametrize("dtype", ["bf16", "fp32"])
    def test_the_chosen_micro_batch_fits_a_small_card(self, here, monkeypatch, dtype, compile_flag):
        write_shards(here / "gpt2", lengths=(3000, 200_000), encoding="gpt2")
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (8 * 2**30, total))
        torch.cuda.set_per_process_memory_fraction(8 * 2**30 / total)
        try:
            run = ["--data=gpt2", "--log_dir=log", "--model=gpt2", "--total_batch_size=65536"]
            run += ["--max_steps=2", "--warmup_steps=1", f"--dtype={dtype}", compile_flag]
            off = ["--val_every=0", "--sample_every=0", "--checkpoint_every=0"]
            assert main(run + off) == 0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
