"""Validation and curves."""

import io
import sys
import time

import numpy as np
import pytest
import torch
from conftest import train, write_shards
from matplotlib.figure import Figure

import train_gpt2
from train_gpt2 import (
    GPT2,
    DataLoaderLite,
    GPT2Config,
    TrainConfig,
    draw_curves,
    validation_loss,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a user would see it


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


def make_loader(folder, B, rank=0, world_size=1):
    values = dict(micro_batch_size=B, sequence_length=16, vocab_size=257, device="cpu")
    cfg = TrainConfig(data=str(folder), **values)
    return DataLoaderLite(cfg, "val", rank, world_size)


@pytest.mark.parametrize("val_tokens", [1, 16 * 7, 16 * 23, 10**9])
def test_validation_is_the_same_for_every_batch_and_number_of_ranks(tmp_path, model, val_tokens):
    tokens = write_shards(tmp_path, lengths=(16 * 23 + 5, 99))[0].astype(np.int64)
    num_windows = min(23, max(1, val_tokens // 16))
    x = torch.from_numpy(tokens[: 16 * num_windows]).view(num_windows, 16)
    y = torch.from_numpy(tokens[1 : 16 * num_windows + 1]).view(num_windows, 16)
    with torch.no_grad():
        expected = model(x, y).item()
    for B in (1, 3, 8, 50):
        for world_size in (1, 2, 3):
            total = 0.0
            for rank in range(world_size):
                loader = make_loader(tmp_path, B, rank, world_size)
                # In one process there is nobody to sum with, so this is one rank's part.
                total += validation_loss(model, loader, val_tokens, CPU)
            assert total == pytest.approx(expected, abs=1e-5)


def test_validation_shows_the_model_one_shape_only(tmp_path, model):
    """Otherwise torch.compile would compile it again. Strides decide, too."""
    write_shards(tmp_path, lengths=(16 * 23 + 5, 99))
    shapes = set()

    def watched(x, y):
        shapes.add((x.shape, y.shape, x.stride(), y.stride()))
        return model(x, y)

    validation_loss(watched, make_loader(tmp_path, 8), 10**9, CPU)
    assert len(shapes) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_validation_shows_how_far_it_is_on_a_terminal(here, monkeypatch, terminal):
    """And leaves no trace of it there."""

    def slow(model, loader, *args):
        batch = loader.batch

        def slow_batch(i):
            time.sleep(0.4 * terminal)
            return batch(i)

        monkeypatch.setattr(loader, "batch", slow_batch)
        return validation_loss(model, loader, *args)

    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(train_gpt2, "validation_loss", slow)
    run = ["--log_dir=log", "--micro_batch_size=1", "--max_steps=1", "--warmup_steps=0"]
    assert train("--val_every=1", "--val_tokens=64", *run) == 0
    assert ("4/4" in screen.getvalue()) == terminal
    if terminal:
        assert screen.getvalue().endswith(" \r")
    else:
        assert not screen.getvalue()


# --------------------------------------------------------------------------------------------------
# Curves


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws a log.txt. Returns the lines of each panel, {name of the axis: {label: points}}."""
    figures = []
    # To write the picture takes long, and is done in the last tests of this file.
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: figures.append(self))

    def draw_log(text, data="data", **sizes):
        (tmp_path / "log.txt").write_text(text)
        draw_curves(TrainConfig(log_dir=str(tmp_path), data=data, **sizes))
        panels = {}
        for axes in figures[-1].axes:
            assert axes.get_xlabel() == "step"
            name = axes.get_ylabel()
            panels[name] = {line.get_label(): line.get_xydata() for line in axes.lines}
        return panels

    return draw_log


def panel(panels, words):
    """The lines of the panel whose axis is named like this."""
    (name,) = [name for name in panels if words in name]
    return panels[name]


def published(lines):
    """The heights of the lines that show what is published."""
    return [points[0, 1] for label, points in lines.items() if label.startswith("published")]


def test_curves_show_the_log_and_name_their_axes_and_units(draw):
    rng = np.random.default_rng(0)
    losses = rng.random(500).round(6)
    norms = rng.random(500).round(6)
    text = ""
    for step in range(500):
        if step == 250:
            text += "250 val 3.5\n250 hella 0.27\n"
        tps = 5000 if step >= 490 else 1000  # a few odd steps, at the end
        text += f"{step} train {losses[step]}\n{step} lr 1e-3\n"
        text += f"{step} norm {norms[step]}\n{step} tps {tps}\n"
    panels = draw(text)
    loss_lines = panel(panels, "loss (nats per token)")
    steps = np.arange(500)
    raw, smoothed = [points for points in loss_lines.values() if len(points) > 400]
    assert np.array_equal(raw, np.stack((steps, losses), axis=1))
    assert set(smoothed[:, 0]) <= set(steps)
    assert smoothed[:, 1].std() < losses.std() / 2
    assert smoothed[:, 1].mean() == pytest.approx(losses.mean(), abs=0.02)
    assert [250, 3.5] in [points.tolist()[0] for points in loss_lines.values()]
    assert any("val" in label and "3.5" in label for label in loss_lines)
    assert any(points.tolist() == [[250, 0.27]] for points in panel(panels, "acc_norm").values())
    norm_lines = panel(panels, "gradient norm")
    assert any(np.array_equal(points[:, 1], norms) for points in norm_lines.values())
    speed_lines = panel(panels, "tokens per second")
    assert any("1,000" in label for label in speed_lines)  # the median


def test_a_label_tells_the_latest_value(draw):
    panels = draw("".join(f"{step} train {5 - step / 10}\n" for step in range(20)))
    assert any("train" in label and "3.1" in label for label in panel(panels, "loss"))


def test_what_is_published_is_shown_where_it_applies(draw):
    text = "0 train 10.9\n0 val 10.9\n0 hella 0.25\n"
    for settings, loss, acc_norm in [
        (dict(data="edu_fineweb10B"), [3.2924], [0.2945]),
        (dict(data="other"), [], [0.2945]),
        (dict(data="edu_fineweb10B", n_layer=24, n_embd=1024), [], [0.3752]),
        (dict(data="edu_fineweb10B", n_layer=36, n_embd=1280), [], [0.4320]),
        (dict(data="edu_fineweb10B", n_layer=48, n_embd=1600), [], [0.4889]),
        (dict(data="edu_fineweb10B", n_embd=96), [], []),
    ]:
        panels = draw(text, **settings)
        assert published(panel(panels, "loss")) == loss, settings
        assert published(panel(panels, "acc_norm")) == acc_norm, settings


def test_without_hellaswag_it_has_no_panel(draw):
    assert not any("acc_norm" in name for name in draw("0 train 5.5\n0 norm 1\n0 tps 9\n"))


def test_the_log_of_build_nanogpt_is_drawn_too(draw):
    panels = draw("0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\n1 train 10.6\n250 val 5.9\n")
    lines = [points.tolist() for points in panel(panels, "loss").values()]
    assert [[0, 10.955029], [1, 10.6]] in lines
    assert [[0, 10.9511], [250, 5.9]] in lines


def test_curves_that_can_not_be_written_stop_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "draw_curves", draw_curves)
    (here / "log/curves.png").mkdir(parents=True)
    assert train("--log_dir=log", "--checkpoint_every=10") == 0
    assert "curves.png can't be" in capsys.readouterr().out
    assert (here / "log/checkpoint_00020.pt").exists()


def test_a_run_draws_its_curves_with_each_checkpoint_and_at_the_end(here, monkeypatch):
    num_lines = []

    def watched(cfg):
        draw_curves(cfg)
        num_lines.append(len((here / "log/log.txt").read_text().splitlines()))
        assert (here / "log/curves.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(train_gpt2, "draw_curves", watched)
    assert train("--log_dir=log", "--val_every=5", "--checkpoint_every=8") == 0
    # Four lines a step, and the validations before the checkpoint: those of its step follow it.
    assert num_lines == [4 * 8 + 2, 4 * 16 + 4, 4 * 20 + 4, 4 * 20 + 5]
