"""HellaSwag: the questions, their file, the scores, and the script that does it all."""

import functools
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, llmc_header, python, read_log, write_hellaswag, write_shards

import hellaswag
import train_gpt2
from train_gpt2 import (
    GPT2,
    GPT2Config,
    UserError,
    evaluate_hellaswag,
    export,
    hellaswag_scores,
    read_hellaswag,
)

CPU = torch.device("cpu")
BIN = train_gpt2.HELLASWAG_FILE


def small_model(vocab_size=257, block_size=64, n_embd=32, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=n_embd)
    model = GPT2(GPT2Config(**sizes, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def random_examples(n=30, vocab_size=257, seed=0, longest=(30, 20)):
    rng = np.random.default_rng(seed)
    tokens = lambda most: rng.integers(0, vocab_size, rng.integers(1, most))  # noqa: E731
    return [(tokens(longest[0]), [tokens(longest[1]) for _ in range(4)], int(rng.integers(4))) for _ in range(n)]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The small model as transformers' own."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    export(small_model(), folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def alone(theirs, context, ending):
    """Log-likelihoods of an ending's tokens, scored by itself, without padding."""
    logits = theirs(torch.tensor([[*context, *ending]])).logits[0]
    return torch.log_softmax(logits, -1)[range(len(context) - 1, len(logits) - 1), ending]


def assert_scores(scores, wanted):
    for ours, statistic in zip(scores, ("sum", "mean"), strict=True):
        for i, row in enumerate(wanted):
            assert ours[i].tolist() == pytest.approx([getattr(p, statistic)().item() for p in row], abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 2**12])
def test_scores_are_those_of_each_ending_alone_in_transformers(theirs, attention, batch_tokens):
    examples = random_examples()
    model = small_model(attention=attention)
    scores = hellaswag_scores(model, examples, CPU, batch_tokens=batch_tokens)
    assert_scores(scores, [[alone(theirs, c, e) for e in endings] for c, endings, _ in examples])
    labels = torch.tensor([label for *_, label in examples])
    expected = [(s.argmax(1) == labels).double().mean().item() for s in scores]
    assert evaluate_hellaswag(model, examples, CPU) == pytest.approx(expected)


def test_one_token_is_enough_for_a_context_and_an_ending(theirs):
    examples = [([5], [[6], [7], [8], [9]], 0), ([5], [[6], [7, 8, 9], [8], [9, 10]], 0), ([5, 6], [[7]] * 4, 0)]
    examples = [(np.array(c), [np.array(e) for e in endings], label) for c, endings, label in examples]
    wanted = [[alone(theirs, c, e) for e in endings] for c, endings, _ in examples]
    assert_scores(hellaswag_scores(small_model(), examples, CPU), wanted)


def test_what_exceeds_the_block_size_loses_the_start_of_its_context(theirs):
    """The longest ending decides for all four, which share the context."""
    examples = random_examples(20, longest=(64, 30))
    scores = hellaswag_scores(small_model(), [(c[-1:].repeat(30), *rest) for c, *rest in examples], CPU)
    assert torch.isfinite(torch.stack(scores)).all()
    scores = hellaswag_scores(small_model(), [(np.append(np.arange(90), c), *rest) for c, *rest in examples], CPU)
    wanted = []
    for context, endings, _ in examples:
        context = np.append(np.arange(90), context)[max(map(len, endings)) - 64 :]
        wanted.append([alone(theirs, context, ending) for ending in endings])
    assert_scores(scores, wanted)


def test_an_ending_that_leaves_no_room_is_cut_to_what_fits(theirs):
    ending, short = np.arange(100), np.array([3, 4])
    scores = hellaswag_scores(small_model(), [(np.array([7, 8]), [ending, short, short, ending], 0)], CPU)
    wanted = [alone(theirs, [8], ending[:63]), alone(theirs, [8], short)]
    assert scores[0][0, 1].item() == pytest.approx(wanted[1].sum().item(), abs=1e-4)
    assert abs(scores[1][0, 0].item() - wanted[0].mean().item()) < 0.2  # one token more: its 64th is not an input
    assert hellaswag_scores(small_model(block_size=1), random_examples(5), CPU)[1].isfinite().all()


def test_each_context_is_computed_once_and_the_head_only_where_an_ending_is_scored(monkeypatch):
    examples, computed = random_examples(40), dict(hidden=0, logits=0)
    for name in computed:
        original = getattr(GPT2, name)

        def counting(self, x, *args, name=name, original=original):
            computed[name] += x.numel() // (1 if name == "hidden" else x.size(-1))
            return original(self, x, *args)

        monkeypatch.setattr(GPT2, name, counting)
    hellaswag_scores(small_model(), examples, CPU, batch_tokens=500)
    needed = sum(len(context) - 1 + sum(len(e) for e in endings) for context, endings, _ in examples)
    assert computed["logits"] == sum(len(ending) for _, endings, _ in examples for ending in endings)
    assert needed <= computed["hidden"] < 1.1 * needed  # the rest is padding


def test_progress_sees_every_example_once():
    examples, seen = random_examples(40), []
    hellaswag_scores(small_model(), examples, CPU, lambda batches: (seen.extend(b) or b for b in batches), 500)
    assert sorted(seen) == list(range(40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_equal_endings_the_first_is_the_choice(dtype):
    """Whatever stands before them: sums of the same numbers in another order differ in their last digits."""
    rng, model = np.random.default_rng(0), small_model()
    examples = []
    for _ in range(60):
        same, other = rng.integers(0, 257, rng.integers(1, 20)), rng.integers(0, 257, 20)
        examples.append((rng.integers(0, 257, rng.integers(1, 30)), [other, same, same.copy(), same.copy()], 0))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for scores in hellaswag_scores(model, examples, CPU):
            assert (scores[:, 1:] == scores[:, 1:2]).all()
            assert set(scores.argmax(1).tolist()) <= {0, 1}


def test_a_model_that_knows_nothing_finds_all_means_equal():
    model = small_model()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    examples = [(context, endings, 0) for context, endings, _ in random_examples()]
    _, means = hellaswag_scores(model, examples, CPU)
    assert torch.equal(means, means[:1, :1].expand(30, 4))
    assert evaluate_hellaswag(model, examples, CPU)[1] == 1.0


def test_ranks_share_the_examples(monkeypatch):
    examples, model = random_examples(31), small_model()
    whole = evaluate_hellaswag(model, examples, CPU)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(train_gpt2, "RANK", rank)
        monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 3)
        parts.append(evaluate_hellaswag(model, examples, CPU))
    assert [sum(p) for p in zip(*parts, strict=True)] == pytest.approx(whole)
    monkeypatch.setattr(train_gpt2, "WORLD_SIZE", 40)
    monkeypatch.setattr(train_gpt2, "RANK", 35)
    assert evaluate_hellaswag(model, examples, CPU) == (0, 0)  # a rank without work


# ----------------------------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("damage", ["magic", "version", "truncated", "empty", "short header", "too many"])
def test_damaged_file_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "h.bin"
    write_hellaswag(path, random_examples(5))
    data = path.read_bytes()
    path.write_bytes(
        {
            "magic": llmc_header(20240520, 5, 100) + data[1024:],
            "version": llmc_header(20240522, 5, 100, version=2) + data[1024:],
            "truncated": data[:-10],
            "empty": b"",
            "short header": data[:100],
            "too many": llmc_header(20240522, 6, 100) + data[1024:],
        }[damage]
    )
    with pytest.raises(UserError, match="is no HellaSwag token file"):
        read_hellaswag(path)


WORDS = "a man is sitting on the roof . he starts pulling up old tiles ½ naïve 猫 ripping them off [step] it's"


def questions(n=12, seed=0):
    """Rows of the hub's schema."""
    rng = np.random.default_rng(seed)
    text = lambda low, high: " ".join(rng.choice(WORDS.split(), rng.integers(low, high)))  # noqa: E731
    rows = []
    for i in range(n):
        a, b = text(3, 12), text(1, 3)
        rows.append(dict(
            ind=7 * i, activity_label="Roof shingle removal", ctx_a=a, ctx_b=b, ctx=f"{a} {b}",
            endings=[text(1, 9) for _ in range(4)], source_id=f"activitynet~v_{i}", split="val",
            split_type="indomain", label=str(rng.integers(4)),
        ))  # fmt: skip
    return rows


gpt2_encoding = functools.cache(train_gpt2.gpt2_encoding)  # which takes half a second
gpt2_like = functools.partial(small_model, vocab_size=50257, n_embd=8)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with q.jsonl, and hf/, a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "gpt2_encoding", gpt2_encoding)
    write_jsonl(tmp_path / "q.jsonl", questions())
    export(gpt2_like(), tmp_path / "hf")
    return tmp_path


def expected_file(path, rows):
    encode = gpt2_encoding().encode_ordinary
    tokens = [(encode(r["ctx"]), [encode(" " + e) for e in r["endings"]], int(r["label"])) for r in rows]
    write_hellaswag(path, tokens)
    return tokens


def test_the_file_is_llmcs_byte_for_byte_and_comes_back(folder, capsys):
    tokens = expected_file(folder / "expected.bin", questions())
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    assert BIN.read_bytes() == (folder / "expected.bin").read_bytes()
    assert [path.name for path in BIN.parent.iterdir()] == [BIN.name]
    assert capsys.readouterr().out == f"{BIN}: 12 questions from q.jsonl\n"
    for ours, (context, endings, label) in zip(read_hellaswag(BIN), tokens, strict=True):
        assert (ours[0].tolist(), [e.tolist() for e in ours[1]], ours[2]) == (context, endings, label)


def test_labels_are_numbers_or_texts_and_lines_may_be_blank(folder):
    rows = [dict(row, label=int(row["label"])) for row in questions()]
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "numbers.jsonl").write_bytes(text.encode())
    assert hellaswag.main(["--file", "q.jsonl"]) == hellaswag.main(["--file", "numbers.jsonl"]) == 0


