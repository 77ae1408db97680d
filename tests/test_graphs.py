"""What torch.compile sees of a training step, and the memory that a step takes. No GPU is needed:
of the 124M model nothing is computed, only the sizes and types of its tensors are followed."""

import shutil

import pytest
import torch
from benchmark import Tally
from conftest import load, losses, read_log, train, write_questions, write_shards
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from train_gpt2 import GPT2, GPT2Config, TrainConfig, activation_bytes_per_token

B = 2
T = 1024


# --------------------------------------------------------------------------------------------------
# What the compiled forward pass leaves to the backward pass


def saved_for_backward(n_layer):
    """The tensors with a row for each of B × T tokens that the forward pass of a model as wide as
    the 124M one keeps, when it is compiled."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        raise StopIteration("before anything is computed")

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=keep,
        decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )
    torch._dynamo.reset()
    model = torch.compile(GPT2(GPT2Config(n_layer=n_layer)), backend=backend, dynamic=False)
    x = torch.zeros(B, T, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(Exception, match="before anything"):
        model(x, x)
    (outputs,) = graphs[0].graph.find_nodes(op="output")
    values = [node.meta["val"] for node in tree_leaves(outputs.args) if node.op != "placeholder"]
    # Views share a storage, and count once.
    unique = {z.untyped_storage()._cdata: z for z in values if isinstance(z, torch.Tensor)}
    rows_of_tokens = ((B, T), (B * T,), (B, 12, T))
    return [z for z in unique.values() if any(z.shape[: len(r)] == r for r in rows_of_tokens)]


@pytest.fixture(scope="module")
def saved():
    return {n_layer: saved_for_backward(n_layer) for n_layer in (1, 2)}


def test_bytes_per_token_that_wait_for_the_backward_pass(saved):
    """With a residual stream of 32 bits there were 437,696."""

    def bytes_per_token(tensors):
        return sum(z.untyped_storage().nbytes() for z in tensors) / (B * T)

    one_layer = bytes_per_token(saved[1])
    two_layers = bytes_per_token(saved[2])
    assert one_layer + 11 * (two_layers - one_layer) < 401_000


def test_what_waits_for_the_backward_pass_is_in_16_bits(saved):
    wide = [z for z in saved[2] if z.numel() >= 64 * B * T]
    assert {z.dtype for z in wide} == {torch.bfloat16}
    # The logits are kept once, without their softmax or their gradient.
    assert len([z for z in wide if z.size(-1) == 50304]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_residual_stream_is_in_bf16_but_never_in_fp16(dtype):
    """fp16 ends at 65,504, and the sum of all branches may be larger."""
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32, block_size=16))
    dtypes = []
    for block in model.transformer.h:
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        model(torch.zeros(1, 16, dtype=torch.int64))
    expected = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    assert dtypes == [expected, expected]


# --------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are compiled. They run as they are, without a compiler."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    compile_function = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_function(f, backend=backend, **options)
    )
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def test_training_is_one_graph_and_validation_one_more(here, graphs):
    """Whatever happens in between: samples and HellaSwag have many shapes, and add none."""
    write_shards(here / "gpt2", lengths=(16 * 23 + 5, 5000), encoding="gpt2")
    write_questions(here)
    evaluations = ["--val_every=3", "--hellaswag_every=4", "--sample_every=5"]
    run = ["--micro_batch_size=4", "--max_new_tokens=20", "--checkpoint_every=6"]
    assert train("--data=gpt2", "--log_dir=log", "--compile", *run, *evaluations) == 0
    of_the_model = [graph for graph in graphs if len(graph.graph.nodes) > 10]  # not of a trial
    assert len(of_the_model) == 2
    assert set(read_log("log")) >= {"train", "val", "hella"}


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_compiled_losses_are_the_eager_ones(here, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(here / "cache"))
    run = ["--n_layer=1", "--max_steps=10"]
    assert train("--log_dir=eager", *run) == 0
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        assert train("--log_dir=compiled", "--compile", "--checkpoint_every=10", *run) == 0
    assert load("compiled/checkpoint_00010.pt")["train_config"]["compile"]
    assert losses("compiled") == pytest.approx(losses("eager"), abs=1e-4)


def test_compile_that_was_asked_for_and_fails_is_an_error(here, capsys, monkeypatch):
    def no_compiler(*args):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **options: no_compiler)
    assert train("--log_dir=log", "--compile") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "no C++ compiler" in error
    assert "--compile" in error
    assert error.count("\n") == 1
    assert not (here / "log").exists()


def test_after_a_compiler_that_fails_other_code_is_still_compiled(here, capsys):
    """A notebook's own torch.compile, say, later in the same process."""
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert train("--log_dir=log", "--compile") == 1
    assert "no-such-compiler" in capsys.readouterr().err
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch.compile(torch.sin, backend=backend)(torch.ones(3))
    assert compiled


