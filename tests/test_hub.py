"""fineweb.py with the hub's real clients, against an imitation of the hub and its faults."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, llmc_header
from hub_server import COMMIT, Hub

import fineweb

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sends signals")

CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*
- config_name: small
  data_files:
  - split: train
    path: data/000*
---
"""
# Pauses take no time here, but a clock counts them, by which fineweb's patience goes
CLIENT = f"""
import sys, time, types
sys.path.insert(0, {str(ROOT)!r})
import fineweb

clock, sleep = [0], time.sleep
def pause(seconds):
    clock[0] += seconds
    sleep(0.002)
time.sleep = pause
fineweb.time = types.SimpleNamespace(sleep=pause, monotonic=lambda: clock[0])
code = fineweb.main(sys.argv[1:])
print(f"paused {{clock[0]}} s", flush=True)
sys.exit(code)
"""
# Files of 100,000 characters are small beside what is usually under way
SMALL = CLIENT.replace("import fineweb\n", "import fineweb; fineweb.PIECE = 5000\n", 1)
PROGRAM = f"import runpy; runpy.run_path({str(ROOT / 'fineweb.py')!r}, run_name='__main__')"


class Server(Hub):
    """The imitation, and a client of it in a folder of its own."""

    def __init__(self, folder):
        super().__init__(folder / "hub")
        self.work = folder
        (self.folder / "datasets/some/texts/data").mkdir(parents=True)
        (self.folder / "datasets/some/texts/README.md").write_text(CARD)

    def file(self, name):
        return self.folder / "datasets/some/texts/data" / name

    def start(self, *args, script=CLIENT):
        home = str(self.work / "home")
        env = dict(os.environ, HF_ENDPOINT=self.address, HF_HOME=home, HF_HUB_OFFLINE="0")
        return subprocess.Popen(
            [sys.executable, "-c", script, *args],
            cwd=self.work,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *args, code=0, script=CLIENT):
        """What a client prints; fails unless it ends with that exit code."""
        self.sent, self.requests = 0, []
        process = self.start(*args, script=script)
        out, err = process.communicate(timeout=180)
        assert process.returncode == code and "Traceback" not in err, out + err
        return out + err

    def wait_for(self, what):
        """Wait until a request was made."""
        end = time.monotonic() + 120
        while not any(re.search(what, request) for request in self.requests):
            assert time.monotonic() < end, self.requests
            time.sleep(0.01)

    def tokens(self, out):
        paths = sorted((self.work / out).glob("*.npy"), key=lambda path: path.stem[-6:])
        return np.concatenate([np.load(path) for path in paths])

    def downloads(self, out="out"):
        """The names of the files that lie in the folder for downloads, whole or not."""
        folder = self.work / out / "downloads"
        suffixes = (".parquet", ".incomplete")
        return sorted(path.name for path in folder.rglob("*") if path.suffix in suffixes)


TEXTS = ["--dataset=some/texts", "--encoding=bytes", "--num_workers=1"]
DOCUMENTS = [f"document {i}: " + "the quick brown fox " * (i % 50) for i in range(600)]


