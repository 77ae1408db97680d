"""HellaSwag: its questions, the scores of endings, and the command line."""

import functools
import json
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, python, read_log, write_shards

import fineweb
import hellaswag
import train_gpt2
from hellaswag import QUESTIONS_FILE, count_hits, read_questions, score_questions
from train_gpt2 import GPT2

CPU = torch.device("cpu")


@functools.cache
def small_model(vocab_size=257, block_size=64, n_embd=32):
    """A random GPT-2 of transformers, whose weights are large enough to tell endings apart."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd)
    config = transformers.GPT2Config(n_layer=2, n_head=2, **sizes)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    """A function that gives the small model of these sizes as the trainer reads it."""

    @functools.cache
    def load(**sizes):
        folder = tmp_path_factory.mktemp("model")
        small_model(**sizes).save_pretrained(folder)
        return GPT2.from_pretrained(str(folder)).eval()

    return load


def random_questions(n=30, longest_context=30, longest_ending=20):
    """Questions of random bytes."""
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(n):
        context = rng.integers(0, 257, rng.integers(1, longest_context)).tolist()
        lengths = rng.integers(1, longest_ending, 4)
        endings = [rng.integers(0, 257, length).tolist() for length in lengths]
        questions.append((context, endings, int(rng.integers(4))))
    return questions


@torch.no_grad()
def log_likelihoods(context, ending):
    """Those of an ending's tokens, by transformers and from a row without padding."""
    logits = small_model()(torch.tensor([context + ending])).logits[0]
    return torch.log_softmax(logits, -1)[range(len(context) - 1, len(logits) - 1), ending]