def test_a_file_that_is_there_is_used_and_never_overwritten(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # it need not even be installed
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    before = BIN.stat().st_mtime_ns, BIN.read_bytes()
    for argv in ([], ["--file", "q.jsonl"]):
        assert hellaswag.main(argv) == 0
        assert "already" in capsys.readouterr().out
    write_jsonl(folder / "other.jsonl", questions(seed=1))
    assert hellaswag.main(["--file", "other.jsonl"]) == 2
    assert "holds other questions than --file other.jsonl" in capsys.readouterr().err
    assert (BIN.stat().st_mtime_ns, BIN.read_bytes()) == before


def test_limit_does_not_shorten_the_file(folder, capsys):
    assert hellaswag.main(["--file", "q.jsonl", "--model", "hf", "--limit", "3", "--device", "cpu"]) == 0
    assert re.fullmatch(r"hellaswag \| 3 examples \| acc 0\.\d{4} \| acc_norm 0\.\d{4}", last_line(capsys))
    assert len(read_hellaswag(BIN)) == 12


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hellaswag.os, "fsync", full)
    assert hellaswag.main(["--file", "q.jsonl"]) == 2
    assert "can't be written (No space left on device)" in capsys.readouterr().err
    assert not list(BIN.parent.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# The script


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_questions_come_from_the_hub(folder, monkeypatch, capsys):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return questions()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert hellaswag.main([]) == 0
    assert asked == [(("Rowan/hellaswag",), dict(split="validation"))]
    expected_file(folder / "expected.bin", questions())
    assert BIN.read_bytes() == (folder / "expected.bin").read_bytes()
    assert capsys.readouterr().out == f"{BIN}: 12 questions from Rowan/hellaswag\n"


def test_the_library_is_asked_as_it_can_be(folder, monkeypatch):
    """The real `datasets`, on rows of the hub's schema."""
    import datasets

    rows = datasets.Dataset.from_list(questions())
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    assert hellaswag.main([]) == 0
    expected_file(folder / "expected.bin", questions())
    assert BIN.read_bytes() == (folder / "expected.bin").read_bytes()


def test_without_a_network_the_error_names_the_data_set_and_the_way_out(folder, capsys):
    assert hellaswag.main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: Rowan/hellaswag can't be downloaded") and "--file" in error
    assert error.count("\n") == 1 and not BIN.parent.exists()


@pytest.mark.parametrize("what", ["hf", "model_00000.pt"])
def test_scores_of_a_folder_and_a_checkpoint_are_those_of_the_trainer(folder, capsys, what):
    model = gpt2_like()
    config = {name: getattr(model.config, name) for name in train_gpt2.SIZES}
    torch.save(dict(format=1, step=0, config=config, model=model.state_dict()), "model_00000.pt")
    argv = ["--file", "q.jsonl", "--model", what, "--device", "cpu", "--dtype", "fp32"]
    assert hellaswag.main(argv) == 0
    acc, acc_norm = evaluate_hellaswag(model, read_hellaswag(BIN), CPU)
    assert last_line(capsys) == f"hellaswag | 12 examples | acc {acc:.4f} | acc_norm {acc_norm:.4f}"


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
def test_half_precision_runs(folder, capsys, dtype):
    assert hellaswag.main(["--file", "q.jsonl", "--model", "hf", "--device", "cpu", "--limit", "4", *dtype]) == 0
    assert last_line(capsys).startswith("hellaswag | 4 examples | acc ")


def test_show_prints_context_endings_losses_the_choice_and_the_right_one(folder, capsys):
    argv = ["--file", "q.jsonl", "--model", "hf", "--device", "cpu", "--dtype", "fp32", "--show", "2"]
    assert hellaswag.main(argv) == 0
    out = capsys.readouterr().out
    shown = out.split("--- example ")[1:]
    assert len(shown) == 2 and out.splitlines()[-1].startswith("hellaswag | 12 examples")
    scores = hellaswag_scores(gpt2_like(), read_hellaswag(BIN)[:2], CPU)
    for i, (row, text) in enumerate(zip(questions(), shown, strict=False)):
        number, context, _, *lines = text.splitlines()
        assert (number, context) == (str(i), row["ctx"])
        for k, (ending, line) in enumerate(zip(row["endings"], lines, strict=False)):
            loss, mean = -scores[0][i, k].item(), -scores[1][i, k].item()
            assert line.startswith(f"    {loss:8.2f} {mean:8.4f}  {ending}")
            assert ("the choice by acc" in line.replace("acc_norm", "")) == (k == scores[0][i].argmax())
            assert ("the choice by acc_norm" in line) == (k == scores[1][i].argmax())
            assert line.endswith("right") == (k == int(row["label"]))


def test_importing_does_nothing(tmp_path):
    late = ("datasets", "matplotlib", "safetensors", "transformers")
    code = f"import sys, hellaswag; print([m for m in {late} if m in sys.modules])"
    done = python("-c", code, cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    assert done.stdout == "[]\n" and done.stderr == "" and not list(tmp_path.iterdir())


def test_as_a_program_it_shows_progress_and_ends_with_the_score(folder):
    done = python(ROOT / "hellaswag.py", "--file", "q.jsonl", "--model", "hf", "--device", "cpu", cwd=folder)
    assert re.fullmatch(r"hellaswag \| 12 examples \| acc [\d.]+ \| acc_norm [\d.]+", done.stdout.splitlines()[-1])


def test_training_evaluates_on_the_file(folder):
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    write_shards(folder / "gpt2", encoding="gpt2")
    argv = [*TINY, "--data", "gpt2", "--log_dir", "log", "--max_steps", "2", "--hellaswag_every", "1"]
    assert train_gpt2.main([*argv, "--block_size", "64"]) == 0
    assert set(read_log("log")["hella"]) == {0, 1, 2}


def test_training_without_the_file_says_how_to_make_it(folder, capsys):
    write_shards(folder / "gpt2", encoding="gpt2")
    argv = [*TINY, "--data", "gpt2", "--log_dir", "log", "--max_steps", "2", "--hellaswag_every", "1"]
    assert train_gpt2.main(argv) == 0
    assert "no HellaSwag: " in (out := capsys.readouterr().out) and "python hellaswag.py makes it" in out


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


def without(field):
    return lambda row: row.pop(field)


LINES = {
    "not JSON": ('{"ctx": ', "is not JSON"),
    "not UTF-8": (b'{"ctx": "\xff"}', "is not JSON"),
    "not an object": ("[1, 2]", "no JSON object"),
    "no context": (without("ctx"), "no field ctx"),
    "no endings": (without("endings"), "no field endings"),
    "no label": (without("label"), "no field label"),
    "three endings": (lambda row: row["endings"].pop(), "four"),
    "endings are no list": (lambda row: row.update(endings="abcd"), "four"),
    "ending is a number": (lambda row: row["endings"].__setitem__(2, 5), "ending 2 is no text"),
    "empty ending": (lambda row: row["endings"].__setitem__(1, ""), "ending 1 is empty"),
    "empty context": (lambda row: row.update(ctx=" "), "ctx is empty"),
    "context is null": (lambda row: row.update(ctx=None), "ctx is no text"),
    "label 4": (lambda row: row.update(label=4), "label is 4"),
    "label -1": (lambda row: row.update(label="-1"), "label is '-1'"),
    "label of the test split": (lambda row: row.update(label=""), "label is ''"),
    "label true": (lambda row: row.update(label=True), "label is True"),
    "label 1.5": (lambda row: row.update(label=1.5), "label is 1.5"),
    "too long": (lambda row: row.update(ctx=" a" * 32760), "too much for the format"),
}


def assert_one_error(folder, capsys, argv, *words):
    before = {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}
    assert hellaswag.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    for word in words:
        assert word in captured.err
    assert {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_no_question_is_named(folder, capsys, case):
    wrong, message = LINES[case]
    lines = [json.dumps(row).encode() for row in questions(3)]
    if callable(wrong):
        wrong(row := questions(3)[1])
        wrong = json.dumps(row)
    lines[1] = wrong if isinstance(wrong, bytes) else wrong.encode()
    (folder / "wrong.jsonl").write_bytes(b"\n".join(lines))
    assert_one_error(folder, capsys, ["--file", "wrong.jsonl"], "wrong.jsonl, line 2", message)


def test_the_longest_example_the_format_can_hold(folder):
    [row] = questions(1)
    row.update(ctx=" a" * 32754, endings=["b"] * 4)  # 5 + 1 + 32754 + 4 × 2 = 32768 numbers: one more than there may be
    write_jsonl(folder / "long.jsonl", [row])
    assert hellaswag.main(["--file", "long.jsonl"]) == 2
    row.update(ctx=" a" * 32753)
    write_jsonl(folder / "long.jsonl", [row])
    assert hellaswag.main(["--file", "long.jsonl"]) == 0
    assert len(read_hellaswag(BIN)[0][0]) == 32753


WRONG = {
    "no such file": (["--file", "nowhere.jsonl"], "nowhere.jsonl"),
    "a folder": (["--file", "hf"], "--file hf"),
    "no questions": (["--file", "empty.jsonl"], "no questions"),
    "no such model": (["--file", "q.jsonl", "--model", "gpt3"], "gpt3 is no model"),
    "the demo model": (["--file", "q.jsonl", "--model", "demo"], "demo is no model"),
    "a model that is none": (["--file", "q.jsonl", "--model", "q.jsonl"], "q.jsonl"),
    "a model of bytes": (["--file", "q.jsonl", "--model", "bytes"], "vocabulary of 257"),
    "limit 0": (["--limit", "0"], "--limit 0"),
    "limit -1": (["--limit", "-1"], "--limit -1"),
    "limit many": (["--limit", "many"], "--limit"),
    "show -1": (["--show", "-1"], "--show -1"),
    "show without a model": (["--file", "q.jsonl", "--show", "1"], "--model"),
    "unknown flag": (["--models", "gpt2"], "--models"),
    "unknown dtype": (["--dtype", "fp8"], "--dtype"),
    "no such device": (["--file", "q.jsonl", "--model", "hf", "--device", "tpu9"], "tpu9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_error(folder, capsys, case):
    argv, message = WRONG[case]
    (folder / "empty.jsonl").write_bytes(b"\n")
    if "bytes" in argv:
        export(small_model(257), folder / "bytes")
    assert_one_error(folder, capsys, argv, message)


def test_a_folder_that_cannot_be_written(folder, capsys):
    (folder / "hellaswag").write_text("a file")
    assert_one_error(folder, capsys, ["--file", "q.jsonl"], str(BIN), "can't be written")


@pytest.mark.parametrize("content", [b"", b"junk", llmc_header(20240520, 1) + bytes(100)])
def test_a_file_of_questions_that_is_none(folder, capsys, content):
    BIN.parent.mkdir()
    BIN.write_bytes(content)
    assert_one_error(folder, capsys, [], str(BIN))
    assert_one_error(folder, capsys, ["--model", "hf", "--device", "cpu"], str(BIN))


def test_tokens_beyond_the_vocabulary(folder, capsys):
    write_hellaswag(BIN, [([60000], [[1], [2], [3], [4]], 0)])
    assert_one_error(folder, capsys, ["--model", "hf", "--device", "cpu"], str(BIN))
