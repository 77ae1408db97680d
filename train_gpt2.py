"""Train GPT-2 from scratch, and use the result.

    python train_gpt2.py                         # one GPU, a Mac, or just a CPU
    torchrun --nproc_per_node=8 train_gpt2.py    # eight GPUs on one machine
    python train_gpt2.py --generate "def "       # continue a prompt with the newest checkpoint

The model is GPT-2 as OpenAI published it (Radford et al., 2019), and the training recipe is that of
GPT-3 (Brown et al., 2020, arXiv:2005.14165). The file is meant to be read from top to bottom:

    configuration, model, data, evaluation, checkpoints, log, set-up, training, command line

In the shapes below, B is the number of sequences in a batch, T the number of tokens in each, C the
number of channels, and V the size of the vocabulary.
"""

import argparse
import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import types
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import filelock
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

# torchrun starts one process per GPU and numbers them. Without torchrun there is only rank 0.
RANK = int(os.environ.get("RANK") or 0)  # among the processes on all machines
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)  # among the processes on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)

FINEWEB_DATA = Path("edu_fineweb10B")
DEMO_DATA = Path("python_stdlib")
HELLASWAG_FILE = Path("hellaswag/hellaswag_val.jsonl")


def say(message):
    """Print a line on rank 0. A closed pipe or a full disk must not end a run, so what can't be
    printed is dropped."""
    if RANK == 0:
        with contextlib.suppress(OSError, ValueError):
            print(message, flush=True)


def reason(error):
    """The text of one of our own errors, for a message that is not an error."""
    return str(error).removeprefix("error: ")


def first_line(error):
    """The first line of an exception's text, cut to a readable length."""
    # torch first advises to switch off what protects us from code in files. Its reason comes last.
    text = str(error).rpartition("trusted source.")[2].rpartition("WeightsUnpickler error:")[2]
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[0][:250]


# -----------------------------------------------------------------------------
# Configuration. Every field made with flag() is also a command-line flag.


def flag(default, help: str, low=0, choices=None, group=None):
    """A configuration field that is also a command-line flag.

    If the default is None, resolve_config() chooses a value. `low` is the smallest number
    allowed. `group` begins a new group of flags in --help.
    """
    return field(default=default, metadata=dict(help=help, low=low, choices=choices, group=group))


@dataclass(frozen=True, kw_only=True)
class GPT2Config:
    """The settings of the model. The defaults are those of GPT-2 124M."""

    vocab_size: int = 50257  # 50,000 merges, 256 bytes, <|endoftext|>
    encoding: str | None = None  # what the tokens mean: "gpt2", "bytes", or a name of your own
    n_layer: int = flag(12, "number of transformer blocks", low=1, group="model size")
    n_head: int = flag(12, "number of attention heads", low=1)
    n_embd: int = flag(768, "channels of the residual stream", low=1)
    block_size: int = flag(1024, "longest context, in tokens", low=1)
    pad_vocab: bool = flag(True, "round the vocabulary up to a multiple of 128, which is faster")
    attention: str = flag(
        "flash",
        "a fused kernel, or the textbook's formula, the default on a CPU in bf16 (faster there)",
        choices=("flash", "manual"),
    )
    activation_checkpointing: bool = flag(
        False, "save memory by recomputing activations in the backward pass"
    )

    @property
    def padded_vocab_size(self):
        if not self.pad_vocab:
            return self.vocab_size
        return math.ceil(self.vocab_size / 128) * 128


# These fields only say how to compute. Weights dictate all the others, except the encoding.
COMPUTE_FIELDS = ["pad_vocab", "attention", "activation_checkpointing"]
SIZE_FIELDS = [
    f.name for f in fields(GPT2Config) if f.name not in COMPUTE_FIELDS and f.name != "encoding"
]

