"""The model computes what GPT-2 computes: transformers is the reference."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config as ReferenceConfig
from transformers import GPT2LMHeadModel

from train_gpt2 import GPT2, MODELS, GPT2Config

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SMALL = dict(vocab_size=97, block_size=8, n_layer=2, n_head=2, n_embd=16)
SIZES = [
    dict(vocab_size=97, block_size=32, n_layer=2, n_head=4, n_embd=64),
    dict(vocab_size=300, block_size=48, n_layer=3, n_head=2, n_embd=48),
]


def to_reference(name, tensor, vocab_size):
    """Ours as transformers stores it: Conv1D weights transposed, the vocabulary without padding."""
    tensor = tensor[:vocab_size] if name.endswith(("wte.weight", "lm_head.weight")) else tensor
    return tensor.t() if name.endswith(TRANSPOSED) else tensor


def pair(attention="flash", **size):
    """Our model and the reference with the same random weights, biases and gains random, too."""
    torch.manual_seed(0)
    ours, V = GPT2(GPT2Config(attention=attention, **size)), size["vocab_size"]
    with torch.no_grad():
        for p in ours.parameters():
            p[:V].add_(torch.randn_like(p[:V]), alpha=0.05)
    config = ReferenceConfig(
        vocab_size=V, n_positions=size["block_size"], n_embd=size["n_embd"],
        n_layer=size["n_layer"], n_head=size["n_head"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        attn_implementation="eager",
    )  # fmt: skip
    reference = GPT2LMHeadModel(config)
    reference.load_state_dict({n: to_reference(n, p, V) for n, p in ours.state_dict().items()})
    return ours, reference


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(size, attention):
    ours, reference = pair(attention, **size)
    tokens = torch.randint(size["vocab_size"], (3, size["block_size"] + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    logits, loss = ours(x, y)
    assert logits is None or logits.requires_grad  # never silently cut off from the gradient
    expected = reference(x).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), y.flatten())
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-4, rtol=0)
    assert abs(loss.item() - expected_loss.item()) < 1e-5
    loss.backward()
    expected_loss.backward()
    wanted = dict(reference.named_parameters())
    assert set(wanted) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        grad = to_reference(name, p.grad, size["vocab_size"])
        error = (grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 1e-4, (name, error)


def test_logits_alone_carry_the_gradient_too():
    model, x = GPT2(GPT2Config(**SMALL)), torch.arange(16).view(2, 8)
    grads = []
    for loss in (model(x, x)[1], F.cross_entropy(model(x)[0].flatten(0, 1), x.flatten())):
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*grads)


def test_padding_of_the_vocabulary_changes_nothing_and_stays_zero():
    padded, plain = GPT2(GPT2Config(**SMALL)), GPT2(GPT2Config(pad_vocab=False, **SMALL))
    weights = padded.state_dict().items()
    plain.load_state_dict({n: p[:97] if "wte" in n or "lm_head" in n else p for n, p in weights})
    x, losses = torch.arange(32).view(4, 8), []
    for model in (padded, plain):
        optimizer = model.configure_optimizers(0.1, 1e-2)
        for _ in range(5):
            loss = model(x, x + 1)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert model(x)[0].shape == (4, 8, 97)
    table = padded.transformer.wte.weight
    assert len(table) == 128 and not table[97:].any()
    assert losses[:5] == pytest.approx(losses[5:], abs=1e-6)


def test_parameter_counts_and_flops_are_the_published_ones():
    counts = []
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        sizes = {size: MODELS[name][size] for size in ("n_layer", "n_head", "n_embd")}
        with torch.device("meta"):
            counts.append(GPT2(GPT2Config(**sizes)).num_params())
    assert counts == [124439808, 354823168, 774030080, 1557611200]
    with torch.device("meta"):
        flops = GPT2(GPT2Config()).flops_per_token(1024)
    assert flops == 6 * (124439808 - 1024 * 768) + 12 * 12 * 768 * 1024 == 855166464


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=1000, block_size=128, n_layer=8, n_head=4, n_embd=128))
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert p[:1000].std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize("V", [257, 50257])
def test_first_loss_is_that_of_a_uniform_guess(V):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=V, block_size=64, n_layer=4, n_head=4, n_embd=128))
    tokens = torch.randint(V, (8, 65))
    loss = model(tokens[:, :-1], tokens[:, 1:])[1].item()
    assert loss == pytest.approx(math.log(V), abs=0.2)


def test_decay_is_for_matrices_and_embeddings_only():
    model = GPT2(GPT2Config(**SMALL))
    decay, no_decay = groups = model.configure_optimizers(0.1, 1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [{p.dim() for p in group["params"]} for group in groups] == [{2}, {1}]
    assert len(decay["params"]) + len(no_decay["params"]) == len(list(model.parameters()))
    assert all((g["betas"], g["eps"]) == ((0.9, 0.95), 1e-8) for g in groups)


def test_activation_checkpointing_gives_the_same_gradients():
    grads, x = [], torch.arange(16).view(2, 8)
    for on in (False, True):
        torch.manual_seed(0)
        model = GPT2(GPT2Config(activation_checkpointing=on, **SMALL))
        model(x, x)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_targets_of_minus_100_do_not_count():
    model, x = GPT2(GPT2Config(**SMALL)), torch.arange(16).view(2, 8)
    y = torch.stack((x[0], torch.full((8,), -100)))
    torch.testing.assert_close(model(x, y)[1], model(x[:1], x[:1])[1])


class TestGenerate:
    @pytest.fixture
    def both(self):
        return pair(**SIZES[0])

    @pytest.fixture
    def ours(self, both):
        return both[0]

    def test_greedy_is_what_transformers_generates(self, both):
        ours, reference = both
        idx = torch.tensor([[5, 6, 7]])
        how = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
        expected = reference.generate(idx, attention_mask=torch.ones_like(idx), **how)
        assert ours.generate(idx, 20, temperature=0).tolist() == expected.tolist()

    def test_context_slides_past_the_block_size(self, ours):
        out = ours.generate(torch.randint(97, (2, 30)), 10, temperature=0)
        assert out.shape == (2, 40)
        assert out[:, 39].equal(ours(out[:, 7:39])[0][:, -1].argmax(-1))

    def test_only_the_k_likeliest_are_drawn(self, ours):
        idx = torch.tensor([[1, 2, 3]] * 500)
        allowed = set(ours(idx[:1])[0][0, -1].topk(5).indices.tolist())
        assert set(ours.generate(idx, 1, top_k=5)[:, -1].tolist()) == allowed
        assert len(set(ours.generate(idx, 1, top_k=0)[:, -1].tolist())) > 20

    def test_draws_follow_the_softmax(self, ours):
        idx, generator = torch.tensor([[1]]), torch.Generator().manual_seed(0)
        drawn = ours.generate(idx.expand(20000, 1), 1, temperature=0.7, generator=generator)[:, -1]
        expected = torch.softmax(ours(idx)[0][0, -1] / 0.7, -1)
        assert (torch.bincount(drawn, minlength=97) / 20000 - expected).abs().max() < 0.015

    def test_its_own_generator_leaves_all_other_random_numbers_alone(self, ours):
        torch.manual_seed(3)
        before, texts = torch.get_rng_state(), []
        for _ in range(2):
            generator = torch.Generator().manual_seed(1)
            texts.append(ours.generate(torch.tensor([[1]]), 9, generator=generator))
        assert texts[0].equal(texts[1]) and torch.get_rng_state().equal(before)