def assert_scores_are_of_transformers(scores, questions):
    sums, means = scores
    for i, (context, endings, _) in enumerate(questions):
        for k, ending in enumerate(endings):
            nats = log_likelihoods(context, ending)
            assert sums[i, k].item() == pytest.approx(nats.sum().item(), abs=1e-4)
            assert means[i, k].item() == pytest.approx(nats.mean().item(), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("batch_tokens", [1, 200, 2**12])
def test_scores_are_those_of_each_ending_alone_in_transformers(load, batch_tokens):
    questions = random_questions()
    sums, means = score_questions(load(), questions, CPU, batch_tokens=batch_tokens)
    assert_scores_are_of_transformers((sums, means), questions)
    labels = torch.tensor([label for _, _, label in questions])
    hits = (sums.argmax(1) == labels).sum().item()
    hits_norm = (means.argmax(1) == labels).sum().item()
    assert count_hits(load(), questions, CPU) == (hits, hits_norm)
    assert 0 < hits_norm < 30


def test_one_token_is_enough_for_a_context_and_an_ending(load):
    questions = [
        ([5], [[6], [7], [8], [9]], 0),
        ([5], [[6], [7, 8, 9], [8], [9, 10]], 0),
        ([5, 6], [[7], [7], [7], [7]], 0),
    ]
    assert_scores_are_of_transformers(score_questions(load(), questions, CPU), questions)


def test_a_context_that_is_too_long_loses_its_start(load):
    """The longest ending decides for all four, so that they follow the same context."""
    questions = []
    cut_questions = []
    for context, endings, label in random_questions(20, 64, 30):
        context = list(range(90)) + context
        room = 64 - max(len(ending) for ending in endings)
        questions.append((context, endings, label))
        cut_questions.append((context[-room:], endings, label))
    assert_scores_are_of_transformers(score_questions(load(), questions, CPU), cut_questions)


def test_an_ending_that_leaves_no_room_is_cut_to_what_fits(load):
    long = list(range(100))
    short = [3, 4]
    question = ([7, 8], [long, short, short, long], 0)
    sums, means = score_questions(load(), [question], CPU)
    assert sums[0, 1].item() == pytest.approx(log_likelihoods([8], short).sum().item(), abs=1e-4)
    # transformers has room for 63 of its tokens. Here 64 are scored, since the last one is not fed
    # to the model.
    assert abs(means[0, 0].item() - log_likelihoods([8], long[:63]).mean().item()) < 0.2
    sums, means = score_questions(load(block_size=1), random_questions(5), CPU)
    assert sums.isfinite().all() and means.isfinite().all()


@pytest.mark.parametrize("batch_tokens", [1, 100, 500])
def test_rows_of_like_length_fill_batches(load, monkeypatch, batch_tokens):
    model = load()
    forward = GPT2.forward
    shapes = []

    def recording_forward(self, idx, *rest):
        shapes.append(tuple(idx.shape))
        return forward(self, idx, *rest)

    monkeypatch.setattr(GPT2, "forward", recording_forward)
    questions = random_questions(40)
    score_questions(model, questions, CPU, batch_tokens=batch_tokens)
    assert sum(B for B, _ in shapes) == 160
    sizes = [B * T for B, T in shapes if B > 1]
    assert max(sizes, default=0) <= batch_tokens
    lengths = [T for _, T in shapes]
    assert lengths == sorted(lengths, reverse=True)
    needed = sum(len(c) - 1 + len(e) for c, endings, _ in questions for e in endings)
    padded = sum(B * T for B, T in shapes)
    assert needed <= padded < 1.2 * needed


def test_progress_sees_every_row_and_may_end_the_work_early(load):
    questions = random_questions(40)
    seen = []

    def watch(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    score_questions(load(), questions, CPU, watch, batch_tokens=500)
    assert sum(len(batch) for batch in seen) == 160
    # So does a signal.
    assert sum(count_hits(load(), questions, CPU, lambda batches: batches[:1])) <= 80
    assert sum(count_hits(load(), questions, CPU, lambda batches: [])) <= 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_endings_tie_and_the_first_of_them_counts(load, dtype):
    """In batches of other shapes, sums differ in their last digits, but not theirs."""
    rng = np.random.default_rng(0)
    questions = []
    for _ in range(60):
        same = rng.integers(0, 257, rng.integers(1, 20)).tolist()
        other = rng.integers(0, 257, 20).tolist()
        context = rng.integers(0, 257, rng.integers(1, 30)).tolist()
        questions.append((context, [other, same, list(same), list(same)], 1))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        scores = score_questions(load(), questions, CPU)
        hits = count_hits(load(), questions, CPU)
    for values, hit in zip(scores, hits, strict=True):
        assert (values[:, 1:] == values[:, 1:2]).all()
        assert hit == (values[:, 1] > values[:, 0]).sum() and hit > 0


def test_a_model_that_knows_nothing_finds_all_means_equal(tmp_path):
    model = transformers.GPT2LMHeadModel(small_model().config)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    model.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(str(tmp_path)).eval()
    questions = [(context, endings, 0) for context, endings, _ in random_questions()]
    _, means = score_questions(model, questions, CPU)
    assert torch.equal(means, means[:1, :1].expand(30, 4))
    assert count_hits(model, questions, CPU)[1] == 30


@pytest.mark.parametrize("world_size", [3, 40])
def test_hits_of_the_ranks_shares_add_up_to_those_of_one_process(load, world_size):
    questions = random_questions(31)
    parts = [count_hits(load(), questions[rank::world_size], CPU) for rank in range(world_size)]
    hits = sum(part[0] for part in parts)
    hits_norm = sum(part[1] for part in parts)
    assert (hits, hits_norm) == count_hits(load(), questions, CPU)
    if world_size == 40:
        assert parts[35] == (0, 0)  # a rank without a question


# --------------------------------------------------------------------------------------------------
# The file


WORDS = "a man is sitting on the roof . he starts pulling up tiles ½ naïve 猫 them off [step] it's"


def hub_rows(n=12, seed=0):
    """Rows with the fields that the data set has on the hub."""
    rng = np.random.default_rng(seed)

    def words(low, high):
        return " ".join(rng.choice(WORDS.split(), rng.integers(low, high)))

    rows = []
    for i in range(n):
        ctx_a = words(3, 12)
        ctx_b = words(1, 3)
        row = dict(ind=7 * i, activity_label="Roof shingle removal")
        row |= dict(ctx_a=ctx_a, ctx_b=ctx_b, ctx=f"{ctx_a} {ctx_b}")
        row |= dict(endings=[words(1, 9) for _ in range(4)], source_id=f"activitynet~v_{i}")
        row |= dict(split="val", split_type="indomain", label=str(rng.integers(4)))
        rows.append(row)
    return rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


get_encoding = functools.cache(fineweb.get_encoding)  # a call takes half a second


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with questions in q.jsonl and a model in hf/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "get_encoding", get_encoding)
    write_jsonl(tmp_path / "q.jsonl", hub_rows())
    small_model(vocab_size=50257, n_embd=8).save_pretrained(tmp_path / "hf")
    return tmp_path


def assert_file_has_the_questions():
    """Of hub_rows(), and nothing else is in its folder."""
    encode = get_encoding("gpt2").encode_ordinary
    expected = []
    for row in hub_rows():
        endings = [encode(" " + ending) for ending in row["endings"]]
        expected.append((encode(row["ctx"]), endings, int(row["label"])))
    assert read_questions(QUESTIONS_FILE, get_encoding("gpt2")) == expected
    assert [path.name for path in QUESTIONS_FILE.parent.iterdir()] == [QUESTIONS_FILE.name]


def test_a_local_copy_is_copied_as_it_is(folder, capsys):
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    assert capsys.readouterr().out == f"{QUESTIONS_FILE} holds 12 questions\n"
    assert QUESTIONS_FILE.read_bytes() == (folder / "q.jsonl").read_bytes()
    assert_file_has_the_questions()


def test_labels_are_numbers_or_texts_and_lines_may_be_blank(folder):
    rows = [dict(row, label=int(row["label"])) for row in hub_rows()]
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "numbers.jsonl").write_bytes(text.encode())
    assert hellaswag.main(["--file", "numbers.jsonl"]) == 0
    assert_file_has_the_questions()
    # They are the same questions, so that nothing is in the way of the other file.
    assert hellaswag.main(["--file", "q.jsonl"]) == 0


