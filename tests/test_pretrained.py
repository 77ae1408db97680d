"""Weights of others come in, ours go out, and both are held against the real transformers."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import PROGRAM, ROOT, TINY, python, read_log, write_shards
from hub_server import Hub
from safetensors.torch import load_file, save_file

import hellaswag
from fineweb import get_encoding
from train_gpt2 import GPT2, main

# Its bars would stand between the lines that are compared here.
transformers.logging.disable_progress_bar()


def reference(vocab_size=257, n_layer=2, n_embd=32, n_positions=32):
    """transformers' GPT-2 with weights that are far from symmetric."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_layer=n_layer,
        n_head=2,
        n_embd=n_embd,
        n_positions=n_positions,
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        bos_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 1,
    )
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


def greedy(theirs, idx, n):
    """The tokens idx (1, T) and the likeliest n that follow, by transformers."""
    mask = torch.ones_like(idx)
    return theirs.generate(
        idx,
        attention_mask=mask,
        max_new_tokens=n,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    ).tolist()


@torch.no_grad()
def assert_same(ours, theirs):
    """Equal logits, and the same tokens. What they have more than we is padding."""
    V = ours.config.vocab_size
    idx = torch.randint(V, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(idx), theirs(idx).logits[:, :, :V], atol=1e-4, rtol=0)
    prompt = idx[:1, :4]
    assert ours.generate(prompt, 12, temperature=0).tolist() == greedy(theirs, prompt, 12)


@torch.no_grad()
def validation_loss(theirs, shard, vocab_size=None):
    """transformers' loss over the first twelve windows of 16 tokens of a shard."""
    tokens = torch.from_numpy(np.load(shard)[: 12 * 16 + 1].astype(np.int64))
    logits = theirs(tokens[:-1].view(12, 16)).logits.flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits[:, :vocab_size], tokens[1:]).item()


