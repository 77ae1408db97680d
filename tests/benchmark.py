"""Benchmarks, run by hand on a machine that does nothing else. Each prints a table of ratios,
measured side by side:

    python tests/benchmark.py gpu         # all that a CUDA GPU can tell, in ten minutes
    python tests/benchmark.py ladder      # what each step up to the trainer's settings gains
    python tests/benchmark.py batch       # several micro-batches, and build-nanogpt's step
    python tests/benchmark.py compiler    # torch.compile with more tuning
    python tests/benchmark.py attention   # which of PyTorch's kernels it is, and how fast all are
    python tests/benchmark.py residual    # the loss with a residual stream in bf16 and in float32
    python tests/benchmark.py evaluation  # the share of validation and HellaSwag in a run
    python tests/benchmark.py ddp         # several GPUs, with and without DDP's own optimisation
    python tests/benchmark.py step        # the training loop against its bare products
    python tests/benchmark.py profile     # where a step's milliseconds go
    python tests/benchmark.py memory      # what the larger models take; do they fit small cards?
    python tests/benchmark.py loader      # batches a second, against reading whole shards
    python tests/benchmark.py scaling     # two processes against one
    python tests/benchmark.py tokenize    # fineweb.py against plain tiktoken and the pool scheme
    python tests/benchmark.py hellaswag   # scoring endings, against one example at a time
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt2  # noqa: E402


def print_table(header: list[str], rows: list[list]) -> None:
    """A table as Markdown, numbers to the right."""
    text = lambda cell: f"{cell:,.2f}" if isinstance(cell, float) else str(cell)  # noqa: E731
    rows = [[text(cell) for cell in row] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * first, *["-" * (width - 1) + ":" for width in others]]
    for name, *cells in [header, rule, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        print("| " + " | ".join([name.ljust(first), *cells]) + " |")


# --------------------------------------------------------------------------------------------------
# ladder: the same model and batch, one improvement more on each rung


def hardware(device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    name = re.search(r"model name\s*: (.*)", cpus)
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads"


def synchronize(device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def compiles(device) -> bool:
    """Whether torch.compile works here: it needs Triton for a GPU, a C++ compiler for a CPU."""
    try:
        return torch.compile(torch.square)(torch.ones(8, device=device)).sum().item() == 8
    except Exception:
        return False


def trainers_config(model, **changes):
    """The settings that the trainer chooses here for a named model, and the device they name."""
    device = train_gpt2.choose_device(changes.get("device"))
    name = model or ("gpt2" if device.type == "cuda" else "demo")
    known = dict(model=name, vocab_size=257 if name == "demo" else 50257)
    cfg = train_gpt2.TrainConfig(**{**train_gpt2.MODELS[name], **known, **changes})
    return cfg, train_gpt2.resolve(cfg)


def configure(args):
    """The same, for what the command line asks for."""
    cfg, device = trainers_config(args.model, device=args.device, dtype=args.dtype)
    usual = 16 if device.type == "cuda" else max(1, 2048 // cfg.block_size)
    cfg.micro_batch_size = args.micro_batch_size or usual
    cfg.n_layer = getattr(args, "n_layer", None) or cfg.n_layer
    cfg.compile = cfg.compile or args.compile
    cfg.total_batch_size = cfg.micro_batch_size * cfg.block_size * args.micro_steps
    train_gpt2.check(cfg)
    return cfg, device


def model_of(cfg):
    fields = dataclasses.fields(train_gpt2.GPT2Config)
    return train_gpt2.GPT2(train_gpt2.GPT2Config(**{f.name: getattr(cfg, f.name) for f in fields}))


def describe(args, cfg, device, how_long: str) -> None:
    batch = f"{cfg.micro_batch_size} × {cfg.sequence_length} tokens"
    batch += f" × {args.micro_steps} micro-steps"
    print(f"{hardware(device)}: {cfg.model}, {cfg.dtype}, {batch}, {how_long}\n", flush=True)


STREAM = "x = x.bfloat16()"  # the line that makes the residual stream one of 16 bits


def with_float32_stream():
    """train_gpt2 as it would be with a residual stream in float32, from here on."""
    global train_gpt2
    path = ROOT / "train_gpt2.py"
    source = path.read_text(encoding="utf-8")
    assert source.count(STREAM) == 1, f"{path} does not have the line {STREAM}"
    module = types.ModuleType("train_gpt2")
    module.__file__ = str(path)
    sys.modules["train_gpt2"] = train_gpt2 = module
    exec(compile(source.replace(STREAM, "pass"), path, "exec"), module.__dict__)
    return module


def training_step(cfg, device, micro_steps: int, **compiler):
    """A function that does one whole optimiser step on random tokens, with cfg's dtype, tf32,
    compile and fused_adamw (without which torch picks the kernels)."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    with torch.device(device):
        model = model_of(cfg)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.max_lr, cfg.fused_adamw)
    forward = torch.compile(model, dynamic=False, **compiler) if cfg.compile else model
    shape = 2, cfg.micro_batch_size, cfg.sequence_length
    x, y = torch.randint(0, cfg.vocab_size, shape, device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bf16")
    parameters = list(model.parameters())

    def step(clip=True):
        for _ in range(micro_steps):
            with autocast:
                loss = forward(x, y)[1] / micro_steps
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def take_part(pipe, cfg, micro_steps: int, float32_stream=False, **compiler) -> None:
    """A process of its own for each contestant, since no allocator and no compiler can be made to
    forget. Sent a number of steps, it does them and sends back the seconds and, on CUDA, the peak
    of its memory in bytes; 0 is the end. What fails is sent back in words."""
    device = torch.device(cfg.device)
    try:
        if float32_stream:
            with_float32_stream()
        step = training_step(cfg, device, micro_steps, **compiler)
        while steps := pipe.recv():
            for _ in range(2):
                step()
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds, peak = seconds_a_step(step, steps, device), None
            if device.type == "cuda":  # the next one begins when this one has reported
                peak = torch.cuda.max_memory_allocated()
                torch.cuda.empty_cache()
            pipe.send((seconds, peak))
    except torch.OutOfMemoryError:
        pipe.send("out of memory")
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}".splitlines()[0][:100])


PATIENCE = 120  # seconds; to compile may take one


