"""The training loop, run as a user runs it: through the command line, on small data."""

import functools
import math
import platform
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import PROGRAM, TINY, python, read_log, write_hellaswag, write_shards
from torch.overrides import TorchFunctionMode

import train_gpt2
from train_gpt2 import GPT2, GPT2Config, TrainConfig, get_lr, main

RUN = ["--data", "data", *TINY]


def losses(log_dir):
    return list(read_log(log_dir)["train"].values())


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
    model = GPT2(GPT2Config(vocab_size=257, block_size=16, n_layer=2, n_head=2, n_embd=32, attention="manual")).double()
    decay = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    shards = [np.load(here / "data" / f"text_train_00000{i}.npy") for i in (1, 2)]
    windows = [s[k * 16 : k * 16 + 17] for s in shards for k in range((len(s) - 1) // 16)]
    logged = read_log("log")
    for t in range(20):
        order = [np.random.RandomState(np.random.MT19937([1337, e])).permutation(len(windows)) for e in (0, 1)]
        picked = [windows[np.concatenate(order)[s]] for s in range(t * 8, t * 8 + 8)]
        tokens = torch.from_numpy(np.stack(picked).astype(np.int64))
        loss = model(tokens[:, :-1], tokens[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, 1.0 / (norm + 1e-6))
        lr = 1e-2 * (t + 1) / 2 if t < 2 else 1e-3 + 0.5 * (1 + math.cos(math.pi * (t - 2) / 18)) * 9e-3
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


def test_vocabulary_is_padded_unless_told_not_to(here, capsys):
    for flags, rows in (["--pad_vocab"], 384), (["--no-pad_vocab"], 257):
        assert main([*RUN, "--log_dir", str(rows), *flags, "--max_steps", "2"]) == 0
        assert f"vocabulary 257 in {rows} rows" in capsys.readouterr().out


def test_attention_is_the_faster_one_unless_told_otherwise(here, capsys):
    """On a CPU in bf16, the textbook's while sequences are short (tests/benchmark.py); how the weights a run begins
    with were computed doesn't matter."""
    write_shards(here / "data", (700, 3000, 1777))
    for flags, expected in (
        ("--dtype fp32", "flash"),
        ("--dtype bf16", "manual"),
        ("--dtype bf16 --attention flash", "flash"),
        ("--dtype bf16 --block_size 600 --total_batch_size 600", "flash"),
        ("--dtype bf16 --attention auto --checkpoint_every 1", "manual"),
        ("--dtype fp32 --init_from manual/model_00001.pt", "flash"),
    ):
        assert main([*RUN, "--log_dir", expected, "--max_steps", "1", "--warmup_steps", "0", *flags.split()]) == 0
        assert f", {expected} attention, " in capsys.readouterr().out


@pytest.mark.parametrize("dtype, tolerance", [("bf16", 0.1), ("fp16", 0.02)])
def test_half_precision_follows_float32(here, dtype, tolerance):
    assert main([*RUN, "--log_dir", "plain"]) == 0
    assert main([*RUN, "--log_dir", "half", "--dtype", dtype, "--val_every", "10", "--sample_every", "10"]) == 0
    assert losses("half") == pytest.approx(losses("plain"), abs=tolerance)
    assert losses("half") != losses("plain")


def test_loss_scaling_keeps_gradients_that_fp16_would_lose(here, monkeypatch):
    """fp16 holds nothing below 6e-8; the scaler must lift gradients over it, and the step must be theirs unscaled."""
    scales, scale = [], torch.amp.GradScaler.scale

    def watched(self, loss):
        scales.append(self.get_scale())
        return scale(self, loss)

    monkeypatch.setattr(torch.amp.GradScaler, "scale", watched)
    assert main([*RUN, "--log_dir", "half", "--dtype", "fp16", "--max_steps", "5"]) == 0
    assert min(scales) >= 1024
    assert max(read_log("half")["norm"].values()) < 50  # norms are those of unscaled gradients


def test_output_has_the_summary_the_step_line_and_the_first_loss(here, capsys):
    assert main([*RUN, "--log_dir", "log", "--micro_batch_size", "2", "--val_every", "20"]) == 0
    out = capsys.readouterr().out
    for text in (
        "model   demo: ",
        "device  cpu",
        "fp32",
        "4,777 tokens to train on in 2 shards, 200 to validate on",
        "128 tokens a step = 2 sequences × 16 tokens × 4 micro-steps × 1 processes",
        "ln 257 = 5.5491",
    ):
        assert text in out
    lines = [line for line in out.splitlines() if line.startswith("step ") and "| loss" in line]
    pattern = r"step +#/# \| loss #.# \| lr #.#e-# \| norm #.# \| # ms \| [#,]+ tok/s \| eta #m#s"
    pattern = pattern.replace("#", r"\d+")
    assert len(lines) == 20
    for t, line in enumerate(lines):
        assert re.fullmatch(pattern, line) and line.startswith(f"step {t:5d}/20 "), line
    assert set(read_log("log")) == {"train", "val", "lr", "norm", "tps"}


def test_schedule_of_everything_that_happens_once_in_a_while(here, capsys):
    flags = ["--val_every", "8", "--sample_every", "16", "--checkpoint_every", "5", "--keep_checkpoints", "0"]
    assert main([*RUN, "--log_dir", "log", *flags, "--num_samples", "3", "--max_new_tokens", "5"]) == 0
    assert list(read_log("log")["val"]) == [0, 8, 16, 20]
    assert capsys.readouterr().out.count("--- sample") == 2 * 3  # after 16 and after 20 steps
    assert sorted(p.name for p in (here / "log").glob("*.pt")) == [f"model_{t:05d}.pt" for t in (5, 10, 15, 20)]


def test_only_the_newest_checkpoints_are_kept(here):
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "3"]) == 0
    assert sorted(p.name for p in (here / "log").iterdir()) == [".lock", "log.txt", "model_00018.pt", "model_00020.pt"]


def test_checkpoint_holds_what_it_should(here):
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "20", "--val_every", "10"]) == 0
    state = torch.load("log/model_00020.pt", weights_only=True)
    assert {"model", "optimizer", "step", "config", "train_config", "val_loss", "format"} <= set(state)
    assert (state["step"], state["config"]["n_layer"], state["train_config"]["max_lr"]) == (20, 2, 0.01)
    assert state["val_loss"] == pytest.approx(read_log("log")["val"][20], rel=1e-6)


