"""Nothing is lost: real processes are stopped, killed and starved at every point, and end where an
untouched one ends."""

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, read_log, write_shards

if not hasattr(os, "fork"):
    pytest.skip("needs fork and POSIX signals", allow_module_level=True)

import processes
from processes import (
    TWO_PROCESSES,
    At,
    AtFile,
    Run,
    break_weights,
    die_at_file_size,
    fail,
    get_signal,
    run_to_end,
    wait,
)

from train_gpt2 import main

RUN = TINY + ["--data=data", "--log_dir=log"]
# Validations and checkpoints at different steps, and at the same
OFTEN = RUN + ["--val_every=3", "--val_tokens=100", "--checkpoint_every=4"]


def assert_one_error(output, *words):
    """The output ends with one error, which has these words."""
    lines = output.splitlines()
    assert lines[-1].startswith("error: "), output
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output, output
    for word in words:
        assert word in lines[-1], output


def checkpoints(log_dir):
    """The names of the checkpoints in a folder, and of what is left of others."""
    return sorted(path.name for path in Path(log_dir).glob("checkpoint*"))


def load(path):
    """A checkpoint, which must be whole."""
    return torch.load(path, weights_only=True)


def lines_of(log_dir):
    """The log but for what the clock says."""
    read_log(log_dir)  # fails where a step stands twice or out of order
    lines = Path(log_dir, "log.txt").read_text().splitlines()
    return [line for line in lines if " tps " not in line]


def assert_same_run(one, other):
    """Two folders have the same log, and last checkpoints that are the same to the last bit."""
    assert lines_of(one) == lines_of(other)
    name = checkpoints(one)[-1]
    assert checkpoints(other)[-1] == name
    a = load(Path(one, name))
    b = load(Path(other, name))
    assert a["step"] == b["step"]
    for key, weight in a["model"].items():
        assert weight.equal(b["model"][key]), key
    for number, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert value.equal(b["optimizer"]["state"][number][key]), (number, key)


# -----------------------------------------------------------------------------
# Kills


def test_twenty_four_kills_at_random_moments_change_nothing(here):
    run = OFTEN + ["--max_steps=200"]
    run_to_end(run + ["--log_dir=whole"])
    seed = random.randrange(10**6)
    dice = random.Random(seed)
    kills = 0
    for _ in range(24):
        process = Run(run)
        # A validation has such a line, too.
        if not process.wait_for("^step", times=dice.randrange(1, 11)):
            break
        time.sleep(dice.random() * 0.01)
        signum = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        process.send(signum)
        code, output = process.end()
        if signum == signal.SIGKILL:
            assert code == -signal.SIGKILL, (seed, code, output)
        else:
            assert code == 128 + signum, (seed, code, output)
            assert "stopped after" in output, (seed, output)
        kills += 1
    assert kills >= 20, seed
    run_to_end(run)
    assert_same_run("whole", "log")
    assert checkpoints("log") == ["checkpoint_00196.pt", "checkpoint_00200.pt"], seed
    # Nothing else is left but the logs of runs that were killed before they saved anything.
    names = {re.sub(r"^log_\d+", "log", path.name) for path in Path("log").iterdir()}
    assert names - set(checkpoints("log")) == {".lock", "log.txt"}, seed


# A checkpoint has 420 kB.
HALF_WAY = partial(die_at_file_size, 200_000)
POINTS = {
    "in a step": At("train_gpt2.get_lr", 7),
    "before a checkpoint is written": At("torch.save", 1),
    "half-way through a checkpoint": HALF_WAY,
    "before a checkpoint is safe on the disk": At("os.fsync", 1),
    "after it is safe": At("os.fsync", 1, after=True),
    "before a checkpoint has its name": AtFile("os.rename", "checkpoint_*.pt"),
    "before the log is put in place": AtFile("os.rename", "log.txt"),
    "while a checkpoint is read": At("torch.load", 1),
    "before a validation": At("train_gpt2.validation_loss", 2),
    "between a validation and its line": At("train_gpt2.validation_loss", 2, after=True),
    "before an old one is removed": AtFile("os.remove", "checkpoint_*.pt"),
    "after it is removed": At("train_gpt2.draw_curves", 1),
    "half-way through the next": At("torch.save", 2, spring=HALF_WAY),
}


def test_a_kill_at_each_point_of_a_checkpoint_s_life(here):
    run = OFTEN + ["--max_steps=60"]
    run_to_end(run + ["--log_dir=whole"])
    for where, trap in POINTS.items():
        code, output = Run(run, prepare=[trap]).end()
        assert code in (-signal.SIGKILL, -signal.SIGXFSZ), (where, code, output)
        assert "error" not in output, (where, output)
        for path in Path("log").glob("checkpoint_*.pt"):
            load(path)
    run_to_end(run)
    assert_same_run("whole", "log")
    assert checkpoints("log") == ["checkpoint_00056.pt", "checkpoint_00060.pt"]


