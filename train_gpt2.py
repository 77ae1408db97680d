"""Train GPT-2, from random numbers to a model that writes: the whole of it in one file.

    python train_gpt2.py                         # one GPU, a Mac, or just a CPU
    torchrun --nproc_per_node=8 train_gpt2.py    # eight GPUs; several nodes work alike
    python train_gpt2.py --generate "def "       # let the newest checkpoint write

The model is GPT-2 as published, the recipe GPT-3's (Brown et al., 2020, arXiv:2005.14165).
In shapes, B is sequences, T tokens, C channels, V the vocabulary.
"""

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import re
import signal
import sys
import time
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
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# === Configuration: a flag is a field of TrainConfig ===
RANK, LOCAL_RANK = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK"))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)  # torchrun sets all three
FINEWEB_DATA, DEMO_DATA = Path("edu_fineweb10B"), Path("python_stdlib")
HELLASWAG_FILE = Path("hellaswag/hellaswag_val.bin")
ENCODINGS = {"gpt2": 50257, "bytes": 257}  # those of fineweb.py, and their vocabularies
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")  # a checkpoint dictates them
MODELS = {  # GPT-2's sizes, with the peak rates GPT-3 had near them (its table 2.1)
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768, max_lr=6e-4),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024, max_lr=3e-4),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280, max_lr=2.5e-4),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600, max_lr=2e-4),
    "demo": dict(n_layer=2, n_head=4, n_embd=128, block_size=128, pad_vocab=False, max_lr=6e-3,
        min_lr=1e-4, warmup_steps=100, max_steps=3000, total_batch_size=2048, val_every=500,
        val_tokens=131072, sample_every=1000, checkpoint_every=500, print_every=10,
        prompt="def ", num_samples=2, max_new_tokens=400, temperature=0.8),
}

def flag(default, help, kind=None, low=None, choices=None):
    """A field that is a flag, too. None, for auto or off, needs a `kind`."""
    about = dict(help=help, kind=kind or type(default), low=low, choices=choices)
    return field(default=default, metadata=about)

@dataclass
class GPT2Config:
    vocab_size: int = 50257  # 50,000 merges, 256 bytes, <|endoftext|>
    n_layer: int = flag(12, "transformer blocks", low=1)
    n_head: int = flag(12, "attention heads", low=1)
    n_embd: int = flag(768, "channels of the residual stream", low=1)
    block_size: int = flag(1024, "context in tokens", low=1)
    pad_vocab: bool = flag(True, "vocabulary in multiples of 128: faster")
    attention: str | None = flag(None, "(auto: faster)", str, choices=("flash", "manual"))
    activation_checkpointing: bool = flag(False, "to save memory: slower")
    encoding: str | None = None  # this and vocab_size are the data's
    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // 128) * 128 if self.pad_vocab else self.vocab_size

@dataclass
class TrainConfig(GPT2Config):
    data: str | None = flag(None, "folder of shards (auto: edu_fineweb10B, or demo)", str)
    shuffle: bool = flag(True, "a new order each epoch; off: file order")
    model: str | None = flag(None, "named size (auto: gpt2, or demo)", str, choices=MODELS)
    init_from: str = flag("scratch", "or weights: gpt2 to gpt2-xl, user/model, a path")
    total_batch_size: int = flag(2**19, "tokens an optimiser step", low=1)
    micro_batch_size: int | None = flag(None, "sequences at a time (auto: what fits)", int, low=1)
    sequence_length: int | None = flag(None, "tokens each (auto: the block size)", int, low=1)
    max_lr: float = flag(6e-4, "peak learning rate", low=0)
    min_lr: float | None = flag(None, "final one (auto: a tenth of the peak)", float, low=0)
    warmup_steps: int = flag(715, "of linear warm-up", low=0)
    max_steps: int = flag(19073, "steps; 19073 of 2^19 tokens are 10 billion", low=1)
    weight_decay: float = flag(0.1, "on matrices and embeddings", low=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0: any", low=0)
    device: str | None = flag(None, "cpu, cuda, cuda:1, mps (auto: the fastest)", str)
    dtype: str | None = flag(None, "of autocast (auto)", str, choices=("bf16", "fp16", "fp32"))
    tf32: bool | None = flag(None, "TensorFloat-32 (auto: on CUDA)", bool)
    compile: bool | None = flag(None, "torch.compile (auto: on CUDA, but for the demo)", bool)
    fused_adamw: bool | None = flag(None, "AdamW in one kernel (auto: on CUDA and CPU)", bool)
    val_every: int = flag(250, "steps between validations; 0: never", low=0)
    val_tokens: int = flag(10485760, "tokens a validation", low=1)
    hellaswag_every: int = flag(250, "steps between HellaSwags; 0: never", low=0)
    sample_every: int = flag(250, "steps between samples; 0: never", low=0)
    prompt: str = flag("Hello, I'm a language model,", "what the samples begin with")
    print_every: int = flag(1, "steps between lines", low=1)
    log_dir: str | None = flag(None, "of log and checkpoints (auto: log, log_demo)", str)
    checkpoint_every: int = flag(1000, "steps between checkpoints; 0: never", low=0)
    keep_checkpoints: int = flag(2, "the newest to keep; 0: all", low=0)
    seed: int = flag(1337, "of weights, data order and samples", low=0)
    deterministic: bool = flag(False, "repeatable to the bit on CUDA, too: slower")
    generate: str | None = flag(None, "print samples that go on from it, and exit", str)
    export: str | None = flag(None, "write this folder for Hugging Face, and exit", str)
    num_samples: int = flag(4, "samples to draw", low=1)
    max_new_tokens: int = flag(64, "tokens a sample", low=1)
    temperature: float = flag(1.0, "of samples; 0: always the likeliest", low=0)
    top_k: int = flag(50, "of the k likeliest tokens; 0: of all", low=0)

class UserError(ValueError):
    """What a user can put right: one `error:` line and exit code 2."""

def require(condition, message: str):
    if not condition:
        raise UserError(message)

@contextlib.contextmanager
def user_error(what: str, advice: str):
    """Let what fails inside end in a UserError: what, why, what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what} ({reason:.250}); {advice}") from error

@contextlib.contextmanager
def unfinished(path: Path):
    """Give a name to write to, which becomes `path` if all goes well."""
    partial = path.with_name("unfinished.tmp")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # on the disk, before it has its name
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

def say(message: str, file=None):
    """Print on rank 0, or on any to `file`. What can't be printed is lost: no run ends for it."""
    if RANK == 0 or file:
        with contextlib.suppress(OSError, ValueError):  # a full disk
            encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
            print(message.encode(encoding, "replace").decode(encoding), file=file, flush=True)

# === Model: parameters are named as OpenAI's, so that weights travel ===
class CausalSelfAttention(nn.Module):
    """Tokens exchange information: each gathers, per head, a weighted mean of what it and those
    before it offer (Vaswani et al., 2017, arXiv:1706.03762, §3.2)."""
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head, self.attention = config.n_head, config.attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v of all heads at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
    def forward(self, x):  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in (q, k, v))
        if self.attention == "manual":  # softmax(q kᵀ / √d) v, of past and present
            hide = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
            scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, n_head, T, T)
            y = F.softmax(scores + hide, dim=-1) @ v  # e^-inf = 0: nothing comes from the future
        else:  # flash attention: (T, T) never reaches memory (Dao et al., 2022, arXiv:2205.14135)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