@pytest.mark.parametrize("first, dtype", [(1, "fp32"), (7, "fp32"), (19, "fp32"), (11, "fp16"), (11, "bf16")])
def test_resumed_run_ends_like_an_uninterrupted_one(here, capsys, first, dtype):
    run = [*RUN, "--dtype", dtype, "--val_every", "4", "--sample_every", "4", "--max_new_tokens", "8"]
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
    whole, parts = (torch.load(f"{name}/model_00020.pt", weights_only=True) for name in ("whole", "parts"))
    for name, weight in whole["model"].items():
        assert weight.equal(parts["model"][name]), name
    for i, state in whole["optimizer"]["state"].items():
        assert all(value.equal(parts["optimizer"]["state"][i][key]) for key, value in state.items())
    a, b = read_log("whole"), read_log("parts")
    assert all(a[stream] == b[stream] for stream in ("train", "val", "norm", "lr"))


def test_log_of_a_run_without_checkpoints_is_kept_beside_the_new_one(here):
    for steps in (5, 3):
        assert main([*RUN, "--log_dir", "log", "--max_steps", str(steps)]) == 0
    (old,) = (here / "log").glob("log_*.txt")
    assert len(losses("log")) == 3 and old.read_text().count("train") == 5


def test_settings_of_today_apply_to_a_resumed_run(here):
    assert main([*RUN, "--log_dir", "log", "--max_steps", "5", "--checkpoint_every", "5"]) == 0
    assert main([*RUN, "--log_dir", "log", "--max_steps", "6", "--weight_decay", "0.3", "--checkpoint_every", "6"]) == 0
    groups = torch.load("log/model_00006.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [g["weight_decay"] for g in groups] == [0.3, 0.0]


def test_run_resumes_in_another_precision(here):
    run = [*RUN, "--log_dir", "log", "--checkpoint_every", "5"]
    for steps, dtype in (5, "fp32"), (10, "fp16"), (15, "bf16"), (20, "fp32"):
        assert main([*run, "--dtype", dtype, "--max_steps", str(steps)]) == 0
    assert list(read_log("log")["train"]) == list(range(20))


def test_auto_may_be_said(here, capsys):
    autos = [f"--{name}=auto" for name in ("model", "micro_batch_size", "sequence_length", "min_lr", "device", "dtype")]
    flags = [flag for flag in RUN if not flag.startswith(("--model", "--device", "--dtype"))]
    assert main([*flags, *autos, "--log_dir", "log", "--device", "cpu"]) == 0
    assert "model   gpt2: " in capsys.readouterr().out


def test_unreadable_checkpoint_is_named_and_the_one_before_it_used(here, capsys):
    run = [*RUN, "--log_dir", "log", "--checkpoint_every", "10"]
    assert main(run) == 0
    newest = here / "log/model_00020.pt"
    newest.write_bytes(newest.read_bytes()[:5000])
    assert main(run) == 0
    out = capsys.readouterr().out
    assert "model_00020.pt can't be read" in out and "resuming log after 10 steps" in out


def test_weights_of_another_run_start_a_new_one(here):
    assert main([*RUN, "--log_dir", "first", "--checkpoint_every", "20", "--val_every", "20"]) == 0
    fine_tune = [flag for flag in RUN if not flag.startswith(("--n_", "--block_size"))]  # sizes come with the weights
    flags = ["--init_from", "first/model_00020.pt", "--log_dir", "second", "--val_every", "20"]
    assert main([*fine_tune, *flags]) == 0
    assert read_log("second")["val"][0] == pytest.approx(read_log("first")["val"][20], abs=1e-5)


@pytest.mark.parametrize("source", [[], ["--init_from", "log/model_00020.pt"]])
def test_generate_continues_a_prompt(here, capsys, source):
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "20"]) == 0
    capsys.readouterr()
    flags = ["--log_dir", "log", "--num_samples", "2", "--max_new_tokens", "9", "--temperature", "0", "--device", "cpu"]
    assert main(["--generate", "some", *flags, *source]) == 0
    samples = capsys.readouterr().out.split("--- sample ")[1:]
    assert len(samples) == 2 and all(s[2:].startswith("some") for s in samples)
    assert samples[0][2:] == samples[1][2:]  # greedy


