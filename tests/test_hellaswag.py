"""HellaSwag: the questions, their file, the scores, and the script that does it all."""

import functools
import json
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, TINY, llmc_header, python, read_log, write_hellaswag, write_shards

import fineweb
import hellaswag
import train_gpt2
from fineweb import UserError
from hellaswag import FILE, count_hits, read_questions, scores
from train_gpt2 import GPT2, GPT2Config

CPU = torch.device("cpu")


def small_model(vocab_size=257, block_size=64, n_embd=32, **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=n_embd)
    model = GPT2(GPT2Config(**sizes, **options))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def export(model, folder):
    sizes = {size: getattr(model.config, size) for size in train_gpt2.SIZES}
    hellaswag.write_model(folder, sizes, model.state_dict())


def random_questions(n=30, longest=(30, 20)):
    rng, questions = np.random.default_rng(0), []
    for _ in range(n):
        lengths = rng.integers(1, longest[0]), *rng.integers(1, longest[1], 4)
        context, *endings = [rng.integers(0, 257, length) for length in lengths]
        questions.append((context, endings, int(rng.integers(4))))
    return questions


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


def assert_scores(ours, theirs, questions):
    parts = [alone(theirs, context, ending) for context, four, _ in questions for ending in four]
    wanted = torch.tensor([[p.sum() for p in parts], [p.mean() for p in parts]]).double()
    torch.testing.assert_close(torch.stack(ours).flatten(1), wanted, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------
# Scores


@pytest.mark.parametrize("attention", ["flash", "manual"])
@pytest.mark.parametrize("batch_tokens", [1, 200, 2**12])
def test_scores_are_those_of_each_ending_alone_in_transformers(theirs, attention, batch_tokens):
    questions, model = random_questions(), small_model(attention=attention)
    ours = scores(model, questions, CPU, batch_tokens=batch_tokens)
    assert_scores(ours, theirs, questions)
    labels = torch.tensor([label for *_, label in questions])
    hits = [(values.argmax(1) == labels).sum() for values in ours]
    assert count_hits(model, questions, CPU) == hits and 0 < hits[1] < 30


def test_one_token_is_enough_for_a_context_and_an_ending(theirs):
    lists = [([5], [[6], [7], [8], [9]]), ([5], [[6], [7, 8, 9], [8], [9, 10]])]
    lists += [([5, 6], [[7]] * 4)]
    questions = [(np.array(context), [*map(np.array, endings)], 0) for context, endings in lists]
    assert_scores(scores(small_model(), questions, CPU), theirs, questions)


def test_what_exceeds_the_block_size_loses_the_start_of_its_context(theirs):
    """The longest ending decides for all four, which share the context."""
    ours, cut = [], []
    for context, endings, label in random_questions(20, longest=(64, 30)):
        context = np.append(np.arange(90), context)
        ours.append((context, endings, label))
        cut.append((context[max(map(len, endings)) - 64 :], endings, label))
    assert_scores(scores(small_model(), ours, CPU), theirs, cut)


def test_an_ending_that_leaves_no_room_is_cut_to_what_fits(theirs):
    ending, short = np.arange(100), np.array([3, 4])
    question = np.array([7, 8]), [ending, short, short, ending], 0
    sums, means = scores(small_model(), [question], CPU)
    wanted = [alone(theirs, [8], tokens) for tokens in (ending[:63], short)]
    assert sums[0, 1].item() == pytest.approx(wanted[1].sum().item(), abs=1e-4)
    # Ours is one token more, since the last is no input, and the mean is of all that are scored
    assert abs(means[0, 0].item() - wanted[0].mean().item()) < 0.2
    tiny = small_model(block_size=1)
    assert torch.stack(scores(tiny, random_questions(5), CPU)).isfinite().all()


@pytest.mark.parametrize("most", [1, 100, 500])
def test_rows_of_like_length_fill_batches_and_only_endings_meet_the_head(monkeypatch, most):
    questions, shapes, headed = random_questions(40), [], 0
    hidden, logits = GPT2.hidden, GPT2.logits

    def counting_hidden(self, idx):
        shapes.append(tuple(idx.shape))
        return hidden(self, idx)

    def counting_logits(self, x):
        nonlocal headed
        headed += x.shape[:-1].numel()
        return logits(self, x)

    monkeypatch.setattr(GPT2, "hidden", counting_hidden)
    monkeypatch.setattr(GPT2, "logits", counting_logits)
    scores(small_model(), questions, CPU, batch_tokens=most)
    assert headed == sum(len(ending) for _, endings, _ in questions for ending in endings)
    assert all(rows * T <= most for rows, T in shapes if rows > 1)
    lengths = [T for _, T in shapes]
    assert sum(B for B, _ in shapes) == 160 and lengths == sorted(lengths, reverse=True)
    needed = sum(len(c) - 1 + len(e) for c, endings, _ in questions for e in endings)
    assert needed <= sum(B * T for B, T in shapes) < 1.2 * needed  # the rest is padding


def test_progress_sees_every_row_and_may_end_the_work_early():
    questions, seen = random_questions(40), []
    watch = lambda batches: (seen.append(batch) or batch for batch in batches)  # noqa: E731
    scores(small_model(), questions, CPU, watch, batch_tokens=500)
    assert sum(map(len, seen)) == 160
    for batches in (lambda batches: batches[:1], lambda batches: []):  # as a signal does
        assert sum(count_hits(small_model(), questions, CPU, batches)) <= 80


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_if_endings_are_equal_they_tie_and_the_first_counts(dtype):
    """Whatever is beside them: sums in another order differ in their last digits."""
    rng, model, questions = np.random.default_rng(0), small_model(), []
    for label in 60 * [1]:
        same, other = rng.integers(0, 257, rng.integers(1, 20)), rng.integers(0, 257, 20)
        four = [other, same, same.copy(), same.copy()]
        questions.append((rng.integers(0, 257, rng.integers(1, 30)), four, label))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        both, hits = scores(model, questions, CPU), count_hits(model, questions, CPU)
    for values, hit in zip(both, hits, strict=True):
        assert (values[:, 1:] == values[:, 1:2]).all()
        assert hit == (values[:, 1] > values[:, 0]).sum() and hit > 0


def test_a_model_that_knows_nothing_finds_all_means_equal():
    model = small_model()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    questions = [(context, endings, 0) for context, endings, _ in random_questions()]
    _, means = scores(model, questions, CPU)
    assert torch.equal(means, means[:1, :1].expand(30, 4))
    assert count_hits(model, questions, CPU)[1] == 30


@pytest.mark.parametrize("ranks", [3, 40])
def test_hits_of_the_ranks_shares_add_up_to_those_of_one(ranks):
    questions, model = random_questions(31), small_model()
    parts = [count_hits(model, questions[rank::ranks], CPU) for rank in range(ranks)]
    assert [*map(sum, zip(*parts, strict=True))] == count_hits(model, questions, CPU)
    assert ranks < 40 or parts[35] == [0, 0]  # a rank without work


# --------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("damage", ["magic", "version", "truncated", "empty", "short", "too many"])
def test_damaged_file_is_one_clear_error(tmp_path, damage):
    path = tmp_path / "h.bin"
    write_hellaswag(path, random_questions(5))
    data = path.read_bytes()
    path.write_bytes({
        "magic": llmc_header(20240520, 5, 100) + data[1024:],
        "version": llmc_header(20240522, 5, 100, version=2) + data[1024:],
        "truncated": data[:-10],
        "empty": b"",
        "short": data[:100],
        "too many": llmc_header(20240522, 6, 100) + data[1024:],
    }[damage])  # fmt: skip
    with pytest.raises(UserError, match="is no HellaSwag token file"):
        read_questions(path)


WORDS = "a man is sitting on the roof . he starts pulling up tiles ½ naïve 猫 them off [step] it's"


def hub_rows(n=12, seed=0):
    """Rows of the hub's schema."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        lengths = rng.integers([3, *[1] * 5], [12, 3, *[9] * 4])
        a, b, *endings = [" ".join(rng.choice(WORDS.split(), length)) for length in lengths]
        rows.append(dict(
            ind=7 * i, activity_label="Roof shingle removal", ctx_a=a, ctx_b=b, ctx=f"{a} {b}",
            endings=endings, source_id=f"activitynet~v_{i}", split="val",
            split_type="indomain", label=str(rng.integers(4)),
        ))  # fmt: skip
    return rows


get_encoding = functools.cache(fineweb.get_encoding)  # which takes half a second
gpt2_like = functools.partial(small_model, vocab_size=50257, n_embd=8)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with q.jsonl, and hf/, a model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hellaswag, "get_encoding", get_encoding)
    write_jsonl(tmp_path / "q.jsonl", hub_rows())
    export(gpt2_like(), tmp_path / "hf")
    return tmp_path


@pytest.fixture(scope="module")
def expected():
    """hub_rows() in tokens."""
    encode, questions = get_encoding("gpt2").encode_ordinary, []
    for row in hub_rows():
        endings = [encode(f" {ending}") for ending in row["endings"]]
        questions.append((encode(row["ctx"]), endings, int(row["label"])))
    return questions


def assert_file_is(expected):
    written = FILE.read_bytes()
    write_hellaswag(FILE, expected)
    assert written == FILE.read_bytes()
    assert [path.name for path in FILE.parent.iterdir()] == [FILE.name]


def test_the_file_is_llmcs_byte_for_byte_and_comes_back(folder, expected, capsys):
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    assert capsys.readouterr().out == f"{FILE}: 12 questions from q.jsonl\n"
    assert_file_is(expected)
    for (context, endings, label), wanted in zip(read_questions(FILE), expected, strict=True):
        assert (context.tolist(), [e.tolist() for e in endings], label) == wanted


def test_labels_are_numbers_or_texts_and_lines_may_be_blank(folder):
    rows = [dict(row, label=int(row["label"])) for row in hub_rows()]
    text = "\ufeff" + "\r\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "numbers.jsonl").write_bytes(text.encode())
    assert hellaswag.main(["--file", "q.jsonl"]) == hellaswag.main(["--file", "numbers.jsonl"]) == 0


def test_a_file_that_is_there_is_used_and_never_overwritten(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # it need not even be installed
    assert hellaswag.main(["--file", "q.jsonl"]) == 0
    before = FILE.stat().st_mtime_ns, FILE.read_bytes()
    for argv in ([], ["--file", "q.jsonl"]):
        assert hellaswag.main(argv) == 0
        assert "already" in capsys.readouterr().out
    write_jsonl(folder / "other.jsonl", hub_rows(seed=1))
    assert_one_error(folder, capsys, ["--file", "other.jsonl"], "other questions than --file other")
    assert (FILE.stat().st_mtime_ns, FILE.read_bytes()) == before


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch, capsys):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hellaswag.os, "fsync", full)
    assert hellaswag.main(["--file", "q.jsonl"]) == 2
    assert "can't be written (No space left on device)" in capsys.readouterr().err
    assert not list(FILE.parent.iterdir())


# --------------------------------------------------------------------------------------------------
# The script


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_questions_come_from_the_hub_and_need_no_trainer(folder, expected, monkeypatch, capsys):
    """By the real `datasets`, on rows of the hub's schema."""
    import datasets

    rows = {("Rowan/hellaswag", "validation"): datasets.Dataset.from_list(hub_rows())}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows[name, split])
    monkeypatch.setitem(sys.modules, "train_gpt2", None)  # an import would fail
    assert hellaswag.main([]) == 0
    assert capsys.readouterr().out == f"{FILE}: 12 questions from Rowan/hellaswag\n"
    assert_file_is(expected)