def test_a_kill_in_the_last_validation_leaves_the_last_checkpoint(here):
    run = RUN + ["--val_every=20", "--val_tokens=100", "--checkpoint_every=20"]
    run_to_end(run + ["--log_dir=whole"])
    trap = At("train_gpt2.validation_loss", 2)
    run_to_end(run, prepare=[trap], code=-signal.SIGKILL)
    assert load("log/checkpoint_00020.pt")["step"] == 20
    # No step is left to do, but the validation is.
    output = run_to_end(run)
    assert "| loss" not in output, output
    assert "val loss" in output, output
    assert_same_run("whole", "log")


def test_what_a_killed_save_leaves_behind_is_removed_by_the_next(here):
    """A batch system sends SIGTERM, and SIGKILL when the save that it asked for takes too long."""
    run = RUN + ["--checkpoint_every=20"]
    for step in 3, 5:
        sigterm = At("train_gpt2.get_lr", step, spring=partial(get_signal, signal.SIGTERM))
        prepare = [sigterm, At("torch.save", 1, spring=HALF_WAY)]
        run_to_end(run, prepare=prepare, code=-signal.SIGXFSZ)
    run_to_end(run)
    assert checkpoints("log") == ["checkpoint_00020.pt"]


def test_kills_while_the_demo_s_data_are_written_leave_whole_data_or_none(here):
    (here / "stdlib").mkdir()
    for i in range(120):
        (here / f"stdlib/module_{i:03d}.py").write_text(f"x = {i}\n" * 50)
    run = TINY + ["--max_steps=2", "--log_dir=log"]
    library = partial(processes.use_library, "stdlib")
    data = here / "python_stdlib"
    for trap in (
        At("os.fsync", 1),
        At("os.fsync", 2, after=True),
        AtFile("os.rename", "manifest.json"),
        AtFile("os.rename", "python_stdlib"),
    ):
        run_to_end(run, prepare=[library, trap], code=-signal.SIGKILL)
        assert not data.exists(), trap
    # Nothing is to be saved yet, so a signal ends it at once.
    for signum, code in (signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM):
        trap = At("os.fsync", 2, spring=partial(get_signal, signum))
        run_to_end(run, prepare=[library, trap], code=code)
        assert not data.exists(), signum

    trap = At("fineweb.write_demo_data", 1, after=True)
    run_to_end(run, prepare=[library, trap], code=-signal.SIGKILL)
    whole = {path.name: path.read_bytes() for path in data.iterdir()}
    assert sorted(whole) == ["manifest.json", "text_train_000001.npy", "text_val_000000.npy"]
    run_to_end(run, prepare=[library])
    shutil.rmtree(data)
    run_to_end(run + ["--log_dir=again"], prepare=[library])
    assert whole == {path.name: path.read_bytes() for path in data.iterdir()}


# -----------------------------------------------------------------------------
# Signals


def test_a_signal_does_not_wait_for_the_end_of_a_long_validation(here):
    run = RUN + ["--val_every=10", "--checkpoint_every=20", "--micro_batch_size=1"]
    run_to_end(run + ["--log_dir=whole"])
    trap = At("train_gpt2.validation_loss", 2, spring=processes.slow_down_batches)
    process = Run(run, prepare=[trap])
    assert process.wait_for("a batch")  # of 12
    process.send(signal.SIGTERM)
    code, output = process.end()
    assert code == 128 + signal.SIGTERM, output
    assert "stopped after 10 steps" in output, output
    assert output.count("a batch") < 10, output
    # What it had of the loss is not that of the validation data.
    assert list(read_log("log")["val"]) == [0]
    run_to_end(run)
    assert_same_run("whole", "log")


def test_a_signal_in_hellaswag_ends_it_and_saves_the_step(here):
    write_shards(here / "gpt2", encoding="gpt2")
    question = dict(ctx="The sky is", endings=["blue", "red", "green", "loud"], label=0, ind=0)
    (here / "hellaswag").mkdir()
    (here / "hellaswag/hellaswag_val.jsonl").write_text(json.dumps(question) + "\n")
    stop = At("hellaswag.count_hits", 2, spring=partial(get_signal, signal.SIGTERM))
    run = RUN + ["--data=gpt2", "--hellaswag_every=10", "--checkpoint_every=20"]
    run_to_end(run, prepare=[stop], code=128 + signal.SIGTERM)
    assert list(read_log("log")["hella"]) == [0]
    assert checkpoints("log") == ["checkpoint_00010.pt"]
    run_to_end(run)
    assert list(read_log("log")["hella"]) == [0, 10, 20]