def race(contestants: dict, rounds: int, steps: int) -> tuple[dict, dict, dict]:
    """{name: (cfg, micro_steps, options)} -> tokens a second in each round, the peak of memory in
    bytes (None but on CUDA), and what went wrong. Each round has all of them in turn, so that
    whatever the machine does meanwhile hits them alike."""
    pipes, processes, speeds, memory, failures = {}, {}, {}, {}, {}
    context = multiprocessing.get_context("spawn")
    for name, (cfg, micro_steps, options) in contestants.items():
        pipes[name], end = context.Pipe()
        job = dict(args=(end, cfg, micro_steps), kwargs=options, daemon=True)
        processes[name] = context.Process(target=take_part, **job)
        processes[name].start()
        end.close()
        speeds[name] = []
    for i in range(-1, rounds):  # the first round, in which models compile, does not count
        for name in [name for name in pipes if name not in failures]:
            start = time.perf_counter()
            try:
                pipes[name].send(steps)
                there = pipes[name].poll(PATIENCE)
                answer = pipes[name].recv() if there else f"not ready after {PATIENCE} s"
            except (EOFError, OSError):
                answer = "it died"
            if isinstance(answer, str):
                failures[name] = answer
                processes[name].kill()
                continue
            seconds, memory[name] = answer
            if i >= 0:
                speeds[name].append(contestants[name][0].total_batch_size / seconds)
            else:
                took = time.perf_counter() - start
                print(f"{name}: {took:.0f} s until it ran", file=sys.stderr, flush=True)
    for name in pipes.keys() - failures.keys():
        pipes[name].send(0)
    return speeds, memory, failures


def mfu(cfg, speed: float) -> str:
    """Tokens a second as a share of the device's peak in 16 bits."""
    peak = train_gpt2.peak_flops(dataclasses.replace(cfg, dtype="bf16"))
    with torch.device("meta"):
        flops = model_of(cfg).flops_per_token(cfg.sequence_length)
    return f"{speed * flops / peak:.1%}" if peak else "-"


def gibibytes(size) -> str:
    return f"{size / 2**30:.1f}" if size else "-"


def seconds_a_step(step, steps: int, device) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / steps


def rungs_of(args, cfg, device) -> list[tuple]:
    """(name, config, options, why the rung is left out) of each. At the end comes build-nanogpt's
    step, compiled: flash attention, AdamW fused on CUDA only, the padding part of the softmax, a
    residual stream in float32."""
    cuda, compiler = device.type == "cuda", compiles(device)
    tf32 = cuda and torch.cuda.is_tf32_supported()
    plain = dict(attention="manual", pad_vocab=False, dtype="fp32", tf32=False, compile=False)
    climb, rungs = dataclasses.replace(cfg, **plain, fused_adamw=False), []
    for rung, change, lacking in (
        ("float32, textbook", {}, ""),
        ("+ TF32", dict(tf32=True), "" if tf32 else "no TF32 units"),
        ("+ bf16 autocast", dict(dtype="bf16"), cfg.dtype != "bf16" and "not used here"),
        ("+ torch.compile", dict(compile=True), not (cuda or args.compile) and "not used here"),
        ("+ flash attention", dict(attention="flash"), cfg.attention != "flash" and "slower here"),
        ("+ vocabulary padded", dict(pad_vocab=True), not cfg.pad_vocab and "not used here"),
        ("+ fused AdamW", dict(fused_adamw=True), not cfg.fused_adamw and "no kernel"),
    ):
        if "compile" in rung and not lacking and not compiler:
            lacking = "no compiler"
        climb = climb if lacking else dataclasses.replace(climb, **change)
        rungs.append((rung, climb, {}, lacking))
    padded = dataclasses.replace(cfg, pad_vocab=True).padded_vocab_size
    theirs = dict(vocab_size=padded, fused_adamw=cuda, attention="flash", compile=True)
    lacking = "" if compiler else "no compiler"
    theirs = dataclasses.replace(cfg, **theirs)
    return [*rungs, ("build-nanogpt's step", theirs, dict(float32_stream=True), lacking)]


def ladder(args) -> None:
    """Each round climbs the whole ladder."""
    cfg, device = configure(args)
    describe(args, cfg, device, f"{args.rounds} rounds")
    rungs = rungs_of(args, cfg, device)
    there = {rung: (c, args.micro_steps, options) for rung, c, options, out in rungs if not out}
    speeds, memory, failures = race(there, args.rounds, args.steps)
    first = before = np.array(speeds["float32, textbook"])
    rows = []
    for rung, _, _, lacking in rungs:
        if lacking or rung in failures:
            rows.append([rung, lacking or failures[rung], *"----"])
            continue
        speed = np.array(speeds[rung])
        gains = [float(np.median(speed / base)) for base in (before, first)]
        middle = np.median(speed)
        rows.append([rung, f"{middle:,.0f}", *gains, mfu(cfg, middle), gibibytes(memory[rung])])
        before = speed
    header = ["", "tokens/s", "× the rung before", "× the first", "MFU (bf16 peak)", "peak GiB"]
    print_table(header, rows)


# --------------------------------------------------------------------------------------------------
# batch, compiler: the trainer's step, and others of it, side by side


def compare(args, contestants: dict) -> None:
    """Race, and print a table; the first contestant is what the others are held against."""
    cfg, device = configure(args)
    describe(args, cfg, device, f"{args.rounds} rounds of {args.steps} steps")
    speeds, memory, failures = race(contestants, args.rounds, args.steps)
    first, rows = np.array(next(iter(speeds.values()))), []
    for name, (cfg, _, _) in contestants.items():
        if name in failures:
            rows.append([name, failures[name], *"----"])
            continue
        speed = np.median(speeds[name])
        ratio = float(np.median(np.array(speeds[name]) / first)) if len(first) else "-"
        ms = f"{1e3 * cfg.total_batch_size / speed:.1f}"
        figures = [f"{speed:,.0f}", ratio, mfu(cfg, speed), gibibytes(memory[name])]
        rows.append([name, ms, *figures])
    print_table(["", "ms a step", "tokens/s", "× the first", "MFU", "peak GiB"], rows)


def batch(args) -> None:
    """The trainer's step at several micro-batches; then, at the first of them, with a residual
    stream in float32, and build-nanogpt's step."""
    contestants = {}
    for B in args.micro_batch_sizes:
        args.micro_batch_size = B
        cfg, device = configure(args)
        contestants[f"ours, B = {B}"] = cfg, args.micro_steps, {}
    if not args.ours_alone:
        args.micro_batch_size = args.micro_batch_sizes[0]
        cfg, device = configure(args)
        stream = dict(float32_stream=True)
        contestants["residual stream in float32"] = cfg, args.micro_steps, stream
        *_, (theirs, their_cfg, options, lacking) = rungs_of(args, cfg, device)
        if not lacking:
            contestants[theirs] = their_cfg, args.micro_steps, options
    compare(args, contestants)