def test_without_a_network_the_error_names_the_data_set_and_the_way_out(folder, capsys):
    assert_one_error(folder, capsys, [], "error: Rowan/hellaswag can't be downloaded", "--file")


@pytest.mark.parametrize("what", ["hf", "model_00000.pt"])
def test_scores_of_a_folder_and_a_checkpoint_are_those_of_the_trainer(folder, capsys, what):
    model = gpt2_like()
    config = {name: getattr(model.config, name) for name in train_gpt2.SIZES}
    state = dict(format=1, step=0, config=config, model=model.state_dict())
    torch.save(state, "model_00000.pt")
    argv = ["--file", "q.jsonl", "--model", what, "--device", "cpu", "--dtype", "fp32"]
    assert hellaswag.main(argv) == 0
    acc, acc_norm = (hits / 12 for hits in count_hits(model, read_questions(FILE), CPU))
    wanted = f"hellaswag | 12 examples | acc {acc:.4f} | acc_norm {acc_norm:.4f}"
    assert last_line(capsys) == wanted


@pytest.mark.parametrize("dtype", [[], ["--dtype", "bf16"]])
def test_a_limit_in_any_precision_does_not_shorten_the_file(folder, capsys, dtype):
    argv = ["--file", "q.jsonl", "--model", "hf", "--device", "cpu", "--limit", "4", *dtype]
    assert hellaswag.main(argv) == 0
    score = r"hellaswag \| 4 examples \| acc (0\.\d{4}|1\.0000) \| acc_norm (0\.\d{4}|1\.0000)"
    assert re.fullmatch(score, last_line(capsys)) and len(read_questions(FILE)) == 12


