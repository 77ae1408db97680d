"""Score a model on HellaSwag: which of four endings goes on from a context as the world does?

    python hellaswag.py                       # get the questions -> hellaswag/hellaswag_val.bin
    python hellaswag.py --model gpt2          # and score OpenAI's 124M model, or gpt2-medium …
    python hellaswag.py --model log/model_19073.pt --show 3    # your own; show what it chose
    python hellaswag.py --file hellaswag_val.jsonl             # questions from a local copy

HellaSwag (Zellers et al., 2019, arXiv:1905.07830) has 10,042 questions to validate on, easy for
people. The model is not asked: its choice is the ending it finds likeliest after the context. acc
goes by an ending's log-likelihood, which favours short ones, acc_norm by its mean over the tokens.
The file made here is llm.c's; train_gpt2.py scores on it. Models of others are read here, too."""

import functools
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fineweb import (
    SHA256,
    FlagParser,
    UserError,
    download,
    get_encoding,
    gpt2_files,
    keep_printing,
    write_file,
)

FILE = Path("hellaswag/hellaswag_val.bin")
DATASET, SPLIT = "Rowan/hellaswag", "validation"

# === Questions: rows with a context `ctx`, four `endings` and `label`, the right one of them ===
def read_hub():
    """(where, row) of each question of the data set on the Hugging Face hub. Raises UserError."""
    import datasets

    help = "connect to the network, or name a local copy, a .jsonl, with --file"
    rows = download(DATASET, lambda: datasets.load_dataset(DATASET, split=SPLIT), help)
    for number, row in enumerate(rows):
        yield f"{DATASET}, row {number}", row

def read_jsonl(path: Path):
    """(where, row) of each line of a file. Raises UserError for one that is not JSON."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--file {path} can't be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise UserError(f"{path}, line {number} is not JSON ({error})") from error
        if line.strip():
            yield f"{path}, line {number}", row

def check_question(row, where: str) -> None:
    """Raises UserError for a row that is no question."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object")
    if missing := [name for name in ("ctx", "endings", "label") if name not in row]:
        raise UserError(f"{where} has no field {missing[0]}")
    if not isinstance(row["endings"], list) or len(row["endings"]) != 4:
        raise UserError(f"{where}: endings is not a list of four")
    for name, text in zip(("ctx", *"0123"), (row["ctx"], *row["endings"]), strict=True):
        if not isinstance(text, str) or not text.strip():
            name = name if name == "ctx" else f"ending {name}"
            raise UserError(f"{where}: {name} is {'empty' if isinstance(text, str) else 'no text'}")
    if str(row["label"]) not in tuple("0123"):  # text on the hub, numbers elsewhere
        raise UserError(f"{where}: label is {row['label']!r}, not 0, 1, 2 or 3")

# === The file, in llm.c's format ===
# 256 int32 (20240522, version 1, examples, longest in bytes); then uint16, for each example 65535,
# its bytes, index, label, number of endings, and length and tokens of the context and each ending

def to_bytes(encoding, questions) -> bytes:
    """The content of the file. Raises UserError for a question that is none, or does not fit."""
    examples = []
    for index, (where, row) in enumerate(questions):
        check_question(row, where)
        context = encoding.encode_ordinary(row["ctx"])
        example = [65535, 0, index, int(row["label"]), 4, len(context), *context]
        for text in row["endings"]:
            ending = encoding.encode_ordinary(" " + text)
            example += [len(ending), *ending]
        if max(2 * len(example), index) > 65535:
            limits = "65,535 bytes an example, 65,536 in all"
            raise UserError(f"{where} is too much for the format: {limits}; leave it out")
        example[1] = 2 * len(example)
        examples.append(np.array(example, dtype="<u2").tobytes())
    if not examples:
        raise UserError("there are no questions in it; see --file")
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240522, 1, len(examples), max(map(len, examples))
    return header.tobytes() + b"".join(examples)

