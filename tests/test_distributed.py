"""Several processes under torchrun, with gloo, are one run: real launches, on this machine."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import PROGRAM, TINY, python, read_log, torchrun, write_shards

from train_gpt2 import main

RUN = ["--data", "data", *TINY, "--val_every", "10"]


def assert_same_run(a, b):
    one, other = read_log(a), read_log(b)
    close = dict(train=dict(abs=1e-5), val=dict(abs=1e-5), norm=dict(rel=1e-3))
    for stream, tolerance in close.items():
        assert other[stream] == pytest.approx(one[stream], **tolerance), stream


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process, to be compared with."""
    folder = tmp_path_factory.mktemp("alone")
    write_shards(folder / "data")
    assert main([*RUN, "--data", f"{folder}/data", "--log_dir", f"{folder}/log"]) == 0
    return folder / "log"


def test_two_processes_have_the_losses_of_one_and_only_rank_0_speaks_and_writes(here, alone):
    run = [*RUN, "--log_dir", "log", "--checkpoint_every", "10"]
    done = torchrun(PROGRAM, *run, cwd=here)
    assert "step: 4 sequences × 16 tokens × 1 micro-steps × 2 processes" in done.stdout
    assert_same_run(alone, here / "log")
    lines = done.stdout.splitlines()
    for t in range(20):
        assert sum(line.startswith(f"step {t:5d}/20 | loss") for line in lines) == 1
    names = sorted(p.name for p in (here / "log").iterdir())
    assert names == [".lock", "curves.png", "log.txt", "model_00010.pt", "model_00020.pt"]
    torchrun(PROGRAM, "--log_dir", "log", "--export", "folder", cwd=here)
    assert (here / "folder/model.safetensors").exists()
    (here / "log/model_00020.pt").unlink()  # and one process goes on with it
    assert main(run) == 0
    assert_same_run(alone, here / "log")


def test_accumulation_and_compilation_give_the_same_and_gradients_travel_once(here, alone):
    """They travel in the last micro-step, and most of them while others are still to come."""
    (here / "driver.py").write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import functools, torch, train_gpt2
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        from torch.nn.parallel import DistributedDataParallel as DDP

        # Graphs as on a GPU, run as they are; several buckets, of a model as small as this
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 20_000
        models, events = [], []
        def exchange(state, bucket):
            events.append("exchange")
            return allreduce_hook(state, bucket)
        class Watched(DDP):
            def __init__(self, *args, **options):
                super().__init__(*args, **dict(options, bucket_cap_mb=0.03))
                self.register_comm_hook(None, exchange)
                first = self.module.transformer.wpe.weight  # whose gradient comes last
                first.register_post_accumulate_grad_hook(lambda p: events.append("first layer"))
                models.append(self)
            def forward(self, *args):
                events.append("forward")
                return super().forward(*args)
        torch.nn.parallel.DistributedDataParallel = Watched
        code = train_gpt2.main()
        torch.save((models[0].module.state_dict(), events), f"rank{{train_gpt2.RANK}}.pt")
        sys.exit(code)
        """)
    )
    run = [*RUN, "--log_dir", "log", "--micro_batch_size", "1", "--compile"]
    torchrun("driver.py", *run, cwd=here)
    assert_same_run(alone, here / "log")
    (weights, events), (other, _) = (torch.load(f"rank{r}.pt") for r in range(2))
    assert all(weights[name].equal(other[name]) for name in weights)
    passes = " ".join(events).split("forward")[3:]  # two were for the trial of the micro-batch
    assert len(passes) == 20 * 4
    for i, happened in enumerate(passes):
        assert ("exchange" in happened) == (i % 4 == 3)
        if i % 4 == 3 and i > 3:  # in the first step DDP learns the order of the gradients
            assert happened.count("exchange") >= 3
            assert happened.split()[:2] == ["exchange", "exchange"]


def test_two_nodes_on_the_loopback_address(here, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    how = dict(cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    nodes = [
        subprocess.Popen([*launcher, f"--node_rank={i}", PROGRAM, *RUN, "--log_dir=log"], **how)
        for i in range(2)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert "step" in outputs[0] and "step" not in outputs[1]
    assert_same_run(alone, here / "log")


def test_one_rank_out_of_memory_halves_the_micro_batch_on_all(here, alone):
    (here / "driver.py").write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import torch, train_gpt2

        forward = train_gpt2.GPT2.forward
        def hungry(self, idx, targets=None):
            if train_gpt2.RANK == 1 and idx.size(0) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(self, idx, targets)
        train_gpt2.GPT2.forward = hungry
        sys.exit(train_gpt2.main())
        """)
    )
    done = torchrun("driver.py", *RUN, "--log_dir", "log", cwd=here)
    assert "step: 1 sequences × 16 tokens × 4 micro-steps × 2 processes" in done.stdout
    assert_same_run(alone, here / "log")


