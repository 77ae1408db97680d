"""build-nanogpt's model and step in a training loop of its own: the second half of real_run.py.

    python tests/reference_run.py SECONDS END [--flag value ...]

The flags are those of train_gpt2.py, and so are the lines in log.txt. It trains until its steps
have taken SECONDS, or until the clock, time.time(), says END. Then it validates once more.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import benchmark
import torch
from real_run import without_compiling

import train_gpt2


class Log:
    """Prints the figures of a step, and adds them to log.txt as `step stream value`."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.path = Path(cfg.log_dir, "log.txt")
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, step: int, **figures) -> None:
        with open(self.path, "a") as file:
            for stream, value in figures.items():
                file.write(f"{step} {stream} {value:.8g}\n")

    def validation(self, step: int, loss: float) -> None:
        self.write(step, val=loss)
        print(f"step {step:5d}/{self.cfg.max_steps} | val loss {loss:.4f}", flush=True)

    def step(self, step: int, loss: float, lr: float, norm: float, seconds: float) -> None:
        tps = self.cfg.total_batch_size / seconds
        self.write(step, train=loss, lr=lr, norm=norm, tps=tps)
        if step % self.cfg.print_every == 0:
            figures = f"loss {loss:.4f} | lr {lr:.4e} | norm {norm:.2f}"
            speed = f"{seconds * 1e3:.0f} ms | {tps:,.0f} tok/s"
            print(f"step {step:5d}/{self.cfg.max_steps} | {figures} | {speed}", flush=True)


def make_model(trainer, cfg, theirs, fused: bool) -> tuple:
    """The model with the weights that the trainer would draw, and its optimiser."""
    torch.manual_seed(cfg.seed)
    model = trainer.GPT2(theirs).to(cfg.device)
    optimizer = model.configure_optimizers(cfg.weight_decay, cfg.max_lr)
    if not fused:
        for group in optimizer.param_groups:
            group["fused"] = None
    return model, optimizer


def take_step(model, optimizer, loader, micro_batches: range, cfg, autocast) -> tuple[float, float]:
    """One step as in the lecture: each batch is fetched when it is needed. Returns the loss and the
    norm of the gradient."""
    optimizer.zero_grad()
    train_loss = torch.zeros((), device=cfg.device)
    for i in micro_batches:
        x, y = loader.batch(i)
        with autocast:
            loss = model(x, y) / len(micro_batches)
        train_loss += loss.detach()
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
    optimizer.step()
    # Reading the figures waits for the GPU, so the caller's clock shows the time of the whole step.
    return train_loss.item(), norm.item()


def train(cfg, seconds_to_train: float, end: float) -> None:
    """Train with the settings that the trainer would have, until the steps have taken so many
    seconds, or until the clock says `end`."""
    if cfg.dtype == "fp16":
        raise SystemExit("error: build-nanogpt needs bf16, which this GPU lacks; use another GPU")
    theirs, variant = benchmark.build_nanogpts_step(cfg)
    theirs = replace(theirs, shuffle=False, compile=cfg.compile)
    trainer = benchmark.trainer_with_float32_stream()
    device = torch.device(cfg.device)
    autocast = trainer.set_precision(device, cfg.dtype)
    model, optimizer = make_model(trainer, cfg, theirs, variant["fused"])
    compiled_model = torch.compile(model, dynamic=False) if cfg.compile else model
    train_loader = trainer.DataLoaderLite(theirs, "train")
    val_loader = trainer.DataLoaderLite(theirs, "val")
    B = cfg.micro_batch_size
    T = cfg.sequence_length
    grad_accum_steps = cfg.total_batch_size // (B * T)
    print(f"a step is {B} sequences × {T} tokens × {grad_accum_steps} micro-steps", flush=True)

    log = Log(cfg)
    seconds = []
    step = 0
    while True:
        done = sum(without_compiling(seconds)) >= seconds_to_train or time.time() >= end
        if done or train_gpt2.is_due(step, cfg.val_every, cfg.max_steps):
            model.eval()
            with autocast:
                val_loss = trainer.validation_loss(
                    compiled_model, val_loader, cfg.val_tokens, device
                )
            log.validation(step, val_loss)
        if done:
            break
        model.train()
        started = time.perf_counter()
        # If the reference is faster, it continues at the lowest rate, as in the lecture.
        lr = trainer.get_lr(min(step, cfg.max_steps), cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches = range(step * grad_accum_steps, (step + 1) * grad_accum_steps)
        loss, norm = take_step(
            compiled_model, optimizer, train_loader, micro_batches, cfg, autocast
        )
        seconds.append(time.perf_counter() - started)
        log.step(step, loss, lr, norm, seconds[-1])
        step += 1


def main() -> None:
    seconds_to_train, end, *flags = sys.argv[1:]
    cfg, _, _ = train_gpt2.resolve_config(train_gpt2.parse_flags(flags))
    train_gpt2.print_settings(cfg)
    with train_gpt2.explain_out_of_memory(cfg):
        train(cfg, float(seconds_to_train), float(end))


if __name__ == "__main__":
    main()
