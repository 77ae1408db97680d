"""The real run for a GPU, rehearsed: all of its results are there, and whatever fails in one half
costs nothing of the other."""

import re
import sys
import time
from pathlib import Path

import pytest
import real_run
from conftest import ROOT, python, read_log, write_shards

SETTINGS = dict(total_batch_size=100, val_tokens=50, device="cpu", data="data", max_steps=3)

# What stands in for the trainer or the reference: it writes a log where it is told to.
WRITES_A_LOG = """
import pathlib, sys
folder = pathlib.Path([flag for flag in sys.argv if "--log_dir=" in flag][0].split("=")[1])
with open(folder / "log.txt", "w") as file:
    for step in range(3):
        file.write(f"{step} val {5 - step}\\n{step} train {5 - step}\\n{step} tps {100 + step}\\n")
    file.write("3 val 2\\n")
print("--- sample 0\\nonce upon a time", flush=True)
"""
FAILS = "print('begun', flush=True); 1 / 0"


def program(source):
    return [sys.executable, "-c", source]


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A multiple of 128, so that there is no padding, with which the reference's loss differs.
    write_shards(tmp_path / "data", lengths=(2000, 6000, 6000), vocab_size=384)
    return tmp_path


def cells_of(report, label):
    """The cells of a row of the report's table."""
    row = re.search(rf"^\| (?:\*\*)?{label}.*\|$", report, re.MULTILINE)[0]
    return [float(cell.strip(" *").replace(",", "")) for cell in row.split("|")[2:-1]]


def test_a_rehearsal_leaves_all_results(data):
    (data / "temporary").mkdir()
    flags = ["data", "--rehearse", "--minutes=0.05"]
    done = python(ROOT / "tests/real_run.py", *flags, cwd=data, env={"TMPDIR": "temporary"})
    out = data / "real_run"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    halves = {"trainer/log.txt", "trainer/printed.txt", "reference/log.txt"}
    halves |= {"reference/printed.txt", "trainer/curves.png"}
    assert files == halves | {"losses.png", "report.md"}
    left_over = {path.name for path in (data / "temporary").iterdir()}
    assert all(name.startswith("torchinductor_") for name in left_over), left_over  # torch's own
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    for half in ("trainer", "reference"):
        assert (out / half / "printed.txt").read_text() in done.stdout

    # The losses of the report are those of the logs.
    report = (out / "report.md").read_text()
    logs = [read_log(out / "trainer"), read_log(out / "reference")]
    last = [list(log["val"].values())[-1] for log in logs]
    assert cells_of(report, "last validation loss") == [round(loss, 4) for loss in last]
    assert cells_of(report, "sequences in a micro-batch") == [4, 4]
    assert cells_of(report, "steps") == [len(log["train"]) for log in logs]
    assert "--- sample 3" in report

    # Both started with the same weights, and were validated on the same tokens.
    assert logs[0]["val"][0] == pytest.approx(logs[1]["val"][0], abs=1e-6)
    assert logs[0]["lr"][0] == logs[1]["lr"][0]
    # And both have learnt, for the same time.
    assert max(last) < logs[0]["val"][0] - 0.1
    results = [
        real_run.read_result(name, out / name, "", real_run.TINY)
        for name in ("trainer", "reference")
    ]
    times = [sum(result.seconds) for result in results]
    assert times[0] - 1e-3 < times[1] < times[0] + 2 * max(results[1].seconds)


def test_if_the_reference_fails_the_report_has_the_trainer(data, monkeypatch):
    monkeypatch.setattr(real_run, "TRAINER", program(WRITES_A_LOG))
    monkeypatch.setattr(real_run, "REFERENCE", program(FAILS))
    out = Path("out")
    real_run.train_both(SETTINGS, out, whole=30, end=time.monotonic() + 100)
    report = (out / "report.md").read_text()
    assert "build-nanogpt: it failed with exit code 1" in report
    assert cells_of(report, "last validation loss") == [2]
    assert "once upon a time" in report
    assert "ZeroDivisionError" in (out / "reference/printed.txt").read_text()
    assert (out / "losses.png").exists()


def test_if_the_trainer_fails_the_reference_is_trained(data, monkeypatch):
    monkeypatch.setattr(real_run, "TRAINER", program(FAILS))
    monkeypatch.setattr(real_run, "REFERENCE", program(WRITES_A_LOG))
    out = Path("out")
    real_run.train_both(SETTINGS, out, whole=30, end=time.monotonic() + 100)
    report = (out / "report.md").read_text()
    assert "train_gpt2.py: it failed with exit code 1" in report
    assert "build-nanogpt: it failed" not in report
    assert cells_of(report, "last validation loss") == [2]


def test_if_no_time_is_left_the_reference_is_left_out(data, monkeypatch):
    monkeypatch.setattr(real_run, "TRAINER", program(WRITES_A_LOG))
    monkeypatch.setattr(real_run, "REFERENCE", program(FAILS))
    out = Path("out")
    real_run.train_both(SETTINGS, out, whole=1, end=time.monotonic() + 10)
    assert "build-nanogpt has not been trained" in (out / "report.md").read_text()
    assert not (out / "reference").exists()


def test_what_hangs_is_stopped_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(real_run, "GRACE", 0.5)
    source = (
        "import signal, subprocess; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True); signal.pause()"
    )
    started = time.monotonic()
    failure = real_run.run(program(source), tmp_path / "printed.txt", 4)
    assert time.monotonic() - started < 40
    assert "it was stopped after" in failure
    pid = (tmp_path / "printed.txt").read_text().strip()
    state = Path(f"/proc/{pid}/stat")
    while state.exists() and " Z " not in state.read_text():
        assert time.monotonic() - started < 40
        time.sleep(0.1)


@pytest.mark.parametrize("whole", [60, 210, 3000])
def test_the_plan_fits_into_its_time(whole):
    settings = real_run.plan(real_run.REAL, step_seconds=1.0, start_seconds=40.0, whole=whole)
    validations = settings["max_steps"] / settings["val_every"]
    assert validations <= real_run.VALIDATIONS
    # A validation takes a third of a step's time for each step's worth of tokens.
    needed = 40 + settings["max_steps"] + 2 / 3 * validations
    assert 0.85 * whole - 5 < needed <= whole


@pytest.mark.parametrize(
    "flags, message",
    [
        (["missing"], "error: missing has no train shards; make it with fineweb.py --files"),
        (["data", "--out=data"], "error: data is there already; choose another --out"),
        (["data", "--minutes=long"], "error: argument --minutes: invalid float value: 'long'; .*"),
        ([], "error: the following arguments are required: data; --help lists the flags"),
    ],
)
def test_a_mistake_is_one_line(data, flags, message):
    with pytest.raises(SystemExit) as error:
        real_run.parse_args(flags)
    assert re.fullmatch(message, error.value.code)
