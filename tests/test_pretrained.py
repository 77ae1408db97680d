"""Into and out of Hugging Face's format, held against the real transformers."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PROGRAM, ROOT, TINY, python, read_log, write_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train_gpt2
from hellaswag import write_model
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
    assert "hf: " in capsys.readouterr().out.splitlines()[-1]
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


def test_the_names_of_openai_s_models_are_downloaded_where_no_folder_is(folder, monkeypatch):
    """gpt2 … gpt2-xl come from openai-community/…, config first; offline, one line says so."""
    import huggingface_hub

    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl":
        assert GPT2.from_pretrained(name).config.n_embd == 32
        files = "config.json", "model.safetensors"
        assert asked == [(f"openai-community/{name}", file) for file in files]
        asked.clear()
    reference(n_embd=64).save_pretrained("gpt2")
    assert GPT2.from_pretrained("gpt2").config.n_embd == 64 and not asked


def test_without_a_network_a_model_s_name_is_one_line(tmp_path):
    env = {"HF_HOME": str(tmp_path)}
    done = python(PROGRAM, "--init_from=gpt2", "--generate=x", cwd=tmp_path, check=False, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    wanted = "config.json of openai-community/gpt2 can't be downloaded .*the network.* folder"
    assert re.match(f"error: {wanted}", done.stderr)


# --------------------------------------------------------------------------------------------------
# Fine-tuning


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