class MLP(nn.Module):
    """Tokens think for themselves: the same two-layer network at every position."""
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")  # erf was slow in 2019; the weights expect this
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.c_proj(self.gelu(self.c_fc(x)))

class Block(nn.Module):
    """Each branch normalises its input; the first Transformers normalised the sum. So the stream
    stays a clean sum from embedding to head, and gradients flow straight down it."""
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT2(nn.Module):
    """GPT-2 (Radford et al., 2019, §2.3), without dropout: train() and eval() are the same."""
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        # Weight tying: words that mean alike should lie close where they are read and where they
        # are predicted (Press & Wolf, 2017, arXiv:1608.05859).
        self.lm_head.weight = self.transformer.wte.weight
        self.init_weights()
    @torch.no_grad()
    def init_weights(self):
        for name, p in self.named_parameters():
            if p.dim() == 1:  # LayerNorm gains start at one, biases at zero
                p.fill_(0.0 if name.endswith("bias") else 1.0)
            elif name.endswith("c_proj.weight"):
                # 2·n_layer branches add into the stream: 1/√(2·n_layer) keeps its variance
                p.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                p.normal_(std=0.02)
        self.transformer.wte.weight[self.config.vocab_size :] = 0.0  # padding
    @classmethod
    def from_pretrained(cls, what: str) -> "GPT2":
        config, weights = read_pretrained(what)
        return load_weights(cls(config), weights, what)
    def num_params(self) -> int:
        """Parameters of the published model: tied weights count once, padding not at all."""
        padding = self.config.padded_vocab_size - self.config.vocab_size
        return sum(p.numel() for p in self.parameters()) - padding * self.config.n_embd
    def flops_per_token(self, T: int) -> int:
        """FLOPs to train on one of T tokens (PaLM, arXiv:2204.02311, appendix B)."""
        multiplied = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * multiplied + 12 * self.config.n_layer * self.config.n_embd * T
    def hidden(self, idx):
        """Token ids (B, T), T at most the block size -> final hidden states (B, T, C)."""
        pos = torch.arange(idx.size(1), device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)
        kind = idx.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
            x = x.bfloat16()  # half the bytes for the stream, as in llm.c
        again = self.config.activation_checkpointing and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        return self.transformer.ln_f(x)
    def logits(self, x):
        """Final hidden states (..., C) -> logits (..., padded V)."""
        # Padding gets -inf, and is not cut off: rows of odd length would be slow
        rows = torch.arange(self.config.padded_vocab_size, device=x.device)
        hide = torch.where(rows < self.config.vocab_size, 0.0, -torch.inf).to(x.dtype)
        return F.linear(x, self.lm_head.weight, hide)
    def forward(self, idx, targets=None):
        """Token ids (B, T) -> (logits (B, T, V), None). With targets (B, T): (None, loss), the mean
        cross-entropy in nats a token; targets of -100 do not count."""
        logits = self.logits(self.hidden(idx))
        if targets is None:
            return logits[..., : self.config.vocab_size], None
        # No logits here: a compiled backward pass would carry zeros (B, T, V) for them
        return None, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """Continue each row of idx (B, T) -> (B, T + max_new_tokens). Temperature 0 is greedy,
        `top_k` leaves out all but the k likeliest tokens (Fan et al., 2018, arXiv:1805.04833)."""
        for _ in range(max_new_tokens):
            x = self.hidden(idx[:, -self.config.block_size :])
            logits = self.logits(x[:, -1]).float()  # (B, padded V)
            k = 1 if temperature < 1e-6 else min(top_k or logits.size(1), logits.size(1))
            values, tokens = logits.topk(k)
            probs = F.softmax(values / max(temperature, 1e-6), dim=1)
            drawn = torch.multinomial(probs, 1, generator=generator)
            idx = torch.cat((idx, tokens.gather(1, drawn)), dim=1)
        return idx
    def configure_optimizers(self, weight_decay, learning_rate, fused=False):
        """AdamW (Loshchilov & Hutter, 2019, arXiv:1711.05101) as GPT-3's: only matrices decay."""
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)
        how = dict(betas=(0.9, 0.95), eps=1e-8, fused=fused or None)  # None: torch picks kernels
        return torch.optim.AdamW(groups, lr=learning_rate, **how)