def test_a_file_that_is_there_is_used_and_never_overwritten(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # it need not even be installed
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    before = (QUESTIONS_FILE.stat().st_mtime_ns, QUESTIONS_FILE.read_bytes())
    for argv in ([], ["--file", "q.jsonl"], ["--file", str(QUESTIONS_FILE)]):
        assert hellaswag.main(argv) == 0
        assert capsys.readouterr().out.endswith(f"{QUESTIONS_FILE} holds 12 questions\n")
    write_jsonl(folder / "other.jsonl", hub_rows(seed=1))
    assert_one_error(folder, capsys, ["--file", "other.jsonl"], "holds other questions than other")
    assert (QUESTIONS_FILE.stat().st_mtime_ns, QUESTIONS_FILE.read_bytes()) == before


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fineweb.os, "fsync", full)
    assert hellaswag.main(["--file", "q.jsonl"]) == 1
    err = capsys.readouterr().err
    assert (
        err.startswith("error: ")
        and str(QUESTIONS_FILE) in err
        and "No space left on device" in err
    )
    assert not list(QUESTIONS_FILE.parent.iterdir())


# --------------------------------------------------------------------------------------------------
# The script


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_questions_come_from_the_hub_and_need_no_trainer(folder, monkeypatch, capsys):
    """By the real `datasets`, on rows with the hub's fields."""
    import datasets

    on_the_hub = {("Rowan/hellaswag", "validation"): datasets.Dataset.from_list(hub_rows())}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: on_the_hub[name, split])
    monkeypatch.setitem(sys.modules, "train_gpt2", None)  # an import would fail
    assert hellaswag.main([]) == 0
    assert capsys.readouterr().out == f"{QUESTIONS_FILE} holds 12 questions\n"
    assert [json.loads(line) for line in QUESTIONS_FILE.read_text().splitlines()] == hub_rows()
    assert_file_has_the_questions()


def test_offline_one_error_names_the_data_set_at_once(folder, capsys, monkeypatch):
    """HF_HUB_OFFLINE is set. `datasets` hides this in the text of an error."""
    monkeypatch.setattr(fineweb.time, "sleep", None)  # It isn't tried again.
    assert_one_error(folder, capsys, [], "Rowan/hellaswag can't be downloaded")


def test_the_last_line_is_the_score(folder, capsys):
    argv = ["--file", "q.jsonl", "--model", "hf", "--device", "cpu", "--dtype", "fp32"]
    assert hellaswag.main(argv) == 0
    questions = read_questions(QUESTIONS_FILE, get_encoding("gpt2"))
    hits, hits_norm = count_hits(GPT2.from_pretrained("hf").eval(), questions, CPU)
    score = f"acc {hits / 12:.4f} | acc_norm {hits_norm / 12:.4f}"
    assert last_line(capsys) == f"hellaswag | 12 examples | {score}"


