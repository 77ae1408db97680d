"""Validation and curves."""

import numpy as np
import pytest
import torch
from conftest import TINY, write_shards

import train_gpt2
from train_gpt2 import (
    GPT2,
    DataLoaderLite,
    GPT2Config,
    draw_curves,
    find_shards,
    validation_loss,
)

CPU = torch.device("cpu")


def small_model(vocab_size=257, block_size=64):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    return model


@pytest.mark.parametrize("val_tokens", [1, 16 * 7, 16 * 23, 10**9])
def test_validation_is_the_same_for_every_batch_and_number_of_ranks(tmp_path, val_tokens):
    val, *_ = write_shards(tmp_path, lengths=(16 * 23 + 5, 99))
    model = small_model()
    n = min(23, max(1, val_tokens // 16))
    with torch.no_grad():
        rows = torch.from_numpy(val[: n * 16 + 1].astype(np.int64))
        expected = model(rows[:-1].view(n, 16), rows[1:].view(n, 16))[1].item()
    for B in (1, 3, 8, 50):
        for R in (1, 2, 3):
            loaders = [DataLoaderLite(find_shards(tmp_path, "val"), B, 16, r, R, shuffle=False) for r in range(R)]
            parts = [validation_loss(model, loader, val_tokens, CPU) for loader in loaders]  # of each rank, unreduced
            assert sum(parts) == pytest.approx(expected, abs=1e-5)


def test_validation_shows_the_model_one_shape_only(tmp_path):
    write_shards(tmp_path, lengths=(16 * 23 + 5, 99))
    model, shapes = small_model(), set()

    def watched(x, y):
        shapes.add((x.shape, y.shape, x.stride(), y.stride()))  # strides, too, decide whether a graph fits
        return model(x, y)

    validation_loss(watched, DataLoaderLite(find_shards(tmp_path, "val"), 8, 16, shuffle=False), 10**9, CPU)
    assert len(shapes) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def drawn(folder, monkeypatch, **options):
    """What draw_curves draws -> {y label: {line's label: its points}}."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: figures.append(self) or save(self, *args, **kw))
    draw_curves(folder, **options)
    (figure,) = figures
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG") and not (folder / "curves.tmp").exists()
    assert all(axes.get_xlabel() == "step" for axes in figure.axes)
    return {axes.get_ylabel(): {line.get_label(): line.get_xydata() for line in axes.lines} for axes in figure.axes}


def test_curves_show_the_log_and_what_is_published(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    loss, norm = 3 + rng.random(500), rng.random(500)
    lines = [f"{t} train {loss[t]:.8g}\n{t} lr 1e-3\n{t} norm {norm[t]:.8g}\n{t} tps 1000\n" for t in range(500)]
    lines.insert(250, "250 val 3.5\n250 hella 0.27\n")
    (tmp_path / "log.txt").write_text("".join(lines))
    panels = drawn(tmp_path, monkeypatch)
    assert list(panels) == ["loss, nats a token", "HellaSwag, acc_norm", "gradient norm", "tokens a second"]
    losses, hella, norms, tps = panels.values()
    assert losses["GPT-2 124M, trained on FineWeb-Edu: 3.2924"][:, 1].tolist() == [3.2924] * 2
    np.testing.assert_allclose(losses["train"][:, 1], loss, rtol=1e-6)
    smooth = losses["train, mean of 10 steps"][:, 1]
    np.testing.assert_allclose(smooth[100], loss[95:105].mean(), rtol=1e-6)
    np.testing.assert_allclose(smooth[0], loss[:5].mean(), rtol=1e-6)
    assert losses["val, 3.5000 now"].tolist() == [[250, 3.5]] and hella["hella, 0.2700 now"].tolist() == [[250, 0.27]]
    assert {"OpenAI's GPT-2 of this size: 0.2945", "GPT-3 of this size: 0.337"} < hella.keys()
    np.testing.assert_allclose(next(iter(norms.values()))[:, 1], norm, rtol=1e-6)  # each spike is there
    assert len(next(iter(tps.values()))) == 500
    # Another size, other data: nothing that does not apply
    panels = drawn(tmp_path, monkeypatch, size=(3, 96), fineweb=False)
    assert not any("GPT" in label for panel in panels.values() for label in panel)


def test_the_log_of_build_nanogpt_is_drawn_too(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("0 val 10.9511\n0 hella 0.2463\n0 train 10.955029\n1 train 10.6\n250 val 5.9\n")
    panels = drawn(tmp_path, monkeypatch)
    assert list(panels) == ["loss, nats a token", "HellaSwag, acc_norm"]
    assert panels["loss, nats a token"]["train"].tolist() == [[0, 10.955029], [1, 10.6]]
    assert panels["loss, nats a token"]["val, 5.9000 now"].tolist() == [[0, 10.9511], [250, 5.9]]


@pytest.mark.parametrize("log", ["", "1 train\n", "not a log\n", None])
def test_curves_that_cannot_be_drawn_stop_nothing(tmp_path, capsys, log):
    if log is not None:
        (tmp_path / "log.txt").write_text(log)
    draw_curves(tmp_path)
    assert "curves.png can't be drawn" in capsys.readouterr().out and not (tmp_path / "curves.png").exists()


def test_a_run_draws_its_curves(here, monkeypatch):
    monkeypatch.setattr(train_gpt2, "draw_curves", draw_curves)
    assert train_gpt2.main([*TINY, "--data=data", "--log_dir=log", "--val_every=10"]) == 0
    assert (here / "log/curves.png").read_bytes().startswith(b"\x89PNG")