# GPT-2's four sizes, each with the peak learning rate of the GPT-3 model closest in size (table 2.1
# of its paper). "demo" is small enough for two CPU cores and has a schedule of its own.
MODELS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, max_lr=6e-4),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4),
    "demo": dict(
        n_layer=2,
        n_head=4,
        n_embd=128,
        block_size=128,
        pad_vocab=False,
        total_batch_size=2048,
        max_lr=6e-3,
        min_lr=1e-4,
        warmup_steps=100,
        max_steps=3000,
        val_every=500,
        val_tokens=131072,
        sample_every=1000,
        checkpoint_every=500,
        print_every=10,
        prompt="def ",
        num_samples=2,
        max_new_tokens=400,
        temperature=0.8,
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(GPT2Config):
    """All settings of a run. resolve_config() makes one from the flags that were given."""

    model: str = flag(
        None,
        "name of a model size (auto: gpt2, or demo without shards)",
        choices=MODELS,
        group="what to train",
    )
    init_from: str = flag(
        "scratch", "weights to start from: scratch, gpt2 to gpt2-xl, user/model, a folder or a file"
    )
    data: str = flag(None, "folder of token shards (auto: edu_fineweb10B, or the demo's)")
    shuffle: bool = flag(True, "shuffle the data anew for each epoch")
    seed: int = flag(1337, "seed of the initial weights, the data order and the samples")

    total_batch_size: int = flag(2**19, "tokens per optimiser step", low=1, group="batch")
    micro_batch_size: int = flag(None, "sequences per forward pass (auto: what fits)", low=1)
    sequence_length: int = flag(None, "tokens per sequence (auto: the block size)", low=1)

    max_lr: float = flag(6e-4, "peak learning rate", group="optimiser and schedule")
    min_lr: float = flag(None, "final learning rate (auto: a tenth of the peak)")
    warmup_steps: int = flag(715, "steps of linear warm-up")
    max_steps: int = flag(19073, "training steps; 19,073 steps see ten billion tokens", low=1)
    weight_decay: float = flag(0.1, "weight decay of matrices and embeddings")
    grad_clip: float = flag(1.0, "clip the gradient norm to this; 0 for no clipping")

    device: str = flag(
        None, "compute on cpu, cuda, cuda:1 or mps (auto: the fastest)", group="hardware"
    )
    dtype: str = flag(
        None,
        "precision (auto: the fastest safe one)",
        choices=("fp32", "tf32", "bf16", "fp16"),
    )
    compile: bool = flag(None, "use torch.compile (auto: on CUDA, except for the demo)")
    deterministic: bool = flag(False, "make CUDA runs repeatable bit for bit, which is slower")

    val_every: int = flag(
        250, "steps between validations; 0 for never", group="evaluation and samples"
    )
    val_tokens: int = flag(10485760, "tokens per validation", low=1)
    hellaswag_every: int = flag(250, "steps between HellaSwag evaluations; 0 for never")
    sample_every: int = flag(250, "steps between samples; 0 for never")
    prompt: str = flag("Hello, I'm a language model,", "the text that samples continue")
    num_samples: int = flag(4, "number of samples", low=1)
    max_new_tokens: int = flag(64, "tokens per sample", low=1)
    temperature: float = flag(1.0, "sampling temperature; 0 always takes the likeliest token")
    top_k: int = flag(50, "sample only from the k likeliest tokens; 0 for all")

    log_dir: str = flag(
        None, "folder for log and checkpoints (auto: log, or log_demo)", group="log"
    )
    print_every: int = flag(1, "steps between printed lines", low=1)
    checkpoint_every: int = flag(1000, "steps between checkpoints; 0 for never")
    keep_checkpoints: int = flag(2, "how many checkpoints to keep; 0 for all")

    generate: str = flag(
        None, "continue this prompt with the newest checkpoint", group="instead of training"
    )
    export: str = flag(None, "write the model to this new folder, for transformers")


def resolve_config(given):
    """Make the configuration of a run from the flags in `given`, and choose what they leave open.

    Returns the configuration, the checkpoint to resume from, and the model that --init_from names.
    The last two decide the sizes, so they are loaded here, and returned because they are too large
    to load twice. Each is None if there is none. Raises SystemExit for a user's mistakes.
    """
    check_ranges(given)
    training = given.get("generate") is None and given.get("export") is None
    from_scratch = given.get("init_from", "scratch") == "scratch"
    device = choose_device(given.get("device"))
    join_processes(device)

    # Without shards the demo is trained, on data that come with Python.
    demo = training and "data" not in given and not find_shards(FINEWEB_DATA, "train")
    if demo:
        say(
            f"no shards in {FINEWEB_DATA} (python fineweb.py makes them): "
            "training on the source of Python's standard library"
        )

    # The checkpoint to resume from, to generate with or to export
    if "log_dir" in given:
        log_dir = given["log_dir"]
    elif training:
        log_dir = "log_demo" if demo else "log"
    else:
        log_dir = latest_log_dir()
    checkpoint = None
    if training or from_scratch:
        checkpoint = newest_checkpoint(Path(log_dir))
    if not training and from_scratch:
        if checkpoint is None:
            raise SystemExit(
                f"error: there is no checkpoint in {log_dir}; "
                "train first, or choose another --log_dir, or name weights with --init_from"
            )
        say(f"using the checkpoint in {log_dir} after {checkpoint['step']:,} steps")

    # The defaults, overridden by those of the named model, overridden by the flags given
    model_name = "demo" if demo else "gpt2"
    if checkpoint and not training:
        model_name = checkpoint["train_config"]["model"]
    elif given.get("init_from") in MODELS:
        model_name = given["init_from"]
    model_name = given.get("model", model_name)
    values = {f.name: f.default for f in fields(TrainConfig)}
    values["data"] = str(DEMO_DATA if demo else FINEWEB_DATA)
    values["dtype"] = choose_dtype(device)
    values |= MODELS[model_name] | given
    values |= dict(model=model_name, device=str(device), log_dir=log_dir)
    if "attention" not in given and device.type == "cpu" and values["dtype"] == "bf16":
        values["attention"] = "manual"  # PyTorch's flash attention is slow there
    values["compile"] = training and choose_compile(given.get("compile"), device, model_name)

    # The data decide the vocabulary, unless there are weights, which decide all sizes.
    if training:
        manifest = read_manifest(Path(values["data"]))
        values |= dict(encoding=manifest["encoding"], vocab_size=manifest["vocab_size"])
    pretrained = None
    if not from_scratch and checkpoint is None:
        how = {name: values[name] for name in COMPUTE_FIELDS}
        pretrained = GPT2.from_pretrained(values["init_from"], **how)
        values |= sizes_of_weights(asdict(pretrained.config), given, values, training)
    elif not from_scratch or not training:
        # A field that was added to GPT2Config since then has its default.
        their_config = asdict(GPT2Config(**checkpoint["config"]))
        values |= sizes_of_weights(their_config, given, values, training)

    # Defaults that depend on other settings
    if values["min_lr"] is None:
        values["min_lr"] = 0.1 * values["max_lr"]
    if values["sequence_length"] is None:
        values["sequence_length"] = values["block_size"]
    cfg = TrainConfig(**values)
    if training:
        check_config(cfg)
    if training and cfg.micro_batch_size is None:
        cfg = replace(cfg, micro_batch_size=choose_micro_batch_size(cfg, device))
    return cfg, checkpoint, pretrained


def sizes_of_weights(their_config, given, values, training):
    """The settings that existing weights dictate. Raises SystemExit if the flags contradict them,
    or if the data have tokens that the weights don't know."""
    sizes = {name: their_config[name] for name in SIZE_FIELDS}
    for name, size in sizes.items():
        if given.get(name, size) != size:
            raise SystemExit(f"error: --{name} is {given[name]}, but the weights have {size}")
    encoding = their_config["encoding"]
    if not training:
        return sizes | dict(encoding=encoding)
    if values["vocab_size"] > sizes["vocab_size"] or encoding not in (None, values["encoding"]):
        raise SystemExit(
            f"error: {values['data']} has a vocabulary of {values['vocab_size']} "
            f"({values['encoding']}), but the weights have {sizes['vocab_size']} ({encoding}); "
            "choose other data or other weights, or correct encoding and vocab_size in "
            f"{Path(values['data'], 'manifest.json')}"
        )
    return sizes


def check_ranges(given):
    """Raise SystemExit for a number that no run can use."""
    for f in fields(TrainConfig):
        value = given.get(f.name)
        if isinstance(value, int | float):
            low = f.metadata["low"]
            # Written this way it refuses nan, too, with which every comparison is false.
            if not (low <= value < 2**63):
                raise SystemExit(f"error: --{f.name} {value} must be from {low} to 2^63")
        elif value == "" and f.name not in ("prompt", "generate"):
            raise SystemExit(f"error: --{f.name} is empty; give it a value, or leave it out")


def check_config(cfg):
    """Raise SystemExit for settings that don't go together."""
    B = cfg.micro_batch_size or 1
    T = cfg.sequence_length
    if cfg.n_embd % cfg.n_head != 0:
        raise SystemExit(f"error: --n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}")
    if cfg.block_size < T:
        raise SystemExit(f"error: --sequence_length {T} exceeds --block_size {cfg.block_size}")
    if cfg.total_batch_size % (B * T * WORLD_SIZE) != 0:
        raise SystemExit(
            f"error: --total_batch_size {cfg.total_batch_size} is not a multiple of "
            f"{B} sequences × {T} tokens × {WORLD_SIZE} processes"
        )
    if cfg.warmup_steps > cfg.max_steps:
        raise SystemExit(
            f"error: --warmup_steps {cfg.warmup_steps} exceeds --max_steps {cfg.max_steps}; "
            "lower the former"
        )
    if cfg.min_lr > cfg.max_lr:
        raise SystemExit(f"error: --min_lr {cfg.min_lr} exceeds --max_lr {cfg.max_lr}; lower it")


def print_settings(cfg):
    """Print the settings that differ from the defaults, one a line."""
    say("settings, where they differ from the defaults:")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if value != f.default:
            say(f"  {f.name:18} {value}")


# -----------------------------------------------------------------------------
# Model. Parameters have the names of OpenAI's checkpoint, so that weights can be exchanged.


class CausalSelfAttention(nn.Module):
    """Lets each token gather information from those before it.

    Per head, a token's output is a weighted mean of the values v of all tokens up to itself. The
    weights are large where its query q and their keys k agree (Vaswani et al., 2017,
    arXiv:1706.03762, section 3.2).
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.attention = config.attention
        # Queries, keys and values of all heads come from one matrix product.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        # The output of each head is a slice of C. This product mixes them.
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x):
        B, T, C = x.shape
        # Each head works on a slice of the channels, as if it were a sequence of its own, so the
        # heads move to where PyTorch expects the dimensions of a batch.
        q, k, v = self.c_attn(x).split(C, dim=2)
        q = q.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, n_head, T, head size)
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
        if self.attention == "manual":
            # The formula of the paper: softmax(q kᵀ / √d) v. Whatever lies in a token's
            # future gets a score of -inf, and so a weight of e^-inf = 0.
            scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)  # (B, n_head, T, T)
            future = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
            y = F.softmax(scores + future, dim=-1) @ v
        else:
            # The same in one kernel, which works in blocks and never stores the (T, T) matrix
            # (FlashAttention: Dao et al., 2022, arXiv:2205.14135).
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    """Lets each token process what it has gathered: two layers, the same at every position."""

    def __init__(self, config):
        super().__init__()
        # Two thirds of a block's weights are in these two matrices. Four times the width is what
        # the original Transformer had.
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        # The exact GELU was slow in 2019, so OpenAI trained with this approximation, and its
        # weights expect it.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # This is self.c_fc(x), written so that torch.compile can save time. The gradient of a bias
        # is the sum of h's gradient over all tokens, for which that large tensor would be read from
        # memory once more. If each sequence has a bias of its own, (B, 1, 4C), it is summed over T
        # first, and the compiler does that in passing, while it computes the gradient of GELU.
        h = F.linear(x, self.c_fc.weight)  # (B, T, 4C)
        h = h + self.c_fc.bias.expand(len(x), 1, -1).to(h.dtype)
        return self.c_proj(self.gelu(h))


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream x.

    LayerNorm is applied to the input of each branch, not to the sum as in the original Transformer.
    So the stream is a plain sum from the embedding to the output head, and gradients flow down it
    unhindered.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


# OpenAI's "Conv1D" layers compute x @ w where nn.Linear computes x @ w.T. So their
# checkpoints, and those of transformers, store the transposes of these weights.
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")

# Settings in transformers that turn GPT-2 into a variant, which would be computed wrongly here. The
# published model has the default of each.
VARIANTS = [
    "activation_function",
    "layer_norm_epsilon",
    "scale_attn_weights",
    "scale_attn_by_inverse_layer_idx",
    "add_cross_attention",
    "tie_word_embeddings",
]

# Where tiktoken finds OpenAI's tokenizer files, and the SHA-256 of each
TOKENIZER_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019, section 2.3), without dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),  # tokens
                wpe=nn.Embedding(config.block_size, config.n_embd),  # positions
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd),  # until here, only branches are normalised
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Tokens of similar meaning should be close to each other both where they are read and where
        # they are predicted, so one matrix serves for both (Press & Wolf, 2017, arXiv:1608.05859).
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        # 0.02 is OpenAI's choice. It is near 1/√C for the widths of GPT-2, which keeps a matrix
        # product from blowing up or shrinking its input.
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() == 1:  # the gain of a LayerNorm
                p.fill_(1.0)
            elif name.endswith("c_proj.weight"):
                # 2 · n_layer branches are added to the residual stream. With this scale, the
                # variance of their sum does not depend on the depth.
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(std=0.02)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0  # padding

    def num_params(self):
        """The number of parameters as published: tied weights count once, padding doesn't count."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd

    def flops_per_token(self, T):
        """FLOPs per token of a forward and backward pass over T tokens (PaLM: Chowdhery et al.,
        2022, arXiv:2204.02311, appendix B)."""
        positions = sum(p.numel() for name, p in self.named_parameters() if "wpe" in name)
        # Each weight takes one multiplication and one addition in the forward pass, and twice that
        # in the backward pass, 6 in all. Position embeddings are only looked up. Attention
        # scores and the means weighted by them take another 12 · C · T a layer.
        attention = 12 * self.config.n_layer * self.config.n_embd * T
        return 6 * (self.num_params() - positions) + attention

    def forward(self, idx, targets=None):
        """Logits (B, T, V) for token ids (B, T), where T is at most block_size. With targets (B,
        T), the mean cross-entropy instead, in nats per token; targets of -100 are ignored."""
        T = idx.size(1)
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)

        # Autocast would leave this sum, the residual stream, in float32. bf16 halves its memory
        # traffic and gives the same loss (llm.c does this, too). fp16 lacks the range for it.
        device_type = idx.device.type
        autocast = torch.is_autocast_enabled(device_type)
        if autocast and torch.get_autocast_dtype(device_type) == torch.bfloat16:
            x = x.bfloat16()

        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            if recompute:
                x = recompute_in_backward(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.transformer.ln_f(x)

        # The padding's tokens get logits of -inf, and so a probability of 0. Cutting the padding
        # off instead would leave rows of an awkward length, which are slow.
        V = self.config.vocab_size
        token = torch.arange(self.config.padded_vocab_size, device=x.device)
        bias = torch.where(token < V, 0.0, -torch.inf).to(x.dtype)
        logits = F.linear(x, self.lm_head.weight, bias)
        if targets is None:
            return logits[:, :, :V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, generator=None):
        """Extend the token ids idx from (B, T) to (B, T + max_new_tokens). A temperature of 0
        always takes the likeliest token. With top_k, only the k likeliest can be drawn (Fan et al.,
        2018, arXiv:1805.04833, section 5)."""
        if temperature < 1e-6:
            temperature = 1.0
            top_k = 1
        k = min(top_k or self.config.vocab_size, self.config.vocab_size)
        for _ in range(max_new_tokens):
            # Each new token becomes part of the context of the next one. A context that has become
            # too long loses its beginning.
            context = idx[:, -self.config.block_size :]
            logits = self(context)[:, -1].float()  # (B, V), of the last position only
            values, tokens = logits.topk(k)
            # A low temperature makes likely tokens likelier still, a high one evens them out.
            probs = F.softmax(values / temperature, dim=1)
            drawn = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat((idx, tokens.gather(1, drawn)), dim=1)
        return idx

    def configure_optimizers(self, weight_decay, learning_rate):
        """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) with the settings of GPT-3."""
        # Decay pulls weights towards zero. That helps matrices, embeddings included, but would
        # distort biases and the gains of LayerNorms. Tied weights are listed and decayed once.
        matrices = [p for p in self.parameters() if p.dim() >= 2]
        vectors = [p for p in self.parameters() if p.dim() < 2]
        groups = [
            dict(params=matrices, weight_decay=weight_decay),
            dict(params=vectors, weight_decay=0.0),
        ]
        # 0.95 averages squared gradients over 20 steps or so. Adam's default of 0.999 would average
        # over 1,000, and adapt more slowly. "Fused" means that one kernel updates many parameters,
        # instead of one kernel for each operation on each of them.
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    @classmethod
    def from_pretrained(cls, source, **changes):
        """A model with the weights of `source`, in float32 on the CPU.

        `source` is anything that transformers loads as a GPT-2 (gpt2 to gpt2-xl, user/model on the
        hub, or a folder), or a checkpoint file of this program, nanoGPT or build-nanogpt. `changes`
        override fields of GPT2Config that weights don't dictate, such as attention. No code in a
        file is run. Raises SystemExit if the model is not GPT-2 as published.
        """
        checkpoints = sorted(Path(source).glob("*.pt"))
        if Path(source).is_file():
            config, weights = weights_of_file(Path(source))
        elif checkpoints and not Path(source, "config.json").exists():
            raise SystemExit(
                f"error: {source} is a folder of checkpoints; name one, such as {checkpoints[-1]}"
            )
        else:
            import transformers

            transformers.logging.set_verbosity_error()  # problems are reported below, in one line
            try:
                theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
                    source,
                    dtype=torch.float32,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            except Exception as error:  # a missing or foreign model can fail anywhere in it
                raise SystemExit(
                    f"error: {source} can't be loaded as a GPT-2 ({first_line(error)}); name gpt2 "
                    "to gpt2-xl, a model on the hub (`hf auth login` if it is private), or a "
                    "folder or checkpoint that exists"
                ) from error
            sizes = theirs.config.to_dict()
            published = transformers.GPT2Config().to_dict()
            wrong = [name for name in VARIANTS if sizes[name] != published[name]]
            if sizes["n_inner"] not in (None, 4 * sizes["n_embd"]):
                wrong.append("n_inner")
            # transformers ignores weights it does not know, and fills in missing ones at random.
            for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                for key in report[problem]:
                    if not str(key).endswith(".attn.masked_bias"):  # a constant in older files
                        wrong.append(f"{problem}: {key}")
            if not theirs.lm_head.weight.equal(theirs.transformer.wte.weight):
                wrong.append("the output head is not the embedding")
            if wrong:
                raise SystemExit(
                    f"error: {source} is not a GPT-2 as published: {wrong[0]}; choose another model"
                )
            config = config_of_sizes(sizes | dict(block_size=sizes["n_positions"]))
            weights = transposed(theirs.state_dict())
        model = cls(replace(config, **changes))
        model.load_weights(weights)
        return model

    def load_weights(self, weights):
        """Load a state dict, which must have all parameters and no others. Only the padding of the
        vocabulary may differ."""
        V = self.config.vocab_size
        # The file may have been padded in another way, or not at all.
        table = weights["transformer.wte.weight"][:V]
        table = F.pad(table, (0, 0, 0, self.config.padded_vocab_size - V))
        tied = {"transformer.wte.weight": table, "lm_head.weight": table}
        self.load_state_dict(weights | tied)

    def export_pretrained(self, folder):
        """Write a new folder from which transformers loads a model with equal logits. GPT-2's
        tokenizer is included if the model uses it. Raises SystemExit if this fails."""
        import transformers
        from safetensors import SafetensorError

        if folder.exists():
            raise SystemExit(f"error: --export {folder} already exists; choose another folder")
        config = self.config
        end_of_text = {"gpt2": 50256, "bytes": 256}.get(config.encoding)
        their_config = transformers.GPT2Config(
            vocab_size=config.padded_vocab_size,
            n_positions=config.block_size,
            n_ctx=config.block_size,  # for llama.cpp
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
        )
        theirs = transformers.GPT2LMHeadModel(their_config)
        theirs.load_state_dict(transposed(self.state_dict()))
        theirs.resize_token_embeddings(config.vocab_size)  # cuts the padding off
        if config.block_size < 512:
            # A pipeline would write 256 new tokens, which do not fit into a short context.
            theirs.generation_config.max_length = config.block_size

        try:
            theirs.save_pretrained(folder)
            if config.encoding == "gpt2":
                export_tokenizer(folder, config.block_size)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise SystemExit(
                f"error: --export {folder} can't be written ({first_line(error)}); "
                "make room, or choose another folder"
            ) from error


def transposed(weights):
    """A state dict with the weights of OpenAI's "Conv1D" layers transposed."""
    result = {}
    for name, value in weights.items():
        result[name] = value.t() if name.endswith(TRANSPOSED) else value
    return result


def config_of_sizes(sizes):
    """The configuration of a model that others have trained."""
    # Some models add a few special tokens to GPT-2's 50,257. With a vocabulary of any other size,
    # nothing says what the tokens mean.
    encoding = "gpt2" if 50257 <= sizes["vocab_size"] <= 51000 else None
    known = {name: sizes[name] for name in SIZE_FIELDS if name in sizes}
    return GPT2Config(encoding=encoding, **known)


def export_tokenizer(folder, block_size):
    """Write GPT-2's tokenizer for transformers. tiktoken downloads it once and keeps it."""
    from tiktoken.load import read_file_cached

    try:
        merges = read_file_cached(f"{TOKENIZER_URL}/vocab.bpe", MERGES_SHA256)
        vocab = read_file_cached(f"{TOKENIZER_URL}/encoder.json", VOCAB_SHA256)
    except (OSError, ValueError) as error:  # no network, or not the expected file
        say(f"the export has no tokenizer, since it can't be downloaded ({first_line(error)})")
        return
    (folder / "merges.txt").write_bytes(merges)
    (folder / "vocab.json").write_bytes(vocab)
    about = dict(tokenizer_class="GPT2Tokenizer", model_max_length=block_size)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


# -----------------------------------------------------------------------------
# Data: token shards, and which of their tokens a step sees


def find_shards(folder, split):
    """The shards of a split, "train" or "val", in file order."""
    # text_val_000000.npy, fineweb_train_000001.bin, and also nanoGPT's train.bin
    pattern = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    # Hidden files are not shards. macOS, for example, puts ._NAME beside NAME on foreign disks.
    return sorted(path for path in folder.glob("[!.]*") if pattern.fullmatch(path.name))


def read_manifest(folder):
    """What manifest.json says about the shards beside it. Without one they hold GPT-2's tokens.
    Raises SystemExit if it does not say what the tokens mean."""
    path = folder / "manifest.json"
    if not path.exists():
        if folder == DEMO_DATA:  # written later, when the run starts
            return dict(encoding="bytes", vocab_size=257)
        if Path(folder, "meta.pkl").exists():
            # nanoGPT writes this file only if the tokens are not GPT-2's. It is a pickle, and
            # opening it could run code.
            raise SystemExit(
                f"error: {folder} has a meta.pkl of nanoGPT, so its tokens are not GPT-2's; write "
                f'{path} with {{"encoding": "characters", "vocab_size": 65}}, where vocab_size is '
                "what nanoGPT's prepare.py printed"
            )
        return dict(encoding="gpt2", vocab_size=50257)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if type(manifest["encoding"]) is not str or type(manifest["vocab_size"]) is not int:
            raise ValueError("encoding must be a string, and vocab_size a whole number")
        if not 0 < manifest["vocab_size"] <= 2**16:
            raise ValueError("vocab_size must be from 1 to 65536")
        return manifest
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SystemExit(
            f"error: {path} does not describe token shards ({error!r:.200}); make it again"
        ) from error


def read_shard(path):
    """Memory-map the tokens of a shard, as a one-dimensional array of uint16.

    There are three formats: .npy files; .bin files of llm.c and modded-nanogpt, which begin with a
    header of 256 int32 (magic number, version, number of tokens); and train.bin and val.bin of
    nanoGPT, which hold nothing but tokens. Raises SystemExit for any other file.
    """
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
        else:
            magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
            offset = 1024
            if magic == 20240520:
                if version != 1 or path.stat().st_size != offset + 2 * count:
                    raise ValueError("its header has a wrong version or token count")
            elif path.name in ("train.bin", "val.bin"):
                offset = 0
            else:
                raise ValueError("it has no header")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=offset)
        if tokens.dtype != np.uint16 or tokens.ndim != 1:
            raise ValueError("it is not a one-dimensional array of uint16")
    except Exception as error:  # a damaged .npy header can fail anywhere in NumPy
        raise SystemExit(
            f"error: {path} is not a token shard ({first_line(error)}); make it again, or remove it"
        ) from error
    return np.asarray(tokens)  # a plain array that still maps the file