def compiler(args) -> None:
    """torch.compile as the trainer calls it, and with more tuning, on a model of few layers, whose
    kernels are those of the whole one."""
    cfg, _ = configure(args)
    cfg.compile = True
    ways = {
        "default": {},
        "coordinate_descent_tuning": dict(options={"coordinate_descent_tuning": True}),
        "max-autotune-no-cudagraphs": dict(mode="max-autotune-no-cudagraphs"),
    }
    names = args.ways or ways
    compare(args, {name: (cfg, args.micro_steps, ways[name]) for name in names})


# --------------------------------------------------------------------------------------------------
# attention: PyTorch's kernels for it


def attention(args) -> None:
    """Causal attention of a layer, forward and backward, by each of PyTorch's backends and by the
    one it takes itself. q, k and v are views into one tensor, as in the model."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    cfg, device = configure(args)
    B, T, C, n_head = cfg.micro_batch_size, cfg.block_size, cfg.n_embd, cfg.n_head
    dtype = dict(bf16=torch.bfloat16, fp16=torch.float16, fp32=torch.float32)[cfg.dtype]
    qkv = torch.randn(B, T, 3 * C, device=device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(B, T, C, device=device, dtype=dtype)

    def once():
        q, k, v = (z.view(B, T, n_head, -1).transpose(1, 2) for z in qkv.split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.transpose(1, 2).reshape(B, T, C).backward(gradient)

    backends = {"PyTorch's choice": contextlib.nullcontext}
    for name in "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH":
        backends[name] = functools.partial(sdpa_kernel, getattr(SDPBackend, name))
    flops = 3.5 * 2 * B * T**2 * C  # half of (T, T): two products forward, five backward
    rows, kernels = [], {}
    for name, chosen in backends.items():
        try:
            with chosen(), torch.profiler.profile() as record:
                once()
                synchronize(device)
            events = record.key_averages()
            longest = max(events, key=lambda event: event.self_device_time_total).key
            kernels[name] = longest if device.type == "cuda" else "-"
            with chosen():
                for _ in range(args.steps):
                    once()
                synchronize(device)
                seconds = min(seconds_a_step(once, args.steps, device) for _ in range(3))
            rows.append([name, 1e3 * seconds, flops / seconds / 1e12, kernels[name][:60]])
        except Exception as error:  # it does not exist here, or not for these shapes
            rows.append([name, f"{error}".splitlines()[0][:60], "-", "-"])
    what = f"{cfg.dtype}, {B} × {T} tokens, {n_head} heads of {C // n_head}"
    print(f"{hardware(device)}: {what}, forward and backward of one layer\n")
    print_table(["", "ms", "TFLOP/s", "longest kernel"], rows)


# --------------------------------------------------------------------------------------------------
# residual: what 16 bits of the residual stream do to the loss

ONE_RUN = """
import sys
sys.path.insert(0, {tests!r})
import benchmark
trainer = benchmark.with_float32_stream() if {float32} else benchmark.train_gpt2
sys.exit(trainer.main(sys.argv[1:]))
"""


def write_real_text(folder: Path, megabytes: int, encoding: str) -> None:
    """Shards of the source of Python's standard library: for the demo in bytes, else in GPT-2's
    tokens. Every fortieth file is held out."""
    from fineweb import get_encoding

    encoding = get_encoding(encoding)
    files, texts, size = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")), [], 0
    random.Random(0).shuffle(files)
    for path in files:
        if size < megabytes * 1e6 and "encodings" not in path.parts:
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
            size += len(texts[-1])
    tokens = encoding.encode_ordinary_batch(texts)
    held_out, rest = tokens[::40], [document for i, document in enumerate(tokens) if i % 40]
    for name, documents in ("val_000000", held_out), ("train_000001", rest):
        flat = np.concatenate([[encoding.eot_token, *document] for document in documents])
        np.save(folder / f"python_{name}.npy", flat.astype(np.uint16))
    manifest = dict(encoding=encoding.name, vocab_size=encoding.n_vocab)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def residual(args) -> None:
    """Runs of the trainer in pairs, which differ in nothing but the residual stream. The last
    validation loss of each, on real text."""
    cfg, device = configure(args)
    describe(args, cfg, device, f"{args.steps} steps on the source of Python's library")
    sizes = ("n_layer", "n_head", "n_embd", "block_size")
    same = (*sizes, "device", "dtype", "micro_batch_size", "total_batch_size", "max_lr")
    flags = [f"--{name}={getattr(cfg, name)}" for name in same]
    flags += [*NOTHING_BUT_STEPS, f"--warmup_steps={args.steps // 10}", "--val_every=100000"]
    flags += [f"--max_steps={args.steps}", f"--val_tokens={args.val_tokens}"]
    flags += ["--compile" if cfg.compile else "--no-compile"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        write_real_text(Path(folder), args.megabytes, "bytes" if cfg.model == "demo" else "gpt2")

        def last_loss(job) -> float:
            seed, float32 = job
            code = ONE_RUN.format(tests=str(Path(__file__).parent), float32=float32)
            where = ["--data=.", f"--log_dir=log_{seed}_{float32}", f"--seed={seed}"]
            command = [sys.executable, "-c", code, *flags, *where]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            print(f"seed {seed} done", file=sys.stderr, flush=True)
            lines = Path(folder, f"log_{seed}_{float32}", "log.txt").read_text().splitlines()
            return float([line.split()[2] for line in lines if " val " in line][-1])

        jobs = [(seed, float32) for seed in range(args.seeds) for float32 in (False, True)]
        losses = np.array(list(pool.map(last_loss, jobs))).reshape(-1, 2)
    rows = []
    for seed, (bf16, float32) in enumerate(losses):
        rows.append([f"seed {seed}", f"{bf16:.4f}", f"{float32:.4f}", f"{bf16 - float32:+.4f}"])
    print_table(["val loss", "bf16 stream", "float32 stream", "difference"], rows)
    if args.seeds > 1:
        differences, spread = losses[:, 0] - losses[:, 1], losses[:, 1].std(ddof=1)
        error = differences.std(ddof=1) / math.sqrt(args.seeds)
        print(f"\nThe difference is {differences.mean():+.4f} ± {error:.4f} nats (standard error).")
        print(f"Between seeds, the standard deviation is {spread:.4f}.")


# --------------------------------------------------------------------------------------------------
# evaluation: what validation and HellaSwag cost a run


def evaluation(args) -> None:
    """Seconds of the default validation and of all of HellaSwag, by a part of each on random
    tokens, beside those of the 250 steps between them."""
    from hellaswag import count_hits

    cfg, device = configure(args)
    describe(args, cfg, device, "one GPU or CPU")
    bare = training_step(cfg, device, args.micro_steps)
    for _ in range(3):
        bare()
    synchronize(device)
    a_token = seconds_a_step(bare, args.steps, device) / cfg.total_batch_size
    steps = 250 * 2**19 * a_token
    model = model_of(cfg).to(device)
    forward = torch.compile(model, dynamic=False) if cfg.compile else model
    B, T = cfg.micro_batch_size, cfg.block_size
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), args.batches * B * T + 1, 1, cfg.vocab_size, "gpt2")
        files = train_gpt2.find_shards(Path(folder), "val")
        loader = train_gpt2.DataLoaderLite(files, B, T, shuffle=False, vocab_size=cfg.vocab_size)
        questions = like_hellaswag(args.examples)
        if cfg.vocab_size < 50257:  # a rehearsal with a small model
            questions = [(c % 257, [e % 257 for e in four], label) for c, four, label in questions]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cfg.dtype == "bf16"):
            seconds = {}
            for name, work in (
                ("validation", lambda: train_gpt2.validation_loss(forward, loader, 2**40, device)),
                ("HellaSwag", lambda: count_hits(model, questions, device)),
            ):
                work()
                synchronize(device)
                start = time.perf_counter()
                work()
                synchronize(device)
                seconds[name] = time.perf_counter() - start
    seconds["validation"] *= 10485760 / (args.batches * B * T)
    seconds["HellaSwag"] *= 10042 / len(questions)
    whole = steps + sum(seconds.values())
    rows = [["250 steps of 2^19 tokens", steps, f"{steps / whole:.1%}"]]
    rows += [[name, value, f"{value / whole:.1%}"] for name, value in seconds.items()]
    print_table(["", "seconds", "share"], rows)


# --------------------------------------------------------------------------------------------------
# ddp: several GPUs

ONE_RANK = """
import sys, torch
torch._dynamo.config.optimize_ddp = sys.argv[1] == "True"
sys.path.insert(0, {root!r})
import train_gpt2
sys.exit(train_gpt2.main(sys.argv[2:]))
"""


def ddp(args) -> None:
    """The trainer on all GPUs (on a CPU two processes), with DDP's buckets splitting the compiled
    graph, so that gradients travel while others are computed, and with one graph."""
    cfg, device = configure(args)
    cuda = device.type == "cuda"
    processes, rows = torch.cuda.device_count() if cuda else 2, []
    if processes < 2:
        return print("There is one GPU: nothing to compare.")
    batch = cfg.micro_batch_size * cfg.block_size * processes
    flags = [f"--model={cfg.model}", "--data=.", f"--max_steps={args.steps}", *NOTHING_BUT_STEPS]
    flags += [f"--device={device.type}", f"--micro_batch_size={cfg.micro_batch_size}"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launch += ["--no-python", sys.executable, "-c", ONE_RANK.format(root=str(ROOT))]
    with tempfile.TemporaryDirectory() as folder:
        encoding = "bytes" if cfg.model == "demo" else "gpt2"
        write_tokens(Path(folder), 10**6, 2, cfg.vocab_size, encoding)
        for micro_steps in 1, 4:
            for optimise in True, False:
                log = f"log_{micro_steps}_{optimise}"
                size = [f"--log_dir={log}", f"--total_batch_size={batch * micro_steps}"]
                command = [sys.executable, *launch, str(optimise), *flags, *size]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
                lines = Path(folder, log, "log.txt").read_text().splitlines()
                tps = [float(line.split()[2]) for line in lines if " tps " in line]
                speed = np.median(tps[len(tps) // 2 :])
                way = f"optimize_ddp={optimise}, {micro_steps} micro-steps"
                rows.append([way, f"{speed:,.0f}"])
    print(f"{hardware(device)} × {processes}: {cfg.model}, B = {cfg.micro_batch_size}\n")
    print_table(["", "tokens/s"], rows)


# --------------------------------------------------------------------------------------------------
# gpu: all of these that a CUDA GPU can tell

PARTS = (  # title, seconds at most, command, what makes it small for a rehearsal on a CPU
    ("Attention", 60, "attention --micro_batch_size=64", "--steps=1"),
    ("The step", 200, "batch --micro_batch_sizes 64", "--micro_batch_sizes 2 --steps=1"),
    ("Where its time goes", 90, "profile --micro_batch_size=64", "--steps=2"),
    ("Tests that need a GPU", 120, "pytest", ""),
    ("Other micro-batches", 150, "batch --ours_alone --micro_batch_sizes 32 128",
        "--micro_batch_sizes 1 4 --steps=1"),
    ("The residual stream and the loss", 150, "residual --n_layer=4 --jobs=3",
        "--seeds=2 --steps=4 --dtype=bf16 --megabytes=1 --val_tokens=512"),
    ("Validation and HellaSwag", 90, "evaluation --micro_batch_size=64",
        "--batches=2 --examples=4 --steps=1"),
    ("The training loop", 90, "step --micro_batch_size=64 --rounds=6", "--steps=1"),
    ("From the textbook to the trainer", 240, "ladder", "--steps=1"),
    ("torch.compile with more tuning", 300, "compiler --micro_batch_size=64",
        "--ways default --steps=1"),
    ("Small cards", 120, "memory", ""),
    ("Several GPUs", 150, "ddp --micro_batch_size=32", "--steps=4"),
)  # fmt: skip
SMALL = "--device=cpu --model=demo --micro_batch_size=2"  # where there are steps


def gpu(args) -> None:
    """All parts, each in processes of its own, so that what fails or hangs takes nothing with it.
    The report grows part by part."""
    if not args.rehearse and not torch.cuda.is_available():
        raise SystemExit("error: there is no CUDA GPU; --rehearse tries all of it on the CPU")
    device = train_gpt2.choose_device("cpu" if args.rehearse else "cuda")
    out = Path(args.out or re.sub(r"\W+", "_", f"gpu {hardware(device)}") + ".md")
    if out.exists():
        raise SystemExit(f"error: {out} is there already; choose another --out")
    end = time.monotonic() + 60 * args.minutes
    facts = dict(Python=platform.python_version(), torch=torch.__version__, CUDA=torch.version.cuda)
    facts.update(cuDNN=torch.backends.cudnn.version(), GPUs=torch.cuda.device_count())
    report = f"# {hardware(device)}\n\n"
    report += ", ".join(f"{name} {fact}" for name, fact in facts.items()) + "\n"
    for title, limit, command, small in PARTS:
        if args.only and command.split()[0] not in args.only:
            continue
        words = command.split()
        if words[0] == "pytest":
            words = ["-m", "pytest", "-q", "-k", "TestCuda", str(ROOT / "tests/test_training.py")]
        else:
            words.insert(0, __file__)
        if args.rehearse:
            words += small.split()
            words += SMALL.split() if "--steps" in small else []
        start = time.monotonic()
        limit = min(limit * (1 + args.rehearse), end - start)  # a CPU may be slow
        text = f"\n## {title}\n\n"
        if limit < 15:
            text += "No time was left for it.\n"
        else:
            print(f"{title} …", flush=True)
            text += run_part([sys.executable, *words], limit)
            print(f"{title}: {time.monotonic() - start:.0f} s", flush=True)
        report += text
        out.write_text(report, encoding="utf-8")
    print(f"{out} has it all")


def run_part(command: list[str], limit: float) -> str:
    """What a command prints; after it, what went wrong."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        how = dict(stdout=printed, stderr=errors, cwd=ROOT, start_new_session=True)
        process = subprocess.Popen(command, **how)
        try:
            code = process.wait(limit)
            failure = f"It failed (exit code {code}):" if code else ""
        except subprocess.TimeoutExpired:
            failure = f"It was stopped after {limit:.0f} s:"
        finally:
            with contextlib.suppress(OSError):  # it may have left processes behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed.seek(0)
        errors.seek(0)
        text = printed.read().strip() + "\n"
        if failure:
            last = "\n".join(errors.read().splitlines()[-12:])
            text += f"\n{failure}\n\n```\n{last}\n```\n"
        return text