@pytest.fixture
def hub(tmp_path):
    server = Server(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def write_parquet(path, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": texts, "url": [str(i) for i in range(len(texts))]})
    pq.write_table(table, path, row_group_size=50, use_dictionary=False)


@pytest.fixture
def texts(hub):
    """A data set of three files, of about 100,000 tokens each."""
    for i in range(3):
        write_parquet(hub.file(f"{i:03d}.parquet"), DOCUMENTS[200 * i :][:200])
    return hub


def assert_whole(hub, out="out"):
    """All tokens are there, and nothing of the source."""
    tokens = hub.tokens(out)
    tokens[tokens == 256] = 0
    documents = [np.frombuffer(b"\0" + text.encode(), np.uint8) for text in DOCUMENTS]
    np.testing.assert_array_equal(tokens, np.concatenate(documents))
    assert not (hub.work / out / "downloads").exists()


# --------------------------------------------------------------------------------------------------
# What the network loses


FAULTS = {
    "bursts of 429, 500 and 503": [
        dict(match="resolve.*parquet", status=429, times=8),
        dict(match="resolve.*parquet", status=500, times=8),
        dict(match="resolve.*parquet", status=503, times=14),
    ],
    "503 of what there is": [
        dict(match="GET /api/datasets/some/texts$", status=503, times=3),
        dict(match="GET /api/datasets/some/texts/tree", status=503, times=8),
        dict(match="README", status=503, times=8),
    ],
    "connections that drop": [
        dict(match="cdn", drop=5000, times=8),
        dict(match="cdn", drop=0, times=3),
        dict(match="cdn", short=1000, times=1),
    ],
    "a link to the CDN that has run out": [dict(match="cdn", status=403, times=3)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_what_the_network_loses_is_fetched_again(faults, texts):
    texts.faults = [dict(fault) for fault in faults]
    out = texts.run(*TEXTS, "--out=out")
    assert not any(fault["times"] for fault in texts.faults)
    assert re.search("trying again in|Retrying in", out)
    assert_whole(texts)


@pytest.mark.parametrize(
    "fault, cause",
    [
        (dict(match="cdn", status=503), "503 .*Service"),
        (dict(match="cdn", status=403), "403 .*Forbidden"),
        (dict(match="cdn", short=1000), "has size|416"),
        (dict(match="cdn", drop=0), "RemoteProtocolError: |ChunkedEncodingError: "),
    ],
)
def test_what_stays_lost_is_one_line_with_its_cause(fault, cause, texts):
    """The cause is in the words of huggingface_hub, which before version 1.0 are others."""
    texts.faults = [dict(fault, times=10**6)]
    out = texts.run(*TEXTS, "--out=out", code=1)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(rf"000\.parquet can't be downloaded \(.*({cause})", errors[0])
    assert "check the name and the network" in errors[0]
    assert float(re.search(r"paused ([\d.]+) s", out)[1]) > 180
    texts.faults = []  # and what it said to do works
    texts.run(*TEXTS, "--out=out")
    assert_whole(texts)


def test_without_a_network_the_error_comes_after_three_minutes(texts):
    texts.shutdown()
    texts.server_close()
    for args in TEXTS, ["--pretokenized"]:
        out = texts.run(*args, "--out=out", code=1)
        assert re.search(r"(refused|Max retries .*)\); check the name and the network", out)
        assert 180 < float(re.search(r"paused ([\d.]+) s", out)[1]) < 300
        assert not (texts.work / "out").exists()


GATED = dict(X_Error_Code="GatedRepo", X_Error_Message="Access to dataset some/texts is restricted")


@pytest.mark.parametrize(
    "fault, message",
    [
        (dict(status=401), "401 .*Unauthorized"),
        (dict(status=404), "404 .*Not Found"),
        (dict(status=403, headers=GATED), "403 .*Forbidden"),
    ],
)
def test_what_the_hub_refuses_is_an_error_at_once(fault, message, texts):
    texts.faults = [dict(match="some/texts$", times=10**6, **fault)]
    out = texts.run(*TEXTS, "--out=out", code=1)
    assert re.search(message, out) and "log in with `hf auth login`" in out
    assert "trying again" not in out and not (texts.work / "out").exists()


def test_wrong_names_are_errors_at_once(texts):
    for name, files in {
        "many": {"README.md": CARD.replace("name: default", "name: big"), "data/000.txt": "text"},
        "program": {"README.md": "a program", "program.py": "import datasets"},
    }.items():
        for path, content in files.items():
            path = texts.folder / "datasets/some" / name / path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    for args, message in {
        "--dataset=some/others": "some/others can't be downloaded (HTTP",
        "--dataset=https://huggingface.co/datasets/some/texts": "Repo id must be in the form",
        "--dataset=some/texts/": "Repo id must be in the form 'repo_name' or 'namespace/repo_name'",
        "--dataset=a/b/c": "Repo id must be in the form 'repo_name' or 'namespace/repo_name'",
        "--dataset=some/many": "Please pick one among the available configs: ['big', 'small']",
        "--dataset=some/program": "Dataset scripts are no longer supported, but found program.py",
        "--dataset=some/texts --name=large": "'large' not found. Available: ['default', 'small']",
        "--dataset=some/texts --text_column=body": "it has no column body; "
        "choose --text_column from text, url",
    }.items():
        out = texts.run(*args.split(), "--encoding=bytes", "--out=out", code=1)
        assert message in out and "trying again" not in out, out


def test_a_data_set_without_data_is_an_error_at_once(hub):
    (hub.folder / "datasets/some/texts/README.md").write_text("nothing yet")
    out = hub.run(*TEXTS, "--out=out", code=1)
    assert "doesn't contain any data files" in out and "trying again" not in out


# A client whose downloads go to a full disk, and one where Xet says so
FULL = CLIENT.replace(
    "code =",
    """
from huggingface_hub import file_download
http_get = file_download.http_get
def write_to_a_full_disk(url, file, **options):
    if "out/" in str(file.name):
        file = open("/dev/full", "wb")
    http_get(url, file, **options)
    file.close()
file_download.http_get = write_to_a_full_disk
code =""",
)
XET = FULL.replace(
    """open("/dev/full", "wb")""",
    """None
        raise RuntimeError("Data processing error: No space left on device (os error 28)")""",
)


@pytest.mark.parametrize(
    "script, reason",
    [(FULL, r"OSError: \[Errno 28\] No space left"), (XET, "RuntimeError: Data .* No space left")],
    ids=["of Python", "of Xet"],
)
def test_a_full_disk_ends_a_download_at_once(script, reason, texts, shards):
    for args, path in {
        "--dataset=some/texts": "out/downloads/data/000.parquet",
        "--pretokenized=some/shards": "out/edu_val_000000.bin",
    }.items():
        out = texts.run(args, "--out=out", script=script, code=1)
        assert re.search(
            rf"error: {path} can't be downloaded \({reason}.*; .* make room on a full disk", out
        )
        assert "trying again" not in out and "paused 0 s" in out
        shutil.rmtree(texts.work / "out")


def test_what_cannot_be_written_ends_a_download_at_once(texts):
    (texts.work / "home").write_text("a file where the hub's cache would be")
    out = texts.run(*TEXTS, "--out=out", code=1)
    assert re.search("can't be downloaded .*/home.*; .* make room on a full disk", out)
    (texts.work / "home").unlink()
    (texts.work / "out").mkdir()
    (texts.work / "out" / "downloads").write_text("a file where the downloads would be")
    out += texts.run(*TEXTS, "--out=out", code=1)
    assert "error: out/downloads/data/000.parquet can't be downloaded (" in out
    assert "trying again" not in out


def test_without_out_the_folder_is_named_after_the_data_set(texts, shards):
    """All but the default ones."""
    folder = texts.folder / "datasets"
    shutil.copytree(folder / "some/texts", folder / "HuggingFaceFW/fineweb-edu")
    card = folder / "HuggingFaceFW/fineweb-edu/README.md"
    card.write_text(CARD.replace("default", "sample-10BT"))
    shutil.copytree(folder / "some/shards", folder / "kjj0/finewebedu10B-gpt2")
    for args, out in {
        "--encoding=bytes --name=small": "fineweb-edu_tokens",
        "--pretokenized=some/shards": "shards_tokens",
        "--encoding=bytes": "edu_fineweb10B",
        "--pretokenized": "edu_fineweb10B",
    }.items():
        texts.run(*args.split())
        assert {path.name for path in texts.work.iterdir()} == {"hub", "home", out}
        texts.run(*args.split(), "--verify")
        shutil.rmtree(texts.work / out)


# --------------------------------------------------------------------------------------------------
# Files that come and go


def test_one_file_is_read_while_the_next_one_comes_and_none_stays(texts):
    texts.faults = [dict(match="cdn.*002.parquet", stall=60, times=1)]
    process = texts.start(*TEXTS, "--out=out", "--shard_size=150000", script=SMALL)
    assert "val_000000" in process.stdout.readline()
    texts.wait_for("cdn.*002.parquet")
    process.kill()
    process.communicate()
    assert "000.parquet" not in texts.downloads()  # the first shard ended in the second file
    assert "001.parquet" in texts.downloads()
    (texts.work / "out/downloads/.cache/huggingface/download/x.incomplete").write_bytes(b"a" * 999)
    texts.faults = []
    # The file that is there is not fetched again
    texts.run(*TEXTS, "--out=out", "--shard_size=150000", script=SMALL)
    fetched = {path for path in texts.requests if "cdn" in path}
    assert fetched and all("002.parquet" in path for path in fetched)
    assert_whole(texts)


def test_killed_it_goes_on_with_the_same_commit(texts):
    texts.faults = [dict(match="cdn.*002.parquet", stall=60, times=1)]
    process = texts.start(*TEXTS, "--out=out", "--shard_size=150000", script=SMALL)
    process.stdout.readline()
    process.kill()
    process.communicate()
    manifest = json.loads((texts.work / "out/manifest.json").read_text())
    assert manifest["finished"] is False and manifest["commit"] == COMMIT
    assert manifest["files"] == [f"data/00{i}.parquet" for i in range(3)]
    texts.commit, texts.faults = "decade" + "0" * 34, []
    texts.run(*TEXTS, "--out=out", "--shard_size=150000")
    assert any(COMMIT in path for path in texts.requests)
    assert not any(texts.commit in path for path in texts.requests)
    assert_whole(texts)
    texts.run(*TEXTS, "--out=out", "--shard_size=150000")
    assert not texts.requests  # a finished run does not even ask


def test_a_limit_leaves_nothing_and_a_higher_one_goes_on(texts):
    command = [*TEXTS, "--out=out", "--shard_size=50000"]
    texts.run(*command, "--max_tokens=160000")
    assert not (texts.work / "out/downloads").exists()
    assert len(texts.tokens("out")) == 160_000
    texts.run(*command)
    assert not any("000.parquet" in path for path in texts.requests)
    assert_whole(texts)


@pytest.mark.parametrize(
    "request_line, signum, code",
    [
        ("GET /api/datasets/some/texts$", signal.SIGTERM, 143),  # what is there
        ("README", signal.SIGINT, 130),  # which files are for training
        ("cdn", signal.SIGTERM, 143),
        ("cdn", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_a_download_at_once_and_quietly(request_line, signum, code, texts):
    end_while_it_waits(texts, request_line, signum, code, TEXTS)
    texts.run(*TEXTS, "--out=out")
    assert_whole(texts)


@pytest.mark.parametrize("request_line", ["GET /api/datasets/some/shards$", "cdn"])
def test_a_signal_ends_a_download_of_shards_at_once_and_quietly(request_line, shards):
    end_while_it_waits(shards, request_line, signal.SIGTERM, 143, ["--pretokenized=some/shards"])
    assert published(shards) == (True, NAMES)


def end_while_it_waits(hub, request_line, signum, code, args):
    """Send a signal while the hub lets such a request wait."""
    hub.faults = [dict(match=request_line, stall=60, times=10**6)]
    process = hub.start(*args, "--out=out", script=PROGRAM)
    hub.wait_for(request_line)
    start = time.monotonic()
    process.send_signal(signum)
    _, err = process.communicate(timeout=180)
    assert process.returncode == code and "Traceback" not in err, err
    assert time.monotonic() - start < 30  # on the slowest machine
    hub.faults = []


@pytest.mark.parametrize("source", [TEXTS, ["--pretokenized=some/texts"]])
def test_a_signal_between_two_tries_is_quiet(source, texts):
    texts.faults = [dict(match="GET /api", status=503, times=10**6)]
    process = texts.start(*source, "--out=out", script=PROGRAM)
    assert "trying again in 10 s" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 143 and "Traceback" not in err, err
    assert not (texts.work / "out").exists()


def test_lines_and_tables_are_read_from_the_hub_as_from_here(hub):
    import csv
    import lzma

    lines = [json.dumps({"text": text}) for text in DOCUMENTS]
    hub.file("0.jsonl").write_text("\n".join(lines[:100]))
    with lzma.open(hub.file("1.jsonl.xz"), "wt") as file:
        file.write("\n".join(lines[100:200]))
    hub.file("2.json").write_text(json.dumps([json.loads(line) for line in lines[200:300]]))
    with open(hub.file("3.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["text"], *[[text] for text in DOCUMENTS[300:]]])
    hub.run(*TEXTS, "--out=out")
    assert_whole(hub)


# --------------------------------------------------------------------------------------------------
# Published shards


@pytest.fixture
def shards(hub):
    """A repository of three .bin shards of 100,000 tokens."""
    folder = hub.folder / "datasets/some/shards"
    folder.mkdir()
    (folder / "README.md").write_text("tokens")
    for i, split in enumerate(("val", "train", "train")):
        content = llmc_header(20240520, 100_000) + np.full(100_000, i, "<u2").tobytes()
        (folder / f"edu_{split}_{i:06d}.bin").write_bytes(content)
    return hub


NAMES = ["edu_val_000000.bin", "edu_train_000001.bin", "edu_train_000002.bin"]


def published(hub, code=0, *args):
    """Fetch them; whether they are finished, and which there are."""
    hub.run("--pretokenized=some/shards", "--out=out", *args, code=code)
    manifest = json.loads((hub.work / "out/manifest.json").read_text())
    names = [shard["name"] for shard in manifest["shards"]]
    assert [shard["tokens"] for shard in manifest["shards"]] == [100_000] * len(names)
    assert {path.name for path in (hub.work / "out").glob("*.bin")} >= set(names)
    assert (manifest["encoding"], manifest["vocab_size"]) == ("gpt2", 50257)
    return manifest["finished"], names


def test_published_shards_are_fetched_once_and_as_many_as_asked_for(shards):
    assert published(shards, 0, "--max_tokens=150000") == (True, NAMES[:2])
    assert published(shards, 0, "--max_tokens=200000") == (True, NAMES[:2])
    assert not shards.requests
    assert published(shards) == (True, NAMES)
    assert not any(NAMES[1] in request for request in shards.requests)
    assert published(shards) == (True, NAMES)
    assert not shards.requests
    shards.run("--verify", "--out=out")


@pytest.mark.parametrize(
    "fault",
    [
        dict(match="some/shards", status=503, times=6, skip=1),
        dict(match="resolve.*bin", status=503, times=14),
        dict(match="cdn", drop=5000, times=7),
        dict(match="cdn", short=1000, times=1),
    ],
    ids=["a burst of six 503", "more of them", "dropped", "short"],
)
def test_published_shards_outlast_faults(fault, shards):
    shards.faults = [dict(fault)]
    assert published(shards) == (True, NAMES) and shards.faults[0]["times"] == 0
    shards.run("--verify", "--out=out")


def test_published_shards_that_stay_lost_are_an_error_and_the_others_stay(shards):
    assert published(shards, 0, "--max_tokens=1") == (True, NAMES[:2])
    shards.faults = [dict(match="cdn.*train_000002", short=1000, times=10**6)]
    assert published(shards, 1) == (False, NAMES[:2])
    shards.faults = []
    assert published(shards) == (True, NAMES)
    assert not any(NAMES[1] in request for request in shards.requests)


def test_a_published_shard_that_is_gone_is_fetched_again(shards):
    assert published(shards) == (True, NAMES)
    gone = shards.work / "out" / NAMES[1]
    gone.unlink()
    shards.run("--verify", "--out=out", code=1)
    assert published(shards) == (True, NAMES) and gone.exists()
    shards.run("--verify", "--out=out")


def test_killed_while_shards_are_fetched_it_goes_on(shards):
    shards.faults = [dict(match="cdn.*train_000001", stall=60, times=1)]
    process = shards.start("--pretokenized=some/shards", "--out=out", script=PROGRAM)
    shards.wait_for("cdn.*train_000001")
    process.kill()
    process.communicate()
    shards.faults = []
    assert published(shards) == (True, NAMES)
    assert not any(NAMES[0] in request for request in shards.requests)
    left = {path.name for path in (shards.work / "out").iterdir()}
    assert left == {"manifest.json", ".lock", *NAMES}


def test_a_repository_without_shards_is_an_error(shards):
    (shards.folder / "datasets/some/shards" / NAMES[0]).unlink()
    for name in NAMES[1:]:
        (shards.folder / "datasets/some/shards" / name).unlink()
    out = shards.run("--pretokenized=some/shards", "--out=out", code=1)
    assert "some/shards has no val and train shards" in out
    assert not (shards.work / "out").exists()


# --------------------------------------------------------------------------------------------------
# Downloads of the other files


@pytest.fixture
def clock(monkeypatch):
    """Pauses take no time, but are counted."""
    pauses = []
    monkeypatch.setattr(fineweb.time, "sleep", pauses.append)
    monkeypatch.setattr(fineweb.time, "monotonic", lambda: sum(pauses))
    return pauses


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Data processing error: CAS service error"),  # as Xet raises it
        ConnectionResetError("reset by peer"),
        TimeoutError("timed out"),
    ],
)
def test_any_failure_is_tried_again_for_three_minutes(error, clock, capsys):
    results = [error, error, "content"]

    def fetch():
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    assert fineweb.download("the weights", fetch) == "content"
    reason = f"{type(error).__name__}: {error}"
    assert capsys.readouterr().out == f"the weights: {reason}; trying again in 10 s\n" * 2
    results += [error] * 1000
    with pytest.raises(SystemExit, match=f"error: the weights can't be downloaded .{reason}"):
        fineweb.download("the weights", fetch)
    assert 180 <= sum(clock[2:]) <= 200


def test_a_call_that_hangs_is_given_up_and_tried_again(clock, capsys):
    hanging = threading.Event()
    calls = []

    def fetch():
        calls.append(1)
        if len(calls) == 1:
            hanging.wait(30)
        return "content"

    assert fineweb.download("it", fetch, seconds=0.05) == "content"
    assert "it: TimeoutError: ; trying again in 10 s" in capsys.readouterr().out
    hanging.set()
