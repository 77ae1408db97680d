"""What torch.compile and memory get to see of a training step. No GPU is needed: nothing of the
124M model is computed, only its tensors' sizes and types are followed."""

import pytest
import torch
from benchmark import Tally
from conftest import TINY
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch.utils._pytree import tree_leaves

import train_gpt2
from train_gpt2 import GPT2, GPT2Config, main

RUN = ["--data", "data", *TINY]
B, T = 2, 1024


def storages(tensors):
    """Views share a storage, and count once."""
    unique = {z.untyped_storage()._cdata: z for z in tensors if isinstance(z, torch.Tensor)}
    return unique.values()


def saved_for_backward(n_layer):
    """The tensors with a row for each of B × T tokens that the compiled forward pass of a model as
    wide as the 124M one leaves to the backward pass."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        raise StopIteration("before anything is computed")

    as_inductor = dict(decompositions=select_decomp_table())
    as_inductor.update(partition_fn=min_cut_rematerialization_partition)
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, **as_inductor)
    torch._dynamo.reset()
    model = torch.compile(GPT2(GPT2Config(n_layer=n_layer)), backend=backend, dynamic=False)
    x = torch.zeros(B, T, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="before anything"):
        model(x, x)
    (outputs,) = graphs[0].graph.find_nodes(op="output")
    values = [node.meta["val"] for node in tree_leaves(outputs.args) if node.op != "placeholder"]
    return [z for z in storages(values) if z.shape[:2] == (B, T) or z.shape[:1] == (B * T,)
            or z.shape[:3] == (B, 12, T)]  # fmt: skip


@pytest.fixture(scope="module")
def saved():
    return {n_layer: saved_for_backward(n_layer) for n_layer in (1, 2)}


def size(tensors):
    return sum(z.untyped_storage().nbytes() for z in tensors)


def test_bytes_a_token_that_wait_for_the_backward_pass(saved):
    """With a residual stream of 32 bits they were 437,696."""
    one, two = (size(saved[n_layer]) / (B * T) for n_layer in (1, 2))
    whole = one + 11 * (two - one)
    assert whole < 401_000


def test_what_waits_for_the_backward_pass_is_in_16_bits(saved):
    wide = [z for z in saved[2] if z.numel() >= 64 * B * T]
    assert {z.dtype for z in wide} == {torch.bfloat16}
    logits = [z for z in wide if z.size(-1) == 50304]
    assert len(logits) == 1  # and not their softmax or their gradient besides


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_stream_is_in_bf16_but_never_in_fp16(dtype):
    model, seen = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16)), []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(torch.zeros(1, 16, dtype=torch.int64))
    # fp16 ends at 65,504, which the sum of all branches may pass
    assert seen == 2 * [torch.bfloat16 if dtype == torch.bfloat16 else torch.float32]


def test_training_is_one_graph_and_validation_one_more(here, monkeypatch):
    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(f, backend=counter, **how))
    torch._dynamo.reset()
    evaluations = ["--val_every=5", "--val_tokens=200", "--sample_every=5", "--max_new_tokens=4"]
    assert main([*RUN, "--log_dir=log", "--compile", "--micro_batch_size=2", *evaluations]) == 0
    assert counter.frame_count == 2


def test_trial_of_a_micro_batch_takes_the_memory_of_a_step(here, monkeypatch):
    """In the second micro-step activations, the sum of gradients and those of a layer are alive at
    once; so are AdamW's moments."""
    tally, peaks, fit = Tally(), [], train_gpt2.fit_micro_batch

    def trial(*args):
        tally.peak = tally.now
        B = fit(*args)
        peaks.append(tally.peak)
        tally.peak = tally.now
        return B

    monkeypatch.setattr(train_gpt2, "fit_micro_batch", trial)
    with tally:
        wide = ["--n_embd=128", "--max_steps=3", "--micro_batch_size=2"]
        assert main([*RUN, *wide, "--log_dir=log"]) == 0
    peaks.append(tally.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
