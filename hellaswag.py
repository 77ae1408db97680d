"""Score a model on HellaSwag: which of four endings goes on from a context as the world does?

    python hellaswag.py                                   # get the questions -> hellaswag/hellaswag_val.bin
    python hellaswag.py --model gpt2                      # and score OpenAI's 124M model; gpt2-medium … gpt2-xl as well
    python hellaswag.py --model log/model_19073.pt --show 3         # your own, and show what it chose three times
    python hellaswag.py --file hellaswag_val.jsonl        # questions from a local copy

HellaSwag (Zellers et al., 2019, arXiv:1905.07830) has 10,042 questions to validate on, easy for people. The model is
not asked: its choice is the ending it finds likeliest after the context. acc goes by an ending's log-likelihood, which
favours short ones, acc_norm by its mean over the tokens. The file made here is llm.c's, and train_gpt2.py scores on it
as it trains.

Read it from the top: questions, the file, scores, the command line.
"""

import argparse
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

import train_gpt2
from train_gpt2 import UserError

DATASET, SPLIT = "Rowan/hellaswag", "validation"

# ----------------------------------------------------------------------------------------------------------------------
# Questions: rows with a context `ctx`, four `endings`, and `label`, the number of the right one, from 0


def read_hub():
    """(where, row) of each question of the data set on the Hugging Face hub. Raises UserError where it can't be had."""
    try:
        import datasets

        rows = datasets.load_dataset(DATASET, split=SPLIT)
    except Exception as error:  # no network shows itself in a dozen types of exception
        help = "connect to the network, or name a local copy, a .jsonl, with --file"
        raise UserError(f"{DATASET} can't be downloaded ({type(error).__name__}); {help}") from error
    for number, row in enumerate(rows):
        yield f"{DATASET}, row {number}", row