def test_as_many_samples_as_asked_for_at_any_temperature(here, capsys):
    assert main([*RUN, "--max_steps=3", "--checkpoint_every=3", "--log_dir=log"]) == 0
    capsys.readouterr()
    for temperature in ("0", "1e-310", "1e-3", "1e9"):
        flags = ["--generate=ab", "--num_samples=35", "--max_new_tokens=3", f"--temperature={temperature}"]
        assert main([*flags, "--log_dir=log", "--device=cpu"]) == 0
        samples = re.findall(r"^--- sample (\d+)\nab", capsys.readouterr().out, re.MULTILINE)
        assert samples == [str(i) for i in range(35)]


def test_sampling_does_not_disturb_training(here):
    assert main([*RUN, "--log_dir", "quiet"]) == 0
    assert main([*RUN, "--log_dir", "chatty", "--sample_every", "1", "--val_every", "3"]) == 0
    assert losses("quiet") == losses("chatty")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_the_same_command_goes_on(here, signum):
    run = [*RUN, "--max_steps", "3000", "--checkpoint_every", "100000", "--log_dir", "log"]
    with subprocess.Popen([sys.executable, PROGRAM, *run], stdout=subprocess.PIPE, text=True) as process:
        while "step    30/" not in process.stdout.readline():
            pass
        process.send_signal(signum)
        rest = process.stdout.read()
    assert process.returncode == 128 + signum, rest
    checkpoint = torch.load(next((here / "log").glob("*.pt")), weights_only=True)
    assert max(read_log("log")["train"]) == checkpoint["step"] - 1 >= 30
    assert main([*run, "--max_steps", str(checkpoint["step"] + 3)]) == 0
    assert list(read_log("log")["train"]) == list(range(checkpoint["step"] + 3))