def one_error(capsys):
    """What main() has printed to stderr, which has to be one line."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


# --------------------------------------------------------------------------------------------------
# In and out


@pytest.mark.parametrize("vocab_size", [257, 50257])
@pytest.mark.parametrize("files", ["one file", "many files"])
def test_a_folder_of_transformers_computes_the_same_and_comes_back(tmp_path, vocab_size, files):
    theirs = reference(vocab_size)
    shard_size = {"one file": "1GB", "many files": "20KB"}[files]
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard_size)
    written = list((tmp_path / "hf").glob("*.safetensors"))
    assert (len(written) > 1) == (files == "many files")
    ours = GPT2.from_pretrained(str(tmp_path / "hf"))
    assert_same(ours, theirs)
    ours.export_pretrained(tmp_path / "back")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    before = theirs.state_dict()
    after = again.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    names = load_file(tmp_path / "back/model.safetensors").keys()
    assert names == before.keys() - {"lm_head.weight"}


def test_openai_s_names_masks_and_half_precision_are_read(tmp_path):
    """The files of the hub have no prefix, and carry the causal masks along."""
    theirs = reference().half()
    weights = {}
    for name, value in theirs.state_dict().items():
        if name != "lm_head.weight":
            weights[name.removeprefix("transformer.")] = value.contiguous()
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    theirs.config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    ours = GPT2.from_pretrained(str(tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert_same(ours, theirs.float())


@pytest.mark.parametrize("vocab_size", [257, 300, 50258])
def test_a_folder_may_hold_the_head_too_and_any_vocabulary(tmp_path, vocab_size):
    """As other programs write it: the tied matrix twice, and a token more than GPT-2, say."""
    theirs = reference(vocab_size)
    theirs.config.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors", metadata=dict(format="pt"))
    ours = GPT2.from_pretrained(str(tmp_path))
    assert ours.config.vocab_size == vocab_size
    assert_same(ours, theirs)


def test_fifty_thousand_three_hundred_and_four_tokens_with_a_meaning_stay(tmp_path):
    """As resize_token_embeddings(50260, pad_to_multiple_of=64) leaves them."""
    theirs = reference(50304, n_embd=8)
    theirs.save_pretrained(tmp_path / "hf")
    ours = GPT2.from_pretrained(str(tmp_path / "hf"))
    assert ours.config.vocab_size == 50304
    assert_same(ours, theirs)
    ours.export_pretrained(tmp_path / "back")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    assert again.config.eos_token_id == 50256
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)


@pytest.mark.parametrize("pad", ["--pad_vocab", "--no-pad_vocab"])
def test_a_trained_checkpoint_exports_and_writes_the_same_tokens(here, pad, capsys):
    """The byte-encoded demo, with a padded vocabulary and without, through the command line."""
    assert main(TINY + ["--data=data", "--log_dir=log", "--checkpoint_every=20", pad]) == 0
    assert main(["--log_dir=log", "--export=hf", "--device=cpu"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "34,208 parameters" in last and "hf" in last
    names = sorted(path.name for path in Path("hf").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors"]
    config = json.loads(Path("hf/config.json").read_text())
    assert config["vocab_size"] == 257
    assert config["n_positions"] == config["n_ctx"] == 16  # llama.cpp's converter reads the second
    assert config["eos_token_id"] == 256
    theirs = transformers.GPT2LMHeadModel.from_pretrained("hf")
    assert_same(GPT2.from_pretrained("log/checkpoint_00020.pt"), theirs)

    # The same greedy tokens from the command line, ours and, from the export, transformers'
    tokens = greedy(theirs, torch.tensor([list(b"23")]), 12)[0]
    text = bytes(t for t in tokens if t < 256).decode(errors="replace")
    text = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    flags = ["--prompt=x", "--temperature=0", "--max_new_tokens=12", "--num_samples=1"]
    for source in ("--log_dir=log", "--init_from=log/checkpoint_00020.pt"):
        assert main(flags + [source, "--generate=23", "--device=cpu"]) == 0
        assert capsys.readouterr().out.split("--- sample 0\n")[1] == text + "\n"


def test_a_local_folder_comes_before_a_model_of_the_hub(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("gpt2", "some-one/gpt2.v1"):
        shutil.copytree("hf", name)
        assert GPT2.from_pretrained(name).config.n_embd == 32


def test_a_model_is_downloaded_from_the_hub_by_its_name(tmp_path):
    theirs = reference()
    theirs.save_pretrained(tmp_path / "hub/models/some-one/gpt2.v1")
    hub = Hub(tmp_path / "hub")
    env = dict(HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="0")
    flags = ["--init_from=some-one/gpt2.v1", "--export=out", "--device=cpu"]
    try:
        python(PROGRAM, *flags, cwd=tmp_path, env=env)
    finally:
        hub.shutdown()
        hub.server_close()
    assert_same(GPT2.from_pretrained(str(tmp_path / "out")), theirs)


def test_it_works_in_a_notebook(folder):
    """An import has no side effect and is quick, and a model is one call away."""
    code = """
import sys
from train_gpt2 import GPT2
print([name for name in ("transformers", "matplotlib", "fineweb") if name in sys.modules])
model = GPT2.from_pretrained("hf")
print(len(model.transformer.h), next(model.parameters()).device)
"""
    done = python("-c", code, cwd=folder.parent, env=dict(PYTHONPATH=str(ROOT)))
    assert done.stdout == "[]\n2 cpu\n"
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]


# --------------------------------------------------------------------------------------------------
# Weights of other projects

# OpenAI's layers store the transpose of what nn.Linear stores.
TURNED = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def turned(model):
    """transformers' weights with matrices as nn.Linear has them."""
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = value.t().contiguous() if name.endswith(TURNED) else value
    return weights


def sizes_of(model):
    config = model.config
    return dict(
        block_size=config.n_positions,
        vocab_size=config.vocab_size,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.n_embd,
    )


def nanogpt(model, prefix="_orig_mod.", without=()):
    """A file as nanoGPT's train.py writes it."""
    weights = {}
    for name, value in turned(model).items():
        if not name.endswith(without):
            weights[prefix + name] = value
    state = dict(
        model=weights,
        optimizer=torch.optim.AdamW(model.parameters()).state_dict(),
        model_args=dict(sizes_of(model), bias=not without, dropout=0.0),
        iter_num=250,
        best_val_loss=torch.tensor(1.5),
        config=dict(dataset="information"),
    )
    torch.save(state, "ckpt.pt")
    return "ckpt.pt"


