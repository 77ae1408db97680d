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
    """Our tensor as transformers stores it: Conv1D weights transposed, the vocabulary unpadded."""
    if name.endswith(("wte.weight", "lm_head.weight")):
        return tensor[:vocab_size]
    if name.endswith(TRANSPOSED):
        return tensor.t()
    return tensor


def pair(attention="flash", **size):
    """Our model and the reference with the same random weights, biases and gains included."""
    torch.manual_seed(0)
    ours = GPT2(GPT2Config(attention=attention, **size))
    V = size["vocab_size"]
    with torch.no_grad():
        for p in ours.parameters():
            p[:V].add_(torch.randn_like(p[:V]), alpha=0.05)
    config = ReferenceConfig(
        vocab_size=V,
        n_positions=size["block_size"],
        n_embd=size["n_embd"],
        n_layer=size["n_layer"],
        n_head=size["n_head"],
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        attn_implementation="eager",
    )
    reference = GPT2LMHeadModel(config)
    weights = ours.state_dict()
    reference.load_state_dict({name: to_reference(name, p, V) for name, p in weights.items()})
    return ours, reference


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("size", SIZES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(size, attention):
    ours, reference = pair(attention, **size)
    V = size["vocab_size"]
    tokens = torch.randint(V, (3, size["block_size"] + 1))
    x = tokens[:, :-1]
    y = tokens[:, 1:]
    expected = reference(x).logits
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)

    loss = ours(x, y)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), y.flatten())
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-5)
    loss.backward()
    expected_loss.backward()
    wanted = dict(reference.named_parameters())
    assert set(wanted) == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        grad = to_reference(name, p.grad, V)
        error = (grad - wanted[name].grad).norm() / wanted[name].grad.norm()
        assert error < 1e-4, (name, error)


def test_gradient_is_the_same_through_the_logits_and_through_the_loss():
    model = GPT2(GPT2Config(**SMALL))
    parameters = list(model.parameters())
    x = torch.arange(16).view(2, 8)
    loss = model(x, x)
    loss_of_logits = F.cross_entropy(model(x).flatten(0, 1), x.flatten())
    torch.testing.assert_close(loss, loss_of_logits)
    torch.testing.assert_close(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(loss_of_logits, parameters)
    )


def test_padding_of_the_vocabulary_changes_nothing_and_stays_zero():
    padded = GPT2(GPT2Config(**SMALL))
    plain = GPT2(GPT2Config(pad_vocab=False, **SMALL))
    weights = padded.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = weights[name][:97]
    plain.load_state_dict(weights)
    x = torch.arange(32).view(4, 8)
    losses = {padded: [], plain: []}
    for model in losses:
        optimizer = model.configure_optimizers(0.1, 1e-2)
        for _ in range(5):
            loss = model(x, x + 1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[model].append(loss.item())
        assert model(x).shape == (4, 8, 97)
    assert losses[padded] == pytest.approx(losses[plain], abs=1e-6)
    table = padded.transformer.wte.weight
    assert len(table) == 128
    assert not table[97:].any()


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
        elif name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.03), name
        else:
            assert p[:1000].std().item() == pytest.approx(0.02, rel=0.03), name


@pytest.mark.parametrize("V", [257, 50257])
def test_first_loss_is_that_of_a_uniform_guess(V):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=V, block_size=32, n_layer=4, n_head=4, n_embd=128))
    tokens = torch.randint(V, (4, 33))
    loss = model(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss == pytest.approx(math.log(V), abs=0.2)


def test_decay_is_for_matrices_and_embeddings_only():
    model = GPT2(GPT2Config(**SMALL))
    groups = model.configure_optimizers(0.1, 1e-3).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [{p.dim() for p in group["params"]} for group in groups] == [{2}, {1}]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert group["betas"] == (0.9, 0.95)
        assert group["eps"] == 1e-8


def test_activation_checkpointing_gives_the_same_gradients():
    x = torch.arange(16).view(2, 8)
    gradients = []
    for activation_checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT2(GPT2Config(activation_checkpointing=activation_checkpointing, **SMALL))
        model(x, x).backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_targets_of_minus_100_do_not_count():
    model = GPT2(GPT2Config(**SMALL))
    x = torch.arange(16).view(2, 8)
    y = torch.stack((x[0], torch.full((8,), -100)))
    torch.testing.assert_close(model(x, y), model(x[:1], x[:1]))


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
        expected = reference.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=0,
        )
        assert ours.generate(idx, 20, temperature=0).tolist() == expected.tolist()

    def test_context_slides_past_the_block_size(self, ours):
        out = ours.generate(torch.randint(97, (2, 30)), 10, temperature=0)
        assert out.shape == (2, 40)
        assert out[:, 39].equal(ours(out[:, 7:39])[:, -1].argmax(-1))

    def test_only_the_k_likeliest_are_drawn(self, ours):
        idx = torch.tensor([[1, 2, 3]] * 500)
        allowed = ours(idx[:1])[0, -1].topk(5).indices.tolist()
        assert set(ours.generate(idx, 1, top_k=5)[:, -1].tolist()) == set(allowed)
        assert len(set(ours.generate(idx, 1, top_k=0)[:, -1].tolist())) > 20

    def test_draws_follow_the_softmax(self, ours):
        idx = torch.tensor([[1]])
        generator = torch.Generator().manual_seed(0)
        drawn = ours.generate(idx.expand(20000, 1), 1, temperature=0.7, generator=generator)[:, -1]
        expected = torch.softmax(ours(idx)[0, -1] / 0.7, dim=-1)
        frequencies = torch.bincount(drawn, minlength=97) / 20000
        assert (frequencies - expected).abs().max() < 0.015

    def test_its_own_generator_leaves_all_other_random_numbers_alone(self, ours):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        texts = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(1)
            texts.append(ours.generate(torch.tensor([[1]]), 9, generator=generator))
        assert texts[0].equal(texts[1])
        assert torch.get_rng_state().equal(before)