# Two are kept, since a batch may contain the end of one epoch and the start of the next.
@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The numbers from 0 to n - 1 in the random order of an epoch."""
    # RandomState is NumPy's old interface. NumPy promises that it will always draw the same
    # numbers, and makes no such promise for the new one.
    generator = np.random.RandomState(np.random.MT19937([seed, epoch]))
    return generator.permutation(n).astype(np.uint32)


class DataLoaderLite:
    """Serves windows of T + 1 tokens without keeping state: a step's number says what it sees.

    A shard of n tokens holds (n - 1) // T windows. The windows of all shards are numbered from 0 to
    W - 1, in file order. Sample s of the run is window π(s mod W), where π is a permutation drawn
    from the seed and the epoch s // W, or the identity without `shuffle`. In micro-batch i of the
    run, a rank gets B samples, starting at (i · world_size + rank) · B. So a step sees the same
    tokens with any micro-batch size, on any number of GPUs, and after any interruption.
    """

    def __init__(self, cfg, split, rank=0, world_size=1):
        """Raises SystemExit if cfg.data holds no window of the split, "train" or "val"."""
        self.cfg = cfg
        self.B = cfg.micro_batch_size
        self.T = cfg.sequence_length
        self.rank = rank
        self.world_size = world_size
        self.shuffle = cfg.shuffle and split == "train"
        self.paths = find_shards(Path(cfg.data), split)
        # The tokens stay on the disk. The operating system reads the part that a window needs, and
        # keeps in memory what it has room for.
        self.shards = [read_shard(path) for path in self.paths]
        self.num_tokens = sum(len(shard) for shard in self.shards)
        # Windows share a border: the last target of one is the first input of the next.
        windows = [max(0, len(shard) - 1) // self.T for shard in self.shards]
        self.num_windows = sum(windows)
        self.first_window = np.cumsum(windows) - windows  # the number of each shard's first window
        if self.num_windows == 0:
            raise SystemExit(
                f"error: --data {cfg.data} has no {split} shard (NAME_{split}_000000.npy or .bin) "
                f"with {self.T} + 1 tokens; choose another folder, lower --sequence_length, or "
                "make the shards again with another --shard_size"
            )

    def window(self, s):
        """The T + 1 tokens of sample s, as uint16. Raises SystemExit for a token that is not in the
        vocabulary."""
        # Over all epochs together, every window is seen equally often.
        epoch, k = divmod(s, self.num_windows)
        if self.shuffle:
            k = permutation(self.num_windows, self.cfg.seed, epoch)[k]
        shard = np.searchsorted(self.first_window, k, side="right") - 1
        start = (k - self.first_window[shard]) * self.T
        tokens = self.shards[shard][start : start + self.T + 1]
        # On a GPU, a token beyond the embedding is an obscure error that names no file.
        if tokens.max() >= self.cfg.vocab_size:
            raise SystemExit(
                f"error: {self.paths[shard]} has token {tokens.max()}, beyond the vocabulary of "
                f"{self.cfg.vocab_size}; choose other --data, or correct vocab_size in its manifest"
            )
        return tokens

    def batch(self, i):
        """This rank's part of micro-batch i: inputs and targets, int64 (2, B, T)."""
        first = (i * self.world_size + self.rank) * self.B
        rows = np.stack([self.window(first + b) for b in range(self.B)])
        tokens = torch.from_numpy(rows.astype(np.int64))  # (B, T + 1)
        # At each position the model predicts the token that comes next.
        batch = torch.stack((tokens[:, :-1], tokens[:, 1:]))
        # A GPU copies from pinned memory by itself, while the CPU carries on.
        if self.cfg.device.startswith("cuda"):
            batch = batch.pin_memory()
        return batch.to(self.cfg.device, non_blocking=True)


