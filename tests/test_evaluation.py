"""Validation and curves."""

import io
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY, write_shards

import train_gpt2
from train_gpt2 import GPT2, DataLoaderLite, GPT2Config, draw_curves, find_shards, validation_loss

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # which a user would see


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.mark.parametrize("val_tokens", [1, 16 * 7, 16 * 23, 10**9])
def test_validation_is_the_same_for_every_batch_and_number_of_ranks(tmp_path, model, val_tokens):
    val, *_ = write_shards(tmp_path, lengths=(16 * 23 + 5, 99))
    files, n = find_shards(tmp_path, "val"), min(23, max(1, val_tokens // 16))
    with torch.no_grad():
        rows = torch.from_numpy(val[: n * 16 + 1].astype(np.int64))
        expected = model(rows[:-1].view(n, 16), rows[1:].view(n, 16))[1].item()
    for B in (1, 3, 8, 50):
        for R in (1, 2, 3):
            loaders = [DataLoaderLite(files, B, 16, r, R, shuffle=False) for r in range(R)]
            # Of each rank, not yet summed
            parts = [validation_loss(model, loader, val_tokens, CPU) for loader in loaders]
            assert sum(parts) == pytest.approx(expected, abs=1e-5)


def test_validation_shows_the_model_one_shape_only(tmp_path, model):
    write_shards(tmp_path, lengths=(16 * 23 + 5, 99))
    shapes = set()

    def watched(x, y):  # strides, too, decide whether a graph fits
        shapes.add((x.shape, y.shape, x.stride(), y.stride()))
        return model(x, y)

    loader = DataLoaderLite(find_shards(tmp_path, "val"), 8, 16, shuffle=False)
    validation_loss(watched, loader, 10**9, CPU)
    assert len(shapes) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_validation_shows_how_far_it_is_on_a_terminal(here, monkeypatch, capsys, terminal):
    """And leaves no trace of it there. How many tokens it will take is said before."""

    def slow(model, loader, *how):
        batch = loader.batch
        loader.batch = lambda i: time.sleep(0.4 * terminal) or batch(i)
        return validation_loss(model, loader, *how)

    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(train_gpt2, "validation_loss", slow)
    how = ["--data=data", "--log_dir=log", "--micro_batch_size=1", "--max_steps=1"]
    how += ["--warmup_steps=0", "--val_every=2", "--val_tokens=64"]
    assert train_gpt2.main([*TINY, *how]) == 0
    assert ("4/4" in screen.getvalue()) == terminal == bool(screen.getvalue())
    assert screen.getvalue().endswith(" \r" if terminal else "")
    out = capsys.readouterr().out
    assert out.index("a validation: 64 of 200 tokens") < out.index("val loss")


def test_a_validation_takes_no_more_tokens_than_there_are(here, capsys):
    assert train_gpt2.main([*TINY, "--data=data", "--log_dir=log", "--val_tokens=9999"]) == 0
    assert "a validation: 192 of 200 tokens" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Curves


def drawn(folder, monkeypatch, **options):
    """What draw_curves draws -> for each panel {a line's label: its points}."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig

    def watched(self, *args, **how):
        figures.append(self)
        save(self, *args, **how)

    monkeypatch.setattr(Figure, "savefig", watched)
    draw_curves(folder, **options)
    (figure,) = figures
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "log.txt"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    return [{line.get_label(): line.get_xydata() for line in axes.lines} for axes in figure.axes]


def points(panel, stream):
    """The points of the line whose label begins with the stream's name."""
    (line,) = [line for label, line in panel.items() if label.startswith(stream)]
    return line.tolist()


def test_curves_show_the_log_and_what_is_published(tmp_path, monkeypatch):
    values, text = np.random.default_rng(0).random((500, 2)).round(6).tolist(), ""
    for t, (loss, norm) in enumerate(values):
        text += "250 val 3.5\n250 hella 0.27\n" if t == 250 else ""
        text += f"{t} train {loss}\n{t} lr 1e-3\n{t} norm {norm}\n{t} tps 1000\n"
    (tmp_path / "log.txt").write_text(text)
    losses, hella, norms, tps = drawn(tmp_path, monkeypatch)
    assert points(losses, "train") == [[t, loss] for t, (loss, _) in enumerate(values)]
    assert points(norms, "norm") == [[t, norm] for t, (_, norm) in enumerate(values)]
    assert points(losses, "val") == [[250, 3.5]] and points(hella, "hella") == [[250, 0.27]]
    assert any("3.5 now" in label for label in losses)
    assert len(points(tps, "tps")) == 500
    published = [np.array(points(panel, "published"))[:, 1].tolist() for panel in (losses, hella)]
    assert published == [[3.2924] * 2, [0.2945] * 2]
    # Another size, other data: nothing that does not apply
    for options, acc_norm in ((dict(n_embd=1024), 0.3752), (dict(fineweb=False), 0.2945)):
        losses, hella, *_ = drawn(tmp_path, monkeypatch, **options)
        assert len(losses) == 2 and points(hella, "published")[0][1] == acc_norm
    assert "published" not in str(drawn(tmp_path, monkeypatch, n_embd=96))


def test_the_log_of_build_nanogpt_is_drawn_too(tmp_path, monkeypatch):
    lines = "0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\n1 train 10.6\n250 val 5.9\n"
    (tmp_path / "log.txt").write_text(lines)
    losses, hella, *_ = drawn(tmp_path, monkeypatch)
    assert points(losses, "train") == [[0, 10.955029], [1, 10.6]]
    assert points(losses, "val") == [[0, 10.9511], [250, 5.9]]
    assert points(hella, "hella") == [[0, 0.2463]]


@pytest.mark.parametrize("log", ["1 train\n", "not a log\n", None])
def test_curves_that_cannot_be_drawn_stop_nothing(tmp_path, capsys, log):
    if log is not None:
        (tmp_path / "log.txt").write_text(log)
    draw_curves(tmp_path)
    assert "curves.png can't be drawn" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} <= {"log.txt"}


def test_a_run_draws_its_curves_with_each_checkpoint_and_at_the_end(here, monkeypatch):
    sizes = []

    def watched(log_dir, *args):
        draw_curves(log_dir, *args)
        sizes.append(len((log_dir / "log.txt").read_text().splitlines()))
        assert (log_dir / "curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(train_gpt2, "draw_curves", watched)
    how = ["--data=data", "--log_dir=log", "--val_every=5", "--checkpoint_every=8"]
    assert train_gpt2.main([*TINY, *how]) == 0
    val = 2, 4, 5  # validations so far
    assert sizes == [4 * t + n for t, n in zip((8, 16, 20), val, strict=True)]
