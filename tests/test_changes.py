"""What the README says under "How to change it" is true: each of these changes is made in a copy of
train_gpt2.py, in the places that its table names. The copy trains, is stopped, goes on to the end
of an undisturbed run, and generates.
"""

import difflib
import importlib.util
import shutil
import signal
import sys
import types

import pytest
from conftest import PROGRAM, ROOT, TINY, assert_same_weights, read_log, write_shards

import train_gpt2

# Each change is a list of (lines of train_gpt2.py, lines to put in their place).
LINEAR_SCHEDULE = [
    (
        """\
    return cfg.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)
""",
        """\
    return cfg.max_lr + progress * (cfg.min_lr - cfg.max_lr)
""",
    ),
]

SLIDING_WINDOW = [
    (
        """\
            future = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
            y = F.softmax(scores + future, dim=-1) @ v
""",
        """\
            far = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device)
            y = F.softmax(scores + far.triu(1) + far.tril(-4), dim=-1) @ v
""",
    ),
    (
        """\
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
""",
        """\
            near = torch.ones(T, T, dtype=torch.bool, device=q.device).tril().triu(-3)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
""",
    ),
]

MUON = [
    (
        """\
class GPT2(nn.Module):
""",
        """\
class MuonAndAdamW(torch.optim.Optimizer):
    \"\"\"Muon for the matrices of the blocks, AdamW for the rest. It has the groups and the state
    of both, so that train() sets all rates and a checkpoint holds all moments.\"\"\"

    def __init__(self, muon, adamw):
        self.parts = [muon, adamw]
        super().__init__(muon.param_groups + adamw.param_groups, {})

    def step(self):
        for part, group_slice in zip(self.parts, (slice(0, 1), slice(1, None)), strict=True):
            part.param_groups = self.param_groups[group_slice]
            part.state = self.state
            part.step()


class GPT2(nn.Module):
""",
    ),
    (
        """\
        matrices = [p for p in self.parameters() if p.dim() >= 2]
""",
        """\
        hidden = [p for p in self.transformer.h.parameters() if p.dim() == 2]
        matrices = [self.transformer.wte.weight, self.transformer.wpe.weight]
""",
    ),
    (
        """\
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)
""",
        """\
        muon = torch.optim.Muon(hidden, lr=learning_rate, adjust_lr_fn="match_rms_adamw")
        adamw = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8)
        return MuonAndAdamW(muon, adamw)
""",
    ),
]

ROTARY_POSITIONS = [
    (
        """\
        if self.attention == "manual":
""",
        """\
        frequencies = 10000 ** -torch.linspace(0, 1, q.size(-1) // 2, device=q.device)
        angles = torch.outer(torch.arange(T, device=q.device), frequencies)
        cos = angles.cos().to(q.dtype)  # (T, half of the head size)
        sin = angles.sin().to(q.dtype)

        def rotate(z):
            a, b = z.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

        q = rotate(q)
        k = rotate(k)
        if self.attention == "manual":
""",
    ),
    (
        """\
                wpe=nn.Embedding(config.block_size, config.n_embd),  # positions
""",
        "",
    ),
    (
        """\
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
""",
        """\
        x = self.transformer.wte(idx)  # (B, T, C)
""",
    ),
]

WEIGHT_NORM = [
    (
        """\
            logger.step(step, mean_loss, lr, grad_norm, seconds)
""",
        """\
            logger.step(step, mean_loss, lr, grad_norm, seconds)
            logger.write(step, weight_norm=nn.utils.get_total_norm(model.parameters()).item())
""",
    ),
]

WANDB = [
    (
        """\
                self.drop_lines(first_step)
""",
        """\
                self.drop_lines(first_step)
            import wandb

            self.wandb = wandb.init(config=asdict(cfg))
""",
    ),
    (
        """\
        lines = [f"{step} {stream} {value:.8g}\\n" for stream, value in figures.items()]
""",
        """\
        self.wandb.log(figures, step=step)
        lines = [f"{step} {stream} {value:.8g}\\n" for stream, value in figures.items()]
""",
    ),
]

SEQUENTIAL_FROM_A_RANDOM_OFFSET = [
    (
        """\
            k = permutation(self.num_windows, self.cfg.seed, epoch)[k]
""",
        """\
            offset = permutation(self.num_windows, self.cfg.seed, epoch)[0]
            k = (k + offset) % self.num_windows
""",
    ),
]