def test_show_prints_context_endings_losses_the_choice_and_the_right_one(folder, capsys):
    flags = "--file q.jsonl --model hf --device cpu --dtype fp32 --show 2"
    assert hellaswag.main(flags.split()) == 0
    out = capsys.readouterr().out
    shown = out.split("--- example ")[1:]
    assert len(shown) == 2 and out.splitlines()[-1].startswith("hellaswag | 12 examples")
    sums, means = scores(gpt2_like(), read_questions(FILE)[:2], CPU)
    for i, (row, text) in enumerate(zip(hub_rows(), shown, strict=False)):
        number, context, _, *lines = text.splitlines()
        assert (number, context) == (str(i), row["ctx"])
        for k, (ending, line) in enumerate(zip(row["endings"], lines, strict=False)):
            assert line.startswith(f"    {-sums[i, k]:8.2f} {-means[i, k]:8.4f}  {ending}")
            notes = line.replace("acc_norm", "norm")
            assert ("the choice by acc" in notes) == (k == sums[i].argmax())
            assert ("the choice by norm" in notes) == (k == means[i].argmax())
            assert line.endswith("right") == (k == int(row["label"]))


@pytest.mark.parametrize("file, also", [("hellaswag", "train_gpt2"), ("train_gpt2", "hellaswag")])
def test_importing_does_nothing(tmp_path, file, also):
    late = f"datasets matplotlib safetensors transformers tiktoken {also}".split()
    late += ["fineweb"] if file == "train_gpt2" else []
    code = f"import sys, {file}; print([m for m in {late} if m in sys.modules])"
    done = python("-c", code, cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    assert done.stdout == "[]\n" and done.stderr == "" and not list(tmp_path.iterdir())


def test_as_a_program_it_shows_progress_and_ends_with_the_score(folder):
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
    assert train_gpt2.main([*TINY, *flags.split()]) == 0
    out, log = capsys.readouterr().out, read_log("log")
    if there:
        printed = [float(acc) for acc in re.findall(r"acc_norm ([\d.]+)", out)]
        assert printed == pytest.approx([log["hella"][t] for t in range(3)], abs=1e-4)
    else:
        assert "no HellaSwag: " in out and "python hellaswag.py makes it" in out
        assert "hella" not in log


# --------------------------------------------------------------------------------------------------
# Wrong input


def without(field):
    return lambda row: row.pop(field)


LINES = {
    "not JSON": ('{"ctx": ', "is not JSON"),
    "not UTF-8": (b'{"ctx": "\xff"}', "is not JSON"),
    "nested without end": ("[" * 10**5, "is not JSON"),
    "not an object": ("[1, 2]", "no JSON object"),
    "null": ("null", "no JSON object"),
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
    """Exit code 2, one line on stderr, and nothing else changed."""
    before = {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")}
    capsys.readouterr()
    assert hellaswag.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert {path: path.is_dir() or path.read_bytes() for path in folder.rglob("*")} == before


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_is_no_question_is_named(folder, capsys, case):
    wrong, message = LINES[case]
    first, row, last = hub_rows(3)
    if callable(wrong):
        wrong(row)
        wrong = json.dumps(row)
    wrong = wrong if isinstance(wrong, bytes) else wrong.encode()
    lines = [json.dumps(first).encode(), wrong, json.dumps(last).encode()]
    (folder / "wrong.jsonl").write_bytes(b"\n".join(lines))
    assert_one_error(folder, capsys, ["--file", "wrong.jsonl"], "wrong.jsonl, line 2", message)


def test_the_longest_example_the_format_can_hold(folder):
    [row] = hub_rows(1)
    # 5 + 1 + 32753 + 4 × 2 = 32767 numbers; with one more, their bytes exceed an uint16
    for length, code in ((32754, 2), (32753, 0)):
        row.update(ctx=" a" * length, endings=["b"] * 4)
        write_jsonl(folder / "long.jsonl", [row])
        assert hellaswag.main(["--file", "long.jsonl"]) == code
    assert len(read_questions(FILE)[0][0]) == 32753


WRONG = {
    "no such file": ("--file nowhere.jsonl", "nowhere.jsonl"),
    "a folder": ("--file hf", "--file hf"),
    "no questions": ("--file empty.jsonl", "no questions"),
    "no such model": ("--file q.jsonl --model gpt3", "gpt3 is no model"),
    "the demo model": ("--file q.jsonl --model demo", "demo is no model"),
    "no weights": ("--file q.jsonl --model scratch", "scratch has no weights"),
    "a model that is none": ("--file q.jsonl --model q.jsonl", "q.jsonl"),
    "a model of bytes": ("--file q.jsonl --model bytes --device cpu", "vocabulary of 257"),
    "limit 0": ("--limit 0", "--limit 0"),
    "limit -1": ("--limit -1", "--limit -1"),
    "limit many": ("--limit many", "--limit"),
    "show -1": ("--show -1", "--show -1"),
    "show without a model": ("--file q.jsonl --show 1", "--model"),
    "unknown flag": ("--models gpt2", "--models"),
    "unknown dtype": ("--dtype fp8", "--dtype"),
    "no such device": ("--file q.jsonl --model hf --device tpu9", "tpu9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_error(folder, capsys, case):
    flags, message = WRONG[case]
    (folder / "empty.jsonl").write_bytes(b"\n")
    if "bytes" in flags:
        export(small_model(257), folder / "bytes")
    assert_one_error(folder, capsys, flags.split(), message)


def test_a_folder_that_cannot_be_written(folder, capsys):
    (folder / "hellaswag").write_text("a file")
    assert_one_error(folder, capsys, ["--file", "q.jsonl"], str(FILE), "can't be written")


@pytest.mark.parametrize("content", [b"", b"junk", llmc_header(20240520, 1) + bytes(100), None])
def test_a_file_of_questions_that_is_none(folder, capsys, content):
    """Or has a token beyond the vocabulary."""
    write_hellaswag(FILE, [([60000], [[1], [2], [3], [4]], 0)])
    if content is not None:
        FILE.write_bytes(content)
    assert_one_error(folder, capsys, [], str(FILE))
    assert_one_error(folder, capsys, ["--model", "hf", "--device", "cpu"], str(FILE))
