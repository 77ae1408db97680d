"""Which tokens a step sees: the rule, held against a plain reading of it."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, llmc_header, python, write_shards
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt2
from train_gpt2 import DataLoaderLite, TrainConfig, find_shards, read_shard

SHARDS = st.lists(st.integers(0, 60), min_size=1, max_size=5)


def make_loader(folder, B=1, T=16, vocab_size=50257):
    sizes = dict(micro_batch_size=B, sequence_length=T, vocab_size=vocab_size)
    return DataLoaderLite(TrainConfig(data=str(folder), device="cpu", **sizes), "train")


class Shards(DataLoaderLite):
    """A loader of arrays in memory whose every token is its own number."""

    def __init__(self, lengths, B, T, rank=0, world_size=1, **changes):
        tokens = np.arange(sum(lengths), dtype=np.uint16)
        arrays = dict(enumerate(np.split(tokens, np.cumsum(lengths)[:-1])))
        cfg = TrainConfig(
            data="in memory", micro_batch_size=B, sequence_length=T, device="cpu", **changes
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_gpt2, "find_shards", lambda folder, split: list(arrays))
            patch.setattr(train_gpt2, "read_shard", arrays.get)
            super().__init__(cfg, "train", rank, world_size)

    def order(self, number, first=0):
        """The first tokens of so many samples."""
        return [int(self.window(s)[0]) for s in range(first, first + number)]


def windows_of(lengths, T):
    """The first token of every window, in file order, read off the definition."""
    starts = []
    offset = 0
    for length in lengths:
        for k in range(length):
            if (k + 1) * T + 1 <= length:
                starts.append(offset + k * T)
        offset += length
    assume(starts)
    return starts


def samples_of_step(lengths, T, B, A, R, step, shuffle):
    """First tokens of the samples of a step in their order, over all micro-steps and ranks."""
    loaders = [Shards(lengths, B, T, r, R, shuffle=shuffle) for r in range(R)]
    samples = []
    for micro_step in range(A):
        for loader in loaders:
            x, _ = loader.batch(step * A + micro_step)
            samples += x[:, 0].tolist()
    return samples


@settings(deadline=None)
@given(SHARDS, st.integers(1, 9), st.integers(0, 5), st.integers(1, 4))
def test_every_window_once_an_epoch_in_an_order_of_its_own(lengths, T, seed, epochs):
    starts = windows_of(lengths, T)
    loader = Shards(lengths, 1, T, seed=seed)
    W = loader.num_windows
    assert len(starts) == W
    orders = [loader.order(W, epoch * W) for epoch in range(epochs)]
    for order in orders:
        assert sorted(order) == starts
    if W > 12:  # Orders that agree by chance are one in 12!
        assert len({tuple(order) for order in orders}) == epochs
        assert orders[0] != starts


@settings(deadline=None)
@given(SHARDS, st.integers(1, 9), st.integers(0, 3), st.booleans(), st.data())
def test_samples_of_a_step_are_the_same_for_every_split_of_the_batch(
    lengths, T, step, shuffle, data
):
    windows_of(lengths, T)
    total = data.draw(st.sampled_from([4, 6, 12]))
    B = data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
    A = data.draw(st.sampled_from([n for n in range(1, total + 1) if total // B % n == 0]))
    R = total // (B * A)
    expected = samples_of_step(lengths, T, total, 1, 1, step, shuffle)
    assert samples_of_step(lengths, T, B, A, R, step, shuffle) == expected


@settings(deadline=None)
@given(SHARDS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 20))
def test_a_step_depends_on_its_number_alone(lengths, T, B, i):
    windows_of(lengths, T)
    running = Shards(lengths, B, T)
    resumed = Shards(lengths, B, T)
    for j in range(i):
        running.batch(j)
    assert running.batch(i).equal(resumed.batch(i))


@settings(deadline=None)
@given(SHARDS, st.integers(1, 9))
def test_without_shuffle_windows_come_in_file_order_and_targets_are_one_ahead(lengths, T):
    starts = windows_of(lengths, T)
    loader = Shards(lengths, len(starts), T, shuffle=False)
    for epoch in range(2):  # The second is like the first.
        x, y = loader.batch(epoch)
        assert x.equal(torch.tensor(starts)[:, None] + torch.arange(T))
        assert y.equal(x + 1)


def test_seeds_draw_different_orders():
    assert Shards([500], 1, 4, seed=1).order(100) != Shards([500], 1, 4, seed=2).order(100)


def test_order_is_pinned_so_that_old_runs_resume():
    assert Shards([50], 1, 5, seed=1337).order(9) == [15, 10, 35, 5, 0, 20, 30, 25, 40]


def test_npy_and_llmc_bin_hold_the_same(tmp_path):
    write_shards(tmp_path / "npy", suffix=".npy")
    write_shards(tmp_path / "bin", suffix=".bin")
    npy = make_loader(tmp_path / "npy", B=3)
    llmc = make_loader(tmp_path / "bin", B=3)
    for i in range(5):
        batch = npy.batch(i)
        assert batch.equal(llmc.batch(i))
        assert batch.dtype == torch.int64
        assert batch.shape == (2, 3, 16)


def test_nanogpt_s_train_bin_and_val_bin_are_read_with_and_without_a_header(tmp_path):
    """By these names alone: other files say themselves what they are."""
    tokens = np.arange(1000, dtype="<u2")
    for header in (b"", llmc_header(20240520, len(tokens))):
        for split in ("train", "val"):
            (tmp_path / f"{split}.bin").write_bytes(header + tokens.tobytes())
            (path,) = find_shards(tmp_path, split)
            assert np.array_equal(read_shard(path), tokens)
    (tmp_path / "my_train.bin").write_bytes(tokens.tobytes())
    with pytest.raises(SystemExit, match=r"my_train\.bin"):
        read_shard(tmp_path / "my_train.bin")


def test_shards_are_found_by_name_in_order(tmp_path):
    train = ["a_train_000001.npy", "a_train_000002.npy", "fineweb_train_000003.bin", "train.bin"]
    others = ["a_train_1.txt", "training.npy", "manifest.json", "a_train_000001.npy.tmp"]
    others += ["._a_train_000001.npy", ".b_train_000001.npy", "._train.bin"]
    for name in train[::-1] + others + ["tiny_val.bin"]:
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(tmp_path, "train")] == train
    assert [path.name for path in find_shards(tmp_path, "val")] == ["tiny_val.bin"]
    assert find_shards(tmp_path / "nowhere", "train") == []


def test_shards_are_mapped_not_loaded(tmp_path):
    write_shards(tmp_path)
    for path in find_shards(tmp_path, "train"):
        tokens = read_shard(path)
        while not isinstance(tokens, np.memmap):
            tokens = tokens.base
        assert tokens.mode == "r"


@pytest.mark.skipif(sys.platform == "win32", reason="sparse files")
def test_ten_billion_tokens_cost_only_their_permutation(tmp_path):
    for i in range(100):
        with open(tmp_path / f"big_train_{i:06d}.bin", "wb") as file:
            file.write(llmc_header(20240520, 10**8))
            file.truncate(1024 + 2 * 10**8)  # a hole, which takes no room on the disk
    program = """
import resource
from train_gpt2 import DataLoaderLite, TrainConfig

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
cfg = TrainConfig(data=".", micro_batch_size=8, sequence_length=1024, device="cpu")
loader = DataLoaderLite(cfg, "train")
loader.batch(0)
loader.batch(12345)
print(loader.num_windows, peak() - before)
"""
    done = python("-c", program, cwd=tmp_path, env=dict(PYTHONPATH=str(ROOT)))
    num_windows, grown = [int(number) for number in done.stdout.split()]
    assert num_windows == 100 * ((10**8 - 1) // 1024)
    assert grown < 16 * num_windows + 2**24  # the permutation, drawn and kept, and some room


@pytest.mark.parametrize("position", [50, 10**5])
def test_token_beyond_the_vocabulary_names_the_shard(tmp_path, position):
    write_shards(tmp_path)
    tokens = np.zeros(10**5 + 50, np.uint16)
    tokens[position] = 300
    np.save(tmp_path / "text_train_000007.npy", tokens)
    loader = make_loader(tmp_path, vocab_size=257)
    with pytest.raises(SystemExit, match=r"text_train_000007\.npy has token 300.* of 257"):
        for i in range(loader.num_windows):
            loader.batch(i)