SECOND_VALIDATION_SET = [
    (
        """\
    shuffle: bool = flag(True,""",
        """\
    more_val_data: str = flag("more", "folder of token shards for a second validation")
    shuffle: bool = flag(True,""",
    ),
    (
        """\
    val_loader = DataLoaderLite(cfg, "val", RANK, WORLD_SIZE)
""",
        """\
    val_loader = DataLoaderLite(cfg, "val", RANK, WORLD_SIZE)
    more_val_loader = DataLoaderLite(replace(cfg, data=cfg.more_val_data), "val", RANK, WORLD_SIZE)
""",
    ),
    (
        """\
                        compiled_model, val_loader, cfg.val_tokens, device, stop.watch
                    )
""",
        """\
                        compiled_model, val_loader, cfg.val_tokens, device, stop.watch
                    )
                    more_val_loss = validation_loss(
                        compiled_model, more_val_loader, cfg.val_tokens, device, stop.watch
                    )
""",
    ),
    (
        """\
                    logger.write(step, val=val_loss)
""",
        """\
                    logger.write(step, val=val_loss, more_val=more_val_loss)
""",
    ),
]

DROPOUT = [
    (
        """\
    attention: str = flag(
""",
        """\
    dropout: float = flag(0.0, "probability of dropping a channel of a branch")
    attention: str = flag(
""",
    ),
    (
        """\
        self.mlp = MLP(config)
""",
        """\
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)
""",
    ),
    (
        """\
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
""",
        """\
        x = x + self.dropout(self.attn(self.ln_1(x)))
        x = x + self.dropout(self.mlp(self.ln_2(x)))
""",
    ),
]

GROUPED_QUERIES = [
    (
        """\
    n_embd: int = flag(""",
        """\
    n_kv_head: int = flag(1, "number of heads for keys and values", low=1)
    n_embd: int = flag(""",
    ),
    (
        """\
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
""",
        """\
        self.n_kv_head = config.n_kv_head
        self.kv_size = config.n_kv_head * (config.n_embd // config.n_head)
        self.c_attn = nn.Linear(config.n_embd, config.n_embd + 2 * self.kv_size)
""",
    ),
    (
        """\
        q, k, v = self.c_attn(x).split(C, dim=2)
""",
        """\
        q, k, v = self.c_attn(x).split((C, self.kv_size, self.kv_size), dim=2)
""",
    ),
    (
        """\
        k = k.view(B, T, self.n_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_head, -1).transpose(1, 2)
""",
        """\
        k = k.view(B, T, self.n_kv_head, -1).transpose(1, 2)
        v = v.view(B, T, self.n_kv_head, -1).transpose(1, 2)
        k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
        v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
""",
    ),
]

CHANGES = dict(
    linear_schedule=LINEAR_SCHEDULE,
    sliding_window=SLIDING_WINDOW,
    muon=MUON,
    rotary_positions=ROTARY_POSITIONS,
    weight_norm=WEIGHT_NORM,
    wandb=WANDB,
    sequential_from_a_random_offset=SEQUENTIAL_FROM_A_RANDOM_OFFSET,
    second_validation_set=SECOND_VALIDATION_SET,
    dropout=DROPOUT,
    grouped_queries=GROUPED_QUERIES,
)

EVALUATE = ["--val_every=5", "--sample_every=10", "--num_samples=1", "--max_new_tokens=20"]
RUN = ["--data=data"] + TINY + EVALUATE + ["--max_steps=10", "--checkpoint_every=10"]
GENERATE = ["--generate=some", "--device=cpu", "--num_samples=1", "--max_new_tokens=20"]


def change(source, replacements):
    """The source with these replacements. Each text has to be there exactly once."""
    for old, new in replacements:
        assert source.count(old) == 1, f"found {source.count(old)} times:\n{old}"
        source = source.replace(old, new)
    return source


def count_places(source, changed):
    """The number of runs of lines that differ."""
    lines = source.splitlines()
    matcher = difflib.SequenceMatcher(None, lines, changed.splitlines(), autojunk=False)
    return sum(kind != "equal" for kind, *_ in matcher.get_opcodes())


