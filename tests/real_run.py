"""Train GPT-2 124M from nothing on real text, and beside it build-nanogpt's model and step.

    python tests/real_run.py DATA               # on a CUDA GPU, in eight minutes
    python tests/real_run.py DATA --rehearse    # with a tiny model on the CPU, in a minute

First train_gpt2.py is started as a user starts it, for six steps, to see how many fit into
--minutes. Then it trains, with a schedule of so many steps, and tests/reference_run.py trains for
the same time. DATA is a folder of shards of GPT-2's tokens. On Debian 12, the documentation of
Linux and Python and 1,259 RFCs (of the section non-free) make 26 million tokens of real text:

    apt-get download linux-doc-6.1 python3.11-doc doc-rfc-std doc-rfc-old-std doc-rfc-experimental
    for package in *.deb; do dpkg -x $package docs; done
    find docs -type f '(' -name 'rfc[0-9]*.txt.gz' -o -name '*.rst.txt' ')' | grep -v translations |
        sort | shuf --random-source=<(yes) |
        while read -r file; do echo '<|endoftext|>'; zcat -f $file; done | tr -s ' ' > docs.txt
    python fineweb.py --files docs.txt --out DATA --shard_size 1050000 --max_tokens 26250000

(Of their tokens a third would be spaces, for indentation, so each row of spaces becomes one.)

The results are in the folder --out:

    report.md               the figures of both, what differs, and the samples
    losses.png              both losses against the seconds of training
    trainer/log.txt         what train_gpt2.py logs, draws and prints
    trainer/curves.png
    trainer/printed.txt
    reference/log.txt       the same of the reference
    reference/printed.txt

They are written as it goes, so that what is done stays, whatever fails later.
"""

import argparse
import contextlib
import importlib.metadata
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent
TRAINER = [sys.executable, str(TESTS.parent / "train_gpt2.py")]
REFERENCE = [sys.executable, str(TESTS / "reference_run.py")]

# GPT-2 124M with the recipe's batch and learning rate
REAL = dict(model="gpt2", total_batch_size=2**19, val_tokens=2**20, device="cuda")
# What stands in for it on a CPU
TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    total_batch_size=256,
    micro_batch_size=4,
    val_tokens=1024,
    max_lr=6e-3,
    device="cpu",
    dtype="fp32",
    print_every=10,
)
MEASURED_STEPS = 6
VALIDATIONS = 12  # in a run, and one at its start
GRACE = 10  # seconds that a process has to end when it is asked to
RESERVE = 25  # seconds for the report, and for what takes longer than it was measured


# --------------------------------------------------------------------------------------------------
# Running the two, each in a process of its own


def run(command: list[str], printed: Path, seconds: float) -> str:
    """Run a command, and show what it prints, which is also kept in a file. When so many seconds
    are over, it is gone. Returns what went wrong, or an empty string."""
    printed.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    # In a session of its own, so that the compiler's processes can be ended together with it
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    # The trainer finishes its step when it is asked to end. What hangs has to be killed.
    asking = threading.Timer(seconds - GRACE, process.terminate)
    killing = threading.Timer(seconds, kill_session, [process])
    asking.start()
    killing.start()
    try:
        with open(printed, "w", encoding="utf-8") as file:
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
                file.flush()
        process.wait()
    finally:
        asking.cancel()
        killing.cancel()
        kill_session(process)
        process.wait()
    if process.returncode == 0:
        return ""
    if time.monotonic() > end - GRACE:
        return f"it was stopped after {seconds - GRACE:.0f} s"
    return f"it failed with exit code {process.returncode}"


def kill_session(process) -> None:
    """Kill a process and all that it has started."""
    with contextlib.suppress(OSError):  # there is nothing left of them
        os.killpg(process.pid, signal.SIGKILL)