@pytest.mark.parametrize("dtype", [None, "fp32", "tf32", "bf16"])
def test_a_limit_in_any_precision_does_not_shorten_the_file(folder, capsys, dtype):
    argv = ["--file", "q.jsonl", "--model", "hf", "--device", "cpu", "--limit", "4"]
    if dtype is not None:
        argv += ["--dtype", dtype]
    assert hellaswag.main(argv) == 0
    score = r"hellaswag \| 4 examples \| acc (0\.\d{4}|1\.0000) \| acc_norm (0\.\d{4}|1\.0000)"
    assert re.fullmatch(score, last_line(capsys))
    assert_file_has_the_questions()


def test_show_prints_context_endings_losses_the_choices_and_the_right_one(folder, capsys):
    flags = "--file q.jsonl --model hf --device cpu --dtype fp32 --show 2"
    assert hellaswag.main(flags.split()) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("hellaswag | 12 examples")
    shown = out.split("--- example ")[1:]
    assert len(shown) == 2
    questions = read_questions(QUESTIONS_FILE, get_encoding("gpt2"))[:2]
    sums, means = score_questions(GPT2.from_pretrained("hf").eval(), questions, CPU)
    rows = hub_rows()
    for i, text in enumerate(shown):
        number, context, _, *lines = text.splitlines()
        assert (number, context) == (str(i), rows[i]["ctx"])
        for k, ending in enumerate(rows[i]["endings"]):
            assert lines[k].startswith(f"    {-sums[i, k]:8.2f} {-means[i, k]:8.4f}  {ending}")
            _, *notes = lines[k].split("  <- ")
            assert ("the choice by acc" in notes) == (k == sums[i].argmax())
            assert ("the choice by acc_norm" in notes) == (k == means[i].argmax())
            assert ("right" in notes) == (k == int(rows[i]["label"]))


