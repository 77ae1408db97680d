"""Score a model on HellaSwag: which of four endings continues a situation most plausibly?

    python hellaswag.py                       # get the questions -> hellaswag/hellaswag_val.jsonl
    python hellaswag.py --model gpt2          # and score OpenAI's 124M model, or gpt2-medium, …
    python hellaswag.py --model log/checkpoint_19073.pt --show 3   # your own; show what it chose
    python hellaswag.py --file hellaswag_val.jsonl                 # questions from a local copy

HellaSwag (Zellers et al., 2019, arXiv:1905.07830) has 10,042 questions in its validation split,
which are easy for people. The model isn't asked anything: its choice is the ending that it finds
likeliest after the context. Likeliest can mean two things. acc compares the log-likelihoods of
whole endings, which favours short ones, and acc_norm their means over the tokens of an ending.
"""

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from fineweb import download, get_encoding, say, write_file

# train_gpt2.py looks for the questions here, too.
QUESTIONS_FILE = Path("hellaswag/hellaswag_val.jsonl")
DATASET = "Rowan/hellaswag"


# --------------------------------------------------------------------------------------------------
# Questions


def is_question(row) -> bool:
    """Whether a row of the file has a context, four endings and the index of the right one."""
    if not isinstance(row, dict):
        return False
    endings = row.get("endings")
    if not isinstance(endings, list) or len(endings) != 4:
        return False
    # Every text needs a token, since an ending's first token is predicted from the context.
    for text in [row.get("ctx")] + endings:
        if not isinstance(text, str) or not text.strip():
            return False
    # Labels are strings on the hub and numbers in other copies. The test split has none.
    return str(row.get("label")) in ("0", "1", "2", "3")


