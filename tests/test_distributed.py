"""Several processes under torchrun, with gloo, are one run: real launches, on the loopback address."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import PROGRAM, TINY, python, read_log, torchrun

RUN = ["--data", "data", *TINY, "--val_every", "10"]


def assert_same_run(a, b):
    one, other = read_log(a), read_log(b)
    for stream, tolerance in ("train", dict(abs=1e-5)), ("val", dict(abs=1e-5)), ("norm", dict(rel=1e-3)):
        assert list(one[stream]) == list(other[stream])
        assert list(other[stream].values()) == pytest.approx(list(one[stream].values()), **tolerance), stream


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of a single process, to be compared with."""
    from conftest import write_shards

    folder = tmp_path_factory.mktemp("alone")
    write_shards(folder / "data")
    python(PROGRAM, *RUN, "--log_dir", "log", cwd=folder)
    return folder / "log"


def test_two_processes_have_the_losses_of_one_and_only_rank_0_speaks_and_writes(here, alone):
    done = torchrun(PROGRAM, *RUN, "--log_dir", "log", "--checkpoint_every", "20", cwd=here)
    assert "= 4 sequences × 16 tokens × 1 micro-steps × 2 processes" in done.stdout
    assert_same_run(alone, here / "log")
    lines = done.stdout.splitlines()
    assert all(sum(line.startswith(f"step {t:5d}/20 | loss") for line in lines) == 1 for t in range(20))
    assert sorted(p.name for p in (here / "log").iterdir()) == [".lock", "curves.png", "log.txt", "model_00020.pt"]
    torchrun(PROGRAM, "--log_dir", "log", "--export", "folder", cwd=here)
    assert (here / "folder/model.safetensors").exists()


def test_accumulation_and_compilation_give_the_same_and_gradients_travel_once_during_the_backward_pass(here, alone):
    (here / "driver.py").write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(PROGRAM.parent)!r})
        import functools, os, torch, train_gpt2
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        from torch.nn.parallel import DistributedDataParallel as DDP

        torch.compile = functools.partial(torch.compile, backend="aot_eager")  # graphs as on a GPU, run as they are
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 20_000  # several buckets, of a model as small as this
        models, events, policies = [], [], []
        def exchange(state, bucket):
            events.append("exchange")
            if sys.platform == "linux" and not policies:
                policies.extend(os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task"))
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
        train_gpt2.DistributedDataParallel = Watched
        code = train_gpt2.main()
        torch.save((models[0].module.state_dict(), events, policies), f"rank{{train_gpt2.RANK}}.pt")
        sys.exit(code)
        """)
    )
    torchrun("driver.py", *RUN, "--log_dir", "log", "--micro_batch_size", "1", "--compile", cwd=here)
    assert_same_run(alone, here / "log")
    (weights, events, policies), (other, _, _) = (torch.load(f"rank{r}.pt") for r in range(2))
    assert all(weights[name].equal(other[name]) for name in weights)
    if sys.platform == "linux":
        assert policies.count(os.SCHED_BATCH) >= 3  # the main thread, and gloo's that send and receive
    passes = " ".join(events).split("forward")[2:]  # one more was for the trial of the micro-batch
    assert len(passes) == 20 * 4
    for i, happened in enumerate(passes):
        if i % 4 < 3:
            assert "exchange" not in happened
        else:
            assert "exchange" in happened
        if i % 4 == 3 and i > 3:  # most of it while gradients are to come; in the first step DDP learns their order
            assert happened.count("exchange") >= 3 and happened.split()[:2] == ["exchange", "exchange"]


def test_two_nodes_on_the_loopback_address(here, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={i}", "--nproc_per_node=1",
             "--master_addr=127.0.0.1", f"--master_port={port}", PROGRAM, *RUN, "--log_dir", "log"],
            cwd=here, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
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
    assert "= 1 sequences × 16 tokens × 4 micro-steps × 2 processes" in done.stdout
    assert_same_run(alone, here / "log")


def test_run_of_two_processes_goes_on_with_one(here, alone):
    half = ["--checkpoint_every", "10"]
    torchrun(PROGRAM, *RUN, *half, "--log_dir", "log", cwd=here)
    (here / "log/model_00020.pt").unlink()
    python(PROGRAM, *RUN, *half, "--log_dir", "log", cwd=here)
    assert_same_run(alone, here / "log")


def test_what_a_user_gets_wrong_is_said_once(here):
    done = torchrun(PROGRAM, *RUN, "--n_head", "3", cwd=here, check=False)
    assert done.returncode != 0
    error = "error: --n_embd 32 is not a multiple of --n_head 3"
    assert sum(line == error for line in done.stderr.splitlines()) == 1
    assert done.stderr.rstrip("=\n ").endswith(error)  # of torchrun's long report the last line, too
    assert not Path("log").exists()