# -----------------------------------------------------------------------------
# Evaluation and samples


def gather_from_ranks(value):
    """The values of all ranks, in the order of the ranks. Every rank has to call this, or those
    that do will wait for the others."""
    if WORLD_SIZE == 1:
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


@torch.no_grad()
def validation_loss(model, loader, val_tokens, device, progress=iter):
    """The mean loss over the first `val_tokens` tokens of the loader, in nats per token. All ranks
    share the work. `progress` wraps the loop over batches, and may end it early."""
    # Windows are counted exactly, so that the result doesn't depend on the batch or the GPUs.
    num_windows = min(loader.num_windows, max(1, val_tokens // loader.T))
    num_batches = math.ceil(num_windows / (loader.B * loader.world_size))
    total = torch.zeros((), device=device)
    for i in progress(range(num_batches)):
        first = (i * loader.world_size + loader.rank) * loader.B
        count = min(loader.B, num_windows - first)
        if count > 0:
            x, y = loader.batch(i)
            # The last batch may hold more windows than are wanted. They stay in it, so that
            # compiled code sees one shape only, but their targets are ignored.
            y[count:] = -100
            total += model(x, y) * count
    return sum(gather_from_ranks(total.item())) / num_windows


def encode_prompt(encoding, prompt, block_size):
    """The tokens of a prompt. An empty one becomes <|endoftext|>, which begins a document."""
    tokens = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    if len(tokens) > block_size:
        raise SystemExit(
            f"error: the prompt has {len(tokens)} tokens, but the context {block_size}; shorten it"
        )
    return tokens


def print_samples(model, encoding, cfg, prompt, seed):
    """Print cfg.num_samples continuations of a prompt, each up to the end of its document."""
    device = model.lm_head.weight.device
    tokens = encode_prompt(encoding, prompt, model.config.block_size)
    idx = torch.tensor([tokens] * cfg.num_samples, device=device)  # (num_samples, T)
    generator = torch.Generator(device).manual_seed(seed)  # other random numbers stay as they are
    rows = model.generate(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, generator)
    for i, row in enumerate(rows.tolist()):
        # <|endoftext|> begins another document. Fine-tuned models may have special tokens with
        # larger ids, which the encoding can't decode.
        end = len(tokens)
        while end < len(row) and row[end] < encoding.eot_token:
            end += 1
        text = encoding.decode(row[:end])
        # An untrained model may write control characters, which would confuse a terminal.
        text = re.sub(r"[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f]", "\ufffd", text)
        say(f"--- sample {i}\n{text}")


def open_encoding(cfg):
    """The tiktoken.Encoding of the tokens. Raises SystemExit if it is not known, has more tokens
    than the model, or needs files that can't be downloaded."""
    require_sibling("fineweb.py")
    from fineweb import get_encoding

    if cfg.encoding is None:
        raise SystemExit(f"error: nothing says what the model's {cfg.vocab_size} tokens mean")
    encoding = get_encoding(cfg.encoding)
    if encoding.n_vocab > cfg.vocab_size:
        raise SystemExit(
            f"error: {cfg.encoding} has more than the {cfg.vocab_size} tokens there are"
        )
    return encoding


def require_sibling(name):
    """Raise SystemExit if a script beside this one is missing. Training itself needs none."""
    if not Path(__file__).with_name(name).exists():
        raise SystemExit(f"error: {name} is missing; put it beside train_gpt2.py")


def get_questions(encoding):
    """The questions of HellaSwag. If something is missing, none, and a line that says what."""
    for path in (HELLASWAG_FILE, Path(__file__).with_name("hellaswag.py")):
        if not path.exists():
            say(f"no HellaSwag: {path} does not exist; python hellaswag.py downloads the questions")
            return []
    from hellaswag import read_questions

    return read_questions(HELLASWAG_FILE, encoding)


# -----------------------------------------------------------------------------
# Checkpoints. They know the run, not the architecture, so a model that you change is saved as well.


def run_identity(cfg, loaders):
    """What has to stay the same when a run is resumed. Everything else may change."""
    names = ["pad_vocab", "seed", "shuffle", "total_batch_size", "sequence_length"]
    identity = {name: getattr(cfg, name) for name in SIZE_FIELDS + names}
    # The data are known by the name, the size, and the first and last 64 KiB of every shard.
    digest = hashlib.sha256()
    for loader in loaders:
        for path, shard in zip(loader.paths, loader.shards, strict=True):
            digest.update(f"{path.name} {len(shard)}\n".encode(errors="replace"))
            digest.update(shard[: 2**15].tobytes())
            digest.update(shard[-(2**15) :].tobytes())
    return identity | dict(data=digest.hexdigest())


def save_checkpoint(cfg, step, model, optimizer, scaler, identity):
    """Write all that is needed to resume a run after `step` steps, then remove older checkpoints.
    Raises SystemExit if this fails."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise SystemExit(
            f"error: the weights after {step} steps are not finite, and were not saved; "
            f"lower --max_lr, or try --dtype fp32; {what_is_saved(cfg.log_dir)}"
        )
    # Tensors and plain values only: such a file can be loaded without running code.
    checkpoint = dict(
        step=step,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
        config={f.name: getattr(cfg, f.name) for f in fields(GPT2Config)},
        train_config=asdict(cfg) | dict(processes=WORLD_SIZE),
        identity=identity,
    )
    # The process may be killed at any moment, so the file gets its name only when all of it is on
    # the disk. A partial file always has the same name, and the next checkpoint overwrites it.
    path = Path(cfg.log_dir, f"checkpoint_{step:05d}.pt")
    partial = Path(cfg.log_dir, "checkpoint.tmp")
    with explain_failed_write(path):
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # It still exists only if something failed.
    # Older checkpoints may go only now that this one is safe. Newer ones may exist if the run was
    # resumed from an older checkpoint because a newer one was damaged. They stay.
    older = [other for other in checkpoint_paths(path.parent) if step_of(other) <= step]
    for other in older[: -cfg.keep_checkpoints]:  # with 0, all are kept
        try:
            other.unlink()
        except OSError as error:
            say(f"{other} can't be removed ({error.strerror}) and stays")


def step_of(path):
    return int(path.stem.removeprefix("checkpoint_"))


def checkpoint_paths(log_dir):
    """The checkpoints in a folder, from the first step to the last."""
    paths = [p for p in log_dir.glob("checkpoint_*.pt") if re.fullmatch(r"checkpoint_\d+", p.stem)]
    return sorted(paths, key=step_of)


def what_is_saved(log_dir):
    """Which checkpoint the next start would resume from, for the error message of a run."""
    paths = checkpoint_paths(Path(log_dir))
    if not paths:
        return "there is no checkpoint yet"
    return f"the next start resumes from {paths[-1]}"


@contextlib.contextmanager
def explain_failed_write(path):
    """Turn a failure to write a file of the log folder into a SystemExit."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # PyTorch turns a full disk into a RuntimeError that does not say so.
        cause = error.__context__ or error
        raise SystemExit(
            f"error: {path} can't be written ({first_line(cause)}); make room on the disk, or make "
            f"the folder writable; {what_is_saved(path.parent)}"
        ) from error


def load_checkpoint(path):
    """Load a dict that torch.save wrote, without running code in the file. Raises SystemExit if it
    can't be read."""
    try:
        # The file is a zip archive with a checksum for each tensor, which torch.load ignores.
        damaged = zipfile.ZipFile(path).testzip()
        if damaged:
            raise ValueError(f"{damaged} is damaged")
        # build-nanogpt's files hold an object of its class GPTConfig. A namespace stands in for it.
        stand_in = (types.SimpleNamespace, "__main__.GPTConfig")
        with torch.serialization.safe_globals([stand_in]):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # a damaged or foreign file can fail anywhere in zipfile or torch
        raise SystemExit(
            f"error: {path} is not a readable checkpoint ({first_line(error)}); another is needed"
        ) from error


def newest_checkpoint(log_dir):
    """The newest readable checkpoint in a folder, or None if there are no checkpoints. Raises
    SystemExit if there are some, but none can be read."""
    paths = checkpoint_paths(log_dir)
    for path in reversed(paths):
        try:
            checkpoint = load_checkpoint(path)
        except SystemExit as error:
            say(reason(error))
            continue
        if "identity" in checkpoint:
            return checkpoint
        say(f"{path} is not a checkpoint of this program")
    if paths:
        raise SystemExit(f"error: no checkpoint in {log_dir} can be read; choose another --log_dir")
    return None


def latest_log_dir():
    """Whichever of log and log_demo has the newest checkpoint, by the time of the file."""
    paths = checkpoint_paths(Path("log")) + checkpoint_paths(Path("log_demo"))
    return str(max(paths, key=os.path.getmtime, default=Path("log/none")).parent)


def weights_of_file(path):
    """The configuration and the weights in a checkpoint of this program, nanoGPT or build-nanogpt.
    Raises SystemExit for any other file."""
    if path.suffix in (".safetensors", ".bin", ".json"):
        raise SystemExit(f"error: {path} is not a whole model; name its folder, {path.parent}")
    checkpoint = load_checkpoint(path)
    if "identity" in checkpoint:
        return GPT2Config(**checkpoint["config"]), checkpoint["model"]
    try:
        sizes = checkpoint.get("model_args") or vars(checkpoint["config"])
        if sizes["vocab_size"] == 50304:
            sizes["vocab_size"] = 50257  # the rest is padding
        weights = {}
        for name, value in checkpoint["model"].items():
            name = re.sub(r"^((_orig_mod|module)\.)+", "", name)  # prefixes of torch.compile, DDP
            if not name.endswith(".attn.bias"):  # a causal mask
                weights[name] = value
        table = weights["transformer.wte.weight"]
        if not table.equal(weights.get("lm_head.weight", table)):
            raise ValueError("the output head is not the embedding")
        if "transformer.ln_f.bias" not in weights:
            raise ValueError("it has no biases")
        return config_of_sizes(sizes), weights
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise SystemExit(
            f"error: {path} does not hold a GPT-2 of this program, nanoGPT or build-nanogpt "
            f"({error!r}); choose another file"
        ) from error


# -----------------------------------------------------------------------------
# Log, and the signals that stop a run


def lock_log_dir(log_dir):
    """Make the folder, and lock out other runs until the returned context ends. Raises SystemExit
    if another run is in it, or if nothing can be written there."""
    if RANK != 0:
        return contextlib.nullcontext()
    path = log_dir / ".lock"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        # A run that was killed may take a few seconds to end.
        return filelock.FileLock(path).acquire(timeout=5)
    except filelock.Timeout as error:
        raise SystemExit(
            f"error: --log_dir {log_dir} is in use by another run; wait for it, or choose another"
        ) from error
    except (OSError, NotImplementedError) as error:
        if not path.exists():
            raise SystemExit(
                f"error: --log_dir {log_dir} can't be written ({first_line(error)}); choose another"
            ) from error
        # Some network file systems have no locks.
        say(f"{path} can't be locked ({first_line(error)}); keep other runs out of this folder")
        return contextlib.nullcontext()


class Logger:
    """Reports the figures of a run: on the screen, in log.txt and in curves.png.

    log.txt has a line `step stream value` for each figure. When a run is resumed at `first_step`,
    the lines from that step on are removed, since they will be written again. On ranks other than
    0, a logger does nothing.
    """

    def __init__(self, cfg, first_step, flops_per_token):
        self.cfg = cfg
        self.flops_per_token = flops_per_token
        self.peak_flops = peak_flops(cfg)
        self.recent_seconds = collections.deque(maxlen=50)  # of the latest steps
        self.path = Path(cfg.log_dir, "log.txt")
        if RANK == 0:
            with explain_failed_write(self.path):
                self.drop_lines(first_step)

    def drop_lines(self, first_step):
        if not self.path.exists():
            return
        if first_step == 0:
            # The log of a run that left no checkpoint is kept under another name.
            self.path.rename(self.path.with_name(f"log_{self.path.stat().st_mtime_ns}.txt"))
            return
        # Whole lines only: a kill may have cut the last one short.
        text = self.path.read_text(errors="replace")
        lines = re.findall(r"^((\d+) \w+ [-+.\w]+\n)", text, re.MULTILINE)
        partial = self.path.with_suffix(".tmp")
        partial.write_text("".join(line for line, step in lines if int(step) < first_step))
        partial.replace(self.path)

    def write(self, step, **figures):
        """Add figures to log.txt."""
        if RANK != 0:
            return
        lines = [f"{step} {stream} {value:.8g}\n" for stream, value in figures.items()]
        with explain_failed_write(self.path), open(self.path, "a") as file:
            file.write("".join(lines))

    def say(self, step, message):
        say(f"step {step:5d}/{self.cfg.max_steps} | {message}")

    def step(self, step, loss, lr, norm, seconds):
        """Write the figures of a training step, and print them every cfg.print_every steps."""
        # The median of the latest steps is not misled by the first one, which compiles the model.
        self.recent_seconds.append(seconds)
        tps = self.cfg.total_batch_size / seconds
        self.write(step, train=loss, lr=lr, norm=norm, tps=tps)
        steps_left = self.cfg.max_steps - step - 1
        if step % self.cfg.print_every != 0 and steps_left > 0:
            return
        speed = f"{seconds * 1e3:.0f} ms | {tps:,.0f} tok/s"
        if self.peak_flops:
            speed += f" | mfu {self.flops_per_token * tps / self.peak_flops:.1%}"
        eta = duration(steps_left * np.median(self.recent_seconds))
        self.say(step, f"loss {loss:.4f} | lr {lr:.4e} | norm {norm:.2f} | {speed} | eta {eta}")

    def draw_curves(self):
        try:
            if RANK == 0:
                draw_curves(self.cfg)
        except (ImportError, OSError) as error:  # no matplotlib, or a full disk
            say(f"curves.png can't be drawn ({first_line(error)})")


def duration(seconds):
    """Seconds as 2m05s, or 1h46m."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{seconds:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


# Published figures of GPT-2, by layers and channels: the HellaSwag accuracy (acc_norm), and the
# validation loss on FineWeb-Edu that build-nanogpt and llm.c compare themselves with
PUBLISHED_FIGURES = {
    (12, 768): dict(hella=0.2945, train=3.2924),
    (24, 1024): dict(hella=0.3752),
    (36, 1280): dict(hella=0.4320),
    (48, 1600): dict(hella=0.4889),
}
AXIS_LABELS = dict(
    train="loss (nats per token)",
    norm="gradient norm, before clipping",
    tps="throughput (tokens per second)",
    hella="HellaSwag accuracy (acc_norm)",
)


def draw_curves(cfg):
    """Plot log.txt as curves.png, with the published figures of a model of this size."""
    from matplotlib.figure import Figure  # unlike pyplot, it needs no display

    curves = collections.defaultdict(list)
    for line in Path(cfg.log_dir, "log.txt").read_text().splitlines():
        step, stream, value = line.split()
        curves[stream].append((int(step), float(value)))
    published = PUBLISHED_FIGURES.get((cfg.n_layer, cfg.n_embd), {})

    figure = Figure(figsize=(12, 8), layout="constrained")
    top = ["train", "hella"] if curves["hella"] else ["train", "train"]
    for stream, axes in figure.subplot_mosaic([top, ["norm", "tps"]]).items():
        axes.set(xlabel="step", ylabel=AXIS_LABELS[stream])
        axes.grid(alpha=0.3)
        if curves[stream]:
            steps, values = np.array(curves[stream]).T
            axes.plot(steps, values, color="C0", alpha=0.3)
            # The running mean over a hundredth of the run. A few slow steps would spoil the mean of
            # the throughput, so its median is drawn.
            window = math.ceil(len(values) / 100)
            trend = np.convolve(values, np.full(window, 1 / window), mode="valid")
            if stream == "tps":
                trend = np.full_like(trend, np.median(values))
            middle = steps[window // 2 :][: len(trend)]
            axes.plot(middle, trend, color="C0", label=f"{stream}: {trend[-1]:,.2f}")
        if stream == "train" and curves["val"]:
            steps, values = np.array(curves["val"]).T
            axes.plot(steps, values, "o-", color="C1", label=f"val: {values[-1]:.5g}")
        # A loss can only be compared with one on the same data.
        if stream in published and (stream == "hella" or Path(cfg.data) == FINEWEB_DATA):
            label = f"published: {published[stream]}"
            axes.axhline(published[stream], color="gray", linestyle="--", label=label)
        if axes.lines:
            axes.legend()
    figure.savefig(Path(cfg.log_dir, "curves.png"), dpi=120)


class StopSignal:
    """Records a signal that asks the run to stop, so that it can finish its step and save first.

    SIGINT is Ctrl-C, SIGTERM comes from torchrun and batch systems, SIGHUP from a lost connection.
    """

    def __init__(self):
        self.signum = 0
        self.previous_handlers = {}

    def __enter__(self):
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for signum in {signal.SIGINT, signal.SIGTERM, hangup}:
                # nohup makes a run ignore SIGHUP, and that must stay so.
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self.previous_handlers[signum] = signal.signal(signum, self.handle)
        return self

    def __exit__(self, *exception):
        for signum, handler in self.previous_handlers.items():
            signal.signal(signum, handler)

    def handle(self, signum, frame):
        self.signum = self.signum or signum
        if signum == signal.SIGINT:
            # Whoever presses Ctrl-C a second time does not want to wait.
            signal.signal(signum, signal.default_int_handler)

    def on_any_rank(self):
        """Whether a signal has reached any rank. Every rank has to call this."""
        return any(gather_from_ranks(self.signum))

    def watch(self, batches):
        """Yield the batches of an evaluation until a signal comes, with a bar on a terminal."""
        hidden = None if RANK == 0 and sys.stderr else True  # None shows the bar only on a terminal
        for batch in tqdm(batches, "evaluation", leave=False, delay=1, disable=hidden):
            if self.signum:
                return
            yield batch


# -----------------------------------------------------------------------------
# Set-up: device, processes, precision, and how much fits into memory


def choose_device(name):
    """The named device, or the fastest one. Raises SystemExit if it is not available."""
    found = ["cpu"]
    if torch.backends.mps.is_available() and WORLD_SIZE == 1:
        found.append("mps")
    for i in range(torch.cuda.device_count()):
        if WORLD_SIZE == 1 or i == LOCAL_RANK:  # each rank has a GPU of its own
            found.append(f"cuda:{i}")
    if name is None:
        name = "cuda" if torch.cuda.is_available() else found[-1]
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"
    if name not in found:
        raise SystemExit(f"error: there is no device {name} here; choose {' or '.join(found)}")
    if name.startswith("cuda"):
        torch.cuda.set_device(name)
    return torch.device(name)


def join_processes(device):
    """Join the other processes of torchrun. Raises SystemExit if the environment is wrong."""
    complete = all(os.environ.get(name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if not 0 <= RANK < WORLD_SIZE or (WORLD_SIZE > 1 and not complete):
        raise SystemExit(
            "error: of RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, some are set and others "
            "missing or wrong; start with torchrun, which sets them all, or unset them"
        )
    if WORLD_SIZE > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def choose_dtype(device):
    """The fastest precision that trains well on a device."""
    if device.type == "cuda":
        # bf16 has the range of float32 with fewer digits. Older GPUs have fp16 only, whose small
        # range needs loss scaling.
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "fp32"


def set_precision(device, dtype):
    """Set the precision of float32 matrix products, and return the context to compute in.

    fp32 is exact. tf32 rounds the factors of products to 10 bits where the device can. bf16 and
    fp16 compute products in 16 bits, and what stays in float32 may use TF32.
    """
    # Weights stay in float32 all the same, because an update is often too small to change a number
    # in 16 bits. Only what is computed from them has fewer bits.
    tf32 = device.type == "cuda" and dtype != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=dtype in ("bf16", "fp16"))


def choose_compile(asked, device, model_name):
    """Whether to use torch.compile. It needs a compiler that may be missing, so it is tried here.
    Raises SystemExit if it was asked for and fails."""
    wanted = device.type == "cuda" and model_name != "demo" if asked is None else asked
    if not wanted:
        return False
    try:
        torch.compile(torch.sin)(torch.ones(1, device=device))
        return True
    except Exception as error:  # whatever Triton, a C++ compiler or a driver has to say
        problem = f"torch.compile does not work here ({first_line(error)})"
    if asked:
        raise SystemExit(f"error: {problem}; install a compiler, or leave out --compile")
    say(f"{problem}; training without it")
    return False


def activation_bytes_per_token(cfg):
    """A safe estimate of the bytes of memory per token that the forward and backward pass take.

    For the 124M model on an H100, at most 0.8 of it was measured (tests/BENCHMARKS.md).
    """
    itemsize = 2 if cfg.dtype in ("bf16", "fp16") else 4  # bytes per number
    # Compiled code stores 16 vectors of n_embd numbers a layer, and the logits twice. Otherwise
    # every operation stores its result, much of it in float32 whatever the precision.
    layer = cfg.n_embd * (16 * itemsize if cfg.compile else 68)
    logits = cfg.padded_vocab_size * (2 * itemsize if cfg.compile else 12)
    if cfg.attention == "manual":
        layer += 8 * cfg.n_head * cfg.sequence_length  # the (T, T) matrices
    if cfg.activation_checkpointing:
        # The input of each layer is stored, and one layer at a time is computed again.
        return layer + 4 * cfg.n_layer * cfg.n_embd + logits
    return cfg.n_layer * layer + logits


def choose_micro_batch_size(cfg, device):
    """How many sequences to process at a time: as many as should safely fit on every rank, but no
    more than it takes to keep the device busy."""
    tokens = 2**12
    if device.type == "cuda":
        num_params = 12 * cfg.n_layer * cfg.n_embd**2 + cfg.padded_vocab_size * cfg.n_embd
        # A parameter takes 16 bytes: itself, its gradient and the two moments of AdamW.
        room = 0.9 * torch.cuda.mem_get_info()[0] - 16 * num_params
        # On an H100, 2^17 tokens were 2% faster than 2^16. More would hardly gain anything.
        tokens = min(2**17, int(room / activation_bytes_per_token(cfg)))
    return largest_micro_batch(cfg, min(gather_from_ranks(tokens)) // cfg.sequence_length)


def largest_micro_batch(cfg, limit):
    """The largest micro-batch up to a limit that divides a step evenly, and at least 1."""
    sequences = cfg.total_batch_size // (cfg.sequence_length * WORLD_SIZE)
    return max(B for B in range(1, max(2, limit + 1)) if sequences % B == 0)


@contextlib.contextmanager
def explain_out_of_memory(cfg):
    """Turn running out of memory into a SystemExit that names what to try."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one, too
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        B = cfg.micro_batch_size
        if B is None:
            raise SystemExit("error: out of memory; try fewer --num_samples") from error
        advice = f"--micro_batch_size {largest_micro_batch(cfg, B - 1)}"
        if B == 1:
            advice = "--activation_checkpointing, a smaller --sequence_length or a smaller model"
        raise SystemExit(
            f"error: out of memory with a micro-batch of {B} sequences; try {advice}"
        ) from error


# Peak TFLOP/s of dense matrix products in 16 bits. The first name that fits a GPU counts.
PEAK_TERAFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "T4": 65,
}


def peak_flops(cfg):
    """The peak FLOP/s of all devices together, which MFU is a share of; 0 if not known."""
    if cfg.device.startswith("cuda") and cfg.dtype in ("bf16", "fp16"):
        for name, teraflops in PEAK_TERAFLOPS.items():
            if re.search(rf"\b{name}\b", torch.cuda.get_device_name()):
                return teraflops * 1e12 * WORLD_SIZE
    return 0


# -----------------------------------------------------------------------------
# Training


def get_lr(step, cfg):
    """The learning rate of a step: linear warm-up, then half a cosine from max_lr down to min_lr
    (Loshchilov & Hutter, 2017, arXiv:1608.03983)."""
    if step < cfg.warmup_steps:
        # Adam's first estimates come from few gradients, so its first steps should be small.
        return cfg.max_lr * (step + 1) / cfg.warmup_steps
    # A high rate makes quick progress early on, and a low one lets the weights settle at the end.
    progress = (step - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)


def initial_model(cfg, checkpoint, pretrained):
    """The model to start with: pretrained, from a checkpoint, or with random weights."""
    model = pretrained or GPT2(cfg)
    if checkpoint:
        model.load_weights(checkpoint["model"])
    return model


def make_demo_data():
    """Write the demo's shards, once on each machine."""
    if LOCAL_RANK == 0 and not DEMO_DATA.exists():
        require_sibling("fineweb.py")
        from fineweb import write_demo_data

        write_demo_data(DEMO_DATA)
    gather_from_ranks(None)  # the other ranks wait here


def check_same_files(*found):
    """Raise SystemExit if the ranks do not see the same files. Each machine has disks of its own,
    and if their contents differ, the ranks would average the gradients of different runs, or wait
    for each other forever."""
    seen = gather_from_ranks(found)
    if seen.count(seen[0]) < WORLD_SIZE:
        raise SystemExit(
            "error: the processes do not see the same data, checkpoints and HellaSwag questions; "
            f"give all of them the same files: {seen}"
        )


def check_same_run(cfg, checkpoint, identity):
    """Compare a run with its checkpoint, and say what has changed. Raises SystemExit if the
    checkpoint belongs to another run, or is past the last step."""
    for name, old in checkpoint["identity"].items():
        value = identity.get(name)
        if value != old:
            raise SystemExit(
                f"error: {cfg.log_dir} holds another run: its {name} is {old}, not {value}; "
                "choose another --log_dir, or the old flags and data"
            )
    step = checkpoint["step"]
    if step > cfg.max_steps:
        raise SystemExit(
            f"error: {cfg.log_dir} is at step {step}, past --max_steps {cfg.max_steps}; raise it"
        )
    say(f"resuming {cfg.log_dir} after {step:,} steps")
    before = checkpoint["train_config"]
    now = asdict(cfg) | dict(processes=WORLD_SIZE)
    changes = [f"{n} {before.get(n)} -> {now[n]}" for n in now if now[n] != before.get(n)]
    if changes:
        say(f"changed since the last start: {', '.join(changes)}")


def is_due(step, every, max_steps):
    """Whether what is done every so many steps, and after the last one, is due at this step."""
    return every > 0 and (step % every == 0 or step == max_steps)


def train(cfg, checkpoint, pretrained):
    """Train with what resolve_config() returns. Returns the exit code: 0, or 128 + the signal."""
    device = torch.device(cfg.device)
    autocast = set_precision(device, cfg.dtype)
    torch.manual_seed(cfg.seed)  # all ranks draw the same initial weights
    if cfg.deterministic:
        # Without this setting, cuBLAS may choose another algorithm each time.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # Samples and HellaSwag need these. Training carries on without them.
    encoding = None
    questions = []
    if cfg.sample_every or cfg.hellaswag_every:
        try:
            encoding = open_encoding(cfg)
        except SystemExit as error:
            say(f"no samples and no HellaSwag: {reason(error)}")
    if encoding and cfg.sample_every:
        encode_prompt(encoding, cfg.prompt, cfg.block_size)  # refuses one that is too long
    if encoding and cfg.hellaswag_every and cfg.encoding == "gpt2":
        questions = get_questions(encoding)

    # Data
    if Path(cfg.data) == DEMO_DATA:
        make_demo_data()
    train_loader = DataLoaderLite(cfg, "train", RANK, WORLD_SIZE)
    val_loader = DataLoaderLite(cfg, "val", RANK, WORLD_SIZE)
    if not read_manifest(Path(cfg.data)).get("finished", True):
        say(f"{cfg.data} is still being made: {train_loader.num_tokens:,} training tokens so far")

    # Do all ranks see the same run, and does the checkpoint belong to it?
    identity = run_identity(cfg, [train_loader, val_loader])
    step = checkpoint["step"] if checkpoint else 0
    check_same_files(identity, step, len(questions))
    if checkpoint:
        check_same_run(cfg, checkpoint, identity)

    # Model and optimiser, new or as they were saved
    model = initial_model(cfg, checkpoint, pretrained).to(device)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.max_lr)
    # Many gradients are too small for fp16. The scaler multiplies the loss, and with it all
    # gradients, by a large number, and divides the gradients by it before they are used.
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")
    if checkpoint:
        groups = optimizer.state_dict()["param_groups"]  # rate and decay of the current flags
        optimizer.load_state_dict(checkpoint["optimizer"] | dict(param_groups=groups))
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])

    # The three models below share their weights. Training and validation always use one batch
    # shape, so they can use compiled code. HellaSwag and samples have a new shape each time, for
    # which the compiler would have to start again, so they use `model` itself.
    compiled_model = torch.compile(model, dynamic=False) if cfg.compile else model
    ddp_model = compiled_model
    if WORLD_SIZE > 1:
        # DDP averages the gradients of all ranks during the backward pass, beginning with those of
        # the last layers while the first ones are still being computed. A compiled model delivers
        # all gradients at once, at the end, unless PyTorch cuts it into parts (14 of them for
        # the 124M model), as it does by default. We estimate that the parts, which fuse fewer
        # operations, would cost 3.8 ms in every micro-step, and that the exchange at the end costs
        # 2.4 ms per step over NVLink (871 MB per GPU). So the model stays in one piece.
        torch._dynamo.config.optimize_ddp = False
        ddp_model = nn.parallel.DistributedDataParallel(
            compiled_model, gradient_as_bucket_view=True
        )

    # A step is half a million tokens by default, which no GPU holds at once. It is split among the
    # ranks, and what is left to each rank into micro-steps that fit into memory.
    B = cfg.micro_batch_size
    T = cfg.sequence_length
    grad_accum_steps = cfg.total_batch_size // (B * T * WORLD_SIZE)
    print_settings(cfg)
    say(
        f"{model.num_params():,} parameters; a step is {B} sequences × {T} tokens "
        f"× {grad_accum_steps} micro-steps × {WORLD_SIZE} processes"
    )
    say(f"a uniform guess has a loss of ln {cfg.vocab_size:,} = {math.log(cfg.vocab_size):.4f}")

    saved_step = step
    stopping = False  # whether a signal has reached any rank
    x, y = train_loader.batch(step * grad_accum_steps)
    with lock_log_dir(Path(cfg.log_dir)), StopSignal() as stop:
        logger = Logger(cfg, step, model.flops_per_token(T))
        while True:
            # Once in a while, and when the run has to stop: save a checkpoint (rank 0). It comes
            # before the evaluations, so that the weights are safe whatever goes wrong in them.
            save = is_due(step, cfg.checkpoint_every, cfg.max_steps)
            save = save or (stopping and cfg.checkpoint_every > 0)
            if save and step > saved_step:
                if RANK == 0:
                    save_checkpoint(cfg, step, model, optimizer, scaler, identity)
                    logger.draw_curves()
                saved_step = step
            if stopping:
                break

            # Once in a while: measure the loss on the validation data (all ranks share the work).
            model.eval()
            if is_due(step, cfg.val_every, cfg.max_steps):
                with autocast:
                    val_loss = validation_loss(
                        compiled_model, val_loader, cfg.val_tokens, device, stop.watch
                    )
                stopping = stop.on_any_rank()
                if not stopping:
                    logger.write(step, val=val_loss)
                    perplexity = math.exp(min(val_loss, 99))  # exp overflows at 710
                    logger.say(step, f"val loss {val_loss:.4f} | perplexity {perplexity:.2f}")

            # Once in a while: answer HellaSwag's questions (all ranks share them).
            if questions and is_due(step, cfg.hellaswag_every, cfg.max_steps) and not stopping:
                from hellaswag import count_hits

                with autocast:
                    share = questions[RANK::WORLD_SIZE]
                    hits = count_hits(model, share, device, stop.watch)
                stopping = stop.on_any_rank()
                if not stopping:
                    acc, acc_norm = np.sum(gather_from_ranks(hits), axis=0) / len(questions)
                    logger.write(step, hella=acc_norm)
                    logger.say(step, f"hellaswag acc {acc:.4f} | acc_norm {acc_norm:.4f}")

            # Once in a while: generate samples (rank 0, while the others wait).
            sample = is_due(step, cfg.sample_every, cfg.max_steps) and step > 0 and not stopping
            if RANK == 0 and encoding and sample:
                with autocast:
                    print_samples(model, encoding, cfg, cfg.prompt, cfg.seed + step)

            if stopping:
                continue  # to the checkpoint above, since this step may not have one yet
            if step == cfg.max_steps:
                break

            # One step of training: from tokens to new weights.
            model.train()
            started = time.perf_counter()  # after the evaluations, which are not part of the speed
            lr = get_lr(step, cfg)
            for group in optimizer.param_groups:
                group["lr"] = lr
            train_loss = torch.zeros((), device=device)
            for micro_step in range(grad_accum_steps):
                if WORLD_SIZE > 1:
                    # The ranks average their gradients only once, in the last micro-step.
                    ddp_model.require_backward_grad_sync = micro_step == grad_accum_steps - 1
                with autocast:
                    # backward() adds to the gradients that are already there. We want the gradient
                    # of the mean over all micro-steps, so each loss is divided by their number.
                    loss = ddp_model(x, y) / grad_accum_steps
                scaler.scale(loss).backward()
                train_loss += loss.detach()
                # Fetch the next batch now, while the GPU is still busy with this one.
                x, y = train_loader.batch(step * grad_accum_steps + micro_step + 1)
            # Now and then a batch of odd text has a gradient many times larger than usual.
            # Limiting its norm keeps it from throwing the weights off course.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            # Reading the figures waits for the GPU. The signal, if any, is shared along with them,
            # so that all ranks stop after the same step.
            figures = torch.stack([train_loss, norm, torch.full_like(norm, stop.signum)])
            if WORLD_SIZE > 1:
                dist.all_reduce(figures)
                figures /= WORLD_SIZE
            mean_loss, grad_norm, signals = figures.tolist()
            stopping = signals > 0
            seconds = time.perf_counter() - started
            # In fp16 gradients may overflow. Then the scaler skips the step and lowers its scale.
            may_overflow = scaler.get_scale() > 1
            if not math.isfinite(mean_loss) or not (math.isfinite(grad_norm) or may_overflow):
                raise SystemExit(
                    f"error: step {step} has loss {mean_loss} and gradient norm {grad_norm}; "
                    f"lower --max_lr, or try --dtype fp32; {what_is_saved(cfg.log_dir)}"
                )
            logger.step(step, mean_loss, lr, grad_norm, seconds)
            step += 1

        logger.draw_curves()
    if not stopping:
        return 0
    saved = "the same command resumes from there" if cfg.checkpoint_every else "nothing was saved"
    say(f"stopped after {step:,} steps; {saved}")
    return 128 + (stop.signum or signal.SIGTERM)