def build_nanogpt(model, path="model_19072.pt"):
    """A file as build-nanogpt's train_gpt2.py writes it: its config's class is of __main__."""
    names = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    kind = dataclasses.make_dataclass("GPTConfig", [(name, int, 1) for name in names])
    kind.__module__ = "__main__"
    main_module = sys.modules["__main__"]
    main_module.GPTConfig = kind
    try:
        config = kind(**sizes_of(model))
        torch.save(dict(model=turned(model), config=config, step=19072, val_loss=3.1), path)
    finally:
        del main_module.GPTConfig
    return str(path)


def pickled(model, shards=1):
    """A folder as older versions of transformers write it, in one file or two."""
    folder = Path("old")
    folder.mkdir()
    model.config.save_pretrained(folder)
    weights = list(model.state_dict().items())
    if shards == 1:
        torch.save(dict(weights), folder / "pytorch_model.bin")
        return "old"
    index = {}
    for i in range(shards):
        name = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(weights[i::shards])
        torch.save(part, folder / name)
        index |= dict.fromkeys(part, name)
    text = json.dumps(dict(metadata=dict(total_size=0), weight_map=index))
    (folder / "pytorch_model.bin.index.json").write_text(text)
    return "old"


def saved(model):
    model.save_pretrained("saved")
    return "saved"


# How weights are written, the rows of their embedding, and how many of these are tokens
OTHERS = {
    "nanoGPT": (nanogpt, 50304, 50257),
    "nanoGPT, not compiled": (functools.partial(nanogpt, prefix=""), 50257, 50257),
    "build-nanogpt": (build_nanogpt, 50304, 50257),
    "a pickled folder": (pickled, 50257, 50257),
    "a pickled folder in parts": (functools.partial(pickled, shards=2), 50257, 50257),
    "special tokens": (saved, 50260, 50260),
    "special tokens, and rows to spare": (saved, 50304, 50304),
}
# Without sizes, since the weights have them
GPT2_TINY = [flag for flag in TINY if not flag.startswith(("--n_", "--block"))]


@pytest.mark.parametrize("case", OTHERS)
def test_weights_of_others_write_are_scored_exported_and_trained(here, case, capsys):
    write, rows, vocab_size = OTHERS[case]
    theirs = reference(rows, n_embd=8, n_positions=16)
    with torch.no_grad():
        theirs.transformer.wte.weight[vocab_size:] = 0.0  # or transformers writes the padding, too
    what = write(theirs)
    capsys.readouterr()

    assert main([f"--init_from={what}", "--export=out", "--device=cpu"]) == 0
    exported = transformers.GPT2LMHeadModel.from_pretrained("out")
    assert exported.config.vocab_size == vocab_size
    assert exported.config.eos_token_id == 50256
    assert_same(GPT2.from_pretrained(what), theirs)
    assert_same(GPT2.from_pretrained("out"), theirs)

    assert main([f"--init_from={what}", "--generate=Hello", "--device=cpu", "--temperature=0"]) == 0
    assert "--- sample 0\nHello" in capsys.readouterr().out

    question = dict(ctx="A cat", endings=["sits", "flies", "is a dog", "sings"], label="0")
    hellaswag.QUESTIONS_FILE.parent.mkdir()
    hellaswag.QUESTIONS_FILE.write_text(json.dumps(question) + "\n")
    assert hellaswag.main(["--model", what, "--device=cpu"]) == 0
    assert "hellaswag | 1 examples" in capsys.readouterr().out

    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2")
    flags = GPT2_TINY + ["--data=gpt2", "--max_steps=1", "--warmup_steps=0", "--val_every=1"]
    assert main(flags + [f"--init_from={what}", "--log_dir=log"]) == 0
    loss = validation_loss(theirs, "gpt2/text_val_000000.npy", vocab_size)
    assert read_log("log")["val"][0] == pytest.approx(loss, abs=1e-4)
    assert not hasattr(sys.modules["__main__"], "GPTConfig")