# --------------------------------------------------------------------------------------------------
# step: train_gpt2.py as it runs, against the products alone


NEVER = ("val", "sample", "hellaswag", "checkpoint")
NOTHING_BUT_STEPS = ["--warmup_steps=0", *(f"--{name}_every=0" for name in NEVER)]


def write_tokens(folder: Path, tokens: int, shards: int, vocab_size: int, encoding: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(shards):
        name = f"random_{'train' if i else 'val'}_{i:06d}.npy"
        np.save(folder / name, rng.integers(0, vocab_size, tokens, dtype=np.uint16))
    manifest = dict(encoding=encoding, vocab_size=vocab_size)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def trainers_step(args, how_long: str):
    """A step as `training_step` makes it, with the trainer's settings; their config, and device."""
    cfg, device = configure(args)
    describe(args, cfg, device, how_long)
    return training_step(cfg, device, args.micro_steps), cfg, device


def step(args) -> None:
    """Forward, backward and optimiser step of the same model on the same shapes, a fixed batch, no
    clipping and nothing read back, against the training loop with all it does besides. The two take
    turns within one run of the trainer, a few steps each, and each turn of the loop is held against
    the bare steps before and after it: what the machine does meanwhile hits both alike."""
    bare, cfg, device = trainers_step(args, f"{args.rounds} turns of {args.steps} steps")
    get_lr, began, bare_seconds, loop_seconds = train_gpt2.get_lr, None, [], []

    def take_turns(t, cfg):  # the loop asks for the rate at the start of each step
        nonlocal began
        if t % args.steps == 0:
            synchronize(device)
            if began is not None:
                loop_seconds.append((time.perf_counter() - began) / args.steps)
            unclipped = functools.partial(bare, clip=False)
            bare_seconds.append(seconds_a_step(unclipped, args.steps, device))
            began = time.perf_counter()
        return get_lr(t, cfg)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        encoding = "bytes" if cfg.model == "demo" else "gpt2"
        write_tokens(Path(folder), 10**6, 2, cfg.vocab_size, encoding)
        same = ("model", "device", "dtype", "total_batch_size", "micro_batch_size")
        flags = [f"--data={folder}", f"--log_dir={folder}/log", *NOTHING_BUT_STEPS]
        flags += [f"--{name}={getattr(cfg, name)}" for name in same]
        flags += [f"--max_steps={(args.rounds + 2) * args.steps + 1}"]
        train_gpt2.get_lr = take_turns
        if train_gpt2.main(flags):
            raise SystemExit(out.getvalue())
    bare_ms, loop_ms = (1e3 * np.array(s[2:]) for s in (bare_seconds, loop_seconds))  # 2: warm-up
    ratios = loop_ms / ((bare_ms[:-1] + bare_ms[1:]) / 2)
    low, median, high = (f"{ratio:.3f}" for ratio in np.percentile(ratios, [25, 50, 75]))
    rows = [
        ["forward, backward, optimiser step", float(np.median(bare_ms)), "1.000", "-"],
        ["train_gpt2.py", float(np.median(loop_ms)), median, f"{low} to {high}"],
    ]
    print_table(["", "ms a step, median", "× the bare step, median", "half of the turns"], rows)


# --------------------------------------------------------------------------------------------------
# profile: where the time of a step goes

KINDS = (  # what a kernel's name, or on a CPU an operation's, says of its work; the first counts
    ("loss", "log_softmax|nll_loss|cross_entropy"),
    ("attention", "scaled_dot_product|flash|fmha|sdpa|::bmm|::_softmax"),
    ("optimiser and clipping", "adam|multi_tensor|foreach|vector_norm|lpnorm|optimizer"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|::(add)?b?mm\b"),
    ("copies and fills", "memcpy|memset|::copy_|::cat|::fill_|::zero_|contiguous"),
    (
        "element-wise work and norms",
        "triton|elementwise|layer_norm|gelu|::add|::mul|::div|::sum|embedding|reduce",
    ),
)


def profile(args) -> None:
    """Self time of every kernel (on a CPU of every operation) in a step of the trainer, by kind."""
    step, _, device = trainers_step(args, f"{args.steps} steps")
    cuda = device.type == "cuda"
    for _ in range(5):
        step()
    synchronize(device)

    alone = seconds_a_step(step, args.steps, device)
    with torch.profiler.profile() as record:
        profiled = seconds_a_step(step, args.steps, device)
    wall = alone if cuda else profiled  # the profiler slows a CPU down, but no kernel of a GPU
    print(f"{1e3 * alone:.1f} ms a step without the profiler, {1e3 * profiled:.1f} with it\n")
    seconds = dict.fromkeys([*(kind for kind, _ in KINDS), "other kernels"], 0.0)
    for event in record.key_averages():
        named = getattr(event, "is_user_annotation", False)
        if cuda and (event.device_type != torch.autograd.DeviceType.CUDA or named):
            continue  # it launched kernels, which stand for themselves
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        fits = (kind for kind, names in KINDS if re.search(names, event.key, re.IGNORECASE))
        seconds[next(fits, "other kernels")] += microseconds / 1e6 / args.steps
    if not cuda:
        del seconds["other kernels"]
    parts = sorted(seconds.items(), key=lambda item: -item[1])
    gaps = "gaps between kernels" if cuda else "Python and the profiler"
    parts.append((gaps, wall - sum(seconds.values())))
    rows = [[kind, 1e3 * t, f"{t / wall:.0%}"] for kind, t in parts]
    print_table(["", "ms a step", "share"], [*rows, ["the step", 1e3 * wall, "100%"]])


# --------------------------------------------------------------------------------------------------
# memory: does a model fit a card?


class Tally(TorchDispatchMode):
    """Bytes of the tensors made while this is on: alive now, and at most. Views share a storage."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for z in torch.utils._pytree.tree_leaves(out):
            storage = z.untyped_storage() if isinstance(z, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key):
        self.now -= self.alive.pop(key)


def computed_peak(name: str, B: int, checkpointing: bool) -> float:
    """Bytes of all tensors alive at the worst moment of a step in bf16 autocast, uncompiled, from
    their sizes alone: nothing is computed and nothing allocated, so any machine can tell."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Norm(torch.nn.LayerNorm):  # autocast on CUDA computes it in float32, on a CPU not
        def forward(self, x):
            return super().forward(x.float())

    tally, LayerNorm = Tally(), torch.nn.LayerNorm
    torch.nn.LayerNorm = Norm
    try:
        with FakeTensorMode(), tally:
            how = dict(attention="flash", dtype="bf16", activation_checkpointing=checkpointing)
            cfg, device = trainers_config(name, device="cpu", micro_batch_size=B, **how)
            step = training_step(cfg, device, 1)
            step()  # from here on AdamW's moments are there
            tally.peak = tally.now
            step()
    finally:
        torch.nn.LayerNorm = LayerNorm
    return tally.peak


CAPPED = """
import sys, torch, train_gpt2
total = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(min(1.0, float(sys.argv[1]) * 1e9 / total))
code = train_gpt2.main(sys.argv[2:])
print(f"peak {torch.cuda.max_memory_reserved() / 1e9:.1f}")
sys.exit(code)
"""


def memory(args) -> None:
    """The memory a step needs by the sizes of its tensors and, with a CUDA GPU, whether the trainer
    finds a micro-batch by itself when it is held to a small card's memory."""
    rows, cards = [], (("gpt2", 6, False), ("gpt2-large", 24, True), ("gpt2-xl", 40, True))
    for name, card, checkpointing in cards:
        peaks = [f"{computed_peak(name, B, checkpointing) / 1e9:.1f}" for B in (1, 4)]
        measured = ["-", "-"]
        if torch.cuda.is_available():
            with tempfile.TemporaryDirectory() as folder:
                write_tokens(Path(folder), 10**6, 2, 50257, "gpt2")
                flags = [f"--model={name}", "--data=.", "--max_steps=5", "--total_batch_size=65536"]
                flags += ["--no-compile", *NOTHING_BUT_STEPS]
                flags += ["--activation_checkpointing"] * checkpointing
                command = [sys.executable, "-c", CAPPED, str(card), *flags]
                env = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
                measured = ["failed", "-"]
                if done.returncode == 0:
                    measured = re.search(r"step: (\d+) seq(?s:.*)\npeak (.*)", done.stdout).groups()
        rows.append([name, "yes" if checkpointing else "no", f"{card} GB", *peaks, *measured])
    header = ["", "checkpointing", "card", "GB at B = 1", "GB at B = 4", "B found there", "GB used"]
    print_table(header, rows)


# --------------------------------------------------------------------------------------------------
# loader: from shards on disk to batches in memory


class WholeShards:
    """The loader of build-nanogpt: one shard in memory as int64, read in file order."""

    def __init__(self, files, B: int, T: int):
        self.files, self.B, self.T, self.shard, self.at = files, B, T, -1, 0
        self.next_shard()

    def next_shard(self):
        self.shard, self.at = (self.shard + 1) % len(self.files), 0
        tokens = np.load(self.files[self.shard]).astype(np.int32)
        self.tokens = torch.tensor(tokens, dtype=torch.long)

    def batch(self, i: int):
        B, T = self.B, self.T
        part = self.tokens[self.at : self.at + B * T + 1]
        self.at += B * T
        if self.at + B * T + 1 > len(self.tokens):
            self.next_shard()
        return part[:-1].view(B, T), part[1:].view(B, T)


def loader(args) -> None:
    """Tokens a second of one process, and how many GPUs at 650,000 tokens a second that feeds."""
    B, T, per_gpu = args.micro_batch_size, 1024, 650_000
    ways = ("whole shards in memory, in file order", "ours, in file order", "ours, shuffled")
    seconds = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), args.tokens, 3, 50257, "gpt2")
        files = train_gpt2.find_shards(Path(folder), "train")
        loaders = [WholeShards(files, B, T)]
        for shuffle in (False, True):
            loaders.append(train_gpt2.DataLoaderLite(files, B, T, shuffle=shuffle))
        batches = loaders[1].num_tokens // (B * T)
        what = f"{batches} batches of {B} × {T} tokens from {len(files)} shards"
        print(f"{what}, {args.rounds} rounds\n", flush=True)
        for _ in range(args.rounds):
            for way, each in zip(seconds, loaders, strict=True):
                start = time.perf_counter()
                for i in range(batches):
                    each.batch(i)
                seconds[way].append(time.perf_counter() - start)
    base = np.array(seconds[ways[0]])
    rows = []
    for way, values in seconds.items():
        speed = batches * B * T / np.median(values)
        ratio = float(np.median(base / np.array(values)))
        rows.append([way, speed / 1e6, ratio, f"{speed / per_gpu:,.0f}"])
    print_table(["", "Mtok/s, median", "× whole shards", "GPUs it feeds at 650,000 tok/s"], rows)


