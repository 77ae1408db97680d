"""Nothing is lost: real processes are stopped, killed and starved at every point, and end where an
untouched one ends.

Most tests here run in a process of their own, which forks the runs it needs: torch is imported
once, and a run can be made to meet its end at a chosen point. What is forked gets real signals and
writes real files.
"""

import functools
import io
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch._dynamo  # what the optimiser would import in each fork anew
from conftest import PROGRAM, TINY, read_log, torchrun

import fineweb
import train_gpt2
from train_gpt2 import GPT2, DataLoaderLite, load_checkpoint, main

RUN = ["--data=data", *TINY]
OFTEN = [*RUN, "--val_every=3", "--val_tokens=100", "--checkpoint_every=4"]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and POSIX signals")


@pytest.fixture(scope="module")
def server():
    """A process that has imported torch, has not used it yet, and forks for each test."""
    path = os.pathsep.join([str(Path(__file__).parent), str(PROGRAM.parent)])
    how = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    command = [sys.executable, "-c", f"import {__name__} as tests; tests.serve()"]
    with subprocess.Popen(command, env=dict(os.environ, PYTHONPATH=path), **how) as process:
        yield process


def serve():
    for line in sys.stdin:
        name, folder = line.rstrip("\n").split(" ", 1)
        if os.fork() == 0:
            signal.alarm(300)
            os.chdir(folder)
            output = os.open(f"{folder}.txt", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            globals()[name].body()
            leave(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)


def leave(code):
    """End this process, without the second that Python takes to clear away all of torch."""
    sys.stdout.flush()
    os._exit(code)


def apart(test):
    """Run a test's body in a process of its own, in a folder with data/."""

    @needs_fork
    def in_process(here, server):
        print(test.__name__, here, file=server.stdin, flush=True)
        code = server.stdout.readline()
        assert code == "0\n", Path(f"{here}.txt").read_text()

    in_process.__name__, in_process.__doc__, in_process.body = test.__name__, test.__doc__, test
    return in_process


class Run:
    """A forked process that runs the program with these flags, after `prepare` has laid its traps
    in it."""

    def __init__(self, *argv, prepare=None):
        reader, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(240)  # nothing stays behind, whatever becomes of the test
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            train_gpt2.draw_curves = lambda *args: None  # each takes as long as a whole run here
            try:
                if prepare:
                    prepare()
                code = main([str(arg) for arg in argv])
            except Exception:
                traceback.print_exc()
                code = 99
            leave(code)
        os.close(writer)
        self.output = os.fdopen(reader, errors="replace")

    def wait_for(self, pattern, times=1):
        """Read until so many lines match. False where the process ended before."""
        found = (line for line in self.output if re.search(pattern, line))
        return all(next(found, None) is not None for _ in range(times))

    def send(self, signum):
        os.kill(self.pid, signum)

    def end(self):
        """The exit code, and what was yet unread of stdout and stderr."""
        rest = self.output.read()
        self.output.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), rest


def assert_runs(*argv, code=0, prepare=None):
    ended, output = Run(*argv, prepare=prepare).end()
    assert ended == code, f"exit code {ended}: {output}"
    return output


def assert_one_error(output, *words):
    usual = ("step", "knowing", "resuming")
    lines = [line for line in output.splitlines() if not line.startswith(usual)]
    assert lines[-1].startswith("error: ") and output.count("error: ") == 1, output
    assert "Traceback" not in output, output
    for word in words:
        assert word in lines[-1], lines[-1]


def lines_of(log_dir):
    """The log but for what the clock says."""
    read_log(log_dir)  # each step once, in order
    lines = (Path(log_dir) / "log.txt").read_text().splitlines()
    return [line for line in lines if " tps " not in line]


def assert_same(a, b):
    """Two runs have the same log, and last checkpoints that are the same to the last bit."""
    assert sorted(lines_of(a)) == sorted(lines_of(b))
    one, other = (load_checkpoint(paths(folder)[-1]) for folder in (a, b))
    assert (one["step"], one["val_loss"]) == (other["step"], other["val_loss"])
    assert all(weight.equal(other["model"][name]) for name, weight in one["model"].items())
    moments = other["optimizer"]["state"]
    for i, state in one["optimizer"]["state"].items():
        assert all(value.equal(moments[i][key]) for key, value in state.items())


def paths(log_dir):
    return list(train_gpt2.checkpoints(Path(log_dir)).values())


