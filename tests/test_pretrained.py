"""Into and out of Hugging Face's format, held against the real transformers; and the weights of other models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import PROGRAM, ROOT, TINY, python, write_shards
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import train_gpt2
from train_gpt2 import GPT2, GPT2Config, UserError, export, main, read_pretrained

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def reference(vocab_size=257, n_layer=2, n_embd=32, n_positions=32, seed=0, **options):
    """transformers' GPT-2 with weights that are far from symmetric."""
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_layer=n_layer, n_head=2, n_embd=n_embd, n_positions=n_positions, embd_pdrop=0,
        attn_pdrop=0, resid_pdrop=0, bos_token_id=vocab_size - 1, eos_token_id=vocab_size - 1, **options,
    )  # fmt: skip
    torch.manual_seed(seed)
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


def logits_of(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out[0] if isinstance(out, tuple) else out.logits


def greedy(model, idx, n):
    return model.generate(
        idx, max_new_tokens=n, do_sample=False, attention_mask=torch.ones_like(idx), eos_token_id=None, pad_token_id=0
    )


def assert_same(ours, theirs, vocab_size):
    idx = torch.randint(0, vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(ours, idx), logits_of(theirs, idx), atol=1e-4, rtol=0)
    prompt = idx[:1, :4]
    assert ours.generate(prompt, 12, temperature=0).tolist() == greedy(theirs, prompt, 12).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# In and out


@pytest.mark.parametrize("vocab_size", [257, 50257])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["one file", "many files"])
def test_a_folder_of_transformers_computes_the_same_here_and_comes_back_bit_for_bit(tmp_path, vocab_size, options):
    theirs = reference(vocab_size)
    theirs.save_pretrained(tmp_path / "hf", **options)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == bool(options)
    ours = GPT2.from_pretrained(str(tmp_path / "hf"))
    assert_same(ours, theirs, vocab_size)
    export(ours, tmp_path / "back")
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert load_file(tmp_path / "back/model.safetensors").keys() == before.keys() - {"lm_head.weight"}


