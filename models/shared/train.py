"""One small training loop: AdamW, EMA, gradient clip, warm-up, seed, progress bar, JSONL log, atomic checkpoint, exact resume.

``Trainer(model, loss, TrainConfig(...), checkpoint=path, log=path).run()``. The loss is a callable
``loss(model, step, generator) -> (scalar, {name: number})`` that draws every random number from the generator, so that a run
interrupted and resumed takes the same path, bit for bit, as one that was not.
"""

import copy
import dataclasses
import json
import math
import os
import signal
import threading
import time

import torch

from vidkern._files import replacing
from vidkern.errors import import_extra


class Interrupted(Exception):
    """Training stopped by the user; the state is in the checkpoint. Has `.step`, the number of finished steps."""

    def __init__(self, step):
        super().__init__(f"interrupted after {step} steps")
        self.step = step


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """steps: optimiser steps. lr: peak rate, reached after `warmup` steps, then a cosine down to lr * `final_lr` at the last step.

    betas, weight_decay: AdamW. clip: greatest gradient norm. ema: decay of the averaged weights (0 = no average; its first
    steps use a smaller decay, min(ema, (1 + n) / (10 + n))). log_every, save_every: in steps. autocast: "bf16" or None.
    """

    steps: int
    lr: float = 1e-3
    warmup: int = 50
    final_lr: float = 0.0
    betas: tuple = (0.9, 0.95)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.99
    seed: int = 0
    log_every: int = 1
    save_every: int = 200
    autocast: str | None = None

    def rate(self, step):
        """Learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class EMA:
    """Exponential moving average of a model's parameters in a copy, `.model`; buffers are copied."""

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        own, new = list(self.model.parameters()), list(model.parameters())
        torch._foreach_lerp_(own, new, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers()):
            mine.copy_(theirs)


class _StopOnInterrupt:
    """While active, the first Ctrl-C only sets `.asked`, so that no step is cut in two; a second one interrupts at once."""

    def __enter__(self):
        self.asked = False
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exc):
        if self.main:
            signal.signal(signal.SIGINT, self.previous)


class Trainer:
    """Runs the loop. model: trained in place (only parameters that require grad); `loss`: see the module's docstring.

    checkpoint, log: file paths or None. settings: a JSON-able dict stored in the checkpoint; `resume` refuses another one.
    parameters: parameter groups for AdamW, default all that require grad. After `run`, `averaged` is the model to use.
    """

    def __init__(self, model, loss, config, *, checkpoint=None, log=None, settings=None, parameters=None, progress=True):
        self.model, self.loss, self.config = model, loss, config
        self.checkpoint, self.log, self.settings, self.progress = checkpoint, log, settings or {}, progress
        groups = parameters or [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        self.ema = EMA(model, config.ema) if config.ema else None
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.seconds = 0, 0.0

    @property
    def averaged(self):
        """The EMA model, or the model itself without an average."""
        return self.ema.model if self.ema else self.model

    def state(self):
        return {"step": self.step, "seconds": self.seconds, "settings": self.settings, "config": dataclasses.asdict(self.config),
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "ema": (self.ema.model.state_dict(), self.ema.updates) if self.ema else None,
                "generator": self.generator.get_state(), "global_rng": torch.get_rng_state()}

    def resume(self, state):
        """Continue from a `state()` (or the path of a checkpoint). Raises ValueError when it was made with other settings."""
        if not isinstance(state, dict):
            state = torch.load(state, weights_only=True)
        ours = {**self.settings, **dataclasses.asdict(self.config)}
        theirs = {**state["settings"], **state["config"]}
        for key in sorted(set(ours) | set(theirs)):
            if ours.get(key) != theirs.get(key):
                raise ValueError(f"checkpoint was made with {key}={theirs.get(key)!r}, this run has {ours.get(key)!r}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.model.load_state_dict(state["ema"][0])
            self.ema.updates = state["ema"][1]
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._forget_log_after(self.step)

    def _forget_log_after(self, step):
        """Drop log lines of steps that the checkpoint does not contain: they are about to be run again."""
        if self.log is None or not os.path.exists(self.log):
            return
        with open(self.log) as f:
            kept = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with replacing(self.log) as fresh:
            fresh.write_text("".join(kept))

    def one_step(self):
        device = next(self.model.parameters()).device.type
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(self.step) * group.get("lr_scale", 1.0)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.config.autocast == "bf16"):
            loss, extra = self.loss(self.model, self.step, self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.config.clip)
        self.optimizer.step()
        if self.ema:
            self.ema.update(self.model)
        self.step += 1
        return {"step": self.step, "loss": loss.item(), "grad_norm": norm.item(), "lr": self.config.rate(self.step - 1), **extra}

    def save(self):
        """Write the checkpoint; the file is whole or absent, never half."""
        if self.checkpoint is not None:
            with replacing(self.checkpoint) as fresh:
                torch.save(self.state(), fresh)

    def run(self):
        """Train up to config.steps. Ctrl-C finishes the step, saves the checkpoint and raises `Interrupted`."""
        log = open(self.log, "a" if self.step else "w") if self.log is not None else None
        bar = None
        if self.progress:
            tqdm = import_extra("tqdm", "a progress bar").tqdm
            bar = tqdm(total=self.config.steps, initial=self.step, desc="training", leave=False)
        began, before = time.perf_counter(), self.seconds
        self.model.train()
        try:
            with _StopOnInterrupt() as stop:
                while self.step < self.config.steps and not stop.asked:
                    record = self.one_step()
                    self.seconds = before + time.perf_counter() - began
                    if not math.isfinite(record["loss"]):
                        raise FloatingPointError(f"loss is {record['loss']} at step {self.step}: lower lr={self.config.lr:g}")
                    if log is not None and self.step % self.config.log_every == 0:
                        log.write(json.dumps({**record, "seconds": round(self.seconds, 3)}) + "\n")
                        log.flush()
                    if bar is not None:
                        bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
                        bar.update()
                    if self.step % self.config.save_every == 0:
                        self.save()
                self.save()
                if stop.asked and self.step < self.config.steps:
                    raise Interrupted(self.step)
        finally:
            if bar is not None:
                bar.close()
            if log is not None:
                log.close()
        return self.averaged
