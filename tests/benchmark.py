"""Benchmarks, run by hand on a machine that does nothing else. Each prints a table of ratios measured side by side.

python tests/benchmark.py ladder                      # what each step from float32 to the trainer's settings gains
python tests/benchmark.py step                        # the training loop against its bare products
python tests/benchmark.py profile                     # where a step's milliseconds go
python tests/benchmark.py memory                      # what the larger models take, and whether they fit small cards
python tests/benchmark.py loader                      # batches a second, against reading whole shards
python tests/benchmark.py scaling                     # two processes against one
python tests/benchmark.py tokenize                    # fineweb.py against plain tiktoken and the pool scheme
python tests/benchmark.py hellaswag                   # scoring endings, against one example at a time
"""

import argparse
import contextlib
import ctypes
import dataclasses
import io
import json
import multiprocessing
import os
import platform
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def print_table(header: list[str], rows: list[list]) -> None:
    """A table as Markdown, numbers to the right."""
    rows = [[f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    columns = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + (":" if i else "-") for i, width in enumerate(columns)]
    for row in [header, rule, *rows]:
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, columns, strict=True))]
        print("| " + " | ".join(cells) + " |")


# ----------------------------------------------------------------------------------------------------------------------
# ladder: the same model and batch, one improvement more on each rung