# --------------------------------------------------------------------------------------------------
# scaling: the same steps on one process and on two, a thread each


def scaling(args) -> None:
    """Tokens a second of the demo in two processes under torchrun, and in one, a thread each."""
    common = ["--model=demo", "--data=.", "--device=cpu", f"--max_steps={args.steps}"]
    common += ["--micro_batch_size=16", *NOTHING_BUT_STEPS]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ways = {"one process": ([], 1), "two processes": (launch, 1)}
    ways["two processes, 4 micro-steps each"] = launch, 4
    speeds = {way: [] for way in ways}
    print(f"demo, a thread a process, {args.steps} steps, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), 10**6, 2, 257, "bytes")
        for _ in range(args.rounds):
            for way, (launcher, micro_steps) in ways.items():
                log = Path(folder, f"log{time.monotonic_ns()}")
                flags = [f"--log_dir={log}", f"--total_batch_size={4096 * micro_steps}"]
                command = [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *common, *flags]
                subprocess.run(command, check=True, cwd=folder, env=env, stdout=subprocess.DEVNULL)
                lines = [line.split() for line in (log / "log.txt").read_text().splitlines()]
                tps = [float(value) for t, stream, value in lines if stream == "tps"]
                speeds[way].append(float(np.median(tps[args.steps // 4 :])))
    base = np.array(speeds["one process"])
    rows = []
    for way, values in speeds.items():
        ratios = float(np.median(np.array(values) / base)), float(max(values) / max(base))
        rows.append([way, f"{np.median(values):,.0f}", ratios[0], f"{max(values):,.0f}", ratios[1]])
    header = ["", "tokens/s, median", "× one process", "best", "× one process's best"]
    print_table(header, rows)


# --------------------------------------------------------------------------------------------------
# tokenize: three ways from the same text to tokens, each timed from when its workers are up


def english(megabytes: int, seed: int = 0) -> list[str]:
    """Documents of a few kilobytes, as web pages are, of paragraphs in Python's docstrings."""
    rng, paragraphs = random.Random(seed), []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        with contextlib.suppress(OSError):
            source = path.read_text(encoding="utf-8", errors="replace")
            for text in re.findall(r'"""(.*?)"""', source, re.DOTALL):
                paragraphs += [" ".join(p.split()) for p in text.split("\n\n") if len(p) > 80]
    documents, size = [], 0
    while size < megabytes * 2**20:
        document = "\n\n".join(rng.choices(paragraphs, k=rng.randint(2, 30)))
        documents.append(document)
        size += len(document)
    return documents


def own_encoding():
    """What tiktoken.get_encoding("gpt2") returns, with or without a network: tiktoken's pattern."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from fineweb import gpt2_encoding

    ours = gpt2_encoding()
    how = dict(mergeable_ranks=ours._mergeable_ranks, special_tokens=ours._special_tokens)
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, **how)


def plain(documents: list[str], barrier, results) -> None:
    """A process that does nothing but run tiktoken."""
    encoding = own_encoding()
    barrier.wait()
    start, count = time.perf_counter(), 0
    for document in documents:
        count += len(encoding.encode_to_numpy(document, disallowed_special=()))
    results.put((count, start, time.perf_counter()))


def plain_tiktoken(documents: list[str], processes: int) -> tuple[int, float]:
    """(tokens, seconds) of independent processes that share the documents out among them."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    args = [(documents[i::processes], barrier, results) for i in range(processes)]
    workers = [context.Process(target=plain, args=a) for a in args]
    for worker in workers:
        worker.start()
    counts, starts, ends = zip(*[results.get() for _ in workers], strict=True)
    for worker in workers:
        worker.join()
    return sum(counts) + len(documents), max(ends) - min(starts)


def pool_worker(text: str) -> np.ndarray:
    """A document's tokens the way of the pool scheme: a list, checked, then an array."""
    tokens = [POOL_ENCODING._special_tokens["<|endoftext|>"]]
    tokens.extend(POOL_ENCODING.encode_ordinary(text))
    tokens = np.array(tokens)
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def pool_scheme(documents, processes: int, shard_size: int, folder: str) -> tuple[int, float]:
    """(tokens, seconds) of a pool that gets documents in chunks of 16 and sends arrays back, which
    one process copies into shards: the scheme in use today."""
    global POOL_ENCODING
    POOL_ENCODING = own_encoding()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(len, [""] * processes)  # they are up
        total, shard, used, start = 0, np.empty(shard_size, np.uint16), 0, time.perf_counter()
        for tokens in pool.imap(pool_worker, documents, chunksize=16):
            total += len(tokens)
            while used + len(tokens) >= shard_size:
                room = shard_size - used
                shard[used:] = tokens[:room]
                np.save(os.path.join(folder, "shard.npy"), shard)
                tokens, used = tokens[room:], 0
            shard[used : used + len(tokens)] = tokens
            used += len(tokens)
        np.save(os.path.join(folder, "shard.npy"), shard[:used])
        return total, time.perf_counter() - start


def our_shards(path: Path, processes: int, shard_size: int, folder: str) -> tuple[int, float]:
    """(tokens, seconds) of fineweb.py on a file, as it reports them: from when its workers are up
    to when the last shard is on the disk."""
    flags = [f"--out={folder}/{time.monotonic_ns()}", f"--shard_size={shard_size}"]
    command = [sys.executable, ROOT / "fineweb.py", "--files", path, *flags]
    command.append(f"--num_workers={processes}")
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    tokens, seconds = re.findall(r"([\d,]+) tokens, .*, ([\d.]+) s,", done.stdout)[-1]
    return int(tokens.replace(",", "")), float(seconds)


def tokenize(args) -> None:
    """Tokens a second, all ways in turn within each round, so that whatever the machine does
    meanwhile hits them alike; the ratios are medians of the rounds'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cores, documents = args.processes, english(args.megabytes)
    megabytes = sum(map(len, documents)) / 1e6
    what = f"{cores} processes, {len(documents):,} documents, {megabytes:.0f} MB"
    print(f"{what}, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        how = args.shard_size, folder
        ways = {
            "plain tiktoken, a process a core": lambda: plain_tiktoken(documents, cores),
            "pool, half the cores": lambda: pool_scheme(documents, max(1, cores // 2), *how),
            "pool, all cores": lambda: pool_scheme(documents, cores, *how),
        }
        table = pa.table({"text": documents, "id": [str(i) for i in range(len(documents))]})
        pq.write_table(table, Path(folder, "text.parquet"), row_group_size=1000)
        lines = [json.dumps({"text": document}) + "\n" for document in documents]
        Path(folder, "text.jsonl").write_text("".join(lines))
        for kind in ("parquet", "jsonl"):
            path = Path(folder, f"text.{kind}")
            ways[f"fineweb.py, .{kind}"] = functools.partial(our_shards, path, cores, *how)
        speeds = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                tokens, seconds = run()
                speeds[way].append(tokens / seconds / 1e6)
    alone, half, *_ = speeds.values()
    rows = []
    for way, values in speeds.items():
        ratios = [float(np.median(np.divide(values, base))) for base in (alone, half)]
        rows.append([way, float(np.median(values)), min(values), max(values), *ratios])
    header = ["", "Mtok/s, median", "lowest", "highest", "of plain tiktoken", "of the pool, half"]
    print_table(header, rows)


# --------------------------------------------------------------------------------------------------
# hellaswag: the same examples scored one at a time and by hellaswag.scores


def like_hellaswag(count: int, seed: int = 0) -> list:
    """Random tokens in examples as long as HellaSwag's: contexts of 25 to 110 tokens, 60 in the
    mean, endings of 10 to 50, 27 in the mean. Lengths are quantiles, so that a few examples are as
    long as many."""
    rng = np.random.default_rng(seed)

    def lengths(n: int, mean: float, low: int, high: int) -> np.ndarray:
        spread = rng.gamma(6, mean / 6, 10**5).clip(low, high)
        return rng.permutation(np.quantile(spread, (np.arange(n) + 0.5) / n)).astype(int)

    examples, contexts, endings = [], lengths(count, 60, 25, 110), lengths(4 * count, 27, 10, 50)
    for i, length in enumerate(contexts):
        context, *four = [rng.integers(0, 50257, n) for n in (length, *endings[4 * i : 4 * i + 4])]
        examples.append((context, four, int(rng.integers(4))))
    return examples


def one_at_a_time(model, examples, device):
    """Sums and means of log-likelihoods the way of build-nanogpt: an example is four rows, context
    and ending, padded to the longest; the logits of all positions; shifted cross-entropy, of which
    a mask keeps the ending's."""
    sums, means = [], []
    for context, endings, _ in examples:
        idx = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)
        mask = torch.zeros_like(idx)
        for k, ending in enumerate(endings):
            row = torch.from_numpy(np.concatenate((context, ending)))
            idx[k, : len(row)], mask[k, len(context) : len(row)] = row, 1
        idx, mask = idx.to(device), mask.to(device)[:, 1:]
        logits = model(idx)[0][:, :-1].contiguous()
        nats = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
        total = -(nats.view(4, -1) * mask).sum(dim=1)
        mean = total / mask.sum(dim=1)
        total.argmax().item(), mean.argmax().item()  # read back for each example
        sums.append(total)
        means.append(mean)
    return torch.stack(sums).cpu(), torch.stack(means).cpu()


def hellaswag(args) -> None:
    """Examples a second, both ways in turn within each round, in the device's best precision; the
    ratio is the median of the rounds'."""
    from hellaswag import scores

    torch.manual_seed(0)
    cfg, device = trainers_config(args.model, device=args.device, pad_vocab=True)
    cfg.vocab_size = 50257
    model, dtype = model_of(cfg).to(device), cfg.dtype
    examples = like_hellaswag(args.examples or (24 if device.type == "cpu" else 2000))
    context = np.mean([len(context) for context, _, _ in examples])
    ending = np.mean([len(ending) for _, endings, _ in examples for ending in endings])
    what = f"{args.rounds} rounds of {len(examples)} examples"
    print(f"{hardware(device)}, {dtype}: {args.model}, random weights, {what}")
    print(f"with {context:.0f} tokens of context and endings of {ending:.0f} in the mean\n")
    ways = {"one example at a time": one_at_a_time, "hellaswag.scores": scores}
    speeds, means = {way: [] for way in ways}, {}
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    with torch.no_grad(), torch.autocast(device.type, half, enabled=dtype != "fp32"):
        for way in ways.values():
            way(model, examples[-2:], device)
        for _ in range(args.rounds):
            for way, run in ways.items():
                synchronize(device)
                start = time.perf_counter()
                means[way] = run(model, examples, device)[1]
                speeds[way].append(len(examples) / (time.perf_counter() - start))
    alone, rows = speeds["one example at a time"], []
    for way, values in speeds.items():
        speed, ratio = float(np.median(values)), float(np.median(np.divide(values, alone)))
        rows.append([way, speed, min(values), max(values), f"{10042 / speed:,.0f}", ratio])
    header = ["", "examples/s, median", "lowest", "highest", "s for all 10,042"]
    print_table([*header, "× one at a time"], rows)
    one, ours = means.values()
    apart = (one - ours).abs().max().item()
    print(f"\nThe two ways' means of an ending differ by {apart:.1e} nats at most.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    help = dict(re.findall(r"benchmark.py (\w+) +# (.*)", __doc__))
    device = dict(help="cpu, cuda, mps (the fastest there is)")

    with_steps = dict(ladder=(5, 10), batch=(5, 10), compiler=(5, 10), step=(60, 5))
    with_steps.update(profile=(None, 20), attention=(None, 20), residual=(None, 300))
    with_steps.update(evaluation=(None, 10), ddp=(None, 40))
    for name, (rounds, steps) in with_steps.items():
        command = commands.add_parser(name, help=help[name])
        add = command.add_argument
        add("--device", **device)
        add("--dtype", choices=("bf16", "fp32"), help="the trainer's (the device's best)")
        add("--model", help="named size (gpt2 on CUDA, else demo)")
        add("--micro_batch_size", type=int, help="sequences (16 on CUDA, else 2,048 tokens)")
        add("--micro_steps", type=int, default=1, help="of a step (%(default)s)")
        add("--compile", action="store_true", help="on a CPU, too")
        if rounds:
            add("--rounds", type=int, default=rounds, help="(%(default)s)")
        add("--steps", type=int, default=steps, help="timed steps a round (%(default)s)")
        if name == "batch":
            add("--micro_batch_sizes", type=int, nargs="+", default=[64], help="(%(default)s)")
            add("--ours_alone", action="store_true", help="nothing to compare with")
        if name == "compiler":
            add("--ways", nargs="+", help="some of them, by name (all)")
        if name in ("compiler", "residual"):
            few = 3 if name == "compiler" else None
            add("--n_layer", type=int, default=few, help="layers (%(default)s)")
        if name == "residual":
            add("--seeds", type=int, default=5, help="pairs of runs (%(default)s)")
            add("--jobs", type=int, default=1, help="runs at once (%(default)s)")
            add("--megabytes", type=int, default=20, help="of text (%(default)s)")
            add("--val_tokens", type=int, default=262144, help="(%(default)s)")
        if name == "evaluation":
            add("--batches", type=int, default=16, help="to validate on (%(default)s)")
            add("--examples", type=int, default=1000, help="of HellaSwag's lengths (%(default)s)")
        command.set_defaults(run=globals()[name])
    command = commands.add_parser("gpu", help=help["gpu"])
    command.add_argument("--out", help="the report (gpu_NAME_OF_THE_CARD.md)")
    command.add_argument("--minutes", type=float, default=10, help="at most (%(default)s)")
    command.add_argument("--only", nargs="+", help="some of the parts, by their subcommands")
    command.add_argument("--rehearse", action="store_true", help="on the CPU, with a small model")
    command.set_defaults(run=gpu)

    flags = {
        memory: {},
        loader: dict(tokens=50_000_000, micro_batch_size=64, rounds=9),
        scaling: dict(steps=60, rounds=5),
        tokenize: dict(megabytes=60, rounds=9, processes=cores, shard_size=10_000_000),
        hellaswag: dict(examples=None, rounds=5),
    }
    for run, defaults in flags.items():
        command = commands.add_parser(run.__name__, help=help[run.__name__])
        for name, default in defaults.items():
            command.add_argument(f"--{name}", type=int, default=default, help=f"({default})")
        if run is hellaswag:
            command.add_argument("--device", **device)
            command.add_argument("--model", default="gpt2", help="random weights (%(default)s)")
        command.set_defaults(run=run)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