def read_questions(path: Path, vocab_size: int = 50257) -> list:
    """Read the file -> [(context tokens, four endings, index of the right one)], int64 arrays.
    Raises UserError for another file, and for tokens beyond the vocabulary."""
    raw, questions, at = np.fromfile(path, dtype="<u2"), [], 512
    try:
        if tuple(raw[:4]) != (20240522 & 0xFFFF, 20240522 >> 16, 1, 0):
            raise ValueError("wrong magic number or version")
        while at < len(raw):
            question = raw[at : at + int(raw[at + 1]) // 2].astype(np.int64)
            parts, p = [], 5
            for _ in range(1 + 4):
                parts.append(question[p + 1 : p + 1 + question[p]])
                p += 1 + int(question[p])
            label, whole = int(question[3]), p == len(question) and all(map(len, parts))
            if question[0] != 65535 or label > 3 or question[4] != 4 or not whole:
                raise ValueError(f"example {len(questions)} is damaged")
            if np.concatenate(parts).max() >= vocab_size:
                raise ValueError(f"example {len(questions)} is beyond a vocabulary of {vocab_size}")
            questions.append((parts[0], parts[1:], label))
            at += len(question)
        if not questions or len(questions) != raw[:512].view("<i4")[2]:
            raise ValueError(f"the header promises other than the {len(questions)} there are")
        return questions
    except (ValueError, IndexError) as error:
        reason = f"{path} is no HellaSwag token file ({error})"
        raise UserError(f"{reason}; get it again, or remove it") from error

def prepare(path: Path, file: Path | None) -> None:
    """See that all questions are in `path`: from a local copy, or else from the hub. A file that
    is there is used and never overwritten; a new one appears whole or not at all. Raises UserError
    where it holds other questions than the local copy, or can't be written."""
    if path.exists() and file is None:
        return print(f"{path} is there already, and used; to fetch it again, remove it first")
    content = to_bytes(get_encoding("gpt2"), read_jsonl(file) if file else read_hub())
    try:
        if path.exists() and path.read_bytes() != content:
            other = f"{path} holds other questions than --file {file}"
            raise UserError(f"{other}; move it away, or leave out --file")
        if path.exists():
            return print(f"{path} holds the questions of {file} already")
        write_file(path, content)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error
    print(f"{path}: {np.frombuffer(content, '<i4', 3)[2]:,} questions from {file or DATASET}")

# === Scores ===
@torch.no_grad()
def scores(model, questions, device: torch.device, progress=iter, batch_tokens=None):
    """Log-likelihood in nats of each ending after its context: its sum, and its mean over the
    ending's tokens, two float64 tensors (n, 4). `progress` may wrap the batches, or end them.

    A row of a batch is a context and an ending; rows of like length share a batch. What exceeds
    the block size loses the start of its context. Endings that are equal are scored once."""
    size, rows = model.config.block_size, []
    batch_tokens = batch_tokens or (2**11 if device.type == "cpu" else 2**13)
    for context, endings, _ in questions:
        context = context[-max(1, size - max(len(ending) for ending in endings)) :]
        endings = [ending[: size + 1 - len(context)] for ending in endings]
        rows.append([(tuple(context), tuple(ending)) for ending in endings])
    waiting = sorted({row for four in rows for row in four}, key=lambda r: -len(r[0] + r[1]))
    batches, totals = [], {}
    while waiting:
        B = max(1, batch_tokens // len(waiting[0][0] + waiting[0][1]))
        batches, waiting = [*batches, waiting[:B]], waiting[B:]
    for batch in progress(batches):
        T = len(batch[0][0] + batch[0][1]) - 1
        idx, targets = torch.zeros(2, len(batch), T, dtype=torch.int64)
        predicts = torch.zeros(len(batch), T, dtype=torch.bool)  # where an ending's token is next
        for b, (context, ending) in enumerate(batch):
            tokens = torch.tensor(context + ending)
            idx[b, : len(tokens) - 1], targets[b, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            predicts[b, len(context) - 1 : len(tokens) - 1] = True
        x = model.hidden(idx.to(device))[predicts.to(device)]  # only they meet the output head
        target = targets[predicts].to(device)
        nats = -F.cross_entropy(model.logits(x).float(), target, reduction="none").cpu().double()
        parts = nats.split([len(ending) for _, ending in batch])
        totals.update(zip(batch, [part.sum().item() for part in parts], strict=True))
    sums = [[totals.get(row, -torch.inf) for row in four] for four in rows]
    lengths = [[len(ending) for _, ending in four] for four in rows]
    sums, lengths = (torch.tensor(z, dtype=torch.float64).view(-1, 4) for z in (sums, lengths))
    return sums, sums / lengths

def count_hits(model, questions, device: torch.device, progress=iter) -> list[int]:
    """For how many questions the right ending has the highest sum, and mean. If two are equal, the
    first counts."""
    labels = torch.tensor([label for *_, label in questions])
    sums_and_means = scores(model, questions, device, progress)
    return [(values.argmax(dim=1) == labels).sum().item() for values in sums_and_means]

def show(questions, sums: torch.Tensor, means: torch.Tensor) -> None:
    """Print questions with the losses of their endings, in nats, the choice and the right one."""
    encoding = get_encoding("gpt2")
    for i, (context, endings, label) in enumerate(questions):
        print(f"--- example {i}\n{encoding.decode(context.tolist())}")
        choices = {"acc": sums[i].argmax().item(), "acc_norm": means[i].argmax().item()}
        print("        loss  a token  ending")
        for k, ending in enumerate(endings):
            notes = [f"the choice by {name}" for name, choice in choices.items() if choice == k]
            notes += ["right"] if label == k else []
            text = encoding.decode(ending.tolist()) + "  <- " * bool(notes) + ", ".join(notes)
            print(f"    {-sums[i, k]:8.2f} {-means[i, k]:8.4f} {text}")

# === Models of others: folders of Hugging Face's transformers, files of nanoGPT's kind ===
PUBLISHED = dict(  # what its config must say to mean GPT-2 as published
    model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5,
    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
    tie_word_embeddings=True,
)  # fmt: skip
TRANSPOSED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")  # stored the other way round
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
GPT2_TOKENS = range(50257, 50308)  # sizes of GPT-2's vocabulary: some add special tokens
SAFE = ["config.json", "model.safetensors", "model-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin"]  # what older ones have instead
OPENAIS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
HUB = dict(distilgpt2="distilbert/distilgpt2", **{n: f"openai-community/{n}" for n in OPENAIS})

def read_model(what: str, config_of) -> tuple:
    """(config_of(sizes, weights), weights) of a file of nanoGPT or build-nanogpt, of transformers'
    folder or, where there is neither, of a model on the hub. Runs no code. Raises UserError."""
    path = Path(what) if Path(what).exists() else fetch_model(what)
    try:
        config, weights = read_folder(path) if path.is_dir() else read_nanogpt(path)
        sizes = {size: config[size] for size in SIZES}
        if sizes["vocab_size"] == 50304:  # GPT-2's, padded
            sizes["vocab_size"] = 50257
        masks = (".attn.bias", ".attn.masked_bias")  # causal ones, in older files
        weights = {name: w for name, w in weights.items() if not name.endswith(masks)}
        return config_of(sizes, weights), weights
    except Exception as error:  # a damaged or foreign file fails in any layer
        # torch.load's reason is the last line before where it refers to its documentation
        *_, why = str(error).partition("\n\nCheck the documentation")[0].splitlines() or [""]
        reason = f"{type(error).__name__}: {why.strip()}"
        raise UserError(f"{what} can't be read as GPT-2 ({reason:.250}); choose another") from error

def fetch_model(what: str) -> Path:
    """A folder with the files of a model on the hub. Raises UserError."""
    from huggingface_hub import snapshot_download

    name = HUB.get(what, what)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or name.endswith((".pt", ".bin")):
        raise UserError(f"{what} is no model; name gpt2 … gpt2-xl, user/model of the hub or a path")
    for files in SAFE, SAFE + PICKLED:
        fetch = functools.partial(snapshot_download, name, allow_patterns=files)
        folder = Path(download(name, fetch, "connect to the network, or name a local folder"))
        if files != SAFE or any(folder.glob("*.safetensors")):
            return folder

def read_folder(folder: Path) -> tuple[dict, dict]:
    from safetensors.torch import load_file

    config, weights = json.loads((folder / "config.json").read_text(encoding="utf-8")), {}
    for key, value in dict(PUBLISHED, n_inner=4 * config.get("n_embd", 0)).items():
        if config.get(key) not in (None, value):
            raise ValueError(f"another model than GPT-2: {key} {config[key]}")
    found = (sorted(folder.glob(name)) for name in (*SAFE[1:], *PICKLED))
    for file in next(filter(None, found), [folder / "model.safetensors"]):
        safe = file.suffix == ".safetensors"
        part = load_file(file) if safe else torch.load(file, "cpu", weights_only=True)
        for name, value in part.items():
            if not name.startswith(("transformer.", "lm_head.")):  # so OpenAI's on the hub
                name = f"transformer.{name}"
            weights[name] = value.t() if name.endswith(TRANSPOSED) else value
    return dict(config, block_size=config.get("n_positions")), weights

def read_nanogpt(file: Path) -> tuple[dict, dict]:
    # Of nanoGPT's GELU ours is an approximation, and less than 0.0005 from it.
    # build-nanogpt's files hold an object of its own class, and another class stands in for that
    with torch.serialization.safe_globals([(types.SimpleNamespace, "__main__.GPTConfig")]):
        state = dict(torch.load(file, "cpu", weights_only=True, mmap=str(file).isprintable()))
    if "model" not in state:
        raise ValueError("a bare state dict, without the sizes of its model")
    wrapped = r"^((_orig_mod|module)\.)+"  # by torch.compile, by DDP
    weights = {re.sub(wrapped, "", name): w for name, w in state["model"].items()}
    weights.setdefault("lm_head.weight", weights["transformer.wte.weight"])
    if "transformer.ln_f.bias" not in weights:
        raise ValueError("nanoGPT checkpoint without biases: not a GPT-2")
    if not weights["lm_head.weight"].equal(weights["transformer.wte.weight"]):
        raise ValueError("its output head is not its embedding: not a GPT-2")
    return state["model_args"] if "model_args" in state else vars(state["config"]), weights

def write_model(folder: Path | str, sizes: dict, weights: dict) -> str:
    """Write a folder for transformers, with the tokenizer if it has one -> a report. Raises
    UserError."""
    from safetensors.torch import save_file

    folder, V, T, state = Path(folder), sizes["vocab_size"], sizes["block_size"], {}
    for name, value in weights.items():
        value = value[:V] if name == "transformer.wte.weight" else value  # without padding
        state[name] = (value.t() if name.endswith(TRANSPOSED) else value).contiguous()
    state.pop("lm_head.weight")  # the embedding once more
    by_size = "gpt2" if V in GPT2_TOKENS else "bytes" if V == 257 else None
    encoding = by_size if sizes.get("encoding") in (None, by_size) else None  # is unknown
    endoftext = dict(gpt2=50256, bytes=256).get(encoding)
    special = dict(bos_token_id=endoftext, eos_token_id=endoftext)
    config = dict(
        PUBLISHED, **special, architectures=["GPT2LMHeadModel"], vocab_size=V,
        n_layer=sizes["n_layer"], n_head=sizes["n_head"], n_embd=sizes["n_embd"], n_positions=T,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, n_ctx=T,  # llama.cpp reads n_ctx
    )  # fmt: skip
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--export {folder} is there already; choose another folder")
    short = dict(max_length=T) if T < 512 else {}  # a pipeline adds 256 tokens to any prompt
    files = {"config.json": config, "generation_config.json": special | short}
    files = {name: json.dumps(content, indent=2).encode() for name, content in files.items()}
    report = f"{folder}: {sum(w.numel() for w in state.values()):,} parameters, for transformers"
    try:
        files |= tokenizer_files(encoding, T)
    except UserError as error:
        report = f"{folder} gets no tokenizer: {error}\n{report}"
    partial = folder.absolute().with_name(f".{folder.name}.tmp")  # it appears whole or not at all
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(state, partial / "model.safetensors", metadata=dict(format="pt"))
        for name, content in files.items():
            (partial / name).write_bytes(content)
        folder.rmdir() if folder.exists() else None
        partial.rename(folder)
    except Exception as error:  # of the disk, or of safetensors
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"--export {folder} can't be written ({error}); choose another") from error
    return report

def tokenizer_files(encoding: str | None, block_size: int) -> dict[str, bytes]:
    """What transformers' GPT2Tokenizer reads, by name. Raises UserError for other tokens."""
    from tiktoken.load import read_file_cached

    if encoding != "gpt2":
        raise UserError("transformers has one for GPT-2's tokens, not for these")
    config = dict(tokenizer_class="GPT2Tokenizer", model_max_length=block_size)
    get_encoding("gpt2")  # its files are there, or this says why not
    merges, vocab = map(read_file_cached, gpt2_files(), SHA256)
    config = json.dumps(config).encode()
    return {"tokenizer_config.json": config, "merges.txt": merges, "vocab.json": vocab}

# === Command line ===
def parse_flags(argv: list[str] | None):
    parser = FlagParser(description="Score a model on HellaSwag.", allow_abbrev=False)
    add = parser.add_argument
    add("--file", type=Path, help=f"a local .jsonl ({DATASET}, {SPLIT}, from the Hugging Face hub)")
    add("--model", help="score gpt2 … gpt2-xl, user/model, a folder or a checkpoint (none)")
    add("--limit", type=int, help="score the first so many questions (all)")
    add("--show", type=int, default=0, help="print so many questions and choices (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps (the fastest there is)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="autocast precision (the best)")
    args = parser.parse_args(argv)
    for name, low in ("limit", 1), ("show", 0):
        if (value := getattr(args, name)) is not None and value < low:
            raise UserError(f"--{name} {value} is not a number of at least {low}")
    if args.model == "scratch":
        raise UserError("--model scratch has no weights; name a model")
    if args.show and args.model is None:
        raise UserError("--show needs a model to show the choices of; see --model")
    if (os.environ.get("WORLD_SIZE") or "1") != "1":
        raise UserError("hellaswag.py runs as one process; start it without torchrun")
    return args

def run(args) -> None:
    """Do what the flags say. The model comes first: without one, nothing is fetched or written."""
    if args.model is not None:
        import train_gpt2

        device = train_gpt2.choose_device(args.device)
        dtype = args.dtype or train_gpt2.native_dtype(device)
        model = train_gpt2.GPT2.from_pretrained(args.model).to(device)
        if (V := model.config.vocab_size) < 50257:
            raise UserError(f"{args.model} has a vocabulary of {V}; HellaSwag is in GPT-2's 50257")
    prepare(FILE, args.file)
    questions = read_questions(FILE)[: args.limit]
    if args.model is None:
        return
    from tqdm import tqdm

    progress = functools.partial(tqdm, desc="hellaswag", unit=" batches", disable=None)
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    with torch.autocast(device.type, half, enabled=dtype != "fp32"):
        if args.show:
            show(questions[: args.show], *scores(model, questions[: args.show], device))
        hits = count_hits(model, questions, device, progress)
    acc, acc_norm = (n / len(questions) for n in hits)
    print(f"hellaswag | {len(questions)} examples | acc {acc:.4f} | acc_norm {acc_norm:.4f}")

def main(argv: list[str] | None = None) -> int:
    try:
        run(parse_flags(argv))
        return 0
    except ValueError as error:  # train_gpt2's UserError is another class than fineweb's
        if type(error).__name__ != "UserError":
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130

if __name__ == "__main__":
    keep_printing()
    sys.exit(main())
