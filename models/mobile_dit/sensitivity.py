"""How much every unit matters to a trained model, by distillation: how far the velocity moves from the unpruned model's when the unit goes.

The distance D = mean |v_pruned - v_unpruned|^2 has gradient zero at the unpruned model, whatever the masks: there teacher and student are the
same. A score |dD/dm| is therefore 0 for every unit and says nothing. What is used instead: D itself with the unit removed ("exact"); the square of
a finite difference of the velocity in the unit's mask, its second-order form ("difference"); or the squared gradient of the flow matching loss in
the mask, which is not zero ("fisher").
"""

import dataclasses

import torch

from ..shared.flow import RectifiedFlow
from .keep import LEVELS, MASK_OF, Keep, Unit, counts, masks_of, set_unit, unit_masks

HOW = ("auto", "exact", "difference", "fisher", "magnitude", "random")
FLOW = RectifiedFlow()


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Fixed batches on which distances are taken: z, sigma, target (velocity of the data), text; each with the samples on the first axis."""

    z: torch.Tensor
    sigma: torch.Tensor
    target: torch.Tensor
    text: torch.Tensor
    batch: int = 64

    @classmethod
    def of(cls, x0, text, *, times=8, seed=0, batch=64):
        """Every latent x0 [n, C, T, H, W] with its text [n, S, D] at `times` noise times, the middles of equal parts of (0, 1).

        64 latents at paper scale. The noise follows from the seed.
        """
        if times < 1 or not len(x0) or len(text) != len(x0):
            raise ValueError(f"x0: {len(x0)} latents, {len(text)} texts, times={times}; expected a text for every latent, and at least one time")
        generator = torch.Generator().manual_seed(seed)
        x0, text = x0.repeat_interleave(times, 0), text.repeat_interleave(times, 0)
        sigma = ((torch.arange(times) + 0.5) / times).repeat(len(x0) // times).to(x0)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        return cls(FLOW.interpolate(x0, noise, sigma), sigma, FLOW.velocity(x0, noise), text, batch)

    def __len__(self):
        return len(self.z)

    def parts(self):
        """(slice, z, sigma, text) in batches."""
        for start in range(0, len(self), self.batch):
            part = slice(start, start + self.batch)
            yield part, self.z[part], self.sigma[part], self.text[part]

    @torch.no_grad()
    def velocities(self, model, masks=None):
        """The model's velocities of all samples."""
        return torch.cat([model(z, sigma, text, masks=masks) for _, z, sigma, text in self.parts()])


@torch.no_grad()
def distance(student, teacher, calibration, *, masks=None):
    """The distillation distance: mean |v_student - v_teacher|^2. teacher: a model or its velocities. masks: of the student."""
    wanted = teacher if isinstance(teacher, torch.Tensor) else calibration.velocities(teacher)
    total = sum((student(z, sigma, text, masks=masks) - wanted[part]).double().square().sum() for part, z, sigma, text in calibration.parts())
    return float(total / wanted.numel())


def scores(model, calibration=None, *, keep=None, how="auto", wanted=None, epsilon=0.1, seed=0, progress=False):
    """{Unit: score} of all units that `keep` has (default: all); the least one matters least. Scores are sums over a unit, not per parameter.

    how: "exact", "difference", "fisher"; "auto": blocks exactly, all else by "fisher"; and to compare with, "magnitude" (sum of squared weights)
    and "random" (proportional to the unit's parameters). keep: what earlier rounds left; scores are then those of the model that is left.
    wanted: the unpruned model's velocities on the calibration, if known. epsilon: step of the finite difference. Fisher scores, of another
    quantity, are scaled so that those of whole blocks have the sum of the blocks' exact ones.
    """
    if how not in HOW:
        raise ValueError(f"how={how!r}: expected one of {HOW}")
    config = model.config
    if config.packed:
        raise ValueError("model: packed, expected one with plain layers (see `unpack`)")
    keep = (keep or Keep.everything(config)).checked(config, allow_no_heads=True)
    kept = [Unit("block", b) for b in keep.blocks]
    kept += [Unit(level, b, i) for b in keep.blocks for level in LEVELS[1:] for i in getattr(keep, level)[b]]
    if how in ("magnitude", "random"):
        return magnitudes(model, kept, keep) if how == "magnitude" else random_scores(model, kept, keep, seed)
    if calibration is None:
        raise ValueError(f"calibration: None, expected a Calibration for how={how!r}")
    training = model.training
    model.eval()
    try:
        wanted = calibration.velocities(model) if wanted is None else wanted
        masks = masks_of(keep, config, calibration.z.device)
        if how == "exact":
            return _exact(model, calibration, masks, kept, wanted, progress)
        if how == "difference":
            return _difference(model, calibration, masks, kept, epsilon, progress)
        blocks = [u for u in kept if u.level == "block"]
        exact, proxy = _exact(model, calibration, masks, blocks, wanted, progress), _fisher(model, calibration, masks, kept)
        scale = sum(max(exact[u], 0.0) for u in blocks) / max(sum(proxy[u] for u in blocks), 1e-30)
        found = {u: scale * value for u, value in proxy.items()}
        return {**found, **exact} if how == "auto" else found
    finally:
        model.train(training)