def read_jsonl(path: Path):
    """(where, row) of each line of a file. Raises UserError for one that can't be read or is not JSON."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"--file {path} can't be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield f"{path}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
                raise UserError(f"{path}, line {number} is not JSON ({error})") from error


def encode_question(encoding, row, where: str) -> tuple[list[int], list[list[int]], int]:
    """A row -> (tokens of the context, of each ending with a space before it, index of the right one). Raises UserError
    for a row that is no question."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object")
    for name in ("ctx", "endings", "label"):
        if name not in row:
            raise UserError(f"{where} has no field {name}")
    context, endings, label = row["ctx"], row["endings"], row["label"]
    if not isinstance(endings, list) or len(endings) != 4:
        raise UserError(f"{where}: endings is not a list of four")
    for name, text in ("ctx", context), *((f"ending {i}", ending) for i, ending in enumerate(endings)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {name} is {'empty' if isinstance(text, str) else 'no text'}")
    if str(label) not in ("0", "1", "2", "3"):  # the hub has text, the original file numbers
        raise UserError(f"{where}: label is {label!r}, not 0, 1, 2 or 3")
    return encoding.encode_ordinary(context), [encoding.encode_ordinary(" " + e) for e in endings], int(label)


# ----------------------------------------------------------------------------------------------------------------------
# The file, in llm.c's format, which train_gpt2.read_hellaswag describes and reads


def to_bytes(encoding, questions) -> bytes:
    """The content of the file. Raises UserError for a question that is none, or too long for the format; or without
    any."""
    examples = []
    for index, (where, row) in enumerate(questions):
        context, endings, label = encode_question(encoding, row, where)
        example = [65535, 0, index, label, len(endings), len(context), *context]
        for ending in endings:
            example += [len(ending), *ending]
        if max(2 * len(example), index) > 65535:
            raise UserError(f"{where} is too much for the format: 65,535 bytes an example, 65,536 in all; leave it out")
        example[1] = 2 * len(example)
        examples.append(np.array(example, dtype="<u2").tobytes())
    if not examples:
        raise UserError("there are no questions in it; see --file")
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240522, 1, len(examples), max(map(len, examples))
    return header.tobytes() + b"".join(examples)


def prepare(path: Path, file: Path | None) -> None:
    """See that all questions are in `path`: from a local copy, or else from the hub. A file that is there already is
    used and never overwritten; a new one appears whole or not at all. Raises UserError where it holds other questions
    than the local copy, or can't be written."""
    if path.exists() and file is None:
        print(f"{path} is there already, and used as it is; to fetch it again, remove it first")
        return
    content = to_bytes(train_gpt2.gpt2_encoding(), read_jsonl(file) if file else read_hub())
    partial = path.with_name(path.name + ".tmp")
    try:
        if path.exists():
            if path.read_bytes() != content:
                raise UserError(f"{path} holds other questions than --file {file}; move it away, or leave out --file")
            print(f"{path} holds the questions of {file} already")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as out:
                out.write(content)
                out.flush()
                os.fsync(out.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path} can't be written ({error.strerror})") from error
    print(f"{path}: {np.frombuffer(content, '<i4', 3)[2]:,} questions from {file or DATASET}")


# ----------------------------------------------------------------------------------------------------------------------
# Scores


def show(examples, sums: torch.Tensor, means: torch.Tensor) -> None:
    """Print questions with the losses of their endings, in nats, the choice and the right one."""
    encoding = train_gpt2.gpt2_encoding()
    for i, (context, endings, label) in enumerate(examples):
        print(f"--- example {i}\n{encoding.decode(context.tolist())}")
        choices = {"acc": sums[i].argmax().item(), "acc_norm": means[i].argmax().item()}
        print("        loss  a token  ending")
        for k, ending in enumerate(endings):
            notes = [f"the choice by {name}" for name, choice in choices.items() if choice == k]
            notes += ["right"] if label == k else []
            text = encoding.decode(ending.tolist()) + (f"  <- {', '.join(notes)}" if notes else "")
            print(f"    {-sums[i, k]:8.2f} {-means[i, k]:8.4f} {text}")


def score(model: train_gpt2.GPT2, examples, device: torch.device, dtype: str, count: int) -> None:
    """Print the first `count` questions, then acc and acc_norm of all."""
    from tqdm import tqdm

    progress = functools.partial(tqdm, desc="hellaswag", unit=" batches", disable=None)
    half = torch.float16 if dtype == "fp16" else torch.bfloat16
    with torch.autocast(device.type, half, enabled=dtype != "fp32"):
        if count:
            show(examples[:count], *train_gpt2.hellaswag_scores(model, examples[:count], device))
        acc, acc_norm = train_gpt2.evaluate_hellaswag(model, examples, device, progress)
    print(f"hellaswag | {len(examples)} examples | acc {acc:.4f} | acc_norm {acc_norm:.4f}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class FlagParser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; --help lists the flags")


def parse_flags(argv: list[str] | None):
    """The command line, checked. Raises UserError."""
    parser = FlagParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--file", type=Path, help=f"questions from a local .jsonl ({DATASET}, {SPLIT}, from the Hugging Face hub)")
    add("--model", help="score gpt2 … gpt2-xl, a Hugging Face folder or a model_*.pt (only get the questions)")
    add("--limit", type=int, help="score the first so many questions (all)")
    add("--show", type=int, default=0, help="print so many questions, their losses and the choices (%(default)s)")
    add("--device", help="cpu, cuda, cuda:1, mps (the fastest there is)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="autocast precision (the device's best)")
    args = parser.parse_args(argv)
    for name, low in ("limit", 1), ("show", 0):
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name} {value} is not a number of at least {low}")
    if args.show and args.model is None:
        raise UserError("--show needs a model to show the choices of; see --model")
    if train_gpt2.WORLD_SIZE > 1:
        raise UserError("hellaswag.py runs as one process; start it without torchrun")
    return args


def run(args) -> None:
    """Do what the flags say. The model comes first: where there is none, nothing is fetched or written."""
    path, model = train_gpt2.HELLASWAG_FILE, None
    if args.model is not None:
        device = train_gpt2.choose_device(args.device)
        model = train_gpt2.GPT2.from_pretrained(args.model)
        needed, vocab_size = train_gpt2.ENCODINGS["gpt2"][1], model.config.vocab_size
        if vocab_size < needed:
            raise UserError(f"{args.model} has a vocabulary of {vocab_size}; HellaSwag is in GPT-2's {needed} tokens")
    prepare(path, args.file)
    examples = train_gpt2.read_hellaswag(path)[: args.limit]
    if model is not None:
        score(model.to(device), examples, device, args.dtype or train_gpt2.native_dtype(device), args.show)


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    try:
        run(parse_flags(argv))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # questions may hold what the terminal can't show
    sys.exit(main())
