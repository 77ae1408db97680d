"""Benchmarks, to be run by hand on a machine that does nothing else. Each prints a table:

    python tests/benchmark.py gpu          # all that a CUDA GPU can tell, in ten minutes
    python tests/benchmark.py ladder       # what each idea gains, from the textbook to the trainer
    python tests/benchmark.py batch        # micro-batches, and the step of build-nanogpt
    python tests/benchmark.py profile      # where the milliseconds of a step go
    python tests/benchmark.py residual     # the loss with a residual stream in bf16 and in float32
    python tests/benchmark.py evaluation   # the share of validation and HellaSwag in a run
    python tests/benchmark.py step         # the training loop against its bare forward and backward
    python tests/benchmark.py memory       # what a step needs, counted, estimated and measured
    python tests/benchmark.py ddp          # several processes against one, and ways of DDP
    python tests/benchmark.py tokenize     # fineweb.py against plain tiktoken
    python tests/benchmark.py hellaswag    # scoring in batches against one question at a time

What is compared is measured in turn, round after round, so that whatever else the machine does
affects all of it alike. Ratios are medians of the rounds' ratios.
"""

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import fineweb  # noqa: E402
import train_gpt2  # noqa: E402
from hellaswag import count_hits, score_questions  # noqa: E402

GPT2_VOCAB_SIZE = 50257
TRAINER = str(ROOT / "train_gpt2.py")
NOTHING_BUT_STEPS = [
    "--warmup_steps=0",
    "--val_every=0",
    "--hellaswag_every=0",
    "--sample_every=0",
    "--checkpoint_every=0",
]


# --------------------------------------------------------------------------------------------------
# What the benchmarks share


