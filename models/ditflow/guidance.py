"""Motion guidance for any sampler loop: read the motion of a reference, then pull every early step of another sample towards it.

DiTFlow (arXiv 2412.07776), sections 3.2 and 3.3::

    guide = MotionGuidance(adapter, cogvideox_5b(), add_noise=...)
    guide.extract(reference_latent, condition_of_an_empty_prompt)
    guide.begin(timesteps, noise=z, condition=condition)
    for t in timesteps:
        z = guide.step(z, t)                 # first; later steps pass through untouched
        z = scheduler.step(model(z, t), t, z)
    guide.end()
"""

import dataclasses
import os
import tempfile
from pathlib import Path

import torch

from vidkern._files import replacing

from . import losses
from .config import GuidanceConfig
from .probe import check_frames
from .taps import HIDDEN, KV, QK

OVERFLOW = 16.0      # what the loss scale is divided by when gradients overflow


def writable(path):
    """`path` as a Path, in a folder that exists (it is made) and takes files; ValueError otherwise."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as error:
        raise ValueError(f"rescue={str(path)!r}: cannot be written ({error.strerror or error}), expected a file that can be made") from error


class GuidanceStopped(FloatingPointError):
    """Gradients of a guided step are not finite. Has `.step`, `.latents` (before that step) and `.path`, the file that holds both, or None where it
    could not be written."""

    def __init__(self, message, step, latents, path):
        super().__init__(message)
        self.step, self.latents, self.path = step, latents, path


@dataclasses.dataclass(frozen=True)
class MotionReference:
    """The motion of a clip. latents: clean, [1, ...]. grid: (F, h, w). flows: {block: hard flow [P, S, 2]}; hidden: {block: outputs [1, N, D]}, for
    feature losses; what is not asked for is empty."""

    latents: torch.Tensor
    grid: tuple
    flows: dict
    hidden: dict


class MotionGuidance:
    """Guidance of one transformer by the motion of one reference.

    Args:
        adapter: an `Adapter`.
        config: `GuidanceConfig`.
        add_noise: function (clean latent, noise, t) -> latent at time t; needed when `config.inject` is not empty.
        tables: {t: table} of an earlier run (`load`), injected at the same times without optimisation.
        rescue: file for the latents when gradients are not finite, in a folder that is made if need be; None: one in the system's folder for
            temporary files.

    Attributes: reference; tables, the {t: table} that this run has optimised; history, one dict per guided step with its losses.

    Raises:
        ValueError: blocks that the transformer does not have, or a `rescue` that cannot be written.
    """

    def __init__(self, adapter, config=GuidanceConfig(), *, add_noise=None, tables=None, rescue=None):
        adapter.check_blocks("blocks", config.blocks)
        adapter.check_blocks("inject", config.inject)
        if config.inject and config.share and add_noise is None:
            raise ValueError(f"add_noise=None: expected a function (latent, noise, t) -> latent, for inject={config.inject}")
        self.rescue = None if rescue is None else writable(rescue)
        self.adapter, self.config, self.add_noise, self.given = adapter, config, add_noise, tables
        self.reference, self.tables, self.history, self.timesteps = None, {}, [], ()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()

    # ---- the reference ---------------------------------------------------------------------------------------------------------------------
    def _wanted(self):
        return {block: (QK,) if self.config.signal == "amf" else (HIDDEN,) for block in self.config.blocks}

    @torch.no_grad()
    def extract(self, latents, condition=None, t=0):
        """Read the motion of a clean latent [1, ...] at time t (0: no noise), and remember it. Returns a `MotionReference`.

        Blocks after the last guidance block are not run.

        Raises:
            ValueError: more than one video, or one frame of patches.
        """
        self._one("latents", latents)
        check_frames("latents", latents, self.adapter.grid(latents))
        found = self.adapter.features(latents, t, condition, self._wanted())
        grid, where = self.adapter.grid(latents), self._text(condition)
        flows = {b: losses.flow_of(*pair, self.config, grid, **where) for (b, kind), pair in found.items() if kind == QK}
        hidden = {b: out.detach() for (b, kind), out in found.items() if kind == HIDDEN}
        self.reference = MotionReference(latents.detach(), grid, flows, hidden)
        return self.reference

    def _text(self, condition):
        return {"n_text": self.adapter.n_text(condition), "text_position": self.adapter.text_position}

    @staticmethod
    def _one(name, z):
        if len(z) != 1:
            raise ValueError(f"{name}: shape {tuple(z.shape)}, expected one video, [1, ...]")

    # ---- sampling --------------------------------------------------------------------------------------------------------------------------
    def begin(self, timesteps, *, noise, condition=None, reference=None):
        """Prepare a run. timesteps: all of the sampler's, in order. noise: what sampling starts from; condition: of the target prompt, batch 1.

        reference: a `MotionReference` of another guide; None: the last one that `extract` has read.
        """
        self.timesteps = [float(t) for t in timesteps]
        if len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError("timesteps: the same one twice, expected each once (their number says which steps are guided)")
        self._one("noise", noise)
        self._of_these_blocks(reference)
        self.noise, self.condition = noise.detach(), condition
        self.reference = reference or self.reference
        self.rates = self.config.rates(len(self.timesteps))
        if self.rates and self.reference is None and (self.given is None or self.config.inject):
            raise ValueError("reference: none was extracted, expected extract(latents) first, or tables of an earlier run and inject=()")
        if self.reference is not None and self.adapter.grid(noise) != self.reference.grid:
            raise ValueError(f"noise: {self.adapter.grid(noise)} frames, rows and columns of patches, expected the reference's {self.reference.grid}")
        if self.given is not None and (missing := [t for t in self.timesteps[: len(self.rates)] if t not in self.given]):
            raise ValueError(f"tables: none for t={missing[0]:g}, expected those of a run with the same timesteps")
        self.tables, self.history, self._table, self._channels = {}, [], None, {}
        self._scale = self.config.loss_scale or (65536.0 if self.adapter.dtype == torch.float16 else 1.0)
        self.adapter.disarm()

    def _of_these_blocks(self, reference):
        """Raise ValueError unless `reference`, if there is one, was read from the blocks of this guide and with its signal."""
        config = self.config
        if reference is None or self.given is not None or config.optimise == "none":
            return      # its latents at most are used
        kept = {"flows": tuple(reference.flows), "hidden": tuple(reference.hidden)}
        needed = "flows" if config.signal == "amf" else "hidden"
        if set(config.blocks) - set(kept[needed]):
            has = " and ".join(f"{name} of blocks {blocks}" for name, blocks in kept.items() if blocks) or "neither flows nor hidden"
            raise ValueError(f"reference: has {has}, expected {needed} of blocks {config.blocks}, for signal={config.signal!r}")

    def end(self):
        """Back to the model as it is."""
        self.adapter.disarm()

    def step(self, z, t):
        """z [1, ...] for the model's passes at time t: optimised in a guided step with ``optimise="latent"``, else as it came.

        The model keeps the injected values and the positions of this step until the next call.
        """
        if not self.timesteps:
            raise RuntimeError("step: called before begin(timesteps, noise=..., condition=...)")
        if float(t) not in self.timesteps:
            raise ValueError(f"t={float(t):g}: not among the timesteps given to begin")
        index = self.timesteps.index(float(t))
        self.adapter.disarm()
        if index >= len(self.rates):
            return z
        self._one("z", z)
        values, table = self._values(t), None
        if self.given is not None:
            table = self.given[float(t)].to(z.device)
        elif self.config.optimise != "none":
            z, table = self._optimised(z, t, index, values)
        self.adapter.arm(positions=table, values=values)
        return z

    @torch.no_grad()
    def _values(self, t):
        """Keys and values of the noised reference, of the injected blocks; only the blocks up to the last of them are run."""
        if not self.config.inject:
            return {}
        noised = self.add_noise(self.reference.latents, self.noise, t)
        found = self.adapter.features(noised, t, self.condition, {block: (KV,) for block in self.config.inject})
        return {block: pair for (block, _), pair in found.items()}

    def _optimised(self, z, t, index, values):
        """(z, table or None) after the Adam steps of one guided step."""
        if torch.is_inference_mode_enabled():
            raise RuntimeError("step: called inside torch.inference_mode(), which has no gradients, expected torch.no_grad()")
        latent = self.config.optimise == "latent"
        if latent:
            leaf = z.detach().float().clone()
        else:
            start = self.adapter.positions(z, self.condition) if self._table is None else self._table
            leaf = start.detach().float().clone()
        leaf.requires_grad_()
        optimizer = torch.optim.Adam([leaf], lr=self.rates[index])
        record = {"step": index, "t": float(t), "lr": self.rates[index], "losses": []}
        with torch.enable_grad(), self.adapter.frozen():
            for update in range(self.config.updates):
                loss, leaf.grad = self._gradient(leaf, z, t, index, update, values)
                record["losses"].append(loss)
                optimizer.step()
        self.history.append(record)
        leaf = leaf.detach()
        if latent:
            return leaf.to(z.dtype), None
        self._table = leaf
        self.tables[float(t)] = leaf.cpu().clone()
        return z, leaf

    def _gradient(self, leaf, z, t, index, update, values):
        """(loss, gradient of the leaf). The loss scale is lowered until the gradient is finite; at 1 that is the end."""
        latent = self.config.optimise == "latent"
        while True:
            found = self.adapter.features(leaf if latent else z, t, self.condition, self._wanted(), positions=None if latent else leaf, values=values,
                                          checkpointing=self.config.checkpointing)
            loss = self._loss(found)
            if not loss.requires_grad:
                raise RuntimeError(f"step {index}: the loss does not depend on what is optimised ({self.config.optimise})")
            gradient = torch.autograd.grad(loss * self._scale, leaf)[0] / self._scale
            if torch.isfinite(gradient).all() and torch.isfinite(loss):
                return loss.item(), gradient
            if self._scale == 1.0 or not torch.isfinite(loss):
                self._stop(z, t, index, update, loss.item())
            self._scale = max(1.0, self._scale / OVERFLOW)

    def _loss(self, found):
        """Mean of the losses of the guidance blocks."""
        config, grid, parts = self.config, self.reference.grid, []
        for block in config.blocks:
            if config.signal == "amf":
                parts.append(losses.amf(*found[block, QK], self.reference.flows[block], config, grid, **self._text(self.condition)))
                continue
            made, wanted = found[block, HIDDEN], self.reference.hidden[block]
            if config.signal == "smm":
                parts.append(losses.smm(made, wanted, config, grid))
            else:
                if block not in self._channels:
                    self._channels[block] = losses.motion_channels(wanted, config.channels, grid)
                parts.append(losses.moft(made, wanted, config, grid, self._channels[block]))
        return torch.stack(parts).mean()

    def _stop(self, z, t, index, update, loss):
        path = self.rescue or Path(tempfile.gettempdir()) / f"vidkern-motion-{os.getpid()}.pt"
        try:
            with replacing(path) as fresh:
                torch.save({"step": index, "t": float(t), "latents": z.detach().cpu()}, fresh)
            where = f"are in {path}"
        except (OSError, RuntimeError) as error:      # torch.save raises either
            where, path = f"are this error's .latents ({path} cannot be written: {str(error).splitlines()[0]})", None
        raise GuidanceStopped(f"guided step {index} (t={float(t):g}, update {update}): gradient or loss ({loss:g}) is not finite; the latents before it"
                              f" {where}; lower lr={self.config.lr} or share={self.config.share}", index, z.detach(), path)

    # ---- tables ----------------------------------------------------------------------------------------------------------------------------
    def save(self, path):
        """Write the optimised tables of this run, by timestep, for another prompt without optimisation (`load_tables`)."""
        if not self.tables:
            raise ValueError("tables: none were optimised, expected a run with optimise='positions'")
        with replacing(path) as fresh:
            torch.save({"positional": self.adapter.positional, "tables": self.tables}, fresh)


def load_tables(path, adapter):
    """{t: table} that `MotionGuidance.save` wrote, for its argument `tables`. ValueError for tables of the other kind of positions."""
    saved = torch.load(path, weights_only=True)
    if not isinstance(saved, dict) or "tables" not in saved:
        raise ValueError(f"{path}: expected a file written by MotionGuidance.save")
    if saved["positional"] != adapter.positional:
        raise ValueError(f"{path}: tables of {saved['positional']} positions, expected {adapter.positional} ones for this transformer")
    return saved["tables"]