def names(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def trap(owner, name, number, spring=None, after=False):
    """Have `spring`, or death, called before, or after, the call of this number of owner.name."""
    calls, original, spring = [], getattr(owner, name), spring or die

    def call(*args, **options):
        calls.append(1)
        if len(calls) == number and not after:
            spring(*args, **options)
        result = original(*args, **options)
        if len(calls) == number and after:
            spring(*args, **options)
        return result

    setattr(owner, name, call)


def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def die_half_way(state, path):
    whole = io.BytesIO()
    save(state, whole)
    Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
    die()


save = torch.save


@apart
def test_twenty_four_kills_at_random_moments_change_nothing():
    run = [*OFTEN, "--max_steps=200"]
    assert_runs(*run, "--log_dir=whole")
    seed = random.randrange(10**6)
    dice, sent = random.Random(seed), []
    for _ in range(24):
        process = Run(*run, "--log_dir=parts")
        # A validation is such a line, too
        if not process.wait_for("^step", times=dice.randrange(1, 11)):
            break
        time.sleep(dice.random() * 0.01)
        signum = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send(signum)
        code, output = process.end()
        sent.append(signum)
        expected = -9 if signum == signal.SIGKILL else 128 + signum
        assert code == expected, (seed, signum, code, output)
        if signum != signal.SIGKILL:
            assert "stopped after" in output, output
    assert len(sent) >= 20, seed
    assert_runs(*run, "--log_dir=parts")
    assert_same("whole", "parts")
    left = [name for name in names("parts") if not re.fullmatch(r"log_\d+\.txt", name)]
    assert left == [".lock", "log.txt", "model_00196.pt", "model_00200.pt"], seed


POINTS = {
    "before the log is put in place": (os, "replace", 1),
    "in a step": (GPT2, "forward", 12),
    "half-way through a checkpoint": (torch, "save", 1, die_half_way),
    "before a checkpoint is safe": (os, "fsync", 2),
    "before a checkpoint has its name": (os, "replace", 2),
    "after it has its name": (os, "replace", 2, None, True),
    "before the next is written": (torch, "save", 2),
    "before an old one is removed": (Path, "unlink", 5),
    "after an old one is removed": (Path, "unlink", 5, None, True),
    "while a checkpoint is read": (torch, "load", 1),
    "in a validation": (DataLoaderLite, "batch", 10),
    "between a validation and its line in the log": (train_gpt2, "validation_loss", 2, None, True),
    "while the second checkpoint has half its bytes": (torch, "save", 2, die_half_way),
}


@apart
def test_a_kill_at_each_point_of_a_checkpoint_s_life():
    run = [*OFTEN, "--max_steps=60"]
    assert_runs(*run, "--log_dir=whole")
    for where, point in POINTS.items():
        prepare = functools.partial(trap, *point)
        output = assert_runs(*run, "--log_dir=parts", code=-9, prepare=prepare)
        assert "error" not in output, (where, output)
        for path in paths("parts"):  # what has a checkpoint's name is whole
            load_checkpoint(path)
    assert_runs(*run, "--log_dir=parts")
    assert_same("whole", "parts")


@apart
def test_kills_while_the_demo_s_data_are_written_leave_whole_data_or_none():
    stdlib = Path("stdlib")
    stdlib.mkdir()
    for i in range(120):
        (stdlib / f"module_{i:03d}.py").write_text(f"x = {i}\n" * 50)
    files = ["manifest.json", "python_train_000001.npy", "python_val_000000.npy"]
    flags = [*TINY, "--max_steps=2", "--log_dir=log"]

    def prepare(*point):
        fineweb.sysconfig.get_path = lambda name: str(stdlib)
        if point:
            trap(*point)

    for name, number, after in ("fsync", 1, False), ("fsync", 2, True), ("replace", 3, False):
        point = (os, name, number, None, after)
        assert_runs(*flags, code=-9, prepare=lambda point=point: prepare(*point))
        assert not Path("python_stdlib").exists()
    assert_runs(*flags, code=-9, prepare=lambda: prepare(Path, "rename", 1, None, True))
    assert names("python_stdlib") == files
    assert_runs(*flags, prepare=prepare)
    whole = {name: Path("python_stdlib", name).read_bytes() for name in files}
    shutil.rmtree("python_stdlib")
    for signum, code in (signal.SIGINT, 130), (signal.SIGTERM, -15):  # nothing is to be saved yet
        point = (os, "fsync", 2, lambda *_, signum=signum: signal.raise_signal(signum))
        assert_runs(*flags, code=code, prepare=lambda point=point: prepare(*point))
        assert not Path("python_stdlib").exists()
    assert_runs(*flags, "--log_dir=again", prepare=prepare)
    assert whole == {name: Path("python_stdlib", name).read_bytes() for name in files}


@apart
def test_a_signal_does_not_wait_for_the_end_of_a_long_validation():
    run = [*RUN, "--val_every=10", "--checkpoint_every=20", "--micro_batch_size=1"]
    assert_runs(*run, "--log_dir=whole")

    def slow():
        validation_loss = train_gpt2.validation_loss

        def wait(model, loader, *args, **options):
            calls.append(1)
            if len(calls) == 2:
                batch = loader.batch  # 12 in all
                loader.batch = lambda i: say("a batch") or time.sleep(0.5) or batch(i)
            return validation_loss(model, loader, *args, **options)

        calls, say = [], train_gpt2.say
        train_gpt2.validation_loss = wait

    process = Run(*run, "--log_dir=parts", prepare=slow)
    assert process.wait_for("a batch")
    process.send(signal.SIGTERM)
    code, output = process.end()
    assert code == 143 and "stopped after 10 steps" in output, output
    assert output.count("a batch") < 10, output
    assert list(read_log("parts")["val"]) == [0]
    assert_runs(*run, "--log_dir=parts")
    assert_same("whole", "parts")


def slow_step(seconds):
    """Have a step take its time."""

    def wait(*_):
        train_gpt2.say("waiting")
        end = time.time() + seconds
        while time.time() < end:  # a signal does not end it
            time.sleep(0.1)

    return lambda: trap(GPT2, "forward", 8, wait)


@apart
def test_second_ctrl_c_stops_at_once_and_a_second_sigterm_changes_nothing():
    """Batch systems send one to the whole group, and torchrun forwards its own."""
    process = Run(*RUN, "--log_dir=other", prepare=slow_step(3000))
    assert process.wait_for("waiting")
    process.send(signal.SIGINT)
    time.sleep(0.5)
    process.send(signal.SIGINT)
    assert process.end()[0] == -signal.SIGINT
    run = [*RUN, "--log_dir=log", "--checkpoint_every=20"]
    process = Run(*run, prepare=slow_step(1))
    assert process.wait_for("waiting")
    for _ in range(3):
        process.send(signal.SIGTERM)
        time.sleep(0.2)
    code, output = process.end()
    assert code == 143 and "stopped after 6 steps" in output, output
    assert names("log") == [".lock", "log.txt", "model_00006.pt"]
    assert "resuming log after 6 steps" in assert_runs(*run)
    assert list(read_log("log")["train"]) == list(range(20))


@apart
def test_full_disk_and_lost_folder_are_one_line_and_the_last_good_checkpoint_stands():
    import resource

    run = [*RUN, "--checkpoint_every=5", "--log_dir=log"]
    assert_runs(*run, "--log_dir=whole")

    def room(size, call):  # no file can grow beyond this, from some step on
        limit = (size, resource.RLIM_INFINITY)
        shrink = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, limit)
        return lambda: trap(GPT2, "forward", call, lambda *_: shrink())

    for size, call, what in (
        (30_000, 10, "model_00010.pt can't be written whole"), (100, 4, "log.txt can't be written"),
    ):  # fmt: skip
        output = assert_runs(*run, code=2, prepare=room(size, call))
        assert_one_error(output, what, "stands")
        assert names("log") == [".lock", "log.txt", "model_00005.pt"]
        load_checkpoint(Path("log/model_00005.pt"))
        assert len(Path("log/log.txt").read_text().splitlines()) >= 5 * 4
    lose = functools.partial(os.rename, "log", "elsewhere")
    lost = assert_runs(*run, code=2, prepare=lambda: trap(GPT2, "forward", 4, lambda *_: lose()))
    assert_one_error(lost, "can't be written whole", "stands")
    os.rename("elsewhere", "log")
    assert_runs(*run)
    assert_same("whole", "log")

    shutil.rmtree("log")
    full = (9000, resource.RLIM_INFINITY)
    prepare = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, full)
    output = assert_runs(*TINY, "--log_dir=log", code=2, prepare=prepare)
    assert_one_error(output, "python_stdlib")
    assert names(".") == ["data", "whole"]


