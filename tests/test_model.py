"""The model computes what GPT-2 computes: transformers is the reference."""

import math

import pytest
import torch
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2LMHeadModel

from train_gpt2 import GPT2, MODELS, GPT2Config

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SIZES = [
    dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=64),
    dict(vocab_size=300, block_size=48, n_layer=3, n_head=2, n_embd=48),
]


def to_reference(name, tensor, vocab_size):
    """Ours as transformers stores it: its Conv1D weights are transposed, its vocabulary has no padding."""
    tensor = tensor[:vocab_size] if name.endswith(("wte.weight", "lm_head.weight")) else tensor
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def pair(attention="flash", **size):
    """Our model and the reference with the same random weights, biases and gains random, too."""
    torch.manual_seed(0)
    ours = GPT2(GPT2Config(attention=attention, **size))
    with torch.no_grad():
        for p in ours.parameters():
            p[: size["vocab_size"]].add_(torch.randn_like(p[: size["vocab_size"]]), alpha=0.05)
    config = ReferenceConfig(
        vocab_size=size["vocab_size"], n_positions=size["block_size"], n_embd=size["n_embd"],
        n_layer=size["n_layer"], n_head=size["n_head"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        attn_implementation="eager",
    )  # fmt: skip
    reference = GPT2LMHeadModel(config)
    weights = {name: to_reference(name, p, size["vocab_size"]) for name, p in ours.state_dict().items()}
    reference.load_state_dict(weights)
    return ours, reference


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(size, attention):
    ours, reference = pair(attention, **size)
    tokens = torch.randint(size["vocab_size"], (3, size["block_size"] + 1))
    logits, loss = ours(tokens[:, :-1], tokens[:, 1:])
    expected = reference(tokens[:, :-1]).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    loss.backward()
    expected_loss.backward()
    wanted = dict(reference.named_parameters())
    assert set(wanted) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        grad = to_reference(name, p.grad, size["vocab_size"])
        error = (grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 1e-4, (name, error)


def test_padding_of_the_vocabulary_changes_nothing_and_stays_zero():
    size, losses = dict(vocab_size=97, block_size=8, n_layer=1, n_head=2, n_embd=16), []
    padded, plain = GPT2(GPT2Config(**size)), GPT2(GPT2Config(pad_vocab=False, **size))
    weights = padded.state_dict()
    plain.load_state_dict({k: v[:97] if "wte" in k or "lm_head" in k else v for k, v in weights.items()})
    for model in (padded, plain):
        optimizer = model.configure_optimizers(0.1, 1e-2)
        x = torch.arange(32).view(4, 8)
        for _ in range(5):
            loss = model(x, x + 1)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert model(x)[0].shape == (4, 8, 97)
    assert len(padded.transformer.wte.weight) == 128 and not padded.transformer.wte.weight[97:].any()
    assert losses[:5] == pytest.approx(losses[5:], abs=1e-6)


@pytest.mark.parametrize(
    "name, count",
    [("gpt2", 124439808), ("gpt2-medium", 354823168), ("gpt2-large", 774030080), ("gpt2-xl", 1557611200)],
)
def test_parameter_counts_are_the_published_ones(name, count):
    sizes = {k: v for k, v in MODELS[name].items() if k.startswith("n_")}
    with torch.device("meta"):
        assert GPT2(GPT2Config(**sizes)).num_params() == count


def test_flops_of_a_token_by_hand():
    with torch.device("meta"):
        model = GPT2(GPT2Config())
    assert model.flops_per_token(1024) == 6 * (124439808 - 1024 * 768) + 12 * 12 * 768 * 1024 == 855166464


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=1000, block_size=128, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p[:1000].std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize("vocab_size", [257, 50257])
def test_first_loss_is_that_of_a_uniform_guess(vocab_size):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=vocab_size, block_size=64, n_layer=4, n_head=4, n_embd=128))
    tokens = torch.randint(vocab_size, (8, 65))
    assert model(tokens[:, :-1], tokens[:, 1:])[1].item() == pytest.approx(math.log(vocab_size), abs=0.2)


def test_head_and_embedding_are_one_tensor():
    model = GPT2(GPT2Config(vocab_size=97, block_size=8, n_layer=1, n_head=2, n_embd=16))
    assert model.lm_head.weight is model.transformer.wte.weight


def test_decay_is_for_matrices_and_embeddings_only():
    model = GPT2(GPT2Config(vocab_size=97, block_size=8, n_layer=2, n_head=2, n_embd=16))
    groups = model.configure_optimizers(0.1, 1e-3).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert {p.dim() for p in groups[0]["params"]} == {2} and {p.dim() for p in groups[1]["params"]} == {1}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert groups[0]["betas"] == (0.9, 0.95) and groups[0]["eps"] == 1e-8


def test_activation_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        torch.manual_seed(0)
        size = dict(vocab_size=97, block_size=8, n_layer=2, n_head=2, n_embd=16)
        model = GPT2(GPT2Config(activation_checkpointing=on, **size))
        x = torch.arange(16).view(2, 8)
        model(x, x)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_targets_of_minus_100_do_not_count():
    model = GPT2(GPT2Config(vocab_size=97, block_size=8, n_layer=1, n_head=2, n_embd=16))
    x = torch.arange(16).view(2, 8)
    y = x.clone()
    y[1] = -100
    torch.testing.assert_close(model(x, y)[1], model(x[:1], x[:1])[1])


class TestGenerate:
    def model(self):
        return pair(**SIZES[0])

    def test_greedy_is_what_transformers_generates(self):
        ours, reference = self.model()
        idx = torch.tensor([[5, 6, 7]])
        expected = reference.generate(
            idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, pad_token_id=0
        )
        assert ours.generate(idx, 20, temperature=0).tolist() == expected.tolist()

    def test_context_slides_past_the_block_size(self):
        ours, _ = self.model()
        idx = torch.randint(97, (2, 30))
        out = ours.generate(idx, 10, temperature=0)
        assert out.shape == (2, 40)
        assert out[:, 39].equal(ours(out[:, 7:39])[0][:, -1].argmax(-1))

    def test_only_the_k_likeliest_are_drawn(self):
        ours, _ = self.model()
        idx = torch.tensor([[1, 2, 3]] * 500)
        allowed = set(ours(idx[:1])[0][0, -1].topk(5).indices.tolist())
        assert set(ours.generate(idx, 1, top_k=5)[:, -1].tolist()) == allowed
        assert len(set(ours.generate(idx, 1, top_k=0)[:, -1].tolist())) > 20

    def test_draws_follow_the_softmax(self):
        ours, _ = self.model()
        generator = torch.Generator().manual_seed(0)
        drawn = ours.generate(torch.tensor([[1]] * 20000), 1, temperature=0.7, generator=generator)[:, -1]
        expected = torch.softmax(ours(torch.tensor([[1]]))[0][0, -1] / 0.7, -1)
        assert (torch.bincount(drawn, minlength=97) / 20000 - expected).abs().max() < 0.015

    def test_its_own_generator_leaves_all_other_random_numbers_alone(self):
        ours, _ = self.model()
        torch.manual_seed(3)
        before = torch.get_rng_state()
        first, second = (
            ours.generate(torch.tensor([[1]]), 9, generator=torch.Generator().manual_seed(1)) for _ in range(2)
        )
        assert first.equal(second) and torch.get_rng_state().equal(before)