# === Tokens, and which of them a step sees ===
def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split, "train" or "val", in file order."""
    name = re.compile(rf"(.*_)?{split}(_\d+)?\.(npy|bin)")
    return sorted(path for path in folder.glob("*") if name.fullmatch(path.name))

def read_manifest(folder: Path) -> dict:
    """What manifest.json says of a folder's tokens; without one they are GPT-2's."""
    path, encoding = folder / "manifest.json", "bytes" if folder == DEMO_DATA else "gpt2"
    if not os.path.lexists(path):  # the demo data may yet have to be made
        return dict(encoding=encoding, vocab_size=ENCODINGS[encoding])
    with user_error(f"{path} is no manifest of token shards", "make the data again"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        encoding, V = manifest["encoding"], manifest["vocab_size"]
        if type(encoding) is not str or type(V) is not int or not 0 < V <= 65536:
            raise ValueError("no encoding, or no vocab_size of up to 65536")
        return manifest

def read_shard(path: Path) -> np.ndarray:
    """Memory-map the tokens of a shard: a one-dimensional uint16 .npy, or a .bin of llm.c or
    modded-nanogpt (256 int32 of header, then uint16), or nanoGPT's train.bin, val.bin (uint16)."""
    with user_error(f"{path} is no token shard", "make it again, or remove it"):
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
        else:
            magic, version, count = np.fromfile(path, dtype="<i4", count=3).tolist()
            whole = (magic, version) == (20240520, 1) and path.stat().st_size == 1024 + 2 * count
            raw = magic != 20240520 and path.name in ("train.bin", "val.bin")
            require(whole or raw, f"{path} has a wrong header, or size; make it again")
            tokens = np.memmap(path, dtype="<u2", mode="r", offset=0 if raw else 1024)
        require(tokens.dtype == np.uint16 and tokens.ndim == 1, f"{path} is not a row of uint16")
        return np.asarray(tokens)  # still mapped

@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def permutation(n, seed, epoch) -> np.ndarray:  # RandomState's are frozen
    generator = np.random.RandomState(np.random.MT19937([seed, epoch]))
    return generator.permutation(n).astype(np.uint32)