@pytest.fixture
def make(here, monkeypatch):
    """Makes a changed copy of train_gpt2.py, beside a fineweb.py, and imports it."""

    def import_changed(name):
        path = here / f"train_with_{name}.py"
        path.write_text(change(PROGRAM.read_text(encoding="utf-8"), CHANGES[name]))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)  # dataclasses look there
        spec.loader.exec_module(module)
        monkeypatch.setattr(module, "draw_curves", lambda cfg: None)  # takes long
        return module

    shutil.copy(ROOT / "fineweb.py", here)
    write_shards(here / "more", seed=1)
    return import_changed


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package. It notes what it is given."""

    class Run:
        def __init__(self, config):
            self.config = config
            self.figures = []

        def log(self, figures, step):
            self.figures.append((step, figures))

    module = types.ModuleType("wandb")
    module.runs = []

    def init(config):
        module.runs.append(Run(config))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.mark.parametrize("name", CHANGES)
def test_changed_copy_trains_stops_goes_on_and_generates(make, wandb, monkeypatch, capsys, name):
    trainer = make(name)
    get_lr = trainer.get_lr

    def interrupt(step, cfg):
        if step == 6:
            signal.raise_signal(signal.SIGTERM)
        return get_lr(step, cfg)

    assert trainer.main(RUN + ["--log_dir=whole"]) == 0
    assert "--- sample 0" in capsys.readouterr().out
    whole = read_log("whole")["train"]
    assert whole[9] < whole[0]
    monkeypatch.setattr(trainer, "get_lr", interrupt)
    assert trainer.main(RUN + ["--log_dir=parts"]) == 128 + signal.SIGTERM
    monkeypatch.setattr(trainer, "get_lr", get_lr)
    assert trainer.main(RUN + ["--log_dir=parts"]) == 0
    assert "resuming parts after 7 steps" in capsys.readouterr().out
    assert_same_weights("whole/checkpoint_00010.pt", "parts/checkpoint_00010.pt")
    assert trainer.main(GENERATE + ["--log_dir=parts"]) == 0
    assert "--- sample 0\nsome" in capsys.readouterr().out


def test_linear_schedule_is_a_line(make):
    trainer = make("linear_schedule")
    cfg = trainer.TrainConfig(max_lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110)
    rates = [trainer.get_lr(step, cfg) for step in (9, 10, 60, 110)]
    assert rates == pytest.approx([1.0, 1.0, 0.6, 0.2])


def test_sliding_window_and_grouped_queries_are_the_same_in_both_ways_of_attention(make):
    for name in ("sliding_window", "grouped_queries"):
        trainer = make(name)
        for attention in ("flash", "manual"):
            run = ["--log_dir=" + name + attention, "--attention=" + attention]
            assert trainer.main(RUN + run) == 0
        losses = read_log(name + "flash")["train"]
        assert losses == pytest.approx(read_log(name + "manual")["train"], abs=1e-5)


def test_weight_norm_and_second_validation_are_in_the_log(make):
    assert make("weight_norm").main(RUN + ["--log_dir=norms"]) == 0
    norms = read_log("norms")["weight_norm"]
    assert list(norms) == list(range(10))
    assert min(norms.values()) > 1
    assert make("second_validation_set").main(RUN + ["--log_dir=vals"]) == 0
    log = read_log("vals")
    assert list(log["more_val"]) == list(log["val"]) == [0, 5, 10]
    assert log["more_val"][10] != log["val"][10]


def test_wandb_gets_the_configuration_and_every_figure(make, wandb):
    assert make("wandb").main(RUN + ["--log_dir=log"]) == 0
    (run,) = wandb.runs
    assert run.config["n_embd"] == 32
    sent = {}
    for step, figures in run.figures:
        for stream, value in figures.items():
            sent.setdefault(stream, {})[step] = pytest.approx(value)
    assert sent == read_log("log")


def test_order_is_sequential_from_a_random_offset(make):
    trainer = make("sequential_from_a_random_offset")
    values = dict(data="data", micro_batch_size=1, sequence_length=16, device="cpu")
    plain = trainer.DataLoaderLite(trainer.TrainConfig(shuffle=False, **values), "train")
    changed = trainer.DataLoaderLite(trainer.TrainConfig(**values), "train")
    W = plain.num_windows
    firsts = [changed.window(s).tolist() for s in range(W)]
    in_order = [plain.window(s).tolist() for s in range(W)]
    offset = in_order.index(firsts[0])
    assert offset > 0
    assert firsts == in_order[offset:] + in_order[:offset]


def test_dropout_is_off_in_evaluations_and_samples(make, capsys):
    """A validation of the same weights gives the same loss, whatever random numbers come next."""
    trainer = make("dropout")
    run = RUN + ["--log_dir=log", "--dropout=0.5"]
    assert trainer.main(run) == 0
    val = read_log("log")["val"][10]
    assert trainer.main(run) == 0  # It has all its steps, so it only evaluates.
    assert read_log("log")["val"][10] == val
    assert trainer.main(RUN + ["--log_dir=none"]) == 0
    assert read_log("none")["train"] != read_log("log")["train"]
    samples = []
    for _ in range(2):
        capsys.readouterr()
        assert trainer.main(GENERATE + ["--log_dir=log", "--temperature=0"]) == 0
        samples.append(capsys.readouterr().out)
    assert samples[0] == samples[1]


def test_run_goes_on_after_a_field_with_a_default_was_added(make, capsys):
    """A checkpoint from before the change does not know the field."""
    assert train_gpt2.main(RUN + ["--log_dir=log"]) == 0
    trainer = make("dropout")
    assert trainer.main(GENERATE + ["--log_dir=log"]) == 0
    assert trainer.main(RUN + ["--log_dir=log", "--max_steps=12"]) == 0
    assert "resuming log after 10 steps" in capsys.readouterr().out


def test_changes_take_few_places(capsys):
    source = PROGRAM.read_text(encoding="utf-8")
    places = {name: count_places(source, change(source, CHANGES[name])) for name in CHANGES}
    with capsys.disabled():
        print(f"\n{sum(places.values())} places: {places}")
    assert sum(places.values()) <= 40