def hardware(device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return f"{name[1] if name else platform.processor()}, {torch.get_num_threads()} threads"


def synchronize(device) -> None:
    import torch

    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def config_of(model: str, **changes):
    import train_gpt2

    vocab_size = 257 if model == "demo" else 50257
    return train_gpt2.TrainConfig(**{**train_gpt2.MODELS[model], "vocab_size": vocab_size, "model": model, **changes})


def trainers_config(args):
    """The settings the trainer would choose here, and the device they name."""
    import train_gpt2

    device = train_gpt2.choose_device(args.device)
    name = args.model or ("gpt2" if device.type == "cuda" else "demo")
    cfg = config_of(name, device=args.device, dtype=args.dtype, log_dir=tempfile.gettempdir())
    usual = 16 if device.type == "cuda" else max(1, 2048 // cfg.block_size)
    B = cfg.micro_batch_size = args.micro_batch_size or usual
    cfg.total_batch_size = B * cfg.block_size * args.micro_steps
    return cfg, train_gpt2.resolve(cfg)


def sizes_of(cfg) -> dict:
    import train_gpt2

    return {field.name: getattr(cfg, field.name) for field in dataclasses.fields(train_gpt2.GPT2Config)}


def training_step(cfg, device, B: int, T: int, micro_steps: int):
    """A function that does one whole optimiser step on random tokens, with cfg's dtype, tf32, compile and fused_adamw
    (without which torch picks the kernels)."""
    import torch

    import train_gpt2

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    with torch.device(device):
        model = train_gpt2.GPT2(train_gpt2.GPT2Config(**sizes_of(cfg)))
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.max_lr, cfg.fused_adamw)
    forward = torch.compile(model, dynamic=False) if cfg.compile else model
    x, y = torch.randint(0, cfg.vocab_size, (2, B, T), device=device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bf16")

    def step(clip=True):
        for _ in range(micro_steps):
            with autocast:
                loss = forward(x, y)[1] / micro_steps
            loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


KEPT = "+ freed memory kept"  # the rung that isn't a setting, but train_gpt2.keep_memory()


def stand_on_rung(pipe, cfg, keeps: bool, B: int, micro_steps: int) -> None:
    """A process of its own for each rung, since no allocator and no compiler can be made to forget. Sent a number
    of steps, it does them and sends back the seconds and, on CUDA, the peak of its memory in bytes; 0 is the end."""
    import torch

    import train_gpt2

    device, T = torch.device(cfg.device), cfg.block_size
    cuda = device.type == "cuda"
    if keeps:
        train_gpt2.keep_memory()
    step = training_step(cfg, device, B, T, micro_steps)
    while steps := pipe.recv():
        for _ in range(2):
            step()
        synchronize(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() if cuda else None
        if cuda:  # for the next one, which begins when this one has reported
            torch.cuda.empty_cache()
        elif keeps:
            ctypes.CDLL(None).malloc_trim(0)
        pipe.send((seconds, peak))


def ladder(args) -> None:
    """Each round climbs the whole ladder, so that whatever the machine does meanwhile hits every rung alike. At its end
    comes build-nanogpt's step, compiled: flash attention, AdamW fused on CUDA only, the padding part of the softmax."""
    import torch

    import train_gpt2

    cfg, device = trainers_config(args)
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    B, T, micro_steps = cfg.micro_batch_size, cfg.sequence_length, args.micro_steps
    compiles = train_gpt2.can_compile(device)
    padded = dataclasses.replace(cfg, pad_vocab=True).padded_vocab_size
    nanogpt = dataclasses.replace(cfg, vocab_size=padded, fused_adamw=cuda, attention="flash", compile=True)
    climb = dataclasses.replace(
        cfg, attention="manual", pad_vocab=False, dtype="fp32", tf32=False, compile=False, fused_adamw=False
    )
    rungs, keeps = [], False  # (name, config, whether freed memory is kept, why the rung is left out)
    for rung, change, lacking in (
        ("float32, textbook", {}, None),
        (KEPT, {}, None if cpu and sys.platform == "linux" else "not used here"),
        ("+ TF32", dict(tf32=True), None if cuda and torch.cuda.is_tf32_supported() else "no TF32 units"),
        ("+ bf16 autocast", dict(dtype="bf16"), None if cfg.dtype == "bf16" else "not used here"),
        ("+ torch.compile", dict(compile=True), None if compiles and (cuda or args.compile) else "not used here"),
        ("+ flash attention", dict(attention="flash"), None if cfg.attention == "flash" else "slower here"),
        ("+ vocabulary padded", dict(pad_vocab=True), None if cfg.pad_vocab else "not used here"),
        ("+ fused AdamW", dict(fused_adamw=True), None if cuda or cpu else "no kernel"),
    ):
        climb = climb if lacking else dataclasses.replace(climb, **change)
        keeps = keeps or (rung == KEPT and not lacking)
        rungs.append((rung, climb, keeps, lacking))
    rungs.append(("build-nanogpt's step", nanogpt, False, None if compiles else "no compiler"))
    print(f"{hardware(device)}: {cfg.model}, {B} × {T} tokens × {micro_steps} micro-steps, {args.rounds} rounds\n")
    context, pipes = multiprocessing.get_context("spawn"), {}
    for rung, rung_cfg, keeps, lacking in rungs:
        if not lacking:
            pipes[rung], end = context.Pipe()
            job = (end, rung_cfg, keeps, B, micro_steps)
            context.Process(target=stand_on_rung, args=job, daemon=True).start()
            end.close()
    speeds, memory = {rung: [] for rung in pipes}, {}
    for i in range(-1, args.rounds):  # the first round, in which models compile, does not count
        for rung, pipe in pipes.items():
            pipe.send(args.steps)
            seconds, memory[rung] = pipe.recv()
            if i >= 0:
                speeds[rung].append(args.steps * micro_steps * B * T / seconds)
    for pipe in pipes.values():
        pipe.send(0)
    with torch.device("meta"):
        flops = train_gpt2.GPT2(train_gpt2.GPT2Config(**sizes_of(cfg))).flops_per_token(T)
    peak = train_gpt2.peak_flops(dataclasses.replace(cfg, dtype="bf16"))
    rows, first, before = [], None, None
    for rung, _, _, lacking in rungs:
        if lacking:
            rows.append([rung, lacking, *"----"])
            continue
        speed = np.array(speeds[rung])
        first, before = (speed if first is None else first), (speed if before is None else before)
        mfu = f"{np.median(speed) * flops / peak:.1%}" if peak else "-"
        gains = [float(np.median(speed / before)), float(np.median(speed / first))]
        memory_used = "-" if memory[rung] is None else f"{memory[rung] / 2**30:.1f}"
        rows.append([rung, f"{np.median(speed):,.0f}", *gains, mfu, memory_used])
        before = speed
    print_table(["", "tokens/s", "× the rung before", "× the first", "MFU (bf16 peak)", "peak GiB"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# step: train_gpt2.py as it runs, against the products alone


NEVER = ("val", "sample", "hellaswag", "checkpoint")
NOTHING_BUT_STEPS = ["--warmup_steps=0", *(f"--{name}_every=0" for name in NEVER)]


def write_tokens(folder: Path, tokens: int, shards: int, vocab_size: int, encoding: str) -> None:
    rng = np.random.default_rng(0)
    for i in range(shards):
        name = f"random_{'train' if i else 'val'}_{i:06d}.npy"
        np.save(folder / name, rng.integers(0, vocab_size, tokens, dtype=np.uint16))
    (folder / "manifest.json").write_text(json.dumps(dict(encoding=encoding, vocab_size=vocab_size)))


def trainers_step(args, how_long: str):
    """One step as `training_step` makes it, of the settings the trainer would choose here; their config, and device."""
    import train_gpt2

    cfg, device = trainers_config(args)
    B, T = cfg.micro_batch_size, cfg.sequence_length
    print(f"{hardware(device)}: {cfg.model}, {B} × {T} tokens × {args.micro_steps} micro-steps, {how_long}\n")
    if device.type == "cpu":
        train_gpt2.keep_memory()
    return training_step(cfg, device, B, T, args.micro_steps), cfg, device


def step(args) -> None:
    """Forward, backward and optimiser step of the same model on the same shapes, a fixed batch, no clipping and nothing
    read back, against the training loop with all it does besides. The two take turns within one run of the trainer, a
    few steps each, and each turn of the loop is held against the bare steps before and after it: what the machine does
    meanwhile hits both alike."""
    import train_gpt2

    bare, cfg, device = trainers_step(args, f"{args.rounds} turns of {args.steps} steps")
    get_lr, began, bare_seconds, loop_seconds = train_gpt2.get_lr, None, [], []

    def take_turns(t, cfg):  # the loop asks for the rate at the start of each step
        nonlocal began
        if t % args.steps == 0:
            synchronize(device)
            if began is not None:
                loop_seconds.append((time.perf_counter() - began) / args.steps)
            start = time.perf_counter()
            for _ in range(args.steps):
                bare(clip=False)
            synchronize(device)
            began = time.perf_counter()
            bare_seconds.append((began - start) / args.steps)
        return get_lr(t, cfg)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out:
        write_tokens(Path(folder), 10**6, 2, cfg.vocab_size, "bytes" if cfg.model == "demo" else "gpt2")
        flags = [f"--data={folder}", f"--log_dir={folder}/log", f"--model={cfg.model}", f"--device={device}"]
        flags += [f"--max_steps={(args.rounds + 2) * args.steps + 1}", f"--total_batch_size={cfg.total_batch_size}"]
        flags += [f"--micro_batch_size={cfg.micro_batch_size}", f"--dtype={cfg.dtype}", *NOTHING_BUT_STEPS]
        train_gpt2.get_lr = take_turns
        if train_gpt2.main(flags):
            raise SystemExit(out.getvalue())
    bare_seconds, loop_seconds = np.array(bare_seconds[2:]), np.array(loop_seconds[2:])  # the first two warm up
    ratios = loop_seconds / ((bare_seconds[:-1] + bare_seconds[1:]) / 2)
    low, median, high = np.percentile(ratios, [25, 50, 75])
    rows = [
        ["forward, backward, optimiser step", 1e3 * float(np.median(bare_seconds)), "1.000", "-"],
        ["train_gpt2.py", 1e3 * float(np.median(loop_seconds)), f"{median:.3f}", f"{low:.3f} to {high:.3f}"],
    ]
    print_table(["", "ms a step, median", "× the bare step, median", "half of the turns"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# profile: where the time of a step goes

KINDS = (  # what a kernel's name, or on a CPU an operation's, says of its work; the first that fits counts
    ("loss", "log_softmax|nll_loss|cross_entropy"),
    ("attention", "scaled_dot_product|flash|fmha|sdpa|::bmm|::_softmax"),
    ("optimiser and clipping", "adam|multi_tensor|foreach|vector_norm|lpnorm|optimizer"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|::(add)?b?mm\b"),
    ("copies and fills", "memcpy|memset|::copy_|::cat|::fill_|::zero_|contiguous"),
    ("element-wise work and norms", "triton|elementwise|layer_norm|gelu|::add|::mul|::div|::sum|embedding|reduce"),
)


def profile(args) -> None:
    """Self time of every kernel (on a CPU of every operation) in a step of the trainer's settings, by kind."""
    import torch

    step, _, device = trainers_step(args, f"{args.steps} steps")
    cuda = device.type == "cuda"
    for _ in range(5):
        step()
    synchronize(device)

    def seconds_a_step() -> float:
        start = time.perf_counter()
        for _ in range(args.steps):
            step()
        synchronize(device)
        return (time.perf_counter() - start) / args.steps

    alone = seconds_a_step()
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * cuda]
    with torch.profiler.profile(activities=activities) as record:
        profiled = seconds_a_step()
    wall = alone if cuda else profiled  # the profiler slows down what runs on the CPU, but no kernel of a GPU
    print(f"{1e3 * alone:.1f} ms a step without the profiler, {1e3 * profiled:.1f} with it\n")
    seconds, rest = dict.fromkeys([kind for kind, _ in KINDS], 0.0), 0.0
    for event in record.key_averages():
        named = getattr(event, "is_user_annotation", False)
        if cuda and (event.device_type != torch.autograd.DeviceType.CUDA or named):
            continue  # an operation, or a named range, that launched kernels, which stand for themselves
        time_of = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6 / args.steps
        kind = next((kind for kind, names in KINDS if re.search(names, event.key, re.IGNORECASE)), None)
        if kind:
            seconds[kind] += time_of
        else:
            rest += time_of
    if cuda:
        seconds["other kernels"] = rest
    rows = [[kind, 1e3 * t, f"{t / wall:.0%}"] for kind, t in sorted(seconds.items(), key=lambda item: -item[1])]
    gaps = wall - sum(seconds.values())
    rows.append(["gaps between kernels" if cuda else "Python and the profiler", 1e3 * gaps, f"{gaps / wall:.0%}"])
    print_table(["", "ms a step", "share"], [*rows, ["the step", 1e3 * wall, "100%"]])


# ----------------------------------------------------------------------------------------------------------------------
# memory: does a model fit a card?


def computed_peak(name: str, B: int, checkpointing: bool) -> float:
    """Bytes of all tensors alive at the worst moment of a step in bf16 autocast, uncompiled, from their sizes alone:
    nothing is computed and nothing allocated, so any machine can tell."""
    import weakref

    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Tally(TorchDispatchMode):
        alive, now, peak = {}, 0, 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                    storage = tensor.untyped_storage()
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata)
            self.peak = max(self.peak, self.now)
            return out

        def free(self, key):
            self.now -= self.alive.pop(key)

    class Norm(torch.nn.LayerNorm):  # autocast on CUDA computes it in float32, on a CPU not
        def forward(self, x):
            return super().forward(x.float())

    tally, LayerNorm = Tally(), torch.nn.LayerNorm
    torch.nn.LayerNorm = Norm
    try:
        with FakeTensorMode(), tally:
            cfg = config_of(
                name, attention="flash", dtype="bf16", fused_adamw=True, activation_checkpointing=checkpointing
            )
            step = training_step(cfg, torch.device("cpu"), B, cfg.block_size, 1)
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
    """The memory a step needs by the sizes of its tensors and, with a CUDA GPU, whether the trainer finds a
    micro-batch by itself when it is held to a small card's memory."""
    import torch

    rows = []
    for name, card, checkpointing in ("gpt2", 6, False), ("gpt2-large", 24, True), ("gpt2-xl", 40, True):
        peaks = [f"{computed_peak(name, B, checkpointing) / 1e9:.1f}" for B in (1, 4)]
        measured = ["-", "-"]
        if torch.cuda.is_available():
            with tempfile.TemporaryDirectory() as folder:
                write_tokens(Path(folder), 10**6, 2, 50257, "gpt2")
                flags = [f"--model={name}", "--data=.", *NOTHING_BUT_STEPS, "--max_steps=5", "--total_batch_size=65536"]
                flags += ["--activation_checkpointing"] * checkpointing
                command = [sys.executable, "-c", CAPPED, str(card), *flags]
                env = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
                found = re.findall(r"= (\d+) sequences|^peak (.*)", done.stdout, re.MULTILINE)
                measured = [a or b for a, b in found] if done.returncode == 0 else ["failed", "-"]
        rows.append([name, "yes" if checkpointing else "no", f"{card} GB", *peaks, *measured])
    header = ["", "checkpointing", "card", "GB at B = 1", "GB at B = 4", "B found on such a card", "GB used"]
    print_table(header, rows)


# ----------------------------------------------------------------------------------------------------------------------
# loader: from shards on disk to batches in memory


class WholeShards:
    """The loader of build-nanogpt: one shard in memory as int64, read in file order."""

    def __init__(self, files, B: int, T: int):
        self.files, self.B, self.T, self.shard, self.at = files, B, T, -1, 0
        self.next_shard()

    def next_shard(self):
        import torch

        self.shard, self.at = (self.shard + 1) % len(self.files), 0
        self.tokens = torch.tensor(np.load(self.files[self.shard]).astype(np.int32), dtype=torch.long)

    def batch(self, i: int):
        B, T = self.B, self.T
        part = self.tokens[self.at : self.at + B * T + 1]
        self.at += B * T
        if self.at + B * T + 1 > len(self.tokens):
            self.next_shard()
        return part[:-1].view(B, T), part[1:].view(B, T)


def loader(args) -> None:
    """Tokens a second of one process, and how many GPUs at 650,000 tokens a second that feeds."""
    import train_gpt2

    B, T, per_gpu = args.micro_batch_size or 64, 1024, 650_000
    seconds = {"whole shards in memory, in file order": [], "ours, in file order": [], "ours, shuffled": []}
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), args.tokens, 3, 50257, "gpt2")
        files = train_gpt2.find_shards(Path(folder), "train")
        loaders = [WholeShards(files, B, T)]
        loaders += [train_gpt2.DataLoaderLite(files, B, T, shuffle=shuffle) for shuffle in (False, True)]
        batches = sum(len(np.load(file, mmap_mode="r")) for file in files) // (B * T)
        print(f"{batches} batches of {B} × {T} tokens from {len(files)} shards, {args.rounds} rounds\n", flush=True)
        for _ in range(args.rounds):
            for way, each in zip(seconds, loaders, strict=True):
                start = time.perf_counter()
                for i in range(batches):
                    each.batch(i)
                seconds[way].append(time.perf_counter() - start)
    base = np.array(seconds["whole shards in memory, in file order"])
    rows = []
    for way, values in seconds.items():
        speed = batches * B * T / np.median(values)
        rows.append([way, speed / 1e6, float(np.median(base / np.array(values))), f"{speed / per_gpu:,.0f}"])
    print_table(["", "Mtok/s, median", "× whole shards", "GPUs it feeds at 650,000 tok/s"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# scaling: the same steps on one process and on two, a thread each


def scaling(args) -> None:
    """Tokens a second of the demo under torchrun with two processes, and in one, each process with one thread."""
    flags = ["--model=demo", "--device=cpu", f"--max_steps={args.steps}", *NOTHING_BUT_STEPS]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    speeds = {"one process": [], "two processes": [], "two processes, 4 micro-steps each": []}
    ways = {"one process": ([], 1), "two processes": (launch, 1), "two processes, 4 micro-steps each": (launch, 4)}
    print(f"demo, a thread a process, {args.steps} steps, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), 10**6, 2, 257, "bytes")
        for _ in range(args.rounds):
            for way, (launcher, micro_steps) in ways.items():
                log = Path(folder, f"log{time.monotonic_ns()}")
                size = [f"--total_batch_size={4096 * micro_steps}", "--micro_batch_size=16"]
                command = [sys.executable, *launcher, str(ROOT / "train_gpt2.py"), *flags, *size, "--data=."]
                env = {**os.environ, "OMP_NUM_THREADS": "1"}
                command.append(f"--log_dir={log}")
                subprocess.run(command, check=True, cwd=folder, env=env, stdout=subprocess.DEVNULL)
                lines = [line.split() for line in (log / "log.txt").read_text().splitlines()]
                tps = [float(v) for t, stream, v in lines if stream == "tps" and int(t) >= args.steps // 4]
                speeds[way].append(float(np.median(tps)))
    base = np.array(speeds["one process"])
    rows = [
        [way, f"{np.median(v):,.0f}", float(np.median(np.array(v) / base)), f"{max(v):,.0f}", float(max(v) / max(base))]
        for way, v in speeds.items()
    ]
    print_table(["", "tokens/s, median", "× one process", "best", "× one process's best"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# tokenize: three ways from the same text to tokens, each timed from when its workers are up


def english(megabytes: int, seed: int = 0) -> list[str]:
    """Documents of a few kilobytes, as web pages are, of English paragraphs: the docstrings of Python's library."""
    rng, paragraphs = random.Random(seed), []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        with contextlib.suppress(OSError):
            source = path.read_text(encoding="utf-8", errors="replace")
            found = re.findall(r'"""(.*?)"""', source, re.DOTALL)
            paragraphs += [re.sub(r"\s+", " ", p) for text in found for p in text.split("\n\n") if len(p) > 80]
    documents, size = [], 0
    while size < megabytes * 2**20:
        document = "\n\n".join(rng.choices(paragraphs, k=rng.randint(2, 30)))
        documents.append(document)
        size += len(document)
    return documents


def own_encoding():
    """What tiktoken.get_encoding("gpt2") returns, with or without a network: the pattern is tiktoken's own."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    from fineweb import gpt2_encoding

    special, ranks = {"<|endoftext|>": 50256}, gpt2_encoding()._mergeable_ranks
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


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


def pool_scheme(documents: list[str], processes: int, shard_size: int, folder: str) -> tuple[int, float]:
    """(tokens, seconds) of a pool that gets documents in chunks of 16 and sends arrays back, which one process copies
    into shards: the scheme in use today."""
    global POOL_ENCODING
    POOL_ENCODING = own_encoding()
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        pool.map(len, [""] * processes)  # they are up
        start, total, shard, used = time.perf_counter(), 0, np.empty(shard_size, np.uint16), 0
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
    """(tokens, seconds) of fineweb.py on a file, as it reports them: from when its workers are up to when the last
    shard is on the disk."""
    flags = [f"--out={folder}/{time.monotonic_ns()}", f"--num_workers={processes}", f"--shard_size={shard_size}"]
    command = [sys.executable, ROOT / "fineweb.py", "--files", path, *flags]
    line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
    tokens, seconds = re.search(r"([\d,]+) tokens, .*, ([\d.]+) s,", line).groups()
    return int(tokens.replace(",", "")), float(seconds)


def tokenize(args) -> None:
    """Tokens a second, all ways in turn within each round, so that whatever the machine does meanwhile hits them alike;
    the ratios are medians of the rounds'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cores, documents = args.processes, english(args.megabytes)
    megabytes = sum(map(len, documents)) / 1e6
    print(f"{cores} processes, {len(documents):,} documents, {megabytes:.0f} MB, {args.rounds} rounds\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            "plain tiktoken, a process a core": lambda: plain_tiktoken(documents, cores),
            "pool, half the cores": lambda: pool_scheme(documents, max(1, cores // 2), args.shard_size, folder),
            "pool, all cores": lambda: pool_scheme(documents, cores, args.shard_size, folder),
        }
        table = pa.table({"text": documents, "id": [str(i) for i in range(len(documents))]})
        pq.write_table(table, Path(folder, "text.parquet"), row_group_size=1000)
        Path(folder, "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
        for kind in ("parquet", "jsonl"):
            path = Path(folder, f"text.{kind}")
            ways[f"fineweb.py, .{kind}"] = lambda path=path: our_shards(path, cores, args.shard_size, folder)
        speeds = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                tokens, seconds = run()
                speeds[way].append(tokens / seconds / 1e6)
    plain_speeds, half = speeds["plain tiktoken, a process a core"], speeds["pool, half the cores"]
    rows = []
    for way, values in speeds.items():
        ratio = [float(np.median(np.divide(values, reference))) for reference in (plain_speeds, half)]
        rows.append([way, float(np.median(values)), float(min(values)), float(max(values)), *ratio])
    print_table(["", "Mtok/s, median", "lowest", "highest", "of plain tiktoken", "of the pool, half"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# hellaswag: the same examples scored one at a time and by train_gpt2.hellaswag_scores


def like_hellaswag(count: int, seed: int = 0) -> list:
    """Random tokens in examples as long as HellaSwag's: contexts of 25 to 110 tokens, 60 in the mean, endings of 10 to
    50, 27 in the mean. Lengths are quantiles, so that a few examples are as long as many."""
    rng = np.random.default_rng(seed)

    def lengths(n: int, mean: float, low: int, high: int) -> np.ndarray:
        spread = rng.gamma(6, mean / 6, 10**5).clip(low, high)
        return rng.permutation(np.quantile(spread, (np.arange(n) + 0.5) / n)).astype(int)

    contexts, endings = lengths(count, 60, 25, 110), lengths(4 * count, 27, 10, 50).reshape(count, 4)
    return [
        (rng.integers(0, 50257, length), [rng.integers(0, 50257, n) for n in row], int(rng.integers(4)))
        for length, row in zip(contexts, endings, strict=True)
    ]


def one_at_a_time(model, examples, device):
    """Sums and means of log-likelihoods the way of build-nanogpt: an example is four rows, context and ending, padded
    to the longest; the logits of all positions; shifted cross-entropy, of which a mask keeps the ending's."""
    import torch
    from torch.nn import functional as F

    sums, means = [], []
    for context, endings, _ in examples:
        idx = torch.zeros(4, len(context) + max(map(len, endings)), dtype=torch.int64)
        mask = torch.zeros_like(idx)
        for k, ending in enumerate(endings):
            row = torch.from_numpy(np.concatenate((context, ending)))
            idx[k, : len(row)], mask[k, len(context) : len(row)] = row, 1
        idx, mask = idx.to(device), mask.to(device)[:, 1:]
        logits = model(idx)[0][:, :-1].contiguous()
        nats = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none").view(4, -1) * mask
        total = -nats.sum(dim=1)
        mean = total / mask.sum(dim=1)
        total.argmax().item(), mean.argmax().item()  # read back for each example
        sums.append(total)
        means.append(mean)
    return torch.stack(sums).cpu(), torch.stack(means).cpu()


def hellaswag(args) -> None:
    """Examples a second, both ways in turn within each round, in the device's best precision; the ratio is the median
    of the rounds'."""
    import torch

    import train_gpt2

    device = train_gpt2.choose_device(args.device)
    dtype = train_gpt2.native_dtype(device)
    torch.manual_seed(0)
    sizes = {size: value for size, value in train_gpt2.MODELS[args.model].items() if size in train_gpt2.SIZES}
    model = train_gpt2.GPT2(train_gpt2.GPT2Config(**sizes)).to(device)
    examples = like_hellaswag(args.examples or (24 if device.type == "cpu" else 2000))
    context = np.mean([len(context) for context, _, _ in examples])
    ending = np.mean([len(ending) for _, endings, _ in examples for ending in endings])
    print(
        f"{hardware(device)}, {dtype}: {args.model}, random weights, {args.rounds} rounds of {len(examples)} examples"
    )
    print(f"with {context:.0f} tokens of context and endings of {ending:.0f} in the mean\n", flush=True)
    ways = {
        "one example at a time": one_at_a_time,
        "train_gpt2.hellaswag_scores": train_gpt2.hellaswag_scores,
    }
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
    alone = speeds["one example at a time"]
    rows = []
    for way, values in speeds.items():
        ratio, all_of_it = float(np.median(np.divide(values, alone))), f"{10042 / np.median(values):,.0f}"
        rows.append([way, float(np.median(values)), float(min(values)), float(max(values)), all_of_it, ratio])
    print_table(["", "examples/s, median", "lowest", "highest", "s for all 10,042", "× one at a time"], rows)
    apart = (means["one example at a time"] - means["train_gpt2.hellaswag_scores"]).abs().max().item()
    print(f"\nThe two ways' means of an ending differ by {apart:.1e} nats at most.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    for name, run, help, rounds, steps in (
        ("ladder", ladder, "what each step from float32 to the trainer's settings gains", 5, 10),
        ("step", step, "the training loop against its bare products", 60, 5),
        ("profile", profile, "where a step's milliseconds go", None, 20),
    ):
        command = commands.add_parser(name, help=help)
        command.add_argument("--device", help="cpu, cuda, mps (the fastest there is)")
        command.add_argument("--dtype", choices=("bf16", "fp32"), help="the trainer's (the device's best)")
        command.add_argument("--model", help="named size (gpt2 on CUDA, else demo)")
        command.add_argument("--micro_batch_size", type=int, help="sequences (16 on CUDA, else 2,048 tokens)")
        command.add_argument("--micro_steps", type=int, default=1, help="of a step (%(default)s)")
        if rounds:
            command.add_argument("--rounds", type=int, default=rounds, help="(%(default)s)")
        command.add_argument("--steps", type=int, default=steps, help="timed steps a round (%(default)s)")
        if name == "ladder":
            command.add_argument("--compile", action="store_true", help="on a CPU, too")
        command.set_defaults(run=run)

    command = commands.add_parser("memory", help="what the larger models take, and whether they fit small cards")
    command.set_defaults(run=memory)

    command = commands.add_parser("loader", help="batches a second, against reading whole shards")
    command.add_argument("--tokens", type=int, default=50_000_000, help="a shard (%(default)s)")
    command.add_argument("--micro_batch_size", type=int, help="sequences of 1,024 tokens (64)")
    command.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    command.set_defaults(run=loader)

    command = commands.add_parser("scaling", help="two processes against one")
    command.add_argument("--steps", type=int, default=60, help="a run (%(default)s)")
    command.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    command.set_defaults(run=scaling)

    command = commands.add_parser("tokenize", help="fineweb.py against plain tiktoken and the pool scheme")
    command.add_argument("--megabytes", type=int, default=60, help="of text (%(default)s)")
    command.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    command.add_argument("--processes", type=int, default=cores, help="(all cores: %(default)s)")
    command.add_argument("--shard_size", type=int, default=10_000_000, help="tokens a shard (%(default)s)")
    command.set_defaults(run=tokenize)

    command = commands.add_parser("hellaswag", help="scoring endings, against one example at a time")
    command.add_argument("--device", help="cpu, cuda, mps (the fastest there is)")
    command.add_argument("--model", default="gpt2", help="named size, random weights (%(default)s)")
    command.add_argument("--examples", type=int, help="of HellaSwag's lengths (24 on a CPU, else 2000)")
    command.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    command.set_defaults(run=hellaswag)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