# --------------------------------------------------------------------------------------------------
# Memory, from which the micro-batch is chosen

# GiB that the 124M model took at most in a step of B × 1,024 tokens, with everything else at its
# default; tests/BENCHMARKS.md, "One H100".
MEASURED = [
    (dict(dtype="bf16", compile=True, micro_batch_size=32), 13.9),
    (dict(dtype="bf16", compile=True, micro_batch_size=64), 26.2),
    (dict(dtype="bf16", compile=True, micro_batch_size=128), 50.6),
    (dict(dtype="bf16", compile=True, micro_batch_size=16, attention="manual"), 16.9),
    (dict(dtype="bf16", compile=False, micro_batch_size=16, attention="manual"), 28.0),
    (dict(dtype="tf32", compile=False, micro_batch_size=16, attention="manual"), 28.8),
]


@pytest.mark.parametrize("settings, gigabytes", MEASURED)
def test_estimate_of_memory_is_above_what_an_h100_needed(settings, gigabytes):
    cfg = TrainConfig(sequence_length=T, **settings)
    parameters = 16 * 124_439_808  # weights, gradients and the two moments of AdamW, in float32
    activations = cfg.micro_batch_size * T * activation_bytes_per_token(cfg)
    ratio = (parameters + activations) / (gigabytes * 2**30)
    assert 1.1 < ratio < 1.7


def count_bytes_per_token(cfg):
    """What a step that is not compiled holds at its worst moment, added up from the sizes of its
    tensors. Nothing is computed, so the model may be larger than this machine."""
    peaks = {}
    with FakeTensorMode(), Tally() as tally:
        model = GPT2(cfg)
        for B in (3, 6):
            tally.peak = tally.now
            x = torch.zeros(B, cfg.sequence_length, dtype=torch.int64)
            with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bf16"):
                loss = model(x, x)
            loss.backward()
            peaks[B] = tally.peak
            model.zero_grad(set_to_none=True)
            del loss
    return (peaks[6] - peaks[3]) / (3 * cfg.sequence_length)


@pytest.mark.parametrize(
    "settings",
    [
        dict(dtype="fp32"),
        dict(dtype="fp32", n_embd=1600, n_head=25),
        dict(dtype="bf16"),
        dict(dtype="bf16", attention="manual"),
        dict(dtype="bf16", activation_checkpointing=True),
    ],
)
def test_estimate_of_memory_is_above_what_is_counted(settings, monkeypatch):
    layer_norm = torch.nn.LayerNorm.forward
    # Under autocast CUDA computes it in float32, and a CPU in bf16.
    monkeypatch.setattr(torch.nn.LayerNorm, "forward", lambda self, x: layer_norm(self, x.float()))
    cfg = TrainConfig(sequence_length=T, n_layer=4, compile=False, **settings)
    ratio = activation_bytes_per_token(cfg) / count_bytes_per_token(cfg)
    assert 1 < ratio < 2