class DataLoaderLite:
    """Serves windows of T + 1 tokens, without any state: a step's number tells which ones it sees.
    A shard of n tokens holds (n-1)//T windows; those of all shards are numbered 0 … W-1 in file
    order. Sample s is window π(s mod W), π a permutation drawn from the seed and the epoch s//W
    (the identity without `shuffle`). Micro-batch i of the run gives rank r of R the samples
    (i·R + r)·B + 0 … B-1: the same for each B and R, and wherever the run was interrupted."""
    def __init__(self, files, B, T, rank=0, world_size=1, seed=0, shuffle=True, vocab_size=50257):
        self.files, self.B, self.T, self.rank, self.world_size = files, B, T, rank, world_size
        self.seed, self.shuffle, self.vocab_size = seed, shuffle, vocab_size
        self.shards = [read_shard(path) for path in files]
        self.num_tokens = sum(len(shard) for shard in self.shards)
        windows = [max(0, len(shard) - 1) // T for shard in self.shards]
        *self.first_window, self.num_windows = np.cumsum([0, *windows]).tolist()
        few = f"{files[0]}: too few tokens for a window of {T} + 1 in each shard of this split"
        require(self.num_windows > 0, f"{few}; lower --sequence_length, or raise --shard_size")
    def window(self, s: int) -> np.ndarray:
        """The T + 1 tokens of sample s, uint16."""
        epoch, k = divmod(s, self.num_windows)
        if self.shuffle:
            k = int(permutation(self.num_windows, self.seed, epoch)[k])
        shard = int(np.searchsorted(self.first_window, k, side="right")) - 1
        start = (k - self.first_window[shard]) * self.T
        tokens = self.shards[shard][start : start + self.T + 1]
        beyond = f"token {tokens.max()} is beyond a vocabulary of {self.vocab_size}"
        require(tokens.max() < self.vocab_size, f"{self.files[shard]}: {beyond}; see --data")
        return tokens
    def batch(self, i: int) -> torch.Tensor:
        """This rank's part of micro-batch i, int64 (2, B, T): inputs, and targets one token on."""
        first = (i * self.world_size + self.rank) * self.B
        rows = np.array([self.window(first + b) for b in range(self.B)], dtype=np.int64)
        tokens = torch.from_numpy(rows)  # (B, T + 1)
        return torch.stack((tokens[:, :-1], tokens[:, 1:]))

def to_device(z, device):
    """Send a tensor on its way: from pinned memory, a GPU fetches it by itself."""
    return z.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else z.to(device)

# === Validation and samples ===
def sum_over_ranks(values: list[float], device):
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()

@torch.no_grad()
def validation_loss(model, loader, val_tokens: int, device, progress=iter) -> float:
    """Mean loss, nats a token, over the first `val_tokens` tokens. `progress` may end it early."""
    num_windows = min(loader.num_windows, max(1, val_tokens // loader.T))
    total = 0.0  # of windows
    for i in progress(range(math.ceil(num_windows / (loader.B * loader.world_size)))):
        count = min(loader.B, num_windows - (i * loader.world_size + loader.rank) * loader.B)
        if count > 0:
            batch = loader.batch(i)
            batch[1, count:] = -100  # they fill the batch: one shape to compile
            total += model(*to_device(batch, device))[1] * count
    return sum_over_ranks([float(total)], device)[0] / num_windows

def encode_prompt(encoding, prompt, block_size) -> list[int]:
    tokens = encoding.encode(prompt, allowed_special="all") or [encoding.eot_token]
    require(len(tokens) <= block_size, f"the prompt exceeds {block_size} tokens; shorten it")
    return tokens

def print_samples(model: GPT2, encoding, cfg, prompt, seed):
    device = model.lm_head.weight.device
    tokens = encode_prompt(encoding, prompt, model.config.block_size)
    idx = torch.tensor([tokens] * cfg.num_samples, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = model.generate(idx, cfg.max_new_tokens, cfg.temperature, cfg.top_k, generator)
    for i, row in enumerate(rows.tolist()):
        ends = [n for n in range(len(tokens), len(row)) if row[n] >= encoding.eot_token]
        text = encoding.decode(row[: min(ends, default=None)])
        text = (c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
        say(f"--- sample {i}\n{''.join(text)}")

# === Devices, and how much of a batch fits ===
def peak_flops(cfg: TrainConfig) -> float:
    """FLOP/s of all devices at best, in 16 bits: the 100% of MFU. 0 where not known."""
    tera = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L4": 121, "T4": 65}
    words = re.split(r"[ -]", torch.cuda.get_device_name()) if "cuda" in cfg.device else []
    slower = cfg.dtype == "fp32" or {"PCIe", "NVL"} & {*words}
    return 0 if slower else sum(tera.get(word, 0) for word in words) * 1e12 * WORLD_SIZE

def choose_device(name: str | None) -> torch.device:
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    found += ["mps"] * (torch.mps.device_count() // WORLD_SIZE) + ["cpu"]
    require(WORLD_SIZE == 1 or ":" not in (name or ""), f"--device {name} is one for all ranks")
    mine = re.sub("^cuda(:0)?$", f"cuda:{LOCAL_RANK}", name or found[0])
    require(mine in found, f"--device {mine} is not there; found {found}")
    if mine.startswith("cuda"):
        torch.cuda.set_device(mine)
    return torch.device(mine)

def native_dtype(device) -> str:
    if device.type == "cuda":  # bf16 has float32's range; fp16 needs a scaler
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"

def resolve(cfg: TrainConfig) -> torch.device:
    """Fill in what was left to auto -> the device."""
    device = choose_device(cfg.device)
    cuda, cpu, cfg.device = device.type == "cuda", device.type == "cpu", str(device)
    cfg.dtype = cfg.dtype or native_dtype(device)
    demo = cfg.data is None and not find_shards(FINEWEB_DATA, "train")
    auto = dict(
        data=str(DEMO_DATA if demo else FINEWEB_DATA), log_dir="log_demo" if demo else "log",
        model="gpt2", sequence_length=cfg.block_size, min_lr=0.1 * cfg.max_lr,
        attention="manual" if cpu and cfg.dtype == "bf16" else "flash",  # which is slow at that
        tf32=cuda, compile=cuda and cfg.model != "demo", fused_adamw=cuda or cpu,
    )
    for name in (name for name in auto if getattr(cfg, name) is None):
        setattr(cfg, name, auto[name])
    return device

def check(cfg: TrainConfig):
    C, T, B = cfg.n_embd, cfg.sequence_length, cfg.micro_batch_size or 1
    part = f"a multiple of {B} sequences × {T} tokens × {WORLD_SIZE} processes"
    require(max(cfg.n_layer * C, cfg.block_size) * C < 10**11, "no machine holds this model")
    folder = next(p for p in Path(cfg.log_dir, "_").absolute().parents if p.exists())
    require(os.access(f"{folder}/.", os.W_OK), f"--log_dir: {folder} can't be written")
    require(C % cfg.n_head == 0, f"--n_embd {C} is not a multiple of --n_head {cfg.n_head}")
    require(cfg.block_size >= T, f"--sequence_length {T} exceeds --block_size {cfg.block_size}")
    require(cfg.total_batch_size % (B * T * WORLD_SIZE) == 0, f"--total_batch_size is not {part}")
    require(cfg.warmup_steps <= cfg.max_steps, "--max_steps is under --warmup_steps")
    require(cfg.min_lr <= cfg.max_lr, f"--min_lr {cfg.min_lr} exceeds --max_lr {cfg.max_lr}")

def fit_micro_batch(run, forward) -> int:
    """The micro-batch B: what is asked for, or a guess; less while memory runs out."""
    T, tokens = run.cfg.sequence_length, 2**12
    if run.device.type == "cuda":  # 2^16 keep any busy; 124M parameters take 28 GB for them
        share = torch.cuda.mem_get_info()[0] / 36e9 * 124e6 / run.model.num_params()
        tokens = 2**16 * min(1, share)
    tokens = sum_over_ranks([tokens], run.device)[0] / WORLD_SIZE  # the same on all ranks
    sequences = run.cfg.total_batch_size // (T * WORLD_SIZE)  # a step of this process
    most = run.cfg.micro_batch_size or max(1, int(tokens / T))
    for B in (b for b in range(most, 0, -1) if sequences % b == 0):
        if sum_over_ranks([micro_batch_fits(B, run, forward)], run.device)[0] == WORLD_SIZE:
            return B
        say(f"out of memory with micro-batches of {B} sequences; trying fewer")
        torch._dynamo.reset()  # what it compiled counts towards a limit
    raise UserError(f"no room for one sequence of {T} tokens; see --activation_checkpointing")

def micro_batch_fits(B: int, run, forward) -> bool:
    """Try two micro-steps, of which the second adds to gradients that are there."""
    try:
        copies = 0 if run.optimizer.state else 2  # AdamW's moments are yet to come
        _moments = [torch.empty_like(p) for p in copies * [*run.model.parameters()]]
        x, y = torch.zeros(2, B, run.cfg.sequence_length, dtype=int, device=run.device)
        for _ in range(2):
            with run.autocast:
                loss = forward(x, y)[1]
            loss.backward()
        return True
    except Exception as error:
        if re.search("out of memory|can't allocate memory", str(error)):
            return False
        if not run.cfg.compile:
            raise
        say(f"torch.compile can't be used here ({error!r:.100}); training without it")
        torch.compiler.set_stance("force_eager")  # no Triton, no C++ compiler
        run.cfg.compile = False
        return micro_batch_fits(B, run, forward)
    finally:
        run.model.zero_grad(set_to_none=True)

# === A run: what belongs to it, and its checkpoints ===
class Run:
    def __init__(self, cfg: TrainConfig):
        self.cfg, self.device = cfg, resolve(cfg)
        check(cfg)
        torch.manual_seed(cfg.seed)  # the same weights on every rank
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        if WORLD_SIZE > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.open_data()
        self.model = initial_model(cfg).to(self.device)
        how = cfg.weight_decay, cfg.max_lr, cfg.fused_adamw
        self.optimizer = self.model.configure_optimizers(*how)
        kind, half = self.device.type, torch.float16 if cfg.dtype == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(kind, half, enabled=cfg.dtype != "fp32")
        # Small gradients vanish in fp16: they are scaled up
        self.scaler = torch.amp.GradScaler(kind, enabled=cfg.dtype == "fp16")
        self.step, self.val_loss = 0, None  # steps done before; the last validation's
    def open_data(self):
        cfg, folder, self.encoding, self.questions = self.cfg, Path(self.cfg.data), None, None
        manifest = read_manifest(folder)
        cfg.encoding, cfg.vocab_size = manifest["encoding"], manifest["vocab_size"]
        known = ENCODINGS.get(cfg.encoding) == cfg.vocab_size
        if not known:
            say(f"no samples, no HellaSwag: no encoding {cfg.encoding!r} has this size")
        if known and cfg.sample_every:
            try:
                self.encoding = sibling("fineweb", "get_encoding", cfg.encoding)
            except (ImportError, UserError) as error:
                say(f"no samples: {error}")
        if self.encoding:
            encode_prompt(self.encoding, cfg.prompt, cfg.block_size)
        asked = known and cfg.encoding == "gpt2" and cfg.hellaswag_every > 0
        there = HELLASWAG_FILE.exists() and Path(__file__).with_name("hellaswag.py").exists()
        if sum_over_ranks([asked and there], self.device)[0] == WORLD_SIZE:
            self.questions = sibling("hellaswag", "read_questions", HELLASWAG_FILE)
        elif asked:
            say(f"no HellaSwag: no {HELLASWAG_FILE}; python hellaswag.py makes it")
        if folder == DEMO_DATA and not folder.exists() and LOCAL_RANK == 0:
            sibling("fineweb", "write_demo_data", folder)
        sum_over_ranks([0], self.device)  # the others wait
        self.train_loader, self.val_loader = map(self.loader, ("train", "val"))
        cfg.val_tokens = min(cfg.val_tokens, self.val_loader.num_windows * cfg.sequence_length)
        if not manifest.get("finished", True):
            say(f"{folder} is not finished: {self.train_loader.num_tokens:,} tokens so far")
    def loader(self, split: str) -> DataLoaderLite:
        cfg, files = self.cfg, find_shards(Path(self.cfg.data), split)
        none = f"--data {cfg.data} holds no {split} shard, NAME_{split}_000000.npy or .bin"
        require(files, f"{none}; a smaller --shard_size makes more of them")
        order = cfg.seed, cfg.shuffle and split == "train", cfg.vocab_size
        loader = DataLoaderLite(files, 1, cfg.sequence_length, RANK, WORLD_SIZE, *order)
        for k in range(min(99, loader.num_windows)):  # another encoding shows at once
            loader.window(k)
        return loader
    def identity(self) -> dict:  # what must stay from start to start
        names = (*SIZES, "pad_vocab", "seed", "shuffle", "total_batch_size", "sequence_length")
        data = dict(windows=self.train_loader.num_windows, tokens=self.train_loader.num_tokens)
        return {name: getattr(self.cfg, name) for name in names} | data
    def save(self, step: int):
        """Write model_<step>.pt, whole or not at all; then prune."""
        finite = all(p.isfinite().all() for p in self.model.parameters())
        require(finite, f"the weights after step {step - 1} are not finite; lower --max_lr")
        path, keep = Path(self.cfg.log_dir, f"model_{step:05d}.pt"), self.cfg.keep_checkpoints
        path = path.with_name(f"model_0{step:05d}.pt") if foreign(path) else path
        state = dict(
            format=2, step=step, val_loss=self.val_loss, config=asdict(self.model.config),
            train_config=asdict(self.cfg), run=self.identity(), model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict(),
        )
        with user_error(f"{path} can't be written whole", "the last stands"), unfinished(path) as p:
            torch.save(state, p)
        paths = [path for other, path in checkpoints(path.parent).items() if other <= step]
        for path in paths[:-keep]:  # none of them, if keep is 0
            path.unlink()
    def resume(self):
        """Put the newest checkpoint back in place, if there is one."""
        cfg, where, state = self.cfg, self.cfg.log_dir, newest_checkpoint(Path(self.cfg.log_dir))
        seen = [self.identity() | dict(step=state["step"] if state else 0)] * WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_gather_object(seen, seen[0])
        same = seen.count(seen[0]) == WORLD_SIZE
        require(same, f"the processes do not see the same data and checkpoints: {seen}")
        if state is None:
            return
        theirs = {**state["config"], **state.get("train_config", {}), **state.get("run", {})}
        for name, ours in self.identity().items():
            old = theirs.get(name, ours)  # format 1 does not know its data
            other = f"{where} holds another run: its {name} is {old}, and here {ours}"
            require(old == ours, f"{other}; choose another --log_dir, or the old flags and data")
        past = f"{where} is past --max_steps {cfg.max_steps}; choose more"
        require(state["step"] <= cfg.max_steps, past)
        with user_error(f"{where} holds no run to go on with", "choose another --log_dir"):
            load_weights(self.model, state["model"], where)
            rates = self.optimizer.state_dict()["param_groups"]  # and decay: as the flags say now
            self.optimizer.load_state_dict(dict(state["optimizer"], param_groups=rates))
            if state["scaler"]:  # in fp16
                self.scaler.load_state_dict(state["scaler"])
            if cfg.deterministic and not cfg.micro_batch_size:  # other sums round differently
                cfg.micro_batch_size = state["train_config"]["micro_batch_size"]
            self.step, self.val_loss = state["step"], state["val_loss"]
        own = "; its own weights go on: --init_from needs another --log_dir"
        say(f"resuming {where} after {self.step:,} steps{own * (cfg.init_from != 'scratch')}")

def sibling(file, function, *args):
    try:
        return getattr(importlib.import_module(file), function)(*args)
    except ValueError as error:
        require(type(error).__name__ != "UserError", str(error))  # over there a class of its own
        raise

def initial_model(cfg: TrainConfig) -> GPT2:
    config, weights = vars(cfg).pop("loaded", None) or read_pretrained(cfg.init_from) or (cfg, None)
    if cfg.vocab_size < config.vocab_size < 1.001 * cfg.vocab_size:  # special tokens
        cfg.vocab_size = config.vocab_size
    for size in SIZES:
        differs = f"{cfg.init_from} has {size} {getattr(config, size)}, not {getattr(cfg, size)}"
        require(getattr(config, size) == getattr(cfg, size), f"{differs}; see the flags, or --data")
    model = GPT2(GPT2Config(**{f.name: getattr(cfg, f.name) for f in fields(GPT2Config)}))
    return load_weights(model, weights, cfg.init_from) if weights else model

def foreign(path: Path) -> bool:
    """Whether it is another program's: build-nanogpt's are called as ours."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        return b"\6\0\0\0format" not in archive.open(archive.namelist()[0]).read(2**20)

def checkpoints(log_dir: Path) -> dict:
    paths = [path for path in log_dir.glob("model_*.pt") if path.stem[6:].isdecimal()]
    return dict(sorted((int(path.stem[6:]), path) for path in paths if not foreign(path)))

def load_checkpoint(path: Path) -> dict:
    """What a checkpoint holds. Tensors are mapped (if its name is UTF-8), and no code runs."""
    with user_error(f"{path} can't be read as a checkpoint", "choose another"):
        damaged = zipfile.ZipFile(path).testzip()  # torch.load compares no checksums
        state = dict(torch.load(path, "cpu", weights_only=True, mmap=str(path).isprintable()))
        step, known = state.get("step"), state.get("format") in (1, 2)
        if damaged or not known or type(step) is not int or step < 0:
            raise ValueError("damaged, or another program's")
        config_of(state["config"], state["model"])
        return state

def config_of(sizes: dict, weights: dict) -> GPT2Config:
    """No model is built of sizes that a file only claims."""
    config = GPT2Config(**sizes)
    L, C, heads = config.n_layer, config.n_embd, config.n_head
    fits = weights["transformer.wpe.weight"].shape == (config.block_size, C)
    fits = fits and 0 < L < len(weights) and C % heads == 0 < heads
    if not fits or not 0 < config.vocab_size <= len(weights["transformer.wte.weight"]):
        raise ValueError("its sizes are not those of its weights")
    return config

def load_weights(model: GPT2, weights: dict, where: str) -> GPT2:
    """Put a state dict into the model; the vocabulary of each may be padded."""
    V, rows = model.config.vocab_size, model.config.padded_vocab_size
    with user_error(f"{where} holds another model", "choose another"):
        table = weights["transformer.wte.weight"]
        if len(table) - V < 128:
            table = F.pad(table[:V], (0, 0, 0, rows - V))
        model.load_state_dict(weights | {"transformer.wte.weight": table, "lm_head.weight": table})
        return model

def read_pretrained(what: str) -> tuple[GPT2Config, dict] | None:
    """Config and state dict of a checkpoint, or of what hellaswag.read_model knows."""
    if what == "scratch":
        return None
    if Path(what).is_file() and not foreign(Path(what)):
        state = load_checkpoint(Path(what))
        return GPT2Config(**state["config"]), state["model"]
    return sibling("hellaswag", "read_model", what, config_of)

def newest_checkpoint(log_dir: Path) -> dict | None:
    """A folder's newest checkpoint that can be read, None where there is none."""
    for path in filter(foreign, log_dir.glob("model_*.pt")):
        say(f"{path} is another program's, and stays")
    for path in reversed(paths := checkpoints(log_dir).values()):
        try:
            return load_checkpoint(path)
        except UserError as error:
            say(f"{error}; trying the one before it")
    require(not paths, f"no checkpoint in {log_dir} can be read; choose another --log_dir")

# === The log, and a picture of it ===
def locked(log_dir: Path):
    """A context that keeps other runs out of a folder."""
    with user_error(f"--log_dir {log_dir} is another run's, or read-only", "choose another"):
        log_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(log_dir / ".lock", timeout=5)  # a killed run may be dying still
        return lock.acquire() if RANK == 0 else contextlib.nullcontext()

def open_log(log_dir: Path, start: int):
    """Open log.txt to go on at step `start`; lines from there on come again."""
    path = log_dir / "log.txt"
    with user_error(f"--log_dir {log_dir} can't hold the log of this run", "choose another"):
        if path.exists() and start == 0:  # an old log stays
            path.rename(log_dir / f"log_{path.stat().st_mtime_ns}.txt")
        text = path.read_text(errors="replace") if path.exists() else ""
        lines = re.findall(r"^((\d+) \w+ [-+.\w]+\n)", text, re.MULTILINE)  # a kill may break one
        require(lines or not text.strip(), f"--log_dir {log_dir}: log.txt is no log; move it away")
        with unfinished(path) as partial:
            partial.write_text("".join(line for line, step in lines if int(step) < start))
        return open(path, "ab", buffering=0)

class Progress:
    """The figures of each step: printed, written to log.txt, checked. To read a figure is to wait
    for the GPU. So those of a step are read when some of the next has been queued, and the GPU
    always has work. With them ranks tell each other of a signal: all stop after the same step."""
    def __init__(self, run: Run):
        self.run, self.cfg, self.unread = run, run.cfg, None
        self.signum, self.stopping = 0, False  # a signal that came here; the same on all ranks
    def __enter__(self):
        self.file = open_log(Path(self.cfg.log_dir), self.run.step) if RANK == 0 else None
        self.before, hangup = {}, getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        for signum in {signal.SIGINT, signal.SIGTERM, hangup}:
            if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup wants it
                self.before[signum] = signal.signal(signum, self.note)
        self.started = self.clock = time.perf_counter()
        return self
    def __exit__(self, *exception):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
    def note(self, signum, frame):
        self.signum = self.signum or signum  # torchrun and batch systems both send a SIGTERM
        if signum == signal.SIGINT:  # a second Ctrl-C stops at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    def until_signal(self, items):
        hide = None if RANK == 0 and sys.stderr else True  # None: shown on a terminal
        bar = tqdm(items, "evaluation", leave=False, delay=1, disable=hide)
        return (item for item in bar if not self.signum)
    def stop_if_signalled(self) -> bool:  # at any rank
        self.stopping = sum_over_ranks([self.signum], self.run.device)[0] > 0
        return self.stopping
    def step(self, t, lr, loss, norm):
        figures = torch.stack((loss, norm, torch.full_like(norm, self.signum))) / WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_reduce(figures)
        copied = None
        if figures.is_cuda:  # behind the step
            figures, copied = figures.to("cpu", non_blocking=True), torch.cuda.Event()
            copied.record()
        self.unread = t, lr, figures, copied
        if self.stopping or copied is None:
            self.read()
    def read(self):
        if self.unread is None:
            return
        (t, lr, figures, copied), self.unread = self.unread, None
        if copied:
            copied.synchronize()
        loss, norm, signum = figures.tolist()
        self.stopping = self.stopping or signum > 0
        # In fp16 a step is skipped whose gradients overflow, and the next has half the scale
        fine = math.isfinite(norm) or self.run.scaler.get_scale() > 1
        wrong = f"step {t}: loss {loss}, gradient norm {norm}"
        require(math.isfinite(loss) and fine, f"{wrong}; lower --max_lr, or try --dtype fp32")
        seconds = time.perf_counter() - self.clock
        self.clock += seconds
        tps = self.cfg.total_batch_size / seconds
        self.record(t, train=loss, lr=lr, norm=norm, tps=tps)
        if t % self.cfg.print_every == 0 or t + 1 == self.cfg.max_steps:
            speed = f"{seconds * 1e3:.0f} ms | {tps:,.0f} tok/s | {self.outlook(t, tps)}"
            self.say(t, f"loss {loss:.4f} | lr {lr:.4e} | norm {norm:.2f} | {speed}")
    def outlook(self, t, tps) -> str:
        a_step = (self.clock - self.started) / (t + 1 - self.run.step)
        minutes, s = divmod(int(a_step * (self.cfg.max_steps - t - 1)), 60)
        eta = f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{s:02d}s"
        flops, peak = self.run.model.flops_per_token(self.cfg.sequence_length), peak_flops(self.cfg)
        return f"mfu {flops * tps / peak:.1%} | eta {eta}" if peak else f"eta {eta}"
    def say(self, t, message):
        say(f"step {t:5d}/{self.cfg.max_steps} | {message}")
    def record(self, t, **streams):
        lines = "".join(f"{t} {name} {value:.8g}\n" for name, value in streams.items()).encode()
        with user_error("log.txt can't be written", "the newest checkpoint stands"):
            if self.file and self.file.write(lines) < len(lines):
                raise OSError("the disk is full")

def draw_curves(log_dir: Path, n_embd=768, fineweb=True):
    """Draw log.txt as curves.png, beside what is published for this size."""
    hella = {768: 0.2945, 1024: 0.3752, 1280: 0.4320, 1600: 0.4889}.get(n_embd)  # acc_norm
    published = dict(train=3.2924 if fineweb and n_embd == 768 else None, hella=hella)
    points, panels = {}, (("train", "val"), ("hella",), ("norm",), ("tps",))
    try:
        from matplotlib.figure import Figure  # not pyplot, which may look for a screen
        for line in (log_dir / "log.txt").read_text().splitlines():
            step, stream, value = line.split()
            points.setdefault(stream, []).append((int(step), float(value)))
        figure = Figure(figsize=(12, 8), layout="constrained")
        for i, streams in enumerate((p for p in panels if points.keys() & {*p}), 1):
            axes = figure.add_subplot(-(-len(panels) // 2), 2, i, xlabel="step")
            for stream in filter(points.get, streams):
                label = f"{stream}, {points[stream][-1][1]:.5g} now"
                axes.plot(*np.transpose(points[stream]), label=label)
            if height := published.get(streams[0]):
                axes.axhline(height, label=f"published: {height}")
            axes.legend()
        figure.savefig(log_dir / "curves.png")
    except Exception as error:  # no matplotlib, a full disk, a log that is none
        say(f"{log_dir}/curves.png can't be drawn ({error!r})")

# === Training ===
def get_lr(t: int, cfg: TrainConfig) -> float:
    """The learning rate of step t: linear warm-up, since Adam's first estimates are poor, then half
    a cosine from the peak down to min_lr (Loshchilov & Hutter, 2017, arXiv:1608.03983)."""
    if t < cfg.warmup_steps:
        return cfg.max_lr * (t + 1) / cfg.warmup_steps
    progress = (t - cfg.warmup_steps) / (cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)

def once_in_a_while(t, run: Run, compiled, progress: Progress):
    """What is due before step t. All ranks enter; a signal cuts it short."""
    cfg, last = run.cfg, t == run.cfg.max_steps
    often = cfg.val_every, cfg.hellaswag_every, cfg.sample_every, cfg.checkpoint_every
    validate, question, sample, keep = (n > 0 and (t % n == 0 or last) for n in often)
    if not (validate or question or sample or keep or last or progress.stopping):
        return
    progress.read()
    with run.autocast:
        if validate and not progress.stopping:
            how = cfg.val_tokens, run.device, progress.until_signal
            loss = validation_loss(compiled, run.val_loader, *how)
            if not progress.stop_if_signalled():
                run.val_loss = loss
                progress.record(t, val=loss)
                progress.say(t, f"val loss {loss:.4f}, perplexity {math.exp(min(loss, 99)):.2f}")
        if question and run.questions and not progress.stopping:
            mine = run.questions[RANK::WORLD_SIZE], run.device, progress.until_signal
            hits = sum_over_ranks(sibling("hellaswag", "count_hits", run.model, *mine), run.device)
            if not progress.stop_if_signalled():
                acc, acc_norm = (n / len(run.questions) for n in hits)
                progress.record(t, hella=acc_norm)
                progress.say(t, f"hellaswag acc {acc:.4f}, acc_norm {acc_norm:.4f}")
        if RANK == 0 and sample and run.encoding and t > 0 and not progress.stopping:
            print_samples(run.model, run.encoding, cfg, cfg.prompt, seed=cfg.seed + t)
    if RANK == 0 and t > run.step and (keep or last or progress.stopping):
        if cfg.checkpoint_every:
            run.save(t)
        draw_curves(Path(cfg.log_dir), cfg.n_embd, cfg.data == str(FINEWEB_DATA))
    progress.clock = time.perf_counter()  # none of this was a step's time

def train(cfg: TrainConfig) -> int:
    """Train as `cfg` says, on from the newest checkpoint -> exit code: 0, or 128 + the signal."""
    run = Run(cfg)
    with locked(Path(cfg.log_dir)):
        run.resume()
        # Training and validation compile once each; what has many shapes does not
        ddp = compiled = torch.compile(run.model, dynamic=False) if cfg.compile else run.model
        if WORLD_SIZE > 1:
            ddp = nn.parallel.DistributedDataParallel(compiled, gradient_as_bucket_view=True)
            ddp.require_backward_grad_sync = False  # or ranks wait for one out of memory
        B = cfg.micro_batch_size = fit_micro_batch(run, ddp)
        A = cfg.total_batch_size // (B * cfg.sequence_length * WORLD_SIZE)  # micro-steps a step
        run.train_loader.B = run.val_loader.B = B
        say(str(cfg))
        step = f"{B} sequences × {cfg.sequence_length} tokens × {A} micro-steps"
        say(f"{run.model.num_params():,} parameters; a step: {step} × {WORLD_SIZE} processes")
        validation = f"a validation: {cfg.val_tokens:,} of {run.val_loader.num_tokens:,} tokens"
        say(f"{validation}; knowing nothing costs ln V = {math.log(cfg.vocab_size):.4f}")
        batch = to_device(run.train_loader.batch(run.step * A), run.device)
        with Progress(run) as progress:
            for t in range(run.step, cfg.max_steps + 1):
                once_in_a_while(t, run, compiled, progress)
                if t == cfg.max_steps or progress.stopping:
                    break
                # One step, from tokens to new weights
                lr = get_lr(t, cfg)
                for group in run.optimizer.param_groups:
                    group["lr"] = lr
                train_loss = 0.0
                for m in range(A):
                    x, y = batch
                    if WORLD_SIZE > 1:  # gradients are exchanged once, at the last micro-step
                        ddp.require_backward_grad_sync = m == A - 1
                    with run.autocast:
                        # backward() adds up, but the loss is the mean over the whole batch
                        loss = ddp(x, y)[1] / A
                    run.scaler.scale(loss).backward()
                    train_loss += loss.detach()
                    batch = to_device(run.train_loader.batch(t * A + m + 1), run.device)
                    progress.read()  # the step before, now that the GPU has work
                run.scaler.unscale_(run.optimizer)
                # Odd text can have a gradient many times the usual: its length is cut
                norm = nn.utils.clip_grad_norm_(run.model.parameters(), cfg.grad_clip or math.inf)
                run.scaler.step(run.optimizer)
                run.scaler.update()
                run.optimizer.zero_grad(set_to_none=True)
                progress.step(t, lr, train_loss, norm)
    if not progress.stopping:
        return 0
    saved = "the same command goes on from there" if cfg.checkpoint_every else "nothing saved"
    say(f"stopped after {t:,} steps; {saved}")
    return 128 + (progress.signum or signal.SIGTERM)

# === Command line ===
def parse_flags(argv: list[str] | None) -> TrainConfig:
    """Defaults, replaced by what the named model brings, replaced by what is given."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = functools.partial(require, False)
    flags = {f.name: f for f in fields(TrainConfig) if f.metadata}
    for name, f in flags.items():
        about, default = f.metadata, "" if f.default is None else f" ({f.default})"
        how = dict(type=about["kind"], choices=about["choices"])
        how = dict(action=argparse.BooleanOptionalAction) if about["kind"] is bool else how
        parser.add_argument(f"--{name}", help=about["help"] + default, **how)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        low = flags[name].metadata["low"]  # and nan is not
        require(low is None or low <= value < 2**63, f"--{name} {value} is not from {low} to 2^63")
        require(value != "" or name in ("prompt", "generate"), f"--{name} is empty; leave it out")
    demo = "data" not in given and not find_shards(FINEWEB_DATA, "train")
    if demo and not {"generate", "export"} & given.keys():
        say(f"no shards in {FINEWEB_DATA} (python fineweb.py makes them): training on Python's own")
    init_from = given.get("init_from", "scratch")
    model = given.get("model", "demo" if demo else init_from if init_from in MODELS else "gpt2")
    brought = dict(MODELS[model], model=model)
    if loaded := read_pretrained(init_from):
        brought |= {name: getattr(loaded[0], name) for name in (*SIZES, "pad_vocab")}
    cfg = TrainConfig(**{**brought, **given})
    cfg.loaded = loaded  # for initial_model and use
    return cfg

def use(cfg: TrainConfig) -> int:
    """Do what --generate or --export says, with the newest checkpoint or --init_from."""
    device, where = resolve(cfg), cfg.init_from
    if where == "scratch":
        where, state = cfg.log_dir, newest_checkpoint(Path(cfg.log_dir))
        require(state, f"no checkpoint in {where}; train first, or see --init_from, --log_dir")
        config, weights = GPT2Config(**state["config"]), state["model"]
    else:
        config, weights = cfg.loaded
    model = load_weights(GPT2(replace(config, attention=cfg.attention)), weights, where)
    if cfg.export is not None and RANK == 0:
        say(sibling("hellaswag", "write_model", cfg.export, asdict(config), model.state_dict()))
    if cfg.generate is not None:
        fits = [name for name, V in ENCODINGS.items() if V <= config.vocab_size < 1.001 * V]
        name = config.encoding or [*fits, f"of {config.vocab_size} tokens"][0]  # unknown
        encoding = sibling("fineweb", "get_encoding", name)
        print_samples(model.to(device), encoding, cfg, cfg.generate, cfg.seed)
    return 0

def main(argv: list[str] | None = None) -> int:
    try:
        told = WORLD_SIZE == 1 or all(map(os.environ.get, ("RANK", "MASTER_ADDR", "MASTER_PORT")))
        require(told and 0 <= RANK < WORLD_SIZE, "RANK or WORLD_SIZE is wrong; see torchrun")
        cfg = parse_flags(argv)
        return train(cfg) if cfg.generate is None and cfg.export is None else use(cfg)
    except Exception as error:
        ours = isinstance(error, (UserError, ImportError))
        if WORLD_SIZE > 1 and (RANK != 0 or not ours):
            time.sleep(5)  # another rank may say why, and torchrun end all
        get_error_handler().record_exception(error)  # for torchrun's report
        if not ours:
            raise
        say(f"error: {error}", sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        if dist.is_initialized():
            time.sleep(0.1)  # gloo's threads still use Python (pytorch#179291)
            dist.destroy_process_group()

if __name__ == "__main__":
    code = main()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # Python would try once more, and exit with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)