# -----------------------------------------------------------------------------
# Command line


def parse_flags(argv):
    """The flags that were given, as a dict. Raises SystemExit for any that are wrong."""
    parser = argparse.ArgumentParser(
        usage="python train_gpt2.py [--flag value ...]",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )

    def refuse(message):
        raise SystemExit(f"error: {message}; --help lists the flags")

    parser.error = refuse
    for f in fields(TrainConfig):
        about = f.metadata
        if not about:
            continue
        if about["group"]:
            group = parser.add_argument_group(about["group"])
        options = dict(help=about["help"])
        if f.default is not None:
            options["help"] += f" (default: {f.default})"
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= dict(type=f.type, choices=about["choices"])
        group.add_argument(f"--{f.name}", **options)
    return vars(parser.parse_args(argv))


def use_model(cfg, checkpoint, pretrained):
    """Do what --export and --generate ask for."""
    if RANK != 0:
        return
    model = initial_model(cfg, checkpoint, pretrained)
    if cfg.export is not None:
        model.export_pretrained(Path(cfg.export))
        say(f"wrote {model.num_params():,} parameters to {cfg.export}, for transformers")
    if cfg.generate is not None:
        encoding = open_encoding(cfg)
        device = torch.device(cfg.device)
        model.to(device).eval()
        with set_precision(device, cfg.dtype):
            print_samples(model, encoding, cfg, cfg.generate, cfg.seed)