def test_a_second_ctrl_c_stops_at_once(here):
    process = Run(RUN, prepare=[At("train_gpt2.get_lr", 8, spring=partial(wait, 200))])
    assert process.wait_for("waiting")
    process.send(signal.SIGINT)
    time.sleep(2)  # Two that arrive together count as one.
    process.send(signal.SIGINT)
    start = time.monotonic()
    code, output = process.end()
    assert code == 128 + signal.SIGINT, output
    assert "Traceback" not in output, output
    assert time.monotonic() - start < 60


def test_a_notebook_lives_on_after_a_second_ctrl_c(here, monkeypatch):
    """It is Python's own KeyboardInterrupt, and the handler is Python's again."""

    def interrupted(step, cfg):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("this is too late")

    monkeypatch.setattr("train_gpt2.get_lr", interrupted)
    assert main(RUN) == 128 + signal.SIGINT
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    monkeypatch.undo()


def test_more_sigterms_change_nothing(here):
    """Batch systems send one to the whole group, and torchrun forwards its own."""
    run = RUN + ["--checkpoint_every=20"]
    process = Run(run, prepare=[At("train_gpt2.get_lr", 8, spring=partial(wait, 1))])
    assert process.wait_for("waiting")
    for _ in range(3):
        process.send(signal.SIGTERM)
        time.sleep(0.2)
    code, output = process.end()
    assert code == 128 + signal.SIGTERM, output
    assert "stopped after 8 steps" in output, output
    assert checkpoints("log") == ["checkpoint_00008.pt"]
    assert "resuming log after 8 steps" in run_to_end(run)
    assert list(read_log("log")["train"]) == list(range(20))