def test_what_a_user_gets_wrong_is_said_once(here):
    done = torchrun(PROGRAM, *RUN, "--n_head", "3", cwd=here, check=False)
    assert done.returncode != 0
    error = "error: --n_embd 32 is not a multiple of --n_head 3"
    assert sum(line == error for line in done.stderr.splitlines()) == 1
    # Of torchrun's long report the last line, too
    assert done.stderr.rstrip("=\n ").endswith(error.removeprefix("error: "))
    assert not Path("log").exists()


def test_ranks_that_see_different_data_stop_before_they_train(here):
    write_shards(here / "other1", lengths=(200, 3000, 1793))
    (here / "other1/manifest.json").unlink()  # so HellaSwag's questions are for one of them only
    (here / "data").rename(here / "other0")
    (here / "driver.py").write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import train_gpt2
        sys.exit(train_gpt2.main(["--data", "other" + os.environ["RANK"], *sys.argv[1:]]))
        """)
    )
    flags = ["--hellaswag_every=5", "--log_dir=log"]
    done = torchrun("driver.py", *TINY, *flags, cwd=here, check=False)
    assert done.returncode != 0 and "| loss" not in done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "do not see the same data" in errors[0], done.stderr
    assert "'windows': 298" in errors[0] and "'windows': 299" in errors[0]


def test_sigterm_to_all_which_torchrun_sends_once_more_and_a_screen_that_is_gone_lose_nothing(here):
    (here / "driver.py").write_text(
        textwrap.dedent(f"""
        import os, sys, time
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import train_gpt2

        def slow(t, cfg):
            if t == 7:
                os.write(1, b"waiting %d\\n" % os.getpid())  # at once: the other rank writes, too
                while not os.path.exists("signalled"):
                    time.sleep(0.01)
            return get_lr(t, cfg)
        get_lr, train_gpt2.get_lr = train_gpt2.get_lr, slow
        sys.exit(train_gpt2.main())
        """)
    )
    run = ["driver.py", *RUN, "--checkpoint_every=20", "--log_dir=log"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    how = dict(cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*launcher, *run], **how) as process:
        pids = []
        while len(pids) < 2 and (line := process.stdout.readline()):
            pids += re.findall(r"waiting (\d+)", line)
        assert len(pids) == 2
        process.stdout.close()
        process.stderr.close()
        for pid in *pids, process.pid:
            os.kill(int(pid), signal.SIGTERM)
        (here / "signalled").touch()
        process.wait(timeout=120)
    assert (here / "log/model_00008.pt").exists() and max(read_log("log")["train"]) == 7


def test_variables_that_are_not_torchrun_s_are_one_error_each(here):
    """And do no harm where the file is only imported. An empty one is as good as none."""
    cases = [
        dict(WORLD_SIZE="-2"), dict(RANK="-1"), dict(RANK="", WORLD_SIZE="2"),
        dict(RANK="1", WORLD_SIZE="1"), dict(RANK="1", WORLD_SIZE=""), dict(WORLD_SIZE="0"),
        dict(RANK="0", WORLD_SIZE="2"),
        dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="", MASTER_PORT="29500"),
    ]  # fmt: skip
    program = f"""
import os, runpy, sys
program, env = {str(PROGRAM)!r}, dict(os.environ)
for case in {cases}:
    os.environ.clear()
    os.environ.update(env, **case)
    runpy.run_path(program)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        assert end.code == 2, case
"""
    done = python("-c", program, *RUN, cwd=here)
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases) and not done.stdout, done.stderr
    assert all(line.startswith("error: ") and "torchrun" in line for line in lines), lines
    assert not Path("log").exists()