def main(argv=None):
    """Run the command line. Returns the exit code."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # the terminal may not know every character
    try:
        cfg, checkpoint, pretrained = resolve_config(parse_flags(argv))
        with explain_out_of_memory(cfg):
            if cfg.generate is None and cfg.export is None:
                return train(cfg, checkpoint, pretrained)
            use_model(cfg, checkpoint, pretrained)
            return 0
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise  # --help
        message = error.code
        if RANK != 0:
            time.sleep(10)  # rank 0 may report the same, and torchrun end all
            message += f" (rank {RANK})"
        get_error_handler().record_exception(error)  # for the end of torchrun's report
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        # A bug, not a user's mistake. Once this rank is gone, the others will fail as well. Each
        # waits before it ends, so that torchrun stops them first and reports the cause, not an
        # effect.
        get_error_handler().record_exception(error)
        if WORLD_SIZE > 1:
            time.sleep(5)
        raise
    finally:
        # In a notebook, other code runs next. It should find PyTorch with its defaults.
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(False)  # loads the compiler, which takes seconds
        torch.set_float32_matmul_precision("highest")
        if dist.is_initialized():
            time.sleep(0.1)  # gloo's threads still use Python (pytorch issue 179291)
            dist.destroy_process_group()


if __name__ == "__main__":
    exit_code = main()
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):
        # The reader of the pipe is gone. Python would flush again, and change the exit code to 120.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(exit_code)
