"""Levels of a picture or video: the pyramid of `DFMConfig`, its noise, noisy inputs and velocity targets, and the way back."""

import torch

import vidkern


def enlarged(x, times):
    """x [B, C, (T), H, W] twice as large, `times` times, by the pyramid's bilinear filter."""
    for _ in range(times):
        shape = (*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1])
        x = vidkern.pyramid_merge([x, x.new_zeros(shape)])
    return x


def shrunk(x, times):
    """x half as large, `times` times: means of 2 x 2 blocks."""
    for _ in range(times):
        x = vidkern.pyramid_decompose(x, levels=2)[0]
    return x


def split(x, config):
    """States of the levels, without noise, of x [B, C, H, W] or [B, C, T, H, W]; coarse to fine; not yet standardised.

    With `upsample` all have x's size, and a finer level holds what `join` will not get from the enlarged coarser ones: enlarging and
    shrinking is a slight blur, so that taking the plain pyramid's level would not give x back.
    """
    S = config.levels
    if not config.upsample:
        return vidkern.pyramid_decompose(x, levels=S, kind=config.kind, factor=config.factor)
    states, approximation = [], None
    for s in range(S):
        target = shrunk(x, S - 1 - s)
        below = None if approximation is None else enlarged(approximation, 1)
        states.append(enlarged(target if below is None else target - below, S - 1 - s))
        level = shrunk(states[-1], S - 1 - s)
        approximation = level if below is None else below + level
    return states


def join(states, config):
    """The picture of all levels, or of the first ones at their own size; undoes `split` and the standardisation."""
    if config.upsample:
        states = [shrunk(z, config.levels - 1 - s) for s, z in enumerate(states)]
    std = config.scale and config.scale[: len(states)]
    return vidkern.pyramid_merge(list(states), kind=config.kind, factor=config.factor, std=std)


def shapes(shape, config, levels=None):
    """Shapes of the states of the first `levels` levels for a picture or video of this shape.

    Raises:
        ValueError: a size does not divide by 2^(levels - 1) (`vidkern.pyramid_pad` helps).
    """
    S, pool_time = config.levels, config.factor[0] == 2
    if len(shape) not in (4, 5):
        raise ValueError(f"shape {tuple(shape)}: expected [B, C, H, W] or [B, C, T, H, W]")
    pooled = shape[2:] if pool_time and len(shape) == 5 else shape[-2:]
    if any(n % 2 ** (S - 1) for n in pooled):
        raise ValueError(f"shape {tuple(shape)}: expected sizes that divide by {2 ** (S - 1)} for {S} levels")
    kept = tuple(shape[: len(shape) - len(pooled)])
    return [tuple(shape) if config.upsample else kept + tuple(n >> (S - 1 - s) for n in pooled) for s in range(S)][:levels]


def noise_levels(shape, config, *, seed=0, offset=0, first_sample=0, device=None, impl=None):
    """Independent normal noise, float32, for the states of every level; the same for (seed, offset, sample) on every device."""
    zeros = [torch.zeros(s, device=device) for s in shapes(shape, config)]
    pure = torch.tensor([0.0, 1.0, 0.0, 0.0], device=device).expand(1, config.levels, 4).contiguous()
    return vidkern.pyramid_flow_inputs(zeros, pure, seed=seed, offset=offset, first_sample=first_sample, factor=config.factor, target=False,
                                       impl=impl)


def flow_inputs(x, t, config, *, active=None, layout="levels", **options):
    """(z, v): noisy states and velocity targets of x at the data times t [B, S]; see `vidkern.pyramid_flow_inputs` for the options.

    layout "tokens" is not there with `upsample`: levels of equal size have equal patches.
    """
    table = vidkern.flow_coefficients(t if config.sign > 0 else 1 - t, direction=config.direction)
    source = split(x, config) if config.upsample else x
    if layout == "tokens":
        options["patch"] = config.patch_of(0)
    return vidkern.pyramid_flow_inputs(source, table, levels=config.levels, active=active, std=config.scale, kind=config.kind,
                                       factor=config.factor, layout=layout, **options)


def level_std(x, config):
    """Standard deviation of every level over a set x, for `DFMConfig.std`."""
    return tuple(level.double().std(correction=0).item() for level in split(x, config))