def script(*argv):
    """Run the program as Python runs a script, but with torch imported already."""
    sys.argv = ["train_gpt2.py", *argv]
    sys.modules["matplotlib"] = None  # takes its time
    runpy.run_path(str(PROGRAM), run_name="__main__")


def screen(*fds):
    """Have stdout and stderr go to the last of these file descriptors, and close all."""
    os.dup2(fds[-1], 1)
    os.dup2(fds[-1], 2)
    for fd in fds:
        os.close(fd)


SCREENS = {
    "a pipe that nobody reads": (signal.SIGINT, lambda: screen(*os.pipe())),
    "a terminal that is gone": (signal.SIGHUP, lambda: screen(*os.openpty())),
    "a full disk": (signal.SIGTERM, lambda: screen(os.open("/dev/full", os.O_WRONLY))),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@apart
def test_a_run_outlives_its_screen():
    """What can't be printed is in the log, what was done is saved, and the exit code is the
    signal's, never Python's own 1 or 120. SIGHUP, which a dropped connection sends, counts as
    SIGTERM does, unless it is ignored, as under nohup."""
    run = [*RUN, "--log_dir=log", "--checkpoint_every=20"]

    def prepare(lose, signum):
        lose()
        stop = functools.partial(signal.raise_signal, signum)
        trap(torch.optim.AdamW, "step", 7, lambda *_: stop())
        script(*run)

    for name, (signum, lose) in SCREENS.items():
        code = Run(prepare=functools.partial(prepare, lose, signum)).end()[0]
        assert code == 128 + signum, name
        assert list(read_log("log")["train"]) == list(range(7)), name
        load_checkpoint(Path("log/model_00007.pt"))
        shutil.rmtree("log")
    lose = SCREENS["a full disk"][1]
    assert_runs(code=2, prepare=lambda: lose() or script(*run, "--n_head=3"))
    nohup = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    assert_runs(code=0, prepare=functools.partial(prepare, nohup, signal.SIGHUP))
    assert names("log") == [".lock", "log.txt", "model_00020.pt"]


@apart
def test_second_run_in_the_same_log_folder_refuses_and_a_killed_one_leaves_no_lock():
    run = [*RUN, "--log_dir=log", "--checkpoint_every=5"]
    first = Run(*run, prepare=lambda: trap(GPT2, "forward", 16, lambda *_: time.sleep(3000)))
    assert first.wait_for("^step    12/")
    before = {path: path.read_bytes() for path in Path("log").iterdir()}
    assert_one_error(assert_runs(*run, code=2), "--log_dir log is another run's")
    assert before == {path: path.read_bytes() for path in Path("log").iterdir()}
    second = Run(*run)  # started while the first is about to die
    first.send(signal.SIGKILL)
    assert first.end()[0] == -9
    code, output = second.end()
    assert code == 0 and "resuming log after 10 steps" in output, output


@apart
def test_broken_weights_are_not_saved():
    """A step's loss is that of the weights before it."""

    def poison(self, *args, **options):
        self.param_groups[0]["params"][0].data[5] = float("nan")

    run = [*RUN, "--log_dir=log", "--checkpoint_every=5"]
    for step, error in (7, "step 7: loss nan"), (10, "the weights after step 9 are not finite"):
        prepare = functools.partial(trap, torch.optim.AdamW, "step", step, poison, True)
        assert_one_error(assert_runs(*run, code=2, prepare=prepare), error)
        assert names("log") == [".lock", "log.txt", "model_00005.pt"]
        shutil.rmtree("log")


# What it takes for a rank of a torchrun job to go wrong, by rank and by number of restarts
DRIVER = f"""
import math, os, signal, sys, time
sys.dont_write_bytecode = True
sys.path.insert(0, {str(PROGRAM.parent)!r})
import torch, train_gpt2
train_gpt2.draw_curves = lambda *args: None
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 2))  # what waits for torchrun's end waits less
RANK, RESTART = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def trap(owner, name, number, spring):
    calls, original = [], getattr(owner, name)
    def call(*args, **options):
        calls.append(1)
        if len(calls) == number:
            spring()
        return original(*args, **options)
    setattr(owner, name, call)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fail(error):
    raise error
"""


def job(trouble, *argv, cwd, options=()):
    """Start a torchrun job of two processes, with trouble ahead."""
    end = "\ncode = train_gpt2.main()\nsys.stdout.flush()\nos._exit(code)\n"
    (cwd / "driver.py").write_text(DRIVER + textwrap.dedent(trouble) + end)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # Restarted workers may read the addresses of those before them (pytorch/pytorch#135712)
    env = dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    pipe = subprocess.PIPE if trouble else subprocess.DEVNULL
    command = [*launcher, *options, "driver.py", *argv]
    how = dict(cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True, errors="replace")
    return subprocess.Popen(command, **how)


KILLS = int(os.environ.get("KILLS", 2))  # of torchrun's workers; each costs the import of torch


@needs_fork
def test_torchrun_brings_killed_workers_back_and_they_end_like_untouched_ones(here):
    run = [*OFTEN, f"--max_steps={60 + 30 * KILLS}"]
    assert job("", *run, "--log_dir=whole", cwd=here).wait(timeout=240) == 0
    trouble = f"""
        points = [(train_gpt2.GPT2, "forward", 25), (torch, "save", 2), (os, "replace", 3),
                  (os, "fsync", 4), (train_gpt2.DataLoaderLite, "batch", 40)]
        # Rank 0 writes the files
        if RESTART < {KILLS} and RANK == (RESTART + 1) % 2 * (RESTART % 5 in (0, 4)):
            trap(*points[RESTART % 5], die)
        if RESTART == {KILLS}:
            trap(train_gpt2.GPT2, "forward", 20, lambda: train_gpt2.say("now"))
    """
    for signum, restarts in (signal.SIGTERM, KILLS), (signal.SIGINT, 0):
        options = [f"--max_restarts={restarts}"]
        process = job(trouble, *run, "--log_dir=parts", cwd=here, options=options)
        while (line := process.stdout.readline()) and not line.startswith("now"):
            pass
        process.send_signal(signum)  # torchrun passes it on
        output, errors = process.communicate(timeout=240)
        assert "stopped after" in output, output + errors
        trouble = 'trap(train_gpt2.GPT2, "forward", 9, lambda: train_gpt2.say("now"))'
    assert job("", *run, "--log_dir=parts", cwd=here).wait(timeout=240) == 0
    assert_same(here / "whole", here / "parts")


BROKEN = """
forward = train_gpt2.GPT2.forward
def broken(self, *args):
    logits, loss = forward(self, *args)
    calls.append(1)
    return logits, loss * (math.nan if RANK == 1 and len(calls) > 8 else 1)
calls = []
train_gpt2.GPT2.forward = broken
"""
TROUBLES = {
    "bug": (
        'if RANK == 1: trap(train_gpt2.GPT2, "forward", 9, lambda: fail(KeyError("a bug")))',
        "KeyError: 'a bug'",
    ),
    "bad data on one rank": (
        """
        if RANK == 1:
            bad = train_gpt2.UserError("bad data")
            trap(train_gpt2.DataLoaderLite, "window", 30, lambda: fail(bad))
        """,
        "UserError: bad data",
    ),
    "full disk": (
        """
        if RANK == 0:
            trap(os, "replace", 2, lambda: fail(OSError(28, "No space left on device")))
        """,
        "can't be written whole (OSError: [Errno 28] No space left on device)",
    ),
    "not a number": (BROKEN, "UserError: step "),
}


@needs_fork
@pytest.mark.parametrize("trouble, cause", TROUBLES.values(), ids=TROUBLES)
def test_rank_that_fails_ends_the_job_with_the_cause_last_on_the_screen(here, trouble, cause):
    start = time.time()
    process = job(trouble, *RUN, "--checkpoint_every=5", "--log_dir=log", cwd=here)
    _, errors = process.communicate(timeout=240)
    assert process.returncode != 0 and time.time() - start < 120
    assert cause in errors[errors.rindex("Root Cause") :], errors
    assert "closed by peer" not in errors, errors


@needs_fork
def test_run_goes_on_with_more_processes_and_another_micro_batch(here):
    parts = [*RUN, "--log_dir=parts", "--checkpoint_every=7", "--keep_checkpoints=0"]
    assert main([*RUN, "--log_dir=whole"]) == main(parts) == 0
    for step in 14, 20:
        (here / f"parts/model_{step:05d}.pt").unlink()
    assert main([*parts, "--micro_batch_size=2"]) == 0
    (here / "parts/model_00020.pt").unlink()
    torchrun(PROGRAM, *parts, cwd=here)
    for stream, tolerance in ("train", dict(abs=1e-4)), ("norm", dict(rel=1e-3)):
        whole, mixed = (read_log(here / folder)[stream] for folder in ("whole", "parts"))
        assert list(whole) == list(mixed)
        assert list(mixed.values()) == pytest.approx(list(whole.values()), **tolerance)