def read_questions(path: Path, encoding) -> list:
    """Read and encode a .jsonl file -> [(context tokens, [four endings' tokens], label)].

    Raises SystemExit if it can't be read, has a line that is not a question, or has no questions.
    """
    advice = "correct it, or remove the file to download it again with python hellaswag.py"
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise SystemExit(f"error: {path} can't be read ({error.strerror}); {advice}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError, too
            row = None
        if not is_question(row):
            wanted = "JSON with a ctx, four endings, and a label from 0 to 3"
            raise SystemExit(f"error: {path}, line {number} is not {wanted}; {advice}")
        context = encoding.encode_ordinary(row["ctx"])
        # GPT-2's tokens hold a word and the space before it, so the space is part of the ending.
        endings = [encoding.encode_ordinary(" " + ending) for ending in row["endings"]]
        questions.append((context, endings, int(row["label"])))
    if not questions:
        raise SystemExit(f"error: {path} has no questions in it; {advice}")
    return questions


def download_questions() -> bytes:
    """Return the rows of the validation split on the Hugging Face hub, as lines of JSON."""
    import datasets

    fetch = functools.partial(datasets.load_dataset, DATASET, split="validation")
    rows = download(DATASET, fetch, seconds=600)
    lines = [json.dumps(row) + "\n" for row in rows]
    return "".join(lines).encode()


def prepare(file: Path | None, encoding) -> list:
    """Make QUESTIONS_FILE if it isn't there yet, and return its questions.

    They come from the local copy `file` if one is named, otherwise from the hub. What is there is
    never overwritten, because scores can only be compared if the questions are the same.
    """
    if not QUESTIONS_FILE.exists():
        if file is None:
            content = download_questions()
        else:
            read_questions(file, encoding)  # so that a file with mistakes is not copied
            content = file.read_bytes()
        write_file(QUESTIONS_FILE, content)
    questions = read_questions(QUESTIONS_FILE, encoding)
    if file is not None and read_questions(file, encoding) != questions:
        advice = "move it away, or leave out --file"
        raise SystemExit(f"error: {QUESTIONS_FILE} holds other questions than {file}; {advice}")
    say(f"{QUESTIONS_FILE} holds {len(questions):,} questions")
    return questions


# --------------------------------------------------------------------------------------------------
# Scores


def make_rows(context: list[int], endings: list[list[int]], block_size: int) -> list:
    """Join a context with each of its endings -> four rows (tokens, where the ending starts).

    A context that is too long loses its start, which matters least for what comes next. How much of
    it depends on the longest ending, so that all four follow the same context.
    """
    longest = max(len(ending) for ending in endings)
    context = context[-max(1, block_size - longest) :]
    # The last token is predicted but never fed to the model, so there is room for one more.
    return [(tuple(context + ending)[: block_size + 1], len(context)) for ending in endings]


def make_batches(rows: list, batch_tokens: int) -> list:
    """Put rows of similar length into a batch, since all are padded to the longest in it.

    The longest come first, so that a lack of memory shows at once. Equal rows are scored only once:
    in two batches of different shape, their scores would differ in the last digits, and one of two
    equal endings would win where they should tie.
    """
    rows = sorted(set(rows), key=lambda row: len(row[0]), reverse=True)
    batches = []
    while rows:
        longest = len(rows[0][0])
        B = max(1, batch_tokens // longest)
        batches.append(rows[:B])
        rows = rows[B:]
    return batches


def score_batch(model, batch, device):
    """Losses in nats of each token of an ending: a float64 tensor (tokens,) for each row."""
    inputs = [torch.tensor(tokens[:-1]) for tokens, _ in batch]
    endings = [torch.tensor(tokens[start:]) for tokens, start in batch]
    # Padding comes after a row's tokens, and causal attention never looks ahead.
    logits = model(pad_sequence(inputs, batch_first=True).to(device))  # (B, T, V)
    # The logits at a position predict the next token. Only those that predict an ending's token are
    # converted to float32: together, all of them would take gigabytes.
    needed = [logits[b, start - 1 : len(inputs[b])] for b, (_, start) in enumerate(batch)]
    targets = torch.cat(endings).to(device)
    losses = F.cross_entropy(torch.cat(needed).float(), targets, reduction="none")
    return losses.cpu().double().split([len(ending) for ending in endings])


@torch.no_grad()
def score_questions(model, questions, device, progress=iter, batch_tokens=None):
    """Log-likelihoods of the endings in nats -> (sums, means over tokens), float64 tensors (n, 4).

    `model(idx)` gives logits (B, T, V). `progress` wraps the batches: it may show a bar, or end
    them early. An ending that was not scored by then has -inf.
    """
    if batch_tokens is None:
        # A GPU needs large batches to be busy. On a CPU they only take memory.
        batch_tokens = 2**11 if device.type == "cpu" else 2**13
    rows = []
    for context, endings, _ in questions:
        rows += make_rows(context, endings, model.config.block_size)
    scores = {}
    for batch in progress(make_batches(rows, batch_tokens)):
        for row, losses in zip(batch, score_batch(model, batch, device), strict=True):
            scores[row] = -losses.sum().item()
    sums = torch.tensor([scores.get(row, -math.inf) for row in rows], dtype=torch.float64)
    lengths = torch.tensor([len(tokens) - start for tokens, start in rows])
    return sums.view(-1, 4), (sums / lengths).view(-1, 4)


def count_hits(model, questions, device, progress=iter) -> tuple[int, int]:
    """The number of questions whose right ending the model chooses, by acc and by acc_norm."""
    labels = torch.tensor([label for _, _, label in questions])
    sums, means = score_questions(model, questions, device, progress)
    # argmax takes the first of equal values.
    hits = (sums.argmax(dim=1) == labels).sum().item()
    hits_norm = (means.argmax(dim=1) == labels).sum().item()
    return hits, hits_norm


def show(questions, sums, means, encoding) -> None:
    """Print questions with the loss of each ending in nats, the model's choices and the label."""
    for i, (context, endings, label) in enumerate(questions):
        say(f"--- example {i}\n{encoding.decode(context)}\n        loss  a token  ending")
        notes = ["", "", "", ""]
        notes[sums[i].argmax()] += "  <- the choice by acc"
        notes[means[i].argmax()] += "  <- the choice by acc_norm"
        notes[label] += "  <- right"
        for k, ending in enumerate(endings):
            text = encoding.decode(ending)
            say(f"    {-sums[i, k]:8.2f} {-means[i, k]:8.4f} {text}{notes[k]}")


# --------------------------------------------------------------------------------------------------
# Command line


def parse_flags(argv):
    parser = argparse.ArgumentParser(description="Score a model on HellaSwag.", allow_abbrev=False)
    add = parser.add_argument
    add("--file", type=Path, help="a local .jsonl of the questions (default: download them)")
    add("--model", help="score gpt2 to gpt2-xl, user/model of the hub, a folder or a checkpoint")
    add("--limit", type=int, help="score only the first so many questions")
    add("--show", type=int, default=0, help="print so many questions with the model's choices")
    add("--device", help="cpu, cuda, cuda:1 or mps (default: the fastest there is)")
    add("--dtype", choices=("fp32", "tf32", "bf16", "fp16"), help="precision (default: the best)")
    args = parser.parse_args(argv)
    if args.show < 0 or (args.limit is not None and args.limit < 1):
        raise SystemExit("error: too few questions; give --limit and --show positive numbers")
    if args.show and args.model is None:
        raise SystemExit("error: --show prints a model's choices; name the model with --model")
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise SystemExit("error: hellaswag.py runs as one process; start it without torchrun")
    return args


def score(args) -> None:
    """Score the model that --model names."""
    import train_gpt2

    # The model comes first: if it can't be had, nothing is downloaded and nothing written.
    device = train_gpt2.choose_device(args.device)
    dtype = args.dtype or train_gpt2.choose_dtype(device)
    model = train_gpt2.GPT2.from_pretrained(args.model).to(device).eval()
    if model.config.encoding != "gpt2":
        raise SystemExit(f"error: {args.model} has other tokens than GPT-2's; choose another")
    encoding = get_encoding("gpt2")
    questions = prepare(args.file, encoding)[: args.limit]
    with train_gpt2.set_precision(device, dtype):
        if args.show:
            shown = questions[: args.show]
            sums, means = score_questions(model, shown, device)
            show(shown, sums, means, encoding)
        progress = functools.partial(tqdm, desc="hellaswag", unit=" batches", disable=None)
        hits, hits_norm = count_hits(model, questions, device, progress)
    n = len(questions)
    say(f"hellaswag | {n} examples | acc {hits / n:.4f} | acc_norm {hits_norm / n:.4f}")


def main(argv: list[str] | None = None) -> int:
    """Do what the flags say -> the exit code."""
    try:
        args = parse_flags(argv)
        if args.model is None:
            prepare(args.file, get_encoding("gpt2"))
        else:
            score(args)
    except SystemExit as error:
        if not isinstance(error.code, str):  # argparse has said what was wrong
            raise
        say(error.code, sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