def _bar(kept, progress):
    if not progress:
        return kept
    from vidkern.errors import import_extra

    return import_extra("tqdm", "a progress bar").tqdm(kept, desc="sensitivity", unit="unit", leave=False)


def _exact(model, calibration, masks, kept, wanted, progress):
    """By how much D grows when the unit goes."""
    now = distance(model, wanted, calibration, masks=masks)
    return {u: distance(model, wanted, calibration, masks=set_unit(masks, u, 0.0)) - now for u in _bar(kept, progress)}


def _difference(model, calibration, masks, kept, epsilon, progress):
    """mean |(v - v with the mask at 1 - epsilon) / epsilon|^2: what D would be if the velocity were linear in the mask."""
    here = calibration.velocities(model, masks)
    return {u: distance(model, here, calibration, masks=set_unit(masks, u, 1.0 - epsilon)) / epsilon**2 for u in _bar(kept, progress)}


def _fisher(model, calibration, masks, kept):
    """Mean over samples of the squared gradient of the sample's flow matching loss in the unit's mask."""
    config = model.config
    total = {}
    frozen = [p for p in model.parameters() if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        for part, z, sigma, text in calibration.parts():
            each = unit_masks(config, batch=len(z), device=z.device)
            leaves = []
            for found, start in zip(each, masks):
                for name in found:
                    found[name] = start[name].expand(found[name].shape).clone().requires_grad_(True)
                    leaves.append(found[name])
            with torch.enable_grad():
                loss = (model(z, sigma, text, masks=each) - calibration.target[part]).square().flatten(1).mean(1).sum()
            grads = iter(torch.autograd.grad(loss, leaves, allow_unused=True))
            for b, found in enumerate(each):
                for name in found:
                    grad = next(grads)
                    if grad is not None:
                        total[b, name] = total.get((b, name), 0.0) + grad.double().square().sum(0)
    finally:
        for p in frozen:
            p.requires_grad_(True)
    found = {}
    for u in kept:
        value = total.get((u.block, MASK_OF[u.level]), torch.zeros(()))
        found[u] = float(value if u.level == "block" or not value.ndim else value[u.index]) / len(calibration)
    return found


@torch.no_grad()
def _weights(model, unit):
    """The weights of a head or group: (rows of what makes it, columns of what uses it)."""
    config, block = model.config, model.blocks[unit.block]
    if unit.level == "ffn":
        rows = slice(unit.index * config.group, (unit.index + 1) * config.group)
        return [block.ffn.up.weight[rows], block.ffn.down.weight[:, rows]]
    attention = block.attention if unit.level == "heads" else block.cross
    D = config.head_dim
    found = [attention.out.weight[:, unit.index * D : (unit.index + 1) * D]]
    for projection in (attention.qkv,) if unit.level == "heads" else (attention.q, attention.kv):
        found.append(projection.weight.unflatten(0, (-1, attention.heads, D))[:, unit.index])
    return found


@torch.no_grad()
def magnitudes(model, kept, keep):
    """Sum of squared weights of every unit; of a block: of the units that it still has."""
    found = {u: float(sum(w.double().square().sum() for w in _weights(model, u))) for u in kept if u.level != "block"}
    blocks = {Unit("block", b): sum(value for u, value in found.items() if u.block == b) for b in keep.blocks}
    return {u: blocks[u] if u.level == "block" else found[u] for u in kept}


def random_scores(model, kept, keep, seed):
    """Random scores per parameter, the same for a unit in every round: random order of removal."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    every = [Unit("block", b) for b in range(len(config.blocks))]
    every += [Unit(level, b, i) for b, spec in enumerate(config.blocks) for level, n in counts(spec, config.group).items() for i in range(n)]
    drawn = dict(zip(every, torch.rand(len(every), generator=generator).tolist()))
    sizes = {u: float(sum(w.numel() for w in _weights(model, u))) for u in kept if u.level != "block"}
    blocks = {b: sum(size for u, size in sizes.items() if u.block == b) for b in keep.blocks}
    return {u: drawn[u] * (blocks[u.block] if u.level == "block" else sizes[u]) for u in kept}