def test_a_model_of_characters_keeps_its_vocabulary(here, capsys):
    theirs = reference(65, n_positions=16)
    ours = GPT2.from_pretrained(nanogpt(theirs))
    assert ours.config.vocab_size == 65
    assert_same(ours, theirs)
    assert main(["--init_from=ckpt.pt", "--generate=x", "--device=cpu"]) == 1
    assert "65 tokens mean" in one_error(capsys)


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
    flags = [f"--init_from={saved(theirs)}", "--device=cpu", "--max_new_tokens=5"]
    assert main(flags + ["--generate=Hello"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Hello"
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2", lengths=(100, 300))
    tiny = GPT2_TINY + ["--data=gpt2", "--max_steps=2", "--sample_every=2", "--prompt=Hello"]
    assert main(tiny + flags + ["--max_lr=0", "--min_lr=0", "--log_dir=log"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Hello"


def test_checkpoints_of_others_in_a_log_folder_stay_and_do_not_block_a_run(here, capsys):
    Path("log").mkdir()
    others = []
    for step in (5, 20):
        others.append(Path(build_nanogpt(reference(), f"log/model_{step:05d}.pt")))
    before = [path.read_bytes() for path in others]
    flags = TINY + ["--data=data", "--checkpoint_every=5", "--keep_checkpoints=1", "--log_dir=log"]
    assert main(flags) == 0
    assert "resuming" not in capsys.readouterr().out
    assert [path.read_bytes() for path in others] == before
    assert [path.name for path in Path("log").glob("checkpoint_*")] == ["checkpoint_00020.pt"]


# --------------------------------------------------------------------------------------------------
# What is not GPT-2, and what is hostile


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def untied(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 1)
    return nanogpt(model)


def without_biases(model):
    return nanogpt(model, without=(".bias",))


def bare(model):
    torch.save(turned(model), "weights.pt")
    return "weights.pt"


def tensor(model):
    torch.save(torch.zeros(5), "tensor.pt")
    return "tensor.pt"


def hostile_build_nanogpt(model):
    torch.save(dict(model=turned(model), config=Hostile(), step=5), "hostile.pt")
    return "hostile.pt"


def hostile_nanogpt(model):
    state = dict(model=turned(model), model_args=sizes_of(model), optimizer=Hostile())
    torch.save(state, "hostile.pt")
    return "hostile.pt"


def hostile_weight(model):
    weights = turned(model) | {"transformer.h.9.attn.bias": Hostile()}
    torch.save(dict(model=weights, model_args=sizes_of(model)), "hostile.pt")
    return "hostile.pt"


def hostile_old_format(model):
    state = dict(model=Hostile(), model_args=sizes_of(model))
    torch.save(state, "hostile.pt", _use_new_zipfile_serialization=False)
    return "hostile.pt"


def hostile_folder(model):
    torch.save(Hostile(), f"{pickled(model)}/pytorch_model.bin")
    return "old"


def hostile_code_in_a_folder(model):
    """As models with code of their own bring it along."""
    name = saved(model)
    Path(name, "code.py").write_text("import os\nos.mkdir('pwned')\nclass Model: pass\n")
    path = Path(name, "config.json")
    config = json.loads(path.read_text())
    config["auto_map"] = dict(AutoConfig="code.Model", AutoModelForCausalLM="code.Model")
    config["n_inner"] = 100  # so that it is refused, too
    path.write_text(json.dumps(config))
    return name


# How it is written, and what the error says
NOT_GPT2 = {
    "no biases": (without_biases, "ckpt.pt .* biases"),
    "another head": (untied, "ckpt.pt .* output head"),
    "a bare state dict": (bare, "weights.pt does not hold a GPT-2"),
    "a bare tensor": (tensor, "tensor.pt"),
    "code in the configuration": (hostile_build_nanogpt, "hostile.pt .*mkdir"),
    "code in the optimiser": (hostile_nanogpt, "hostile.pt .*mkdir"),
    "code among the weights": (hostile_weight, "hostile.pt .*mkdir"),
    "code in an old format": (hostile_old_format, "hostile.pt"),
    "code in a pickled folder": (hostile_folder, "old can't be loaded"),
    "code beside a folder's weights": (hostile_code_in_a_folder, "saved .* n_inner"),
}


@pytest.mark.parametrize("case", NOT_GPT2)
def test_what_is_no_gpt2_is_refused_by_name_and_no_code_of_it_runs(here, case, capsys):
    write, words = NOT_GPT2[case]
    what = write(reference(65, n_positions=16))
    capsys.readouterr()
    assert main([f"--init_from={what}", "--generate=x", "--device=cpu"]) == 1
    error = one_error(capsys)
    assert re.search(words, error), error
    assert "will likely succeed" not in error  # torch's advice to let the code run
    assert not Path("pwned").exists()


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="it drops the head, and so do we"
)
def test_a_folder_whose_head_is_not_its_embedding_is_refused(here, capsys):
    model = reference(n_positions=16)
    model.save_pretrained("hf")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["lm_head.weight"] += 1
    save_file(weights, "hf/model.safetensors", metadata=dict(format="pt"))
    assert main(["--init_from=hf", "--export=out", "--device=cpu"]) == 1
    assert "output head" in one_error(capsys)


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
    "Hello world",
    "",
    " ",
    "  two  spaces \n\n\ttabs\r\n",
    "it's they'll I'M 12345 3.14 !?...",
    "naïve 猫が好き Ελληνικά עברית 🙂👩‍👩‍👧 \u00a0\u3000",
    "<|endoftext|>",
    "a<|endoftext|> b <|endoftext",
    "def f(x):\n    return x  # ½",
    "\x00\x7f\ufffd e\u0301 ﬁ",
    PROGRAM.read_text(encoding="utf-8"),
]


def test_the_tokenizer_of_an_export_gives_tiktoken_s_ids(exported):
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    encoding = get_encoding("gpt2")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert ids == encoding.encode(text, allowed_special="all")
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") == 50256
    assert tokenizer.model_max_length == 32
    assert len(tokenizer) == 50257


def test_a_pipeline_writes_with_an_export_and_nothing_else(exported):
    write = transformers.pipeline("text-generation", model=str(exported), device="cpu")
    text = write("Hello world", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ours = GPT2.from_pretrained(str(exported))
    encoding = get_encoding("gpt2")
    tokens = ours.generate(torch.tensor([encoding.encode("Hello world")]), 5, temperature=0)
    assert text == encoding.decode(tokens[0].tolist())
    assert len(text) > len("Hello world")
    text = write("Hello world", do_sample=False)[0]["generated_text"]
    assert len(encoding.encode(text)) <= 32  # it ends where the context does


def test_openai_s_files_are_exported_byte_for_byte(exported):
    digests = {
        "merges.txt": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "vocab.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    }
    for name, digest in digests.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("what", ["no network", "a damaged file"])
def test_without_the_tokenizer_s_files_the_model_is_exported_all_the_same(
    here, monkeypatch, capsys, what
):
    def read(url):
        if what == "no network":
            raise ConnectionError("no route to host")
        return b"damaged"

    monkeypatch.setattr("tiktoken.load.read_file", read)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(here / "cache"))
    reference(50257, n_embd=8).save_pretrained("hf")
    assert main(["--init_from=hf", "--export=out", "--device=cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "no tokenizer" in lines[-2]
    assert "parameters" in lines[-1]
    assert not Path("out/merges.txt").exists()
    assert_same(GPT2.from_pretrained("out"), transformers.GPT2LMHeadModel.from_pretrained("out"))


# --------------------------------------------------------------------------------------------------
# Fine-tuning


def test_a_fine_tuned_run_goes_on_when_the_weights_it_began_with_are_gone(here, capsys):
    reference(n_positions=16).save_pretrained("hf")
    flags = GPT2_TINY + ["--init_from=hf", "--data=data", "--log_dir=log", "--checkpoint_every=5"]
    assert main(flags + ["--max_steps=5"]) == 0
    shutil.rmtree("hf")
    capsys.readouterr()
    assert main(flags + ["--max_steps=8"]) == 0
    assert "resuming log after 5 steps" in capsys.readouterr().out
    assert list(read_log("log")["train"]) == list(range(8))


def test_weights_that_are_named_for_a_run_that_has_its_own_are_not_read(here, capsys):
    """Sizes that were given must agree with the run's, and other weights need another folder."""
    flags = TINY + ["--data=data", "--log_dir=log", "--checkpoint_every=5"]
    assert main(flags + ["--max_steps=5"]) == 0
    capsys.readouterr()
    assert main(flags + ["--max_steps=6", "--init_from=nowhere"]) == 0
    out = capsys.readouterr().out
    assert "resuming log after 5 steps" in out
    assert "init_from scratch -> nowhere" in out
    assert main(flags + ["--max_steps=7", "--init_from=nowhere", "--n_layer=3"]) == 1
    assert "n_layer" in one_error(capsys)


@pytest.mark.parametrize("pads", ["--pad_vocab --no-pad_vocab", "--no-pad_vocab --pad_vocab"])
def test_fine_tuning_starts_from_the_weights_of_any_source(here, pads):
    """The first loss is the imported model's, from a folder and a checkpoint, padded or not."""
    first_pad, second_pad = pads.split()
    theirs = reference(n_positions=16)
    theirs.save_pretrained("hf")
    flags = GPT2_TINY + ["--data=data", "--max_steps=2", "--val_every=1", "--checkpoint_every=2"]
    assert main(flags + ["--init_from=hf", "--log_dir=a", first_pad]) == 0
    first = read_log("a")["val"]
    expected = validation_loss(theirs, "data/text_val_000000.npy")
    assert first[0] == pytest.approx(expected, abs=1e-5)
    # On from the checkpoint: its last validation is the first one of the next run.
    again = flags + ["--init_from=a/checkpoint_00002.pt", "--log_dir=b", second_pad]
    assert main(again) == 0
    assert read_log("b")["val"][0] == pytest.approx(first[2], abs=1e-5)


def test_data_may_have_fewer_tokens_than_the_weights_but_not_more_and_no_others(here, capsys):
    reference(300, n_positions=16).save_pretrained("my")
    reference(50260, n_embd=8, n_positions=16).save_pretrained("gpt2_and_more")
    write_shards(here / "bytes", vocab_size=257, encoding="bytes")
    write_shards(here / "fewer", vocab_size=120, encoding="my")
    write_shards(here / "more", vocab_size=301, encoding="my")
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2")
    write_shards(here / "far_more", vocab_size=50261, encoding="gpt2")

    def finetune(weights, data):
        flags = GPT2_TINY + ["--max_steps=1", "--warmup_steps=0", "--sample_every=1"]
        flags += [f"--init_from={weights}", f"--data={data}", f"--log_dir=log_{weights}_{data}"]
        return main(flags + ["--prompt=x"])

    for weights, data in (("my", "fewer"), ("my", "bytes"), ("gpt2_and_more", "gpt2")):
        assert finetune(weights, data) == 0, (weights, data)
    for weights, data in (("my", "more"), ("my", "gpt2"), ("gpt2_and_more", "bytes")):
        capsys.readouterr()
        assert finetune(weights, data) == 1
        error = one_error(capsys)
        assert re.search(rf"{data} has a vocabulary of .* weights have", error), error
        assert f"correct encoding and vocab_size in {data}/manifest.json" in error, error
        assert not Path(f"log_{weights}_{data}").exists()


def test_a_vocabulary_of_one_s_own_trains_without_samples_and_exports_without_a_tokenizer(
    here, capsys
):
    reference(300, n_positions=16).save_pretrained("hf")
    write_shards(here / "my", vocab_size=300, encoding="my")
    flags = GPT2_TINY + ["--data=my", "--log_dir=log", "--checkpoint_every=5", "--max_steps=5"]
    assert main(flags + ["--init_from=hf", "--sample_every=5"]) == 0
    out = capsys.readouterr().out
    assert "no samples" in out and "--- sample" not in out
    assert main(["--log_dir=log", "--export=out", "--device=cpu"]) == 0
    assert not Path("out/tokenizer_config.json").exists()
    theirs = transformers.GPT2LMHeadModel.from_pretrained("out")
    assert_same(GPT2.from_pretrained("log/checkpoint_00005.pt"), theirs)
    capsys.readouterr()
    assert main(["--log_dir=log", "--generate=x", "--device=cpu"]) == 1
    assert "encoding" in one_error(capsys)


# --------------------------------------------------------------------------------------------------
# Wrong input

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
ABSURD_LENGTH = (2**62).to_bytes(8, "little")
CLAIM = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'


def set_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def remove_weight(folder, name):
    weights = load_file(folder / WEIGHTS)
    del weights[f"transformer.{name}"]
    save_file(weights, folder / WEIGHTS, metadata=dict(format="pt"))


def set_weight(folder, name, value):
    weights = load_file(folder / WEIGHTS)
    weights[f"transformer.{name}"] = value
    save_file(weights, folder / WEIGHTS, metadata=dict(format="pt"))


def write(folder, name, content):
    (folder / name).write_bytes(content)


def truncate(folder):
    write(folder, WEIGHTS, (folder / WEIGHTS).read_bytes()[:-9])


def absurd_tensor(folder):
    write(folder, WEIGHTS, len(CLAIM).to_bytes(8, "little") + CLAIM)


# What is done to the folder, and what the error names
WRONG = {
    "no config": (lambda f: (f / CONFIG).unlink(), "hf"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), WEIGHTS),
    "a config that is no JSON": (lambda f: write(f, CONFIG, b"\xff junk"), CONFIG),
    "a config that is a list": (lambda f: write(f, CONFIG, b"[]"), "hf can't be loaded"),
    "a config without sizes": (lambda f: write(f, CONFIG, b"{}"), "hf is not a GPT-2"),
    "a size in words": (lambda f: set_config(f, n_layer="two"), "hf can't be loaded"),
    "no layers": (lambda f: set_config(f, n_layer=0), r"transformer\.h\.[01]"),
    "more layers": (lambda f: set_config(f, n_layer=3), r"transformer\.h\.2"),
    "fewer layers": (lambda f: set_config(f, n_layer=1), r"transformer\.h\.1"),
    "absurd width": (lambda f: set_config(f, n_embd=2**50), "hf can't be loaded"),
    "heads that don't divide": (lambda f: set_config(f, n_head=5), "hf can't be loaded"),
    "no heads": (lambda f: set_config(f, n_head=0), "hf can't be loaded"),
    "another inner width": (lambda f: set_config(f, n_inner=100), "n_inner"),
    "another activation": (lambda f: set_config(f, activation_function="relu"), "activation_f"),
    "another epsilon": (lambda f: set_config(f, layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    "unscaled": (lambda f: set_config(f, scale_attn_weights=False), "scale_attn_weights"),
    "scaled by layer": (
        lambda f: set_config(f, scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
    "a head of its own": (lambda f: set_config(f, tie_word_embeddings=False), "tie_word_embed"),
    "another vocabulary": (lambda f: set_config(f, vocab_size=100), r"transformer\.wte\.weight"),
    "another context": (lambda f: set_config(f, n_positions=16), r"transformer\.wpe\.weight"),
    "weights that are empty": (lambda f: write(f, WEIGHTS, b""), "hf can't be loaded"),
    "weights that are junk": (lambda f: write(f, WEIGHTS, b"\x80\x04ju" * 99), "hf can't be load"),
    "a header of absurd length": (lambda f: write(f, WEIGHTS, ABSURD_LENGTH + b"{}"), "hf can't"),
    "a tensor of absurd size": (absurd_tensor, "hf can't be loaded"),
    "a truncated file": (truncate, "hf can't be loaded"),
    "a weight too few": (lambda f: remove_weight(f, "ln_f.bias"), r"transformer\.ln_f\.bias"),
    "no embedding": (lambda f: remove_weight(f, "wte.weight"), r"transformer\.wte|lm_head"),
    "a weight too many": (lambda f: set_weight(f, "h.0.rotary", torch.ones(2)), r"h\.0\.rotary"),
    "another shape": (lambda f: set_weight(f, "ln_f.bias", torch.ones(7)), r"ln_f\.bias"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_no_gpt2_says_what_is_wrong(folder, case, monkeypatch, capsys):
    damage, words = WRONG[case]
    damage(folder)
    monkeypatch.chdir(folder.parent)
    assert main(["--init_from=hf", "--generate=x", "--device=cpu"]) == 1
    error = one_error(capsys)
    assert re.search(words, error), error


def test_what_transformers_reports_of_a_wrong_folder_does_not_hide_the_one_line(folder):
    """In a process of its own, where transformers is as it is for a user."""
    set_config(folder, n_layer=3, vocab_size=100)
    flags = ["--init_from=hf", "--generate=x", "--device=cpu"]
    done = python(PROGRAM, *flags, cwd=folder.parent, check=False)
    assert done.returncode == 1
    lines = [line for line in done.stderr.split("\n") if line and "Loading weights: " not in line]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: hf is not a GPT-2")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--init_from=gpt2-of-nobody --generate=x", "gpt2-of-nobody can't be loaded .*connect"),
        ("--init_from=nobody/gpt2 --generate=x", "nobody/gpt2 can't be loaded .*connect"),
        ("--init_from=some/one/gpt2 --generate=x", "some/one/gpt2 can't be loaded"),
        ("--init_from=https://x.y/some/gpt2 --generate=x", "x.y/some/gpt2 can't be loaded"),
        ("--init_from=log/checkpoint_00007.pt --generate=x", "checkpoint_00007.pt can't be loaded"),
        ("--init_from=data --generate=x", "data can't be loaded"),
        ("--init_from=hf/model.safetensors --generate=x", "name its folder, hf$"),
        ("--init_from=hf/pytorch_model.bin --generate=x", "name its folder, hf$"),
        ("--init_from=hf/config.json --export=out", "name its folder, hf$"),
        ("--init_from=ours --generate=x", "such as ours/checkpoint_00010.pt$"),
        ("--init_from=nanogpt/ --data=data", "such as nanogpt/ckpt.pt$"),
        ("--init_from=data/manifest.json --export=out", "data/manifest.json"),
        ("--init_from=hf --export=data", "data already exists"),
        ("--init_from=hf --export=.", "already exists"),
        ("--init_from=hf --export=/", "already exists"),
        ("--init_from=hf --export=data/manifest.json", "data/manifest.json already exists"),
        ("--init_from=hf --export=data/manifest.json/out", "can't be written"),
        ("--init_from=hf --data=gpt2", "vocabulary of 50257 .* weights have 257"),
        ("--init_from=hf --data=data --n_layer=3", "n_layer is 3, but the weights have 2"),
        ("--init_from=hf --data=data --block_size=8", "block_size is 8, but the weights have 16"),
        ("--log_dir=empty --export=out", "no checkpoint in empty"),
    ],
)
def test_wrong_sources_and_destinations_are_one_line(here, capsys, flags, words):
    reference(n_positions=16).save_pretrained("hf")
    torch.save(load_file("hf/model.safetensors"), "hf/pytorch_model.bin")
    for name in ("ours/checkpoint_00005.pt", "ours/checkpoint_00010.pt", "nanogpt/ckpt.pt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    write_shards(here / "gpt2", encoding="gpt2")
    before = sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*"))
    capsys.readouterr()
    assert main(flags.split() + ["--device=cpu", "--sample_every=0"]) == 1
    error = one_error(capsys)
    assert re.search(words, error), error
    assert sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*")) == before


def test_a_folder_of_transformers_may_hold_the_state_of_its_trainer(here):
    """Such files end in .pt, too."""
    theirs = reference()
    theirs.save_pretrained("hf")
    torch.save({}, "hf/optimizer.pt")
    assert_same(GPT2.from_pretrained("hf"), theirs)


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
def test_an_export_that_is_cut_short_leaves_nothing(folder):
    """Here a file may not grow beyond 50 kB. On a full disk it is the same."""
    code = """
import resource, sys
from train_gpt2 import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
sys.exit(main(["--init_from=hf", "--export=out", "--device=cpu"]))
"""
    env = dict(PYTHONPATH=str(ROOT))
    done = python("-c", code, cwd=folder.parent, check=False, env=env)
    assert done.returncode == 1
    assert re.match(r"error: --export out can't be written .*", done.stderr.splitlines()[-1])
    assert [path.name for path in folder.parent.iterdir()] == ["hf"]