@pytest.mark.parametrize("name, sibling", [("hellaswag", "train_gpt2"), ("train_gpt2", "fineweb")])
def test_importing_does_nothing(tmp_path, name, sibling):
    late = ["datasets", "transformers", "pyarrow", sibling]
    code = f"import sys, {name}; print([m for m in {late} if m in sys.modules])"
    done = python("-c", code, cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    assert done.stdout == "[]\n" and done.stderr == "" and not list(tmp_path.iterdir())


def test_as_a_program_it_ends_with_the_score(folder):
    argv = ["--file", "q.jsonl", "--model", "hf", "--device", "cpu"]
    done = python(ROOT / "hellaswag.py", *argv, cwd=folder, env=dict(WORLD_SIZE=""))
    score = r"hellaswag \| 12 examples \| acc [\d.]+ \| acc_norm [\d.]+"
    assert re.fullmatch(score, done.stdout.splitlines()[-1])


@pytest.mark.parametrize("there", [True, False])
def test_training_evaluates_on_the_file_or_says_how_to_make_it(folder, capsys, there):
    if there:
        assert hellaswag.main(["--file", "q.jsonl"]) == 0
    write_shards(folder / "gpt2", encoding="gpt2")
    flags = "--data=gpt2 --log_dir=log --max_steps=2 --hellaswag_every=1 --block_size=64"
    assert train_gpt2.main(TINY + flags.split()) == 0
    out = capsys.readouterr().out
    log = read_log("log")
    if there:
        printed = [float(acc) for acc in re.findall(r"acc_norm ([\d.]+)", out)]
        assert printed == pytest.approx([log["hella"][t] for t in range(3)], abs=1e-4)
    else:
        assert "HellaSwag" in out and "python hellaswag.py" in out
        assert "hella" not in log


# --------------------------------------------------------------------------------------------------
# Wrong input


def assert_one_error(folder, capsys, argv, *words):
    """The exit code is 1, stderr ends with one line, and nothing in the folder has changed."""

    def content():
        return {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}

    before = content()
    capsys.readouterr()
    assert hellaswag.main(argv) == 1
    err = capsys.readouterr().err
    # Before it, there may be a bar of transformers, which rewrites its line.
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and err.count("\n") <= 2, err
    assert all(word in line for word in words), err
    assert content() == before


NO_JSON = {
    "not JSON": b'{"ctx": ',
    "not UTF-8": b'{"ctx": "\xff"}',
    "nested without end": b"[" * 10**5,
    "not an object": b"[1, 2]",
    "null": b"null",
    "a text": b'"ctx endings label"',
}


@pytest.mark.parametrize("line", NO_JSON.values(), ids=NO_JSON)
def test_a_line_that_is_not_a_json_object_is_named(folder, capsys, line):
    good = json.dumps(hub_rows(1)[0]).encode()
    (folder / "wrong.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    assert_one_error(folder, capsys, ["--file", "wrong.jsonl"], "wrong.jsonl, line 2 is not JSON")


NO_QUESTION = {
    "context is null": dict(ctx=None),
    "context is empty": dict(ctx=" "),
    "endings are null": dict(endings=None),
    "endings are a text": dict(endings="abcd"),
    "three endings": dict(endings=["a", "b", "c"]),
    "an ending is a number": dict(endings=["a", "b", 5, "d"]),
    "an ending is empty": dict(endings=["a", "", "c", "d"]),
    "label 4": dict(label=4),
    "label -1": dict(label="-1"),
    "label of the test split": dict(label=""),
    "label true": dict(label=True),
    "label 1.5": dict(label=1.5),
    "label is a list": dict(label=[1]),
}


@pytest.mark.parametrize("fields", NO_QUESTION.values(), ids=NO_QUESTION)
def test_a_line_that_is_no_question_is_named(folder, capsys, fields):
    first, second, third = hub_rows(3)
    write_jsonl(folder / "wrong.jsonl", [first, second | fields, third])
    words = ("wrong.jsonl, line 2 ", "four endings", "label from 0 to 3")
    assert_one_error(folder, capsys, ["--file", "wrong.jsonl"], *words)


@pytest.mark.parametrize("field", ["ctx", "endings", "label"])
def test_a_question_without_a_field_is_named(folder, capsys, field):
    row = hub_rows(1)[0]
    row.pop(field)
    write_jsonl(folder / "wrong.jsonl", [row])
    assert_one_error(folder, capsys, ["--file", "wrong.jsonl"], "wrong.jsonl, line 1 ", field[:6])


WRONG_FLAGS = {
    "no such file": ("--file nowhere.jsonl", "nowhere.jsonl"),
    "a folder": ("--file hf", "hf can't be read"),
    "no questions": ("--file empty.jsonl", "no questions"),
    "no such model": ("--file q.jsonl --model gpt3", "gpt3"),
    "the demo model": ("--file q.jsonl --model demo", "demo"),
    "no weights": ("--file q.jsonl --model scratch", "scratch"),
    "a model that is none": ("--file q.jsonl --model q.jsonl", "q.jsonl"),
    "a model of bytes": ("--file q.jsonl --model bytes --device cpu", "other tokens than GPT-2's"),
    "limit 0": ("--limit 0", "--limit"),
    "limit -1": ("--limit -1", "--limit"),
    "show -1": ("--show -1", "--show"),
    "show without a model": ("--file q.jsonl --show 1", "--model"),
    "no such device": ("--file q.jsonl --model hf --device tpu9", "tpu9"),
}


@pytest.mark.parametrize("flags, word", WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_input_is_one_error(folder, capsys, flags, word):
    (folder / "empty.jsonl").write_bytes(b"\n")
    if "bytes" in flags:
        small_model().save_pretrained("bytes")
    assert_one_error(folder, capsys, flags.split(), word)


@pytest.mark.parametrize("flags", ["--limit many", "--models gpt2", "--dtype fp8"])
def test_flags_that_are_none_are_usage_errors(folder, capsys, flags):
    with pytest.raises(SystemExit, match="2"):
        hellaswag.main(flags.split())
    assert flags.split()[0] in capsys.readouterr().err


def test_several_processes_are_an_error(folder, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_error(folder, capsys, ["--file", "q.jsonl"], "without torchrun")


def test_a_folder_that_cannot_be_written(folder, capsys):
    (folder / "hellaswag").write_text("a file")
    assert_one_error(folder, capsys, ["--file", "q.jsonl"], str(QUESTIONS_FILE), "can't be written")


@pytest.mark.parametrize("content", [b"", b"junk", b'{"ctx": "a"}\n'])
def test_a_damaged_file_of_questions_is_named(folder, capsys, content):
    QUESTIONS_FILE.parent.mkdir()
    QUESTIONS_FILE.write_bytes(content)
    assert_one_error(folder, capsys, [], str(QUESTIONS_FILE), "remove the file")
    assert_one_error(folder, capsys, ["--model", "hf", "--device", "cpu"], str(QUESTIONS_FILE))