SCREENS = {
    "a pipe that nobody reads": (processes.lose_pipe, signal.SIGINT),
    "a terminal that is gone": (processes.lose_terminal, signal.SIGHUP),
    "a full disk": (processes.fill_disk, signal.SIGTERM),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
@pytest.mark.parametrize("lose_screen, signum", SCREENS.values(), ids=SCREENS)
def test_a_run_outlives_its_screen(here, lose_screen, signum):
    """What can't be printed is in the log, what was done is saved, and the exit code is the
    signal's, never Python's own 1 or 120. SIGHUP, which a lost connection sends, counts as SIGTERM
    does."""
    stop = At("torch.optim.AdamW.step", 7, spring=partial(get_signal, signum))
    prepare = [lose_screen, stop]
    run_to_end(RUN + ["--checkpoint_every=20"], prepare=prepare, script=True, code=128 + signum)
    assert list(read_log("log")["train"]) == list(range(7))
    assert load("log/checkpoint_00007.pt")["step"] == 7


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_an_error_that_can_t_be_printed_is_in_the_exit_code(here):
    run_to_end(RUN + ["--n_head=3"], prepare=[processes.fill_disk], script=True, code=1)


def test_under_nohup_a_run_goes_on_when_the_connection_is_lost(here):
    stop = At("torch.optim.AdamW.step", 7, spring=partial(get_signal, signal.SIGHUP))
    prepare = [processes.ignore_hangups, stop]
    run_to_end(RUN + ["--checkpoint_every=20"], prepare=prepare, script=True)
    assert checkpoints("log") == ["checkpoint_00020.pt"]


# -----------------------------------------------------------------------------
# What the world does


@pytest.mark.parametrize(
    "size, what",
    [(200_000, "checkpoint_00010.pt can't be written"), (100, "log.txt can't be written")],
    ids=["at a checkpoint", "at a line of the log"],
)
def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stands(here, size, what):
    """No file can grow beyond this size from step 7 on."""
    run = RUN + ["--checkpoint_every=5"]
    run_to_end(run + ["--log_dir=whole"])
    trap = At("train_gpt2.get_lr", 8, spring=partial(processes.limit_file_size, size))
    output = run_to_end(run, prepare=[trap], code=1)
    saved = "the next start resumes from log/checkpoint_00005.pt"
    assert_one_error(output, what, "File too large", "make room", saved)
    assert checkpoints("log") == ["checkpoint_00005.pt"]
    load("log/checkpoint_00005.pt")
    assert len(read_log("log")["train"]) >= 7
    run_to_end(run)
    assert_same_run("whole", "log")


@pytest.mark.parametrize(
    "size, what",
    [(200_000, "checkpoint_00005.pt can't be written"), (100, "log.txt can't be written")],
    ids=["at the first checkpoint", "at a line of the log"],
)
def test_a_full_disk_before_the_first_checkpoint_says_that_there_is_none(here, size, what):
    run = RUN + ["--checkpoint_every=5"]
    full = partial(processes.limit_file_size, size)
    output = run_to_end(run, prepare=[full], code=1)
    assert_one_error(output, what, "File too large", "make room", "there is no checkpoint yet")
    assert checkpoints("log") == []
    run_to_end(run)


def test_a_full_disk_when_a_run_is_resumed_is_one_line(here):
    run = RUN + ["--checkpoint_every=10"]
    run_to_end(run + ["--max_steps=10"])
    before = lines_of("log")
    full = partial(processes.limit_file_size, 100)
    output = run_to_end(run, prepare=[full], code=1)
    assert_one_error(output, "log.txt can't be written", "resumes from log/checkpoint_00010.pt")
    assert lines_of("log") == before
    run_to_end(run)


@pytest.mark.parametrize(
    "number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get
)
def test_a_file_system_without_locks_is_not_another_run(here, number):
    """Network file systems may have none."""
    refused = partial(fail, OSError(number, os.strerror(number)))
    calls = [At("fcntl.flock", call, spring=refused) for call in range(1, 30)]
    output = run_to_end(RUN + ["--checkpoint_every=20"], prepare=calls)
    assert "another run" not in output, output
    if number != errno.ENOSYS:  # for which filelock has a substitute
        assert re.search(rf"log/.lock can't be locked .*{os.strerror(number)}", output), output
    assert checkpoints("log") == ["checkpoint_00020.pt"]


def test_a_full_disk_before_there_are_data_is_one_line(here):
    full = partial(processes.limit_file_size, 9000)
    output = run_to_end(TINY + ["--log_dir=log"], prepare=[full], code=1)
    assert_one_error(output, "python_stdlib")
    assert [path.name for path in here.iterdir()] == ["data"]


def test_curves_that_a_full_disk_has_no_room_for_end_no_run(here):
    full = partial(fail, OSError(28, "No space left on device"))
    trap = At("matplotlib.figure.Figure.savefig", 1, spring=full)
    output = run_to_end(RUN + ["--checkpoint_every=10"], prepare=[trap], script=True)
    assert "No space left on device" in output, output
    assert "Traceback" not in output, output
    assert checkpoints("log") == ["checkpoint_00010.pt", "checkpoint_00020.pt"]


def test_a_log_folder_that_is_lost_is_one_line(here):
    run = RUN + ["--checkpoint_every=5"]
    run_to_end(run + ["--log_dir=whole"])
    lose = partial(processes.rename, "log", "elsewhere")
    trap = At("train_gpt2.get_lr", 8, spring=lose)
    output = run_to_end(run, prepare=[trap], code=1)
    assert_one_error(output, "can't be written", "No such file or directory")
    os.rename("elsewhere", "log")
    run_to_end(run)
    assert_same_run("whole", "log")


def test_an_old_checkpoint_that_can_t_be_removed_is_one_line_and_the_run_goes_on(here):
    """It may belong to somebody else, or be immutable."""
    denied = partial(fail, PermissionError(1, "Operation not permitted"))
    trap = AtFile("os.remove", "checkpoint_00005.pt", spring=denied)
    output = run_to_end(RUN + ["--checkpoint_every=5"], prepare=[trap])
    lines = [line for line in output.splitlines() if "Operation not permitted" in line]
    assert len(lines) == 2, output  # at steps 15 and 20
    assert "checkpoint_00005.pt can't be removed" in lines[0], output
    left = ["checkpoint_00005.pt", "checkpoint_00015.pt", "checkpoint_00020.pt"]
    assert checkpoints("log") == left


def test_a_second_run_in_the_same_log_folder_refuses_and_a_killed_one_leaves_no_lock(here):
    run = RUN + ["--checkpoint_every=5"]
    first = Run(run, prepare=[At("train_gpt2.get_lr", 14, spring=partial(wait, 200))])
    assert first.wait_for("waiting")
    before = {path: path.read_bytes() for path in Path("log").iterdir()}
    assert_one_error(run_to_end(run, code=1), "--log_dir log is in use by another run")
    assert before == {path: path.read_bytes() for path in Path("log").iterdir()}
    second = Run(run)  # starts while the first is about to die
    first.send(signal.SIGKILL)
    assert first.end()[0] == -signal.SIGKILL
    code, output = second.end()
    assert code == 0, output
    assert "resuming log after 10 steps" in output, output


@pytest.mark.parametrize(
    "step, error", [(7, "step 7 has loss nan"), (10, "weights after 10 steps are not finite")]
)
def test_broken_weights_are_not_saved(here, step, error):
    """A step's loss is that of the weights before it."""
    broken = At("torch.optim.AdamW.step", step, after=True, spring=break_weights)
    output = run_to_end(RUN + ["--checkpoint_every=5"], prepare=[broken], code=1)
    assert_one_error(output, error)
    assert checkpoints("log") == ["checkpoint_00005.pt"]


# -----------------------------------------------------------------------------
# Several processes


def test_torchrun_brings_killed_workers_back_and_they_end_like_untouched_ones(here):
    run = OFTEN + ["--max_steps=200"]
    run_to_end(run + ["--log_dir=whole"], torchrun=TWO_PROCESSES)
    kills = [
        At("train_gpt2.GPT2.forward", 25, rank=1, restart=0),
        At("torch.save", 2, rank=0, restart=1),
        AtFile("os.rename", "checkpoint_*.pt", rank=0, restart=2),
        At("os.fsync", 4, rank=0, restart=3),
        At("train_gpt2.DataLoaderLite.batch", 40, rank=1, restart=4),
    ]
    # Restarted workers may read the addresses of those before them (pytorch/pytorch#135712).
    env = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    last = len(kills)
    options = TWO_PROCESSES + [f"--max_restarts={last}"]
    say_so = At("train_gpt2.get_lr", 10, rank=0, restart=last, spring=partial(wait, 0))
    job = Run(run, prepare=kills + [say_so], torchrun=options, env=env)
    assert job.wait_for("waiting")
    job.send(signal.SIGTERM)  # which torchrun passes on
    output = job.end()[1]
    assert "stopped after" in output, output

    say_so = At("train_gpt2.get_lr", 10, rank=0, spring=partial(wait, 0))
    job = Run(run, prepare=[say_so], torchrun=TWO_PROCESSES)
    assert job.wait_for("waiting")
    job.send(signal.SIGINT)
    output = job.end()[1]
    assert "stopped after" in output, output
    run_to_end(run, torchrun=TWO_PROCESSES)
    assert_same_run("whole", "log")


# What befalls a rank, and what is then to be the last thing on the screen
BUG = partial(fail, KeyError("a bug"))
BAD_DATA = partial(fail, SystemExit("error: bad data"))
FULL_DISK = partial(fail, OSError(28, "No space left on device"))
TROUBLES = {
    "a bug": (At("train_gpt2.get_lr", 9, rank=1, spring=BUG), "KeyError: 'a bug'"),
    "bad data": (
        At("train_gpt2.DataLoaderLite.window", 30, rank=1, spring=BAD_DATA),
        "error: bad data",
    ),
    "a full disk": (
        AtFile("os.rename", "checkpoint_*.pt", rank=0, spring=FULL_DISK),
        "No space left on device",
    ),
    "not a number": (
        At("torch.optim.AdamW.step", 7, rank=1, after=True, spring=break_weights),
        "step 7 has loss nan",
    ),
}


@pytest.mark.parametrize("trap, cause", TROUBLES.values(), ids=TROUBLES)
def test_a_rank_that_fails_ends_the_job_with_the_cause_last_on_the_screen(here, trap, cause):
    start = time.monotonic()
    process = Run(RUN + ["--checkpoint_every=5"], prepare=[trap], torchrun=TWO_PROCESSES)
    code, output = process.end()
    assert code == 1, output
    assert time.monotonic() - start < 120
    # The other rank misses this one, and may say so, if torchrun stops it in the middle of a step.
    # What torchrun's report ends with is the cause all the same.
    report = output[output.index("Root Cause") :]
    assert cause in report, output
    assert "closed by peer" not in report, output


def test_a_run_goes_on_with_more_processes_and_another_micro_batch(here):
    run_to_end(RUN + ["--log_dir=whole"])
    parts = RUN + ["--checkpoint_every=7", "--keep_checkpoints=0"]
    run_to_end(parts)
    os.remove("log/checkpoint_00014.pt")
    os.remove("log/checkpoint_00020.pt")
    run_to_end(parts + ["--micro_batch_size=2"])
    os.remove("log/checkpoint_00020.pt")
    output = run_to_end(parts, torchrun=TWO_PROCESSES)
    assert "changed since the last start: micro_batch_size 2 -> 4, processes 1 -> 2" in output
    whole = read_log("whole")
    mixed = read_log("log")
    assert list(mixed["train"]) == list(range(20))
    assert mixed["train"] == pytest.approx(whole["train"], abs=1e-4)
    assert mixed["norm"] == pytest.approx(whole["norm"], rel=1e-3)