def as_flags(settings: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def measure(settings: dict, limit: float) -> tuple[float, float]:
    """Let the trainer take a few steps. Returns the seconds that one takes, and the seconds of all
    that a run needs besides: to start, to compile and to validate twice."""
    settings = settings | dict(max_steps=MEASURED_STEPS, warmup_steps=0)
    settings |= dict(val_every=MEASURED_STEPS, sample_every=0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = TRAINER + as_flags(settings | dict(log_dir=folder))
        failure = run(command, Path(folder, "printed.txt"), limit)
        whole = time.monotonic() - began
        if failure:
            raise SystemExit(
                f"error: train_gpt2.py could not be measured: {failure}, and says above why; "
                "without a CUDA GPU, try --rehearse"
            )
        seconds = read_steps(read_log(Path(folder)), settings)
    # The first step compiles, and the second one may still be slow.
    return statistics.median(seconds[2:]), whole - sum(seconds[1:])


def plan(settings: dict, step_seconds: float, start_seconds: float, whole: float) -> dict:
    """The settings of a run that takes `whole` seconds, from its start to its end. It has a few
    steps even where there is no time for them."""
    # Forward is a third of a step's work. Half of its time leaves some room.
    validation = step_seconds * settings["val_tokens"] / settings["total_batch_size"] / 2
    training = whole - start_seconds - VALIDATIONS * validation
    max_steps = max(VALIDATIONS, int(training / step_seconds))
    return settings | dict(
        max_steps=max_steps,
        warmup_steps=max_steps // 10,
        val_every=math.ceil(max_steps / VALIDATIONS),
        sample_every=max_steps,
    )


# --------------------------------------------------------------------------------------------------
# What they have logged


@dataclass
class Result:
    """What one of the two has come to."""

    name: str
    failure: str  # empty where there was none
    printed: str
    train: list[float]  # the loss of each step
    val: dict[int, float]  # the validation losses, by the number of steps before them
    seconds: list[float]  # the time of each step

    def has_figures(self) -> bool:
        """Whether it has come so far that there is something to show."""
        return len(self.seconds) > 1 and bool(self.val)

    def time_after(self, steps: int) -> float:
        return sum(self.seconds[:steps])


def read_log(folder: Path) -> dict[str, dict[int, float]]:
    """The figures in log.txt, as {stream: {step: value}}."""
    streams = {"train": {}, "val": {}, "tps": {}}
    path = folder / "log.txt"
    if path.exists():
        for line in path.read_text().splitlines():
            step, stream, value = line.split()
            streams.setdefault(stream, {})[int(step)] = float(value)
    return streams


def read_steps(log: dict, settings: dict) -> list[float]:
    """The seconds of each step."""
    return [settings["total_batch_size"] / tps for tps in log["tps"].values()]


def without_compiling(seconds: list[float]) -> list[float]:
    """The seconds of each step, where the first one, which compiles the model, counts as the median
    of the others."""
    if len(seconds) < 2:
        return [0.0] * len(seconds)
    return [statistics.median(seconds[1:])] + seconds[1:]


def read_result(name: str, folder: Path, failure: str, settings: dict) -> Result:
    log = read_log(folder)
    return Result(
        name=name,
        failure=failure,
        printed=(folder / "printed.txt").read_text(encoding="utf-8"),
        train=list(log["train"].values()),
        val=log["val"],
        seconds=without_compiling(read_steps(log, settings)),
    )


# --------------------------------------------------------------------------------------------------
# The report


def count_tokens(data: Path, split: str) -> int:
    return sum(len(np.load(path, mmap_mode="r")) for path in data.glob(f"*_{split}_*.npy"))


def hardware(settings: dict) -> str:
    """The name of the GPU or the CPU, without torch, whose import takes seconds."""
    if settings["device"] == "cpu":
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "a GPU that nvidia-smi does not know"


def figures(result: Result, settings: dict, common_step: int) -> dict[str, str]:
    """What the table says of one of the two."""
    steps = len(result.seconds)
    tokens = settings["total_batch_size"]
    train_tokens = count_tokens(Path(settings["data"]), "train")
    last_tenth = result.train[-math.ceil(steps / 10) :]
    micro_batch = re.search(r"a step is (\d+) sequences", result.printed)
    return {
        "sequences in a micro-batch": micro_batch[1] if micro_batch else "?",
        "seconds of training": f"{result.time_after(steps):.1f}",
        "steps": f"{steps:,}",
        "epochs": f"{steps * tokens / train_tokens:.2f}",
        "tokens a second, median": f"{tokens / statistics.median(result.seconds):,.0f}",
        "training loss, mean of the last tenth": f"{np.mean(last_tenth):.4f}",
        f"validation loss after {common_step:,} steps": f"{result.val[common_step]:.4f}",
        "**last validation loss**": f"**{result.val[max(result.val)]:.4f}**",
    }


def table(results: list[Result], settings: dict) -> str:
    """The figures of both side by side, in Markdown."""
    common_step = max(set.intersection(*[set(result.val) for result in results]))
    columns = [figures(result, settings, common_step) for result in results]
    lines = [f"| | {' | '.join(result.name for result in results)} |"]
    lines += ["|---|" + "--:|" * len(results)]
    for label in columns[0]:
        lines += [f"| {label} | {' | '.join(column[label] for column in columns)} |"]
    return "\n".join(lines) + "\n"


DIFFERENCES = """
Seconds of training are those of the steps alone, where the first one, which compiles the model,
counts as the median of the others. Validations are not part of them. Both start with the same
weights, since the seed is the same. They have the same tokens a step, the same AdamW and clipping,
and in each step the same learning rate, and are validated on the same tokens. What differs:

- **Order.** train_gpt2.py shuffles the data anew for each epoch. build-nanogpt takes them in order.
- **Residual stream.** Under autocast to bf16, train_gpt2.py's is in bf16, too, and build-nanogpt's
  in float32.
- **Loss.** build-nanogpt's softmax includes the tokens that pad the vocabulary, and so do all its
  losses here. They are a thousandth of it, and the model soon learns not to expect them.
- **Loop.** train_gpt2.py fetches a batch while the GPU is busy with the one before.
- **Turn.** train_gpt2.py comes first, and build-nanogpt finds the card warm.

"build-nanogpt" is the model and the step that tests/benchmark.py builds from train_gpt2.py's parts,
compiled as train_gpt2.py is, in the loop of tests/reference_run.py. It is not the program itself.
"""


def write_report(out: Path, settings: dict, results: list[Result]) -> None:
    data = Path(settings["data"])
    report = f"# A real run\n\n{hardware(settings)}, torch {importlib.metadata.version('torch')}. "
    report += f"The data have {count_tokens(data, 'train'):,} tokens to train on, and validation "
    report += (
        f"takes the first {settings['val_tokens']:,} of {count_tokens(data, 'val'):,} others.\n"
    )
    for result in results:
        if result.failure:
            report += f"\n**{result.name}: {result.failure}.** See its printed.txt.\n"
    if len(results) == 1:
        report += "\nbuild-nanogpt has not been trained, or not yet.\n"
    trained = [result for result in results if result.has_figures()]
    if trained:
        report += f"\n{table(trained, settings)}"
    times = [result.time_after(len(result.seconds)) for result in trained]
    if trained and min(times) < 0.95 * max(times):
        report += (
            "\n**They were not trained for the same time.** losses.png shows both at any time.\n"
        )
    report += f"\n![Both losses against time](losses.png)\n{DIFFERENCES}"
    command = shlex.join(["train_gpt2.py"] + as_flags(settings))
    report += f"\n## The command\n\n    {command}\n"
    _, first, samples = results[0].printed.partition("--- sample 0\n")
    if first:
        report += "\n## Samples after the last step\n\n"
        report += textwrap.indent(first + samples, "    ")
    (out / "report.md").write_text(report, encoding="utf-8")


def draw_losses(path: Path, results: list[Result], title: str) -> None:
    """The losses against time: of training as a running mean, of validation as points."""
    from matplotlib.figure import Figure  # unlike pyplot, it needs no display

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="seconds of training", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    tops = []
    for number, result in enumerate(results):
        if not result.has_figures():
            continue
        times = np.cumsum([0.0] + result.seconds)
        window = math.ceil(len(result.train) / 50)
        mean = np.convolve(result.train, np.full(window, 1 / window), mode="valid")
        middle = times[1 + window // 2 :][: len(mean)]
        axes.plot(middle, mean, color=f"C{number}", alpha=0.4)
        label = f"{result.name}: {result.val[max(result.val)]:.4f} on the validation data"
        val_times = [times[step] for step in result.val]
        axes.plot(val_times, list(result.val.values()), "o-", color=f"C{number}", label=label)
        # The fall from a uniform guess would hide all that comes after it, so it is cut off.
        tops.append(mean[len(mean) // 20])
    if tops:
        axes.set_ylim(top=max(tops))
        axes.legend()
    figure.savefig(path, dpi=120)


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def refuse(message):
        raise SystemExit(f"error: {message}; --help lists the flags")

    parser.error = refuse
    add = parser.add_argument
    add("data", type=Path, help="folder of token shards that fineweb.py has made")
    add(
        "--out", type=Path, default=Path("real_run"), help="new folder of the results (%(default)s)"
    )
    add("--minutes", type=float, help="of each of the two, with its start (3.5, or 0.5)")
    add("--limit", type=float, default=480, help="seconds for everything together (%(default)s)")
    add("--micro_batch_size", type=int, help="sequences, of both (what the trainer chooses)")
    add("--rehearse", action="store_true", help="try it on the CPU, with a tiny model")
    args = parser.parse_args(argv)
    for split in ("train", "val"):
        if count_tokens(args.data, split) == 0:
            raise SystemExit(
                f"error: {args.data} has no {split} shards; make it with fineweb.py --files"
            )
    if args.out.exists():
        raise SystemExit(f"error: {args.out} is there already; choose another --out")
    if args.minutes is None:
        args.minutes = 0.5 if args.rehearse else 3.5
    return args


def show(out: Path, settings: dict, results: list[Result]) -> None:
    """Write the report and the picture of what there is so far."""
    write_report(out, settings, results)
    try:
        draw_losses(out / "losses.png", results, hardware(settings))
    except ImportError:
        print("there is no matplotlib, so losses.png is left out", flush=True)


def train_both(settings: dict, out: Path, whole: float, end: float) -> None:
    """Train the one and then the other, and write down what comes of it."""
    print(f"\ntrain_gpt2.py, {settings['max_steps']:,} steps in {whole:.0f} s:", flush=True)
    folder = out / "trainer"
    command = TRAINER + as_flags(settings | dict(log_dir=folder))
    # It may be slower than it was when it was measured, at the cost of the reference if need be.
    limit = max(1.2 * whole + GRACE, end - time.monotonic() - RESERVE - whole)
    failure = run(command, folder / "printed.txt", limit)
    (folder / ".lock").unlink(missing_ok=True)
    results = [read_result("train_gpt2.py", folder, failure, settings)]
    show(out, settings, results)

    # If the trainer has not taken a step, the reference trains for the time that was meant for it.
    seconds = sum(results[0].seconds) or whole
    left = end - time.monotonic() - RESERVE / 5
    if left < 2 * GRACE:
        print("no time is left for build-nanogpt")
        return
    print(f"\nbuild-nanogpt, {seconds:.0f} s of training:", flush=True)
    folder = out / "reference"
    clock = time.time() + left - 1.5 * GRACE
    command = REFERENCE + [f"{seconds}", f"{clock}"] + as_flags(settings | dict(log_dir=folder))
    failure = run(command, folder / "printed.txt", left)
    results.append(read_result("build-nanogpt", folder, failure, settings))
    show(out, settings, results)


def main() -> None:
    began = time.monotonic()
    args = parse_args()
    end = began + args.limit
    # Whoever stops this program stops what it has started, too.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    sys.stdout.reconfigure(errors="replace")  # the terminal may not know every character
    settings = REAL
    if args.rehearse:
        settings = TINY
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model gains nothing from more
    settings = settings | dict(data=str(args.data), hellaswag_every=0, checkpoint_every=0)
    if args.micro_batch_size:
        settings |= dict(micro_batch_size=args.micro_batch_size)

    print(f"train_gpt2.py, {MEASURED_STEPS} steps to be measured:", flush=True)
    step_seconds, start_seconds = measure(settings, args.limit / 3)
    whole = min(60 * args.minutes, (end - time.monotonic() - RESERVE) / 2)
    settings = plan(settings, step_seconds, start_seconds, whole)
    args.out.mkdir(parents=True)
    train_both(settings, args.out, whole, end)
    print(f"\n{args.out / 'report.md'} has it all, after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