def print_table(header: list[str], rows: list):
    """Print a table in Markdown, with everything but the first column to the right."""
    columns = zip(header, *rows, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    rule = ["-" * (width - 1) + ":" for width in widths]
    rule[0] = "-" * widths[0]
    rows = [header, rule] + rows
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        print("| " + " | ".join(cells) + " |")


def median_ratio(values: list[float], others: list[float]) -> float:
    """The median of the ratios of each round."""
    return float(np.median(np.array(values) / np.array(others)))


def hardware(device: torch.device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    if sys.platform == "linux":
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {torch.get_num_threads()} threads"


def time_calls(function, count: int, device: torch.device) -> float:
    """Seconds that a call takes, in the mean of so many."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / count


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def write_random_shards(folder: Path, vocab_size: int):
    """Write a val and a train shard of random tokens, for the trainer to read."""
    rng = np.random.default_rng(0)
    for name in ("val_000000", "train_000001"):
        shard = rng.integers(0, vocab_size, 10**6, dtype=np.uint16)
        np.save(folder / f"random_{name}.npy", shard)
    encoding = "bytes" if vocab_size == 257 else "gpt2"
    manifest = dict(encoding=encoding, vocab_size=vocab_size)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def configure(args) -> train_gpt2.TrainConfig:
    """The configuration that the trainer chooses on this machine for what the flags ask for."""
    device = train_gpt2.choose_device(args.device)
    model = args.model
    if model is None:
        model = "gpt2" if device.type == "cuda" else "demo"
    T = train_gpt2.MODELS[model].get("block_size", 1024)
    if args.micro_batch_size:
        B = args.micro_batch_size[0]
    else:
        B = 16 if device.type == "cuda" else max(1, 2048 // T)
    given = dict(model=model, device=str(device), micro_batch_size=B, total_batch_size=B * T)
    for name in ("dtype", "compile", "n_layer"):
        if getattr(args, name) is not None:
            given[name] = getattr(args, name)
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), 257 if model == "demo" else GPT2_VOCAB_SIZE)
        given |= dict(data=folder, log_dir=f"{folder}/log")
        cfg, _, _ = train_gpt2.resolve_config(given)
    return cfg


def describe(cfg, what: str):
    batch = f"{cfg.micro_batch_size} × {cfg.sequence_length} tokens"
    print(f"{hardware(torch.device(cfg.device))}:", end=" ")
    print(f"{cfg.model}, {cfg.n_layer} layers, {cfg.dtype}, {batch}, {what}\n", flush=True)


def trainer_with_float32_stream() -> types.ModuleType:
    """train_gpt2 without the line that makes the residual stream one of 16 bits."""
    source = Path(TRAINER).read_text(encoding="utf-8")
    line = "x = x.bfloat16()"
    assert source.count(line) == 1, f"{TRAINER} does not have the line {line} once"
    module = types.ModuleType("train_gpt2")
    sys.modules["train_gpt2"] = module  # where dataclasses look for it
    exec(compile(source.replace(line, "pass"), TRAINER, "exec"), module.__dict__)
    return module


def make_training_step(cfg, float32_stream=False, fused=True, clip=True):
    """A function that does a micro-step and an optimiser step as the trainer does them, on random
    tokens."""
    trainer = trainer_with_float32_stream() if float32_stream else train_gpt2
    device = torch.device(cfg.device)
    torch.manual_seed(0)
    with device:
        model = trainer.GPT2(cfg)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.max_lr)
    if not fused:
        for group in optimizer.param_groups:
            group["fused"] = None  # PyTorch chooses among its other kernels
    forward = torch.compile(model, dynamic=False) if cfg.compile else model
    shape = (cfg.micro_batch_size, cfg.sequence_length)
    x = torch.randint(0, cfg.vocab_size, shape, device=device)
    y = torch.randint(0, cfg.vocab_size, shape, device=device)
    autocast = trainer.set_precision(device, cfg.dtype)
    parameters = list(model.parameters())

    def step():
        with autocast:
            loss = forward(x, y)
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


# --------------------------------------------------------------------------------------------------
# ladder, batch: variants of the step, side by side


def take_part(pipe, cfg, variant: dict):
    """Run in a process of its own: for each number that comes, do so many steps, and send back the
    seconds of one and the peak of memory in bytes. What fails is sent back in words."""
    device = torch.device(cfg.device)
    peak = 0
    try:
        step = make_training_step(cfg, **variant)
        while True:
            steps = pipe.recv()
            time_calls(step, 2, device)  # the first steps after a pause are slower
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = time_calls(step, steps, device)
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.empty_cache()  # the next contestant may need it
            pipe.send((seconds, peak))
    except EOFError:
        pass  # the race is over
    except Exception as error:  # out of memory, or whatever a compiler has to say
        pipe.send(str(error).splitlines()[0][:100])


def race(contestants: dict, rounds: int, steps: int):
    """Let training steps compete, and print a table. `contestants` has for each name a
    configuration and the variant of the step, as arguments of make_training_step.

    Each has a process of its own, since neither an allocator nor a compiler can be made to forget.
    """
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, (cfg, variant) in contestants.items():
        pipes[name], its_end = context.Pipe()
        context.Process(target=take_part, args=(its_end, cfg, variant), daemon=True).start()
        its_end.close()
    speeds = {name: [] for name in contestants}
    peaks = {}
    failures = {}
    for round_number in range(rounds + 1):
        for name, (cfg, _) in contestants.items():
            if name in failures:
                continue
            answer = "it died"
            with contextlib.suppress(BrokenPipeError):
                pipes[name].send(steps)
            with contextlib.suppress(EOFError):
                answer = pipes[name].recv()  # what it said before it died, if anything
            if isinstance(answer, str):
                failures[name] = answer
                continue
            seconds, peaks[name] = answer
            if round_number > 0:  # in the first round, they compile
                speeds[name].append(cfg.total_batch_size / seconds)
    for pipe in pipes.values():
        pipe.close()

    rows = []
    first = None
    for name, (cfg, _) in contestants.items():
        if name in failures:
            rows.append([name, failures[name], "-", "-", "-", "-", "-"])
            continue
        if first is None:
            first = before = speeds[name]
        speed = statistics.median(speeds[name])
        rows.append(
            [
                name,
                f"{1e3 * cfg.total_batch_size / speed:,.1f}",
                f"{speed:,.0f}",
                f"{median_ratio(speeds[name], before):.2f}",
                f"{median_ratio(speeds[name], first):.2f}",
                format_mfu(cfg, speed),
                f"{peaks[name] / 2**30:.1f}",
            ]
        )
        before = speeds[name]
    header = ["", "ms a step", "tokens/s", "× the one before", "× the first", "MFU", "peak GiB"]
    print_table(header, rows)


def format_mfu(cfg, speed: float) -> str:
    """Tokens per second as a share of the device's peak in 16 bits."""
    peak = train_gpt2.peak_flops(replace(cfg, dtype="bf16"))
    if not peak:
        return "-"
    with torch.device("meta"):
        model = train_gpt2.GPT2(cfg)
    return f"{speed * model.flops_per_token(cfg.sequence_length) / peak:.1%}"


def build_nanogpts_step(cfg) -> tuple:
    """The step of build-nanogpt, compiled: flash attention, padding that takes part in the softmax,
    a residual stream in float32, and AdamW fused on CUDA only."""
    padded_vocab_size = replace(cfg, pad_vocab=True).padded_vocab_size
    theirs = replace(cfg, vocab_size=padded_vocab_size, attention="flash", compile=True)
    return theirs, dict(float32_stream=True, fused=cfg.device.startswith("cuda"))


def ladder(args):
    """From a textbook loop to the trainer, idea by idea, without those it does not use here."""
    cfg = configure(args)
    rounds = args.rounds or 5
    steps = args.steps or 10
    describe(cfg, f"{rounds} rounds of {steps} steps")
    unfused = dict(fused=False)
    rung = replace(cfg, attention="manual", pad_vocab=False, dtype="fp32", compile=False)
    rungs = {"float32, textbook": (rung, unfused)}
    if cfg.device.startswith("cuda") and torch.cuda.is_tf32_supported():
        rung = replace(rung, dtype="tf32")
        rungs["+ TF32"] = (rung, unfused)
    if cfg.dtype == "bf16":
        rung = replace(rung, dtype="bf16")
        rungs["+ bf16 autocast"] = (rung, unfused)
    if cfg.compile:
        rung = replace(rung, compile=True)
        rungs["+ torch.compile"] = (rung, unfused)
    if cfg.attention == "flash":
        rung = replace(rung, attention="flash")
        rungs["+ flash attention"] = (rung, unfused)
    if cfg.pad_vocab:
        rung = replace(rung, pad_vocab=True)
        rungs["+ vocabulary padded"] = (rung, unfused)
    rungs["+ fused AdamW"] = (rung, {})
    rungs["build-nanogpt's step"] = build_nanogpts_step(cfg)
    race(rungs, rounds, steps)


def batch(args):
    """The trainer's step: at several micro-batches, or at one beside other ways to do it."""
    cfg = configure(args)
    rounds = args.rounds or 5
    steps = args.steps or 10
    describe(cfg, f"{rounds} rounds of {steps} steps")
    sizes = args.micro_batch_size or [cfg.micro_batch_size]
    contestants = {}
    for B in sizes:
        tokens = B * cfg.sequence_length
        sized = replace(cfg, micro_batch_size=B, total_batch_size=tokens)
        contestants[f"ours, B = {B}"] = (sized, {})
    if len(sizes) == 1:
        contestants["residual stream in float32"] = (cfg, dict(float32_stream=True))
        contestants["build-nanogpt's step"] = build_nanogpts_step(cfg)
    race(contestants, rounds, steps)


# --------------------------------------------------------------------------------------------------
# profile: where the time of a step goes

# What the name of a kernel, or on a CPU of an operation, says of its work. The first that fits
# counts.
KINDS = {
    "loss": "log_softmax|nll_loss|cross_entropy",
    "attention": "scaled_dot_product|flash|fmha|sdpa|::bmm|::_softmax",
    "optimiser and clipping": "adam|multi_tensor|foreach|vector_norm|lpnorm|optimizer",
    "matrix products": r"gemm|nvjet|cutlass|cublas|splitk|::(add)?b?mm\b",
    "copies and fills": "memcpy|memset|::copy_|::cat|::fill_|::zero_|contiguous",
    "element-wise work and norms": "triton|elementwise|norm|gelu|::(add|mul|div|sum)|embed|reduce",
    "other": "",
}


def profile(args):
    """The self time of all kernels (on a CPU of all operations) in a step, by kind."""
    cfg = configure(args)
    steps = args.steps or 20
    describe(cfg, f"{steps} steps")
    device = torch.device(cfg.device)
    on_gpu = device.type == "cuda"
    step = make_training_step(cfg)
    time_calls(step, 5, device)
    seconds = time_calls(step, steps, device)
    with torch.profiler.profile() as record:
        profiled_seconds = time_calls(step, steps, device)
    if not on_gpu:
        seconds = profiled_seconds  # the profiler slows down a CPU, but no kernel of a GPU

    times = dict.fromkeys(KINDS, 0.0)
    for event in record.key_averages():
        microseconds = event.self_cpu_time_total
        if on_gpu:
            if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
                continue  # not a kernel, but what launched one
            microseconds = event.self_device_time_total
        for kind, pattern in KINDS.items():
            if re.search(pattern, event.key, re.IGNORECASE):
                times[kind] += microseconds / 1e6 / steps
                break
    times = dict(sorted(times.items(), key=lambda item: -item[1]))
    times["between them"] = seconds - sum(times.values())
    times["the step"] = seconds
    rows = [[kind, f"{1e3 * t:.2f}", f"{t / seconds:.0%}"] for kind, t in times.items()]
    print_table(["", "ms a step", "share"], rows)


# --------------------------------------------------------------------------------------------------
# residual: what 16 bits of the residual stream do to the loss


RUN_WITH_FLOAT32_STREAM = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import benchmark
sys.exit(benchmark.trainer_with_float32_stream().main(sys.argv[1:]))
"""


def run_python(arguments: list, folder: Path, **environment):
    """Run Python in a folder. Raises SystemExit if it fails."""
    done = subprocess.run(
        [sys.executable] + arguments,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"error: {arguments} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def read_log(log_dir: Path, stream: str) -> list[float]:
    """The values of a stream of a run's log.txt."""
    lines = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    return [float(value) for _, name, value in lines if name == stream]


def flags_of(cfg, *names: str) -> list[str]:
    """The fields of a configuration as flags of the trainer."""
    return [f"--{name}={getattr(cfg, name)}" for name in names]


def residual(args):
    """Pairs of runs that differ in nothing but the residual stream, on real text: the source of
    Python's standard library, in bytes."""
    cfg = replace(configure(args), dtype="bf16")
    steps = args.steps or 300
    seeds = args.rounds or 5
    describe(cfg, f"{steps} steps on the source of Python's library")
    flags = NOTHING_BUT_STEPS + ["--data=data", "--val_every=1000000"]
    flags += [f"--val_tokens={1000 * steps}", f"--max_steps={steps}"]
    flags += [f"--warmup_steps={steps // 10}"]
    flags += flags_of(cfg, "n_layer", "n_head", "n_embd", "block_size", "max_lr")
    flags += flags_of(cfg, "device", "dtype", "micro_batch_size", "total_batch_size")
    programs = {"bf16 stream": [TRAINER], "float32 stream": ["-c", RUN_WITH_FLOAT32_STREAM]}
    losses = {name: [] for name in programs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fineweb.write_demo_data(folder / "data")
        for seed in range(seeds):
            for name, program in programs.items():
                log_dir = folder / f"{name} {seed}"
                run_python(program + flags + [f"--seed={seed}", f"--log_dir={log_dir}"], folder)
                losses[name].append(read_log(log_dir, "val")[-1])
    differences = np.array(losses["bf16 stream"]) - np.array(losses["float32 stream"])
    rows = []
    for seed, difference in enumerate(differences):
        row = [f"{losses[name][seed]:.4f}" for name in programs]
        rows.append([f"seed {seed}"] + row + [f"{difference:+.4f}"])
    print_table(["val loss"] + list(programs) + ["difference"], rows)
    if seeds > 1:
        error = differences.std(ddof=1) / seeds**0.5
        print(f"\nThe difference is {differences.mean():+.4f} ± {error:.4f} nats (standard error).")


# --------------------------------------------------------------------------------------------------
# evaluation: what validation and HellaSwag cost a run


def random_questions(count: int, vocab_size: int) -> list:
    """Questions of random tokens, as long as those of HellaSwag: 60 tokens of context and endings
    of 27 in the mean."""
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(count):
        context = rng.integers(0, vocab_size, rng.integers(25, 96)).tolist()
        lengths = rng.integers(10, 45, 4)
        endings = [rng.integers(0, vocab_size, length).tolist() for length in lengths]
        questions.append((context, endings, int(rng.integers(4))))
    return questions


def evaluation(args):
    """The default validation and all of HellaSwag, from a part of each, beside the 250 steps
    between two of them."""
    cfg = configure(args)
    describe(cfg, "one GPU or CPU")
    device = torch.device(cfg.device)
    step = make_training_step(cfg)
    time_calls(step, 3, device)
    tokens_per_second = cfg.total_batch_size / time_calls(step, args.steps or 10, device)
    seconds = {"250 steps of 2^19 tokens": 250 * 2**19 / tokens_per_second}

    model = train_gpt2.GPT2(cfg).to(device)
    compiled_model = torch.compile(model, dynamic=False) if cfg.compile else model
    questions = random_questions(args.questions or 1000, cfg.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), cfg.vocab_size)
        loader = train_gpt2.DataLoaderLite(replace(cfg, data=folder), "val")
        val_tokens = min(16 * cfg.total_batch_size, loader.num_windows * cfg.sequence_length)
        validate = functools.partial(
            train_gpt2.validation_loss, compiled_model, loader, val_tokens, device
        )
        answer = functools.partial(count_hits, model, questions, device)
        with train_gpt2.set_precision(device, cfg.dtype):
            time_calls(validate, 1, device)
            time_calls(answer, 1, device)
            seconds["validation"] = time_calls(validate, 1, device) * 10485760 / val_tokens
            seconds["HellaSwag"] = time_calls(answer, 1, device) * 10042 / len(questions)
    total = sum(seconds.values())
    rows = [[name, f"{value:.1f}", f"{value / total:.1%}"] for name, value in seconds.items()]
    print_table(["", "seconds", "share"], rows)


# --------------------------------------------------------------------------------------------------
# step: the training loop against its bare forward and backward pass


def step(args):
    """The loop of train_gpt2.py, with all that it does besides, against forward pass, backward pass
    and optimiser step on a fixed batch, without clipping and without reading anything back.

    They take turns of a few steps within one run of the trainer. Each turn of the loop is compared
    with the bare steps before and after it.
    """
    cfg = configure(args)
    rounds = args.rounds or 60
    steps = args.steps or 5
    describe(cfg, f"{rounds} turns of {steps} steps")
    device = torch.device(cfg.device)
    bare_step = make_training_step(cfg, clip=False)
    get_lr = train_gpt2.get_lr
    bare_seconds = []
    loop_seconds = []
    turn_began = None

    def take_turns(step, cfg):  # the loop asks for the rate at the beginning of each step
        nonlocal turn_began
        if step % steps == 0:
            synchronize(device)
            if turn_began is not None:
                loop_seconds.append((time.perf_counter() - turn_began) / steps)
            bare_seconds.append(time_calls(bare_step, steps, device))
            turn_began = time.perf_counter()
        return get_lr(step, cfg)

    flags = NOTHING_BUT_STEPS + [f"--max_steps={(rounds + 2) * steps + 1}"]
    flags += flags_of(cfg, "model", "device", "dtype", "micro_batch_size", "total_batch_size")
    printed = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        write_random_shards(Path(folder), cfg.vocab_size)
        train_gpt2.get_lr = take_turns
        exit_code = train_gpt2.main(flags + [f"--data={folder}", f"--log_dir={folder}/log"])
    if exit_code != 0:
        raise SystemExit(printed.getvalue())
    bare = np.array(bare_seconds[2:])  # the first two turns are to get warm
    loop = np.array(loop_seconds[2:])
    ratios = loop / ((bare[:-1] + bare[1:]) / 2)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    rows = [
        ["forward, backward, optimiser step", f"{1e3 * np.median(bare):.2f}", "1.000", "-"],
        [
            "train_gpt2.py",
            f"{1e3 * np.median(loop):.2f}",
            f"{median:.3f}",
            f"{low:.3f} to {high:.3f}",
        ],
    ]
    print_table(["", "ms a step, median", "× the bare step, median", "half of the turns"], rows)


# --------------------------------------------------------------------------------------------------
# memory: what a step needs


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on: those alive now, and the most
    there were. Views share a storage and count once."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def note(self, storage):
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.now -= self.alive.pop(key)


class Float32LayerNorm(torch.nn.LayerNorm):
    """As autocast computes it on CUDA; on a CPU it stays in bf16."""

    def forward(self, x):
        return super().forward(x.float())


def count_peak(cfg) -> int:
    """Bytes of all tensors that are alive at the worst moment of a step, from their sizes alone:
    nothing is computed and nothing allocated, so a model may be larger than this machine."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    tally = Tally()
    LayerNorm = torch.nn.LayerNorm
    torch.nn.LayerNorm = Float32LayerNorm
    try:
        with FakeTensorMode(), tally:
            step = make_training_step(replace(cfg, device="cpu"))
            step()  # makes AdamW's moments
            tally.peak = tally.now
            step()
    finally:
        torch.nn.LayerNorm = LayerNorm
    return tally.peak


def memory(args):
    """Gigabytes of a step in bf16 that is not compiled: counted, as the trainer estimates them when
    it chooses the micro-batch, and measured on a CUDA GPU."""
    models = {"gpt2": False, "gpt2-medium": False, "gpt2-large": True, "gpt2-xl": True}
    rows = []
    for model, checkpointing in models.items():
        for B in args.micro_batch_size or [1, 4]:
            values = train_gpt2.MODELS[model] | dict(model=model, micro_batch_size=B)
            values |= dict(dtype="bf16", compile=False, activation_checkpointing=checkpointing)
            values |= dict(sequence_length=1024, total_batch_size=1024 * B, device="cuda")
            cfg = train_gpt2.TrainConfig(**values)
            with torch.device("meta"):
                parameters = train_gpt2.GPT2(cfg).num_params()
            tokens = B * cfg.sequence_length
            estimate = 16 * parameters + tokens * train_gpt2.activation_bytes_per_token(cfg)
            row = [model, str(checkpointing), str(B)]
            row += [f"{count_peak(cfg) / 1e9:.1f}", f"{estimate / 1e9:.1f}", "-"]
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                with contextlib.suppress(torch.OutOfMemoryError):
                    time_calls(make_training_step(cfg), 2, torch.device("cuda"))
                    row[-1] = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
            rows.append(row)
    header = ["", "checkpointing", "micro-batch", "counted", "estimated", "measured"]
    print_table(header, rows)


# --------------------------------------------------------------------------------------------------
# ddp: several processes against one


def ddp(args):
    """Tokens per second of the trainer on all GPUs, or on a CPU in two processes of one thread,
    against one of them. On GPUs also with the model cut into parts, as PyTorch does by default, so
    that gradients are exchanged during the backward pass."""
    cfg = configure(args)
    rounds = args.rounds or 5
    steps = args.steps or 60
    device_type = torch.device(cfg.device).type
    processes = torch.cuda.device_count() if device_type == "cuda" else 2
    if processes == 1:
        raise SystemExit("error: there is only one GPU; try --device cpu")
    describe(cfg, f"{rounds} rounds of {steps} steps")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    ways = {
        "one process": ([TRAINER], 1),
        f"{processes} processes": (launcher + [TRAINER], processes),
        f"{processes} processes, 4 micro-steps each": (launcher + [TRAINER], 4 * processes),
    }
    if device_type == "cuda":  # where the trainer compiles
        ways[f"{processes} processes, cut"] = (launcher + ["cut.py"], processes)
    flags = NOTHING_BUT_STEPS + ["--data=.", f"--max_steps={steps}", f"--device={device_type}"]
    flags += flags_of(cfg, "model", "dtype", "micro_batch_size")
    speeds = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_random_shards(Path(folder), cfg.vocab_size)
        source = Path(TRAINER).read_text(encoding="utf-8")
        cut = source.replace("optimize_ddp = False", "optimize_ddp = True")
        Path(folder, "cut.py").write_text(cut, encoding="utf-8")
        for round_number in range(rounds):
            for name, (start, micro_batches) in ways.items():
                log_dir = Path(folder, f"{name} {round_number}")
                tokens = micro_batches * cfg.micro_batch_size * cfg.sequence_length
                arguments = [f"--total_batch_size={tokens}", f"--log_dir={log_dir}"]
                run_python(start + flags + arguments, folder, OMP_NUM_THREADS="1")
                all_speeds = read_log(log_dir, "tps")
                speeds[name].append(statistics.median(all_speeds[steps // 4 :]))  # without a start
    rows = []
    for name, values in speeds.items():
        ratio = median_ratio(values, speeds["one process"])
        rows.append([name, f"{statistics.median(values):,.0f}", f"{ratio:.2f}"])
    print_table(["", "tokens/s, median", "× one process"], rows)


# --------------------------------------------------------------------------------------------------
# tokenize: from text to tokens


def write_english(path: Path, megabytes: int):
    """Write documents of a few kilobytes as .jsonl. Like web pages they consist of paragraphs, and
    these come from the docstrings of Python's standard library."""
    paragraphs = []
    for source in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = source.read_text(encoding="utf-8", errors="replace")
        for docstring in re.findall(r'"""(.*?)"""', text, re.DOTALL):
            for paragraph in docstring.split("\n\n"):
                if len(paragraph) > 80:
                    paragraphs.append(" ".join(paragraph.split()))
    rng = random.Random(0)
    size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 10**6:
            document = "\n\n".join(rng.choices(paragraphs, k=rng.randint(2, 30)))
            file.write(json.dumps({"text": document}) + "\n")
            size += len(document)


def start_worker():
    """Give a process of a pool an encoding of its own."""
    global encoding
    encoding = tiktoken.get_encoding("gpt2")


def count_tokens(lines: list[str]) -> int:
    """The number of tokens of documents, and nothing else."""
    texts = [json.loads(line)["text"] for line in lines]
    return sum(len(encoding.encode_to_numpy(text)) + 1 for text in texts)


def tokenize(args):
    """Tokens per second, timed from outside, with the start of all processes and threads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cores = torch.get_num_threads()
    rounds = args.rounds or 5
    tiktoken.get_encoding("gpt2")  # if it can't be downloaded, this says so
    with tempfile.TemporaryDirectory() as folder:
        jsonl = Path(folder, "text.jsonl")
        parquet = Path(folder, "text.parquet")
        write_english(jsonl, args.megabytes)
        lines = jsonl.read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        pq.write_table(pa.table({"text": texts}), parquet, row_group_size=1000)
        print(f"{cores} cores, {len(lines):,} documents, {args.megabytes} MB, {rounds} rounds\n")

        def plain() -> int:
            parts = [lines[i::cores] for i in range(cores)]
            with multiprocessing.Pool(cores, start_worker) as pool:
                return sum(pool.map(count_tokens, parts, chunksize=1))

        def ours(path: Path) -> int:
            out = Path(folder, "out")
            flags = ["--files", path, "--out", out, f"--num_workers={cores}"]
            run_python([ROOT / "fineweb.py"] + flags, folder)
            manifest = json.loads((out / "manifest.json").read_text())
            shutil.rmtree(out)
            return sum(shard["tokens"] for shard in manifest["shards"])

        ways = {
            "plain tiktoken": plain,
            "fineweb.py, .parquet": functools.partial(ours, parquet),
            "fineweb.py, .jsonl": functools.partial(ours, jsonl),
        }
        speeds = {name: [] for name in ways}
        counts = set()
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                tokens = way()
                speeds[name].append(tokens / (time.perf_counter() - start))
                counts.add(tokens)
    assert len(counts) == 1, f"they differ in the number of tokens: {counts}"
    rows = []
    for name, values in speeds.items():
        ratio = median_ratio(values, speeds["plain tiktoken"])
        rows.append([name, f"{statistics.median(values) / 1e6:.2f}", f"{ratio:.2f}"])
    print_table(["", "million tokens/s, median", "× plain tiktoken"], rows)


# --------------------------------------------------------------------------------------------------
# hellaswag: batches of endings against one question at a time


def score_one_at_a_time(model, questions, device):
    """The log-likelihoods of endings as build-nanogpt computes them: a question is four rows,
    padded to the longest, and the logits of all positions become losses, of which a mask keeps
    those of the ending."""
    sums = []
    means = []
    for context, endings, _ in questions:
        T = len(context) + max(len(ending) for ending in endings)
        idx = torch.zeros(4, T, dtype=torch.int64)
        mask = torch.zeros(4, T)
        for k, ending in enumerate(endings):
            row = context + ending
            idx[k, : len(row)] = torch.tensor(row)
            mask[k, len(context) : len(row)] = 1
        idx = idx.to(device)
        mask = mask[:, 1:].to(device)
        logits = model(idx)[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
        totals = -(losses.view(4, -1) * mask).sum(dim=1)
        sums.append(totals.cpu())
        means.append((totals / mask.sum(dim=1)).cpu())
    return torch.stack(sums), torch.stack(means)


@torch.no_grad()
def score_hellaswag(args):
    """Questions per second, in the device's best precision and with random weights."""
    cfg = replace(configure(args), block_size=1024)
    rounds = args.rounds or 5
    device = torch.device(cfg.device)
    questions = random_questions(args.questions or 24, cfg.vocab_size)
    describe(cfg, f"{rounds} rounds of {len(questions)} questions")
    torch.manual_seed(0)
    model = train_gpt2.GPT2(cfg).to(device)
    ways = {"one question at a time": score_one_at_a_time, "hellaswag.py": score_questions}
    speeds = {name: [] for name in ways}
    means = {}
    with train_gpt2.set_precision(device, cfg.dtype):
        for round_number in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                _, means[name] = way(model, questions, device)
                if round_number > 0:  # the first is to get warm
                    speeds[name].append(len(questions) / (time.perf_counter() - start))
    rows = []
    for name, values in speeds.items():
        speed = statistics.median(values)
        ratio = median_ratio(values, speeds["one question at a time"])
        rows.append([name, f"{speed:.2f}", f"{10042 / speed:,.0f}", f"{ratio:.2f}"])
    print_table(["", "questions/s, median", "s for all 10,042", "× one at a time"], rows)
    difference = means["one question at a time"] - means["hellaswag.py"]
    print(f"\nTheir means of an ending differ by {difference.abs().max():.1e} nats at most.")


# --------------------------------------------------------------------------------------------------
# gpu: all that a CUDA GPU can tell

# Title, command, seconds at most, and what makes it small for a rehearsal on a CPU
PARTS = [
    ("The step", "batch --micro_batch_size 64", 200, "--micro_batch_size 2 --steps=1"),
    ("Where its time goes", "profile --micro_batch_size 64", 90, "--steps=2"),
    ("Tests that need a GPU", "pytest", 120, ""),
    ("Other micro-batches", "batch --micro_batch_size 32 128", 150, "--steps=1"),
    ("The residual stream", "residual --n_layer=4 --rounds=2", 200, "--steps=4"),
    ("Validation and HellaSwag", "evaluation --micro_batch_size 64", 90, "--questions=4 --steps=1"),
    ("The training loop", "step --micro_batch_size 64 --rounds=6", 90, "--steps=1"),
    ("From the textbook to the trainer", "ladder", 240, "--steps=1"),
    ("Memory", "memory", 120, "--micro_batch_size 1"),
    ("Several GPUs", "ddp --rounds=1", 150, "--steps=4"),
]
REHEARSAL = "--device=cpu --model=demo --rounds=1"


def gpu(args):
    """Run all parts, each in a process of its own, so that one that fails or hangs takes nothing
    with it. The report grows part by part."""
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA GPU; --rehearse tries all of it on the CPU")
    device = torch.device("cpu" if args.rehearse else "cuda")
    out = Path(args.out or re.sub(r"\W+", "_", f"gpu {hardware(device)}") + ".md")
    if out.exists():
        raise SystemExit(f"error: {out} is there already; choose another --out")
    end = time.monotonic() + 60 * args.minutes
    report = f"# {hardware(device)}\n\nPython {platform.python_version()}, "
    report += f"torch {torch.__version__}, CUDA {torch.version.cuda}, "
    report += f"cuDNN {torch.backends.cudnn.version()}, {torch.cuda.device_count()} GPUs\n"
    for title, command, limit, rehearsal in PARTS:
        if args.only and command.split()[0] not in args.only:
            continue
        if command == "pytest":
            arguments = ["-m", "pytest", "-q", "-k", "TestCuda", str(ROOT / "tests")]
        else:
            arguments = [__file__] + command.split()
        if args.rehearse and command != "pytest":
            arguments += f"{REHEARSAL} {rehearsal}".split()
        start = time.monotonic()
        limit = min(limit, end - start)
        report += f"\n## {title}\n\n"
        if limit < 15:
            report += "No time was left for it.\n"
        else:
            report += run_part([sys.executable] + arguments, limit)
        out.write_text(report, encoding="utf-8")
        print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"{out} has it all")


def run_part(command: list[str], limit: float) -> str:
    """What a command prints, and after it what went wrong."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=output, stderr=errors, cwd=ROOT, start_new_session=True
        )
        failure = None
        try:
            if process.wait(limit) != 0:
                failure = f"It failed (exit code {process.returncode}):"
        except subprocess.TimeoutExpired:
            failure = f"It was stopped after {limit:.0f} s:"
        finally:
            with contextlib.suppress(OSError):  # it may have left processes behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        errors.seek(0)
        text = output.read().strip() + "\n"
        if failure:
            last_lines = "\n".join(errors.read().splitlines()[-12:])
            text += f"\n{failure}\n\n```\n{last_lines}\n```\n"
        return text


# --------------------------------------------------------------------------------------------------
# Command line

COMMANDS = {
    "gpu": gpu,
    "ladder": ladder,
    "batch": batch,
    "profile": profile,
    "residual": residual,
    "evaluation": evaluation,
    "step": step,
    "memory": memory,
    "ddp": ddp,
    "tokenize": tokenize,
    "hellaswag": score_hellaswag,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--rounds", type=int, help="how often to measure each")
    add("--steps", type=int, help="steps to time in a round, or of a run")
    add("--model", help="named size (gpt2 on CUDA, else demo)")
    add("--n_layer", type=int, help="fewer or more layers than it has")
    add("--device", help="cpu, cuda or mps (the fastest there is)")
    add("--dtype", choices=("fp32", "tf32", "bf16"), help="precision (the trainer's choice)")
    add("--compile", action=argparse.BooleanOptionalAction, help="(the trainer's choice)")
    add("--micro_batch_size", type=int, nargs="+", help="sequences (16 on CUDA, else 2,048 tokens)")
    add("--questions", type=int, help="evaluation, hellaswag: how many to score")
    add("--megabytes", type=int, default=300, help="tokenize: of text (%(default)s)")
    add("--out", help="gpu: the report (gpu_NAME_OF_THE_CARD.md)")
    add("--minutes", type=float, default=10, help="gpu: at most so long (%(default)s)")
    add("--only", nargs="+", help="gpu: only these commands")
    add("--rehearse", action="store_true", help="gpu: try it on the CPU, with a small model")
    args = parser.parse_args()
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