def test_signal_during_hellaswag_stops_it_and_it_is_done_again(here, monkeypatch):
    write_shards(here / "gpt2", lengths=(500, 5000), encoding="gpt2")
    examples = [([1] * n, [[2], [3], [4], [5]], n % 4) for n in range(1, 12)]
    write_hellaswag(here / "hellaswag/hellaswag_val.bin", examples)
    run = ["--data", "gpt2", *TINY, "--hellaswag_every", "4", "--max_steps", "8", "--checkpoint_every", "8"]
    assert main([*run, "--log_dir", "whole"]) == 0
    evaluate = train_gpt2.evaluate_hellaswag

    def interrupted(model, examples, device, progress):
        def first(batches):
            if calls.append(1) or len(calls) != 3:  # sums and means come from one pass
                return progress(batches)
            signal.raise_signal(signal.SIGTERM)
            assert not list(progress(batches))
            return []

        return evaluate(model, examples, device, first)

    calls = []
    monkeypatch.setattr(train_gpt2, "evaluate_hellaswag", interrupted)
    assert main([*run, "--log_dir", "parts"]) == 128 + signal.SIGTERM
    assert list(read_log("parts")["hella"]) == [0, 4] and (here / "parts/model_00008.pt").exists()
    assert main([*run, "--log_dir", "parts"]) == 0
    assert read_log("whole")["hella"] == read_log("parts")["hella"] and losses("whole") == losses("parts")