def test_openai_s_names_masks_and_half_precision_are_read(tmp_path):
    """The files of the hub have no prefix, and carry the causal masks along."""
    theirs = reference().half()
    weights = {name.removeprefix("transformer."): p for name, p in theirs.state_dict().items() if "lm_head" not in name}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
    weights["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    theirs.config.save_pretrained(tmp_path)
    save_file({name: p.contiguous() for name, p in weights.items()}, tmp_path / "model.safetensors")
    assert_same(GPT2.from_pretrained(str(tmp_path)), theirs.float(), 257)


@pytest.mark.parametrize("vocab_size", [257, 300, 50258])
def test_a_folder_may_hold_the_head_too_and_any_vocabulary(tmp_path, vocab_size):
    """As other programs write it: the tied matrix twice, and, say, one token more than GPT-2 has, for padding texts."""
    theirs = reference(vocab_size)
    theirs.config.save_pretrained(tmp_path)
    save_file({name: p.clone() for name, p in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    assert_same(GPT2.from_pretrained(str(tmp_path)), theirs, vocab_size)


def test_someone_else_s_padding_of_the_vocabulary_is_cut_off(tmp_path):
    theirs = reference(50304)
    theirs.save_pretrained(tmp_path / "hf")
    ours = GPT2.from_pretrained(str(tmp_path / "hf"))
    idx = torch.arange(20)[None]
    assert ours.config.vocab_size == 50257
    torch.testing.assert_close(logits_of(ours, idx), logits_of(theirs, idx)[..., :50257], atol=1e-4, rtol=0)


@pytest.mark.parametrize("pad_vocab", [True, False])
def test_a_trained_checkpoint_exports_and_writes_the_same_tokens(here, pad_vocab, capsys):
    """The byte-encoded demo, with a padded vocabulary and without, through the command line."""
    pad = "--pad_vocab" if pad_vocab else "--no-pad_vocab"
    assert main([*TINY, "--data=data", "--log_dir=log", "--checkpoint_every=20", pad]) == 0
    assert main(["--log_dir=log", "--export=hf", "--device=cpu"]) == 0
    assert "hf: " in capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in Path("hf").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    config = json.loads(Path("hf/config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["eos_token_id"]) == (257, 16, 256)
    theirs = transformers.GPT2LMHeadModel.from_pretrained("hf")
    ours = GPT2.from_pretrained("log/model_00020.pt")
    idx = torch.randint(0, 257, (3, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits_of(ours, idx), logits_of(theirs, idx), atol=1e-4, rtol=0)
    # The same greedy tokens from the command line, ours and, from the export, transformers'
    flags = ["--prompt=x", "--temperature=0", "--max_new_tokens=12", "--num_samples=1", "--device=cpu"]
    for source in (["--log_dir=log"], ["--init_from=log/model_00020.pt"], ["--init_from=hf"]):
        assert main([*source, "--generate=23", *flags]) == 0
        out = capsys.readouterr().out.split("--- sample 0\n")[1].removesuffix("\n")
        tokens = greedy(theirs, torch.tensor([list(b"23")]), 12)[0].tolist()
        text = bytes(t for t in tokens if t < 256).decode(errors="replace")
        assert out == "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def test_the_names_of_openai_s_models_are_downloaded(folder, monkeypatch, capsys):
    """gpt2 … gpt2-xl come from openai-community/…, config first; without a network one line says what helps."""
    import huggingface_hub

    asked = []

    def download(repository, file):
        asked.append((repository, file))
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl":
        assert GPT2.from_pretrained(name).config.n_embd == 32
        assert asked == [(f"openai-community/{name}", file) for file in ("config.json", "model.safetensors")]
        asked.clear()

    def no_network(repository, file):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    with pytest.raises(UserError, match=r"config\.json of openai-community/gpt2 .*a local folder"):
        GPT2.from_pretrained("gpt2")


def test_without_a_network_a_model_s_name_is_one_line(tmp_path):
    env = {"HF_HOME": str(tmp_path)}
    done = python(PROGRAM, "--init_from=gpt2", "--generate=x", cwd=tmp_path, check=False, env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: config.json of openai-community/gpt2")
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Fine-tuning


@pytest.mark.parametrize("pad", ["--pad_vocab", "--no-pad_vocab"])
def test_fine_tuning_starts_from_the_weights_of_any_source(here, pad, capsys):
    """The first loss is the imported model's own, from a folder and from a checkpoint, padded or not."""
    theirs = reference(n_positions=16)
    theirs.save_pretrained("hf")
    flags = ["--data=data", "--model=demo", "--total_batch_size=128", "--warmup_steps=0", "--val_every=1", pad]
    flags += ["--checkpoint_every=2", "--max_steps=2", "--sample_every=0", "--device=cpu", "--dtype=fp32"]
    assert main([*flags, "--init_from=hf", "--log_dir=a"]) == 0
    val = train_gpt2.read_shard(Path("data/text_val_000000.npy"))[: 12 * 16 + 1].astype("int64")
    val = torch.from_numpy(val)
    x, y = val[:-1].view(12, 16), val[1:].view(12, 16)
    expected = torch.nn.functional.cross_entropy(logits_of(theirs, x).flatten(0, 1), y.flatten()).item()
    lines = Path("a/log.txt").read_text().splitlines()
    assert lines[0].startswith("0 val ") and float(lines[0].split()[2]) == pytest.approx(expected, abs=1e-5)
    # On from the checkpoint: its last validation is the first one of the next run; padding may change between them
    other = "--no-pad_vocab" if pad == "--pad_vocab" else "--pad_vocab"
    assert main([*flags, "--init_from=a/model_00002.pt", "--log_dir=b", other]) == 0
    last = next(line for line in Path("a/log.txt").read_text().splitlines() if line.startswith("2 val"))
    first = Path("b/log.txt").read_text().splitlines()[0]
    assert float(first.split()[2]) == pytest.approx(float(last.split()[2]), abs=1e-5)


def test_gpt2_trains_on_gpt2_tokens_from_a_folder(here):
    reference(50257, n_positions=16).save_pretrained("hf")
    write_shards(here / "gpt2", vocab_size=50257, encoding="gpt2")
    flags = [flag for flag in TINY if not flag.startswith(("--n_", "--block"))]
    assert main([*flags, "--data=gpt2", "--init_from=hf", "--log_dir=log"]) == 0


def test_it_works_in_a_notebook(folder):
    """With the file beside it, and nothing else happening on import."""
    code = "from train_gpt2 import GPT2; m = GPT2.from_pretrained('hf'); print(m.num_params(), len(m.transformer.h))"
    env = {"PYTHONPATH": str(ROOT)}
    assert python("-c", code, cwd=folder.parent, env=env).stdout.split()[1] == "2"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["hf"]


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


def change_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def change_weights(change):
    def apply(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def overwrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


ABSURD = (2**62).to_bytes(8, "little")
CLAIM = b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
WRONG = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a config that is no JSON": (overwrite("config.json", b"\xff junk"), "config.json"),
    "a config that is a list": (overwrite("config.json", b"[]"), "config.json"),
    "a config without sizes": (overwrite("config.json", b"{}"), "n_layer"),
    "a config with a size in words": (change_config(n_layer="two"), "sizes"),
    "a config of no layers": (change_config(n_layer=0), "sizes"),
    "a config of more layers": (change_config(n_layer=3), "28 weights are not all"),
    "a config of fewer layers": (change_config(n_layer=1), "transformer.h.1"),
    "a config of a billion layers": (change_config(n_layer=10**9), "28 weights are not all"),
    "a config of absurd width": (change_config(n_embd=2**50), "config.json|model.safetensors"),
    "heads that don't divide": (change_config(n_head=5), "sizes"),
    "another model": (change_config(model_type="llama"), "model_type llama"),
    "another activation": (change_config(activation_function="relu"), "activation_function relu"),
    "another vocabulary": (change_config(vocab_size=100), "transformer.wte.weight has the shape"),
    "weights that are empty": (overwrite("model.safetensors", b""), "model.safetensors"),
    "weights that are junk": (overwrite("model.safetensors", b"\x80\x04junk" * 99), "model.safetensors"),
    "a header of absurd length": (overwrite("model.safetensors", ABSURD + b"{}"), "model.safetensors"),
    "a tensor of absurd size": (
        overwrite("model.safetensors", len(CLAIM).to_bytes(8, "little") + CLAIM), "model.safetensors",
    ),
    "a truncated file": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors",
    ),
    "a weight too few": (change_weights(lambda w: w.pop("transformer.ln_f.bias")), "27 weights are not all"),
    "a weight too many": (
        change_weights(lambda w: w.update({"transformer.h.0.attn.rotary": torch.ones(2)})), "attn.rotary is no weight",
    ),
    "a weight of the wrong shape": (
        change_weights(lambda w: w.update({"transformer.h.1.mlp.c_fc.bias": torch.ones(7)})),
        r"transformer\.h\.1\.mlp\.c_fc\.bias has the shape \(7,\), not \(128,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_folder_that_is_no_gpt2_says_what_is_wrong(folder, case):
    damage, words = WRONG[case]
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        read_pretrained(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--init_from=gpt3", "--generate=x"], "gpt3 is no model; name one of gpt2, gpt2-medium"),
        (["--init_from=demo", "--generate=x"], "demo is no model"),
        (["--init_from=", "--generate=x"], "--init_from is empty"),
        (["--init_from=data", "--generate=x"], "config.json"),
        (["--init_from=data/manifest.json", "--export=out"], "can't be read as a checkpoint"),
        (["--init_from=hf", "--export=data"], "data is there already"),
        (["--init_from=hf", "--export=."], "is there already"),
        (["--init_from=hf", "--export=/"], "is there already"),
        (["--init_from=hf", "--export=data/manifest.json"], "data/manifest.json can't be written"),
        (["--init_from=hf", "--export=data/manifest.json/out"], "can't be written"),
        (["--init_from=hf", "--data=gpt2"], "vocab_size 257 and the data ask for 50257"),
        (["--init_from=hf", "--data=data", "--n_layer=3"], "n_layer 2 and --n_layer asks for 3"),
        (["--log_dir=empty", "--export=out"], "no checkpoint in empty"),
    ],
)
def test_wrong_sources_and_destinations_are_one_line(here, capsys, flags, words):
    reference(n_positions=16).save_pretrained("hf")
    write_shards(here / "gpt2", vocab_size=300, encoding="gpt2")
    before = sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*"))
    capsys.readouterr()
    assert main([*flags, "--device=cpu", "--sample_every=0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert sorted((path, path.stat().st_mtime_ns) for path in here.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError(28, "No space left"), SafetensorError("I/O error: No space left")])
def test_an_export_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch, error):
    def full_disk(weights, path, **options):
        path.write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(UserError, match="No space left"):
        export(GPT2(GPT2Config(vocab_size=257, n_layer=1, n_head=1, n_embd=4, block_size=4)), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_are_read_without_transformers(folder):
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from train_gpt2 import GPT2; GPT2.from_pretrained('hf'); "
    script += "sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=folder.parent).returncode == 0
