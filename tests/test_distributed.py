"""Several processes under torchrun, with gloo, are one run: real launches, on this machine."""

import json
import os
import re
import signal
import socket
from functools import partial

import pytest
import torch
from conftest import PROGRAM, TINY, read_log, torchrun, write_shards

if not hasattr(os, "fork"):
    pytest.skip("needs fork and POSIX signals", allow_module_level=True)

import processes
from processes import TWO_PROCESSES, At, Run, fail, run_to_end

RUN = TINY + ["--data=data", "--log_dir=log", "--val_every=10"]


def assert_same_run(one, other):
    a = read_log(one)
    b = read_log(other)
    assert b["train"] == pytest.approx(a["train"], abs=1e-5)
    assert b["val"] == pytest.approx(a["val"], abs=1e-5)
    assert b["norm"] == pytest.approx(a["norm"], rel=1e-3)


def errors_in(output):
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The log of a single process, to compare with."""
    folder = tmp_path_factory.mktemp("alone")
    write_shards(folder / "data")
    run_to_end(RUN + [f"--data={folder}/data", f"--log_dir={folder}/log"])
    return folder / "log"


def test_two_processes_have_the_losses_of_one_and_only_rank_0_speaks_and_writes(here, alone):
    run = RUN + ["--checkpoint_every=10"]
    done = torchrun(PROGRAM, *run, cwd=here)
    assert "step is 4 sequences × 16 tokens × 1 micro-steps × 2 processes" in done.stdout
    assert_same_run(alone, "log")
    for step in range(20):
        assert done.stdout.count(f"step {step:5d}/20 | loss") == 1
    names = {path.name for path in (here / "log").iterdir()}
    checkpoints = {"checkpoint_00010.pt", "checkpoint_00020.pt"}
    assert names == {".lock", "curves.png", "log.txt"} | checkpoints

    run_to_end(["--log_dir=log", "--export=folder"], torchrun=TWO_PROCESSES)
    assert (here / "folder/model.safetensors").exists()
    (here / "log/checkpoint_00020.pt").unlink()
    run_to_end(run)  # one process goes on with what two have begun
    assert_same_run(alone, "log")


def test_accumulation_and_compilation_give_the_same_and_gradients_travel_once(here, alone):
    """They travel in the last micro-step, and the compiled model stays in one piece."""
    run = RUN + ["--micro_batch_size=1", "--compile"]
    run_to_end(run, prepare=[processes.watch_gradients], torchrun=TWO_PROCESSES)
    assert_same_run(alone, "log")
    weights, events, graphs = torch.load("rank0.pt")
    other_weights, _, _ = torch.load("rank1.pt")
    assert graphs == 3  # training, validation, and the trial of the compiler
    for name, weight in weights.items():
        assert weight.equal(other_weights[name]), name

    passes = " ".join(events).split("forward")[1:]
    assert len(passes) == 20 * 4
    for i, happened in enumerate(passes):
        last_micro_step = i % 4 == 3
        assert ("exchange" in happened) == last_micro_step
        # In the first step DDP learns the order of the gradients.
        if last_micro_step and i > 3:
            assert happened.count("exchange") >= 3
            assert happened.split()[:2] == ["exchange", "exchange"]


def test_two_nodes_on_the_loopback_address(here, alone):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    options.append(f"--master_port={port}")
    first = Run(RUN, torchrun=options + ["--node_rank=0"])
    second = Run(RUN, torchrun=options + ["--node_rank=1"])
    code, output = first.end()
    assert code == 0, output
    assert "| loss" in output, output
    code, output = second.end()
    assert code == 0, output
    assert "step" not in output, output
    assert_same_run(alone, "log")


def test_a_rank_out_of_memory_is_one_line_that_names_the_micro_batch_to_try(here):
    full = partial(fail, torch.OutOfMemoryError("CUDA out of memory."))
    trap = At("train_gpt2.GPT2.forward", 3, rank=1, spring=full)
    output = run_to_end(RUN, prepare=[trap], torchrun=TWO_PROCESSES, code=1)
    error = "error: out of memory with a micro-batch of 4 sequences; try --micro_batch_size 2"
    assert errors_in(output) == [f"{error} (rank 1)"], output


def test_what_a_user_gets_wrong_is_said_once(here):
    done = torchrun(PROGRAM, *RUN, "--n_head=3", cwd=here, check=False)
    assert done.returncode != 0
    errors = errors_in(done.stderr)
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: --n_embd 32 "), done.stderr
    # It is also the last line of torchrun's long report.
    assert done.stderr.rstrip("=\n ").endswith(errors[0])
    assert not (here / "log").exists()


def make_other_data(folder):
    write_shards(folder / "data", lengths=(200, 3000, 1793), encoding="gpt2")


def make_checkpoint(folder):
    folders = [f"--data={folder}/data", f"--log_dir={folder}/log"]
    run_to_end(RUN + folders + ["--max_steps=2", "--checkpoint_every=2"])


def make_question(folder):
    question = dict(ctx="The sky is", endings=["blue", "red", "green", "loud"], label=0, ind=0)
    (folder / "hellaswag").mkdir()
    (folder / "hellaswag/hellaswag_val.jsonl").write_text(json.dumps(question) + "\n")


@pytest.mark.parametrize("make", [make_other_data, make_checkpoint, make_question])
def test_ranks_that_see_different_files_stop_before_they_train(here, make):
    """As on two machines, of which one has other data, or lacks the checkpoints."""
    write_shards(here / "rank0/data", encoding="gpt2")  # HellaSwag is for GPT-2's tokens only
    write_shards(here / "rank1/data", encoding="gpt2")
    make(here / "rank1")
    run = RUN + ["--hellaswag_every=5"]
    prepare = [processes.enter_folder_of_rank]
    output = run_to_end(run, prepare=prepare, torchrun=TWO_PROCESSES, code=1)
    assert "| loss" not in output, output
    errors = errors_in(output)
    assert len(errors) == 1, output
    assert "the processes do not see the same" in errors[0], output
    assert not (here / "rank0/log").exists()


def test_sigterm_to_all_which_torchrun_sends_once_more_and_a_screen_that_is_gone_lose_nothing(here):
    trap = At("train_gpt2.get_lr", 8, spring=partial(processes.wait_for_file, "signalled"))
    job = Run(RUN + ["--checkpoint_every=20"], prepare=[trap], torchrun=TWO_PROCESSES)
    pids = []
    for line in job.output:
        pids += [int(pid) for pid in re.findall(r"waiting (\d+)", line)]
        if len(pids) == 2:
            break
    assert len(pids) == 2
    job.output.close()
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    job.send(signal.SIGTERM)
    (here / "signalled").touch()
    job.process.join()
    assert (here / "log/checkpoint_00008.pt").exists()
    assert max(read_log("log")["train"]) == 7


VARIABLES = [
    dict(WORLD_SIZE="-2"),
    dict(WORLD_SIZE="0"),
    dict(RANK="-1"),
    dict(RANK="", WORLD_SIZE="2"),
    dict(RANK="1", WORLD_SIZE="1"),
    dict(RANK="1", WORLD_SIZE=""),
    dict(RANK="0", WORLD_SIZE="2"),
    dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500"),
    dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="", MASTER_PORT="29500"),
]


def test_variables_that_are_not_torchrun_s_are_one_error(here):
    runs = [Run(RUN, env=env) for env in VARIABLES]
    for env, run in zip(VARIABLES, runs, strict=True):
        code, output = run.end()
        assert code == 1, (env, output)
        assert output.startswith("error: "), (env, output)
        assert output.count("\n") == 1, (env, output)
        assert "torchrun" in output, (env, output)
    assert not (here / "log").exists()


def test_empty_variables_are_as_good_as_none(here, alone):
    run_to_end(RUN, env=dict(RANK="", LOCAL_RANK="", WORLD_SIZE=""))
    assert_same_run(alone, "log")