def test_numbers_gone_wrong_stop_the_run_and_are_not_saved(here, capsys, monkeypatch):
    forward = GPT2.forward

    def broken(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.append(1)
        return logits, loss * (math.nan if len(calls) == 8 else 1)

    calls = []
    monkeypatch.setattr(GPT2, "forward", broken)
    assert main([*RUN, "--log_dir", "log", "--checkpoint_every", "5"]) == 2
    assert "error: step 6: loss nan" in capsys.readouterr().err  # one call was the trial of the micro-batch
    assert [p.name for p in (here / "log").glob("*.pt")] == ["model_00005.pt"]


@pytest.mark.parametrize("overflows, code", [(3, 0), (100, 2)])
def test_steps_that_the_loss_scaler_skips_do_not_stop_a_run_unless_no_scaling_helps(
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
    run = [*RUN, "--dtype", "fp16", "--log_dir", "log", "--checkpoint_every", "4", "--max_steps", "40"]
    assert main(run) == code
    if code:
        assert "error: step 20: loss 4." in capsys.readouterr().err  # 2^16 was halved 16 times
    else:
        assert losses("log")[-1] < 4.5 and (here / "log/model_00040.pt").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory, or can't be told to")
def test_freed_memory_is_kept(here):
    code = """
        import resource, sys, torch, train_gpt2
        def pages():  # that the system has to find for 100 MB
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(25_000_000)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        if "keep" in sys.argv:
            train_gpt2.keep_memory()
        for _ in range(20):  # until the heap has found its shape
            pages()
        print(sum(pages() for _ in range(5)))
        """
    program, env = textwrap.dedent(code), dict(PYTHONPATH=str(PROGRAM.parent))
    given_back, kept = [int(python("-c", program, *args, cwd=here, env=env).stdout) for args in ([], ["keep"])]
    assert kept < given_back / 10


class TestMicroBatch:
    def test_running_out_of_memory_halves_it_and_the_losses_stay(self, here, capsys, monkeypatch):
        assert main([*RUN, "--log_dir", "plain"]) == 0
        forward = GPT2.forward

        def hungry(self, idx, targets=None):
            if idx.size(0) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, idx, targets)

        monkeypatch.setattr(GPT2, "forward", hungry)
        capsys.readouterr()
        assert main([*RUN, "--log_dir", "halved"]) == 0
        out = capsys.readouterr().out
        assert "micro-batches of 8 sequences" in out and "micro-batches of 4 sequences" in out
        assert "= 2 sequences × 16 tokens × 4 micro-steps" in out
        assert losses("halved") == pytest.approx(losses("plain"), abs=1e-5)

    def test_no_room_for_a_single_sequence_is_one_error(self, here, capsys, monkeypatch):
        def hungry(self, idx, targets=None):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        monkeypatch.setattr(GPT2, "forward", hungry)
        assert main([*RUN, "--log_dir", "log"]) == 2
        assert "no room for one sequence" in capsys.readouterr().err

    @pytest.mark.parametrize("total, asked, taken", [(16 * 6, None, 6), (16 * 7, 7, 7), (16 * 300, None, 150)])
    def test_it_divides_the_batch(self, here, capsys, total, asked, taken):
        flags = ["--micro_batch_size", str(asked)] if asked else []
        run = [*RUN, "--log_dir", "log", "--total_batch_size", str(total), "--max_steps", "2", *flags]
        assert main(run) == 0
        assert f"= {taken} sequences × 16 tokens × {total // 16 // taken} micro-steps" in capsys.readouterr().out


class TestCompile:
    """On the CPU, with the graphs run as they are where only their number matters."""

    @pytest.mark.parametrize("micro_batch_size", ["4", "1"])
    def test_nothing_recompiles_whatever_happens_in_between(self, here, monkeypatch, micro_batch_size):
        """One graph to try the compiler, one to train, one to validate; samples and HellaSwag add none."""
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        write_shards(here / "gpt2", lengths=(16 * 23 + 5, 5000), encoding="gpt2")
        examples = [([1] * n, [[2] * n, [3], [4] * 3, [5]], 0) for n in range(1, 9)]
        write_hellaswag(here / "hellaswag/hellaswag_val.bin", examples)
        run = ["--data", "gpt2", *TINY, "--compile", "--log_dir", "log", "--micro_batch_size", micro_batch_size]
        every = [f"--{name}_every={n}" for name, n in (("val", 3), ("hellaswag", 4), ("sample", 5), ("checkpoint", 6))]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        assert main([*run, *every, "--max_new_tokens", "20"]) == 0
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
        assert set(read_log("log")) >= {"train", "val", "hella"}

    @pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
    def test_compiled_losses_are_the_eager_ones(self, here, capsys):
        run = [*RUN, "--n_layer", "1"]
        assert main([*run, "--log_dir", "eager"]) == 0
        env = dict(TORCHINDUCTOR_CACHE_DIR=str(here / "cache"))
        done = python(PROGRAM, *run, "--log_dir", "compiled", "--compile", cwd=here, env=env)
        assert "compile True" in done.stdout or torch.__version__.startswith("2.6.")  # not trusted: wrong gradients
        assert losses("compiled") == pytest.approx(losses("eager"), abs=1e-4)

    def test_a_compiler_of_wrong_gradients_is_not_used(self, here, monkeypatch, capsys):
        monkeypatch.setattr(torch, "compile", lambda f, **options: lambda *args: f(*args) / 2)
        assert main([*RUN, "--log_dir", "log", "--compile"]) == 0
        out = capsys.readouterr().out
        assert out.count("computes wrong gradients") == 1 and "compile False" in out

    def test_without_a_compiler_one_line_says_so_and_training_goes_on(self, here):
        env = dict(CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(here / "cache"))
        done = python(PROGRAM, *RUN, "--log_dir", "log", "--compile", cwd=here, env=env)
        assert done.stdout.count("torch.compile can't be used here") == 1 and "compile False" in done.stdout
        assert len(losses("log")) == 20


class StandIn(TorchFunctionMode):
    """For CUDA, on a CPU: tensors sent there stay where they are, and the losses are noted in `events`, together with
    all that would make a program wait for a GPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.events = events = []

        class Event:
            def record(self):
                self.number = sum(event.startswith("record") for event in events)
                events.append(f"record {self.number}")

            def synchronize(self):
                events.append(f"synchronize {self.number}")

        answers = dict(device_count=1, set_device=None, mem_get_info=(8e10, 8e10), get_device_name="NVIDIA H200")
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *args, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "Event", Event)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        waits = name in ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
        if name == "cross_entropy" or waits or (name == "to" and "cpu" in args and not kwargs.get("non_blocking")):
            self.events.append(name)

        def here(z):
            return "cpu" if isinstance(z, torch.device) and z.type == "cuda" else z

        return func(*map(here, args), **{key: here(z) for key, z in kwargs.items()})


class TestLoopOfAGpu:
    gpu = ("--device", "cuda", "--no-tf32", "--no-compile")

    def test_figures_are_read_a_step_late_and_nothing_else_waits(self, here, monkeypatch, capsys):
        run = [*RUN, "--val_every", "10", "--micro_batch_size", "4", "--log_dir"]
        with StandIn(monkeypatch) as cuda:
            assert main([*run, "log", *self.gpu]) == 0
        validation, events = 3 * ["cross_entropy"] + 3 * ["item"], ["cross_entropy"]  # that of the micro-batch's trial
        for t in range(20):
            events += [*(validation if t == 10 or t == 0 else []), "cross_entropy", "cross_entropy", f"record {t}"]
            for figures in [t - 1] * (t not in (0, 10)) + [t] * (t in (9, 19)):
                events += [f"synchronize {figures}", "tolist"]
        assert cuda.events == [*events, *validation]
        assert capsys.readouterr().out.count("% | eta ") == 20  # MFU, since the card is known
        assert main([*run, "cpu"]) == 0
        ours, plain = read_log("log"), read_log("cpu")
        assert all(ours[stream] == plain[stream] for stream in ("train", "val", "norm", "lr"))

    def test_stopped_run_goes_on_to_the_same_weights(self, here, monkeypatch):
        def interrupt(t, cfg):
            if t == 7:
                signal.raise_signal(signal.SIGTERM)
            return get_lr(t, cfg)

        run = [*RUN, "--checkpoint_every", "20", "--log_dir"]
        assert main([*run, "cpu"]) == 0
        with StandIn(monkeypatch):
            monkeypatch.setattr(train_gpt2, "get_lr", interrupt)
            assert main([*run, "log", *self.gpu]) == 128 + signal.SIGTERM
            assert (here / "log/model_00009.pt").exists()  # step 8 was under way when the figures of 7 were read
            monkeypatch.setattr(train_gpt2, "get_lr", get_lr)
            assert main([*run, "log", *self.gpu]) == 0
        ours, plain = (torch.load(f"{name}/model_00020.pt", weights_only=True)["model"] for name in ("log", "cpu"))
        assert all(weight.equal(plain[name]) for name, weight in ours.items())
        assert losses("log") == losses("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
class TestCuda:
    def test_bf16_compile_flash_fused_follow_float32_on_the_cpu(self, here):
        gpu = ["--device=cuda", "--compile", "--fused_adamw", "--no-tf32", "--val_every=10", "--sample_every=10"]
        assert main([*RUN, "--log_dir", "cpu"]) == 0
        for dtype, tolerance in (("fp32", 0.01), ("bf16", 0.1), ("fp16", 0.05)):
            assert main([*RUN, "--log_dir", dtype, *gpu, "--dtype", dtype]) == 0
            assert losses(dtype) == pytest.approx(losses("cpu"), abs=tolerance)

    def test_resumed_run_is_the_same_to_the_last_bit_with_deterministic(self, here):
        run = [*RUN, "--device", "cuda", "--deterministic", "--val_every", "4", "--checkpoint_every"]
        try:
            assert main([*run, "20", "--log_dir", "whole"]) == 0
            assert main([*run, "7", "--log_dir", "parts", "--keep_checkpoints", "0"]) == 0
            for step in 14, 20:
                (here / f"parts/model_{step:05d}.pt").unlink()
            assert main([*run, "20", "--log_dir", "parts"]) == 0
        finally:
            torch.use_deterministic_algorithms(False)
        whole, parts = (torch.load(f"{name}/model_00020.pt", weights_only=True)["model"] for name in ("whole", "parts"))
        assert all(weight.equal(parts[name]) for name, weight in whole.items())

    def test_a_small_card_gets_a_micro_batch_that_fits(self, here, capsys):
        write_shards(here / "gpt2", lengths=(3000, 200_000), encoding="gpt2")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(6 * 2**30 / torch.cuda.mem_get_info()[1])
        try:
            flags = ["--model", "gpt2", "--total_batch_size", "65536", "--max_steps", "2", "--warmup_steps", "1"]
            off = ["--val_every", "0", "--sample_every", "0", "--checkpoint_every", "0", "--no-compile"]
            assert main(["--data", "gpt2", "--log_dir", "log", *flags, *off]) == 0
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
