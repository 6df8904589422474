"""Launchers of the hand-written CUDA kernels of the pyramid ops (csrc/cuda/pyramid*.cu): for each op a function, and one for its backward,
with the op's own arguments and ``launch(kernel, parameters, blocks, threads, shared, reads, writes)``, which runs a kernel by name.

Laplacian and Haar pyramids of any number of levels take one launch; the adjoint of merging more than two levels takes one for each, and
block-DCT pyramids one for each filter.
"""

from __future__ import annotations

import torch

from ..launch import unit_stride
from . import cuda_structures as c
from . import levels
from .cuda_filters import put_together, put_together_adjoint, taken_apart, taken_apart_adjoint
from .cuda_stage import stage_inputs, stage_inputs_backward, stage_transition, stage_transition_backward

__all__ = [
    "SOURCES", "decompose", "decompose_backward", "flow_inputs", "flow_inputs_backward", "flow_loss", "flow_loss_backward", "flow_step",
    "flow_step_backward", "merge", "merge_backward", "stage_inputs", "stage_inputs_backward", "stage_transition",
    "stage_transition_backward", "why_not",
]  # fmt: skip

# Source below csrc/cuda -> what the names of its kernels begin with.
SOURCES = {f"pyramid_{stem}": (f"pyramid_{stem}_",) for stem in ("levels", "merge", "filter", "flow", "stage")}
LOSS_TURNS = 8  # as in pyramid_flow.cu


def why_not(*args) -> str | None:
    """Why the kernels cannot serve these arguments of an op (tensors, lists of them, and dtypes asked for), or None."""
    for arg in args:
        for part in arg if isinstance(arg, (list, tuple)) else (arg,):
            dtype = part.dtype if isinstance(part, torch.Tensor) and part.is_floating_point() else part
            if isinstance(dtype, torch.dtype) and dtype not in c.TYPES:
                return f"dtype is {dtype}, it serves {', '.join(str(d) for d in (torch.float16, torch.bfloat16, torch.float32))}"
    return None


# ---- decompose, and the inputs made from it -----------------------------------------------------------------------------------
def _analyse(outputs, x, noise, table, mask, sizes, kind, pool_time, scale, active, written, patch, random, given, launch) -> None:
    """Levels of x (or, ``given``, x itself) into outputs[0], or with a table the mixtures into both."""
    number = levels.level_count(sizes)
    z, v = outputs[0], outputs[1] if len(outputs) > 1 and outputs[1].numel() else None
    if not given and number == 1:
        given = True
    elif not given and kind == "dct":
        x, given = taken_apart(unit_stride(x[0]), sizes, pool_time, launch), True
    z_role, _ = c.laid_out(z, sizes, written, patch, pool_time)
    v_role = c.Role() if v is None else c.laid_out(v, sizes, written, patch, pool_time)[0]
    eps_role, eps = c.listed(noise)
    rows, kept_table = c.table_of(table)
    alive, kept_mask = c.alive_of(mask, active)
    mixing = c.Mixing(
        z_role, v_role, eps_role, rows, alive, random, c.filled(c.FLOAT, scale[:written]), table is not None, v is not None, bool(noise)
    )
    reads, writes = [*eps, *kept_table, *kept_mask], [z] if v is None else [z, v]
    if given:
        shape, (source, x) = c.shape_of(sizes, pool_time, patch, written), c.listed(x[:written])
        runs = c.blocks(shape, tokens=bool(patch))
        parameters = c.Mix(source, mixing, shape, runs)
        launch("pyramid_flow_mix", parameters, runs.per_sample * sizes[0], c.THREADS, 0, [*x, *reads], writes)
        return
    x = unit_stride(x[0])
    shapes = levels.shapes(sizes)
    tiles = c.tiling([s[2:] for s in shapes[: max(written - 1, 1)]], sizes[1], pool_time)
    parameters = c.Analysis(c.volume(x), mixing, c.shape_of(sizes, pool_time, patch), tiles, kind == "laplacian", written > 1)
    frames, most = (3 if pool_time else 1), 0
    for g in range(tiles.groups):
        r, w = tiles.rows[g], tiles.columns[g]
        coarse = frames * (r + 2) * (w + 8)
        # Means of means are made from what is kept, so that its margin is there too.
        deep = g < number - 2
        fine = 4 * coarse * (2 if pool_time else 1) if deep else 4 * r * w * (2 if pool_time else 1)
        most = max(most, 4 * (coarse + fine))
    name = f"pyramid_levels_apart{'_time' if pool_time else ''}"
    launch(name, parameters, tiles.per_sample * sizes[0], c.THREADS, most, [x, *reads], writes)


def _analyse_adjoint(out, dz, dv, table, mask, sizes, kind, pool_time, scale, active, written, patch, given, launch) -> None:
    """Gradients of what ``_analyse`` wrote into that of the volume, or (``given``) of the levels in one flat tensor."""
    number = levels.level_count(sizes)
    # What was not written has no gradient; a token matrix has no columns for it.
    active = min(active, written)
    (z_role, dz_kept), (v_role, dv_kept) = (
        (c.Role(), []) if t is None else c.laid_out(t, sizes, written, patch, pool_time) for t in (dz, dv)
    )
    rows, kept_table = c.table_of(table)
    alive, kept_mask = c.alive_of(mask, active)
    unmixing = c.Unmixing(
        z_role, v_role, rows, alive, c.filled(c.FLOAT, scale), dz is not None, dv is not None, table is not None
    )  # fmt: skip
    shape, reads = c.shape_of(sizes, pool_time, patch), [*dz_kept, *dv_kept, *kept_table, *kept_mask]
    if given or number == 1 or kind == "dct":
        direct = given or number == 1
        target = out.view(-1) if direct else out.new_empty(levels.numel(sizes), dtype=torch.float32)
        role, parts = c.laid_out(target, sizes, number, [], pool_time)
        runs = c.blocks(shape, tokens=bool(patch))
        launch(
            "pyramid_flow_mix_adjoint", c.MixAdjoint(role, unmixing, shape, runs), runs.per_sample * sizes[0], c.THREADS, 0, reads, [target]
        )
        if not direct:
            taken_apart_adjoint(out, parts, pool_time, launch)
        return
    tiles = c.tiling([levels.shapes(sizes)[-2][2:]], sizes[1], pool_time)
    r, w = tiles.rows[0], tiles.columns[0]
    gradient = 4 * (4 if pool_time else 1) * (2 * r + 2) * (2 * w + 16)
    sums = 4 * (r + 1) * (w + 8)
    role = c.listed([out])[0]
    role.at[number - 1], role.batch[number - 1], role.type[number - 1] = role.at[0], role.batch[0], role.type[0]
    parameters = c.AnalysisAdjoint(role, unmixing, shape, tiles, kind == "laplacian", gradient, sums)
    name = f"pyramid_levels_apart_adjoint{'_time' if pool_time else ''}"
    launch(name, parameters, tiles.per_sample * sizes[0], c.THREADS, gradient + 2 * sums, reads, [out])


def decompose(outputs, x, sizes, kind, pool_time, scale, impl, *, launch):
    """Launcher of pyramid_decompose."""
    n = levels.level_count(sizes)
    _analyse(outputs, [x], [], None, None, sizes, kind, pool_time, scale, n, n, [], c.Random(), False, launch)


def decompose_backward(outputs, grad, sizes, kind, pool_time, scale, impl, *, launch):
    """Launcher of its backward."""
    n = levels.level_count(sizes)
    _analyse_adjoint(outputs[0], grad, None, None, None, sizes, kind, pool_time, scale, n, n, [], False, launch)


def flow_inputs(
    outputs, x, table, mask, noise, sizes, given, active, kind, pool_time, scale, seed, offset, first_sample, dtype, patch, zero,
    target, impl, *, launch,
):  # fmt: skip
    """Launcher of pyramid_flow_inputs."""
    written = levels.level_count(sizes) if zero else active
    random = c.random_of(seed, offset, first_sample)
    _analyse(outputs, x, noise, table, mask, sizes, kind, pool_time, scale, active, written, patch, random, given, launch)


def flow_inputs_backward(
    outputs, dz, dv, table, mask, x_dtype, sizes, given, active, kind, pool_time, scale, patch, zero, impl, *, launch
):  # fmt: skip
    """Launcher of its backward."""
    written = levels.level_count(sizes) if zero else active
    dz, dv = (None if t is None or t.numel() == 0 else t for t in (dz, dv))
    _analyse_adjoint(outputs[0], dz, dv, table, mask, sizes, kind, pool_time, scale, active, written, patch, given, launch)


# ---- merge, and the step before it --------------------------------------------------------------------------------------------
def _stepping(z, cond, uncond, table, scale) -> tuple[c.Stepping, list[torch.Tensor]]:
    roles = [c.listed(t) for t in (z, cond, uncond)]
    rows, kept = c.table_of(table if cond else None)
    for _, tensors in roles:
        kept = [*kept, *tensors]
    return c.Stepping(*(role for role, _ in roles), rows, c.filled(c.FLOAT, scale), bool(cond), bool(uncond)), kept


def _synthesise(out, z, cond, uncond, table, sizes, kind, pool_time, scale, launch) -> None:
    """Levels (after a step along ``cond``) into a volume of any strides."""
    n = levels.level_count(sizes)
    shape = c.shape_of(sizes, pool_time)
    stepping, reads = _stepping(z, cond, uncond, table, scale)
    if kind == "dct" and n > 1:
        # The step and the scales first, in float32; then from level to level.
        state = out.new_empty(levels.numel(sizes), dtype=torch.float32)
        role, parts = c.laid_out(state, sizes, n, [], pool_time)
        runs = c.blocks(shape)
        parameters = c.Step(role, c.Role(), stepping, shape, runs, n, 0, n, 0)
        launch("pyramid_flow_step", parameters, runs.per_sample * sizes[0], c.THREADS, 0, reads, [state])
        put_together(out, parts, pool_time, launch)
        return
    tiles = c.tiling([_before(sizes, n - 1, pool_time)], sizes[1], pool_time)
    r, w = tiles.rows[0], tiles.columns[0]
    window = 4 * (3 if pool_time else 1) * (r + 2) * (w + 16)
    parameters = c.Synthesis(c.volume(out), stepping, shape, tiles, kind == "laplacian", window)
    name = f"pyramid_merge_levels{'_time' if pool_time else ''}"
    launch(name, parameters, tiles.per_sample * sizes[0], c.THREADS, 2 * window, reads, [out])


def _before(sizes, s, pool_time) -> tuple[int, int, int]:
    """Frames, rows and columns of the level before level s, or what they would be."""
    t, h, w = levels.shapes(sizes)[s][2:]
    return -(-t // 2) if pool_time else t, -(-h // 2), -(-w // 2)


def _spreading(outputs, sizes, counts, table, guided) -> c.Spreading:
    """Gradients in flat tensors: of so many levels of the state, and of the two velocities."""
    present = [True, table is not None, table is not None and guided]
    roles = [c.laid_out(t, sizes, n, [], False)[0] if p else c.Role() for t, n, p in zip(outputs, counts, present)]
    return c.Spreading(*roles, *[c.Role()] * (3 - len(roles)), c.table_of(table)[0], table is not None, guided)


def _synthesise_adjoint(outputs, grad, table, sizes, kind, pool_time, scale, guided, launch) -> None:
    """Gradient of the volume into those of the levels and, with a table, of the velocities; outputs are flat."""
    n, shape = levels.level_count(sizes), c.shape_of(sizes, pool_time)
    grad, table = unit_stride(grad), None if table is None else unit_stride(table)
    writes = [t for t in outputs if t.numel()]
    spreading, reads = _spreading(outputs, sizes, [n] * 3, table, guided), [] if table is None else [table]
    if kind == "dct" and n > 1:
        parts = put_together_adjoint(grad, sizes, pool_time, launch)
        # The scales: gradients of a state of levels that are dense.
        state, parts = c.listed(parts)
        runs = c.blocks(shape)
        parameters = c.StepAdjoint(state, c.Role(), spreading, shape, runs, c.filled(c.FLOAT, scale), n, 0, True, False)
        launch("pyramid_flow_step_adjoint", parameters, runs.per_sample * sizes[0], c.THREADS, 0, [*parts, *reads], writes)
        return
    for s in range(n - 1, -1, -1) if n == 1 else range(n - 1, 0, -1):
        rest = grad.new_empty(levels.shapes(sizes)[s - 1], dtype=torch.float32) if s > 1 else None
        role = c.Role()
        if rest is not None:
            role.at[s - 1], role.batch[s - 1] = rest.data_ptr(), rest.stride(0)
        tiles = c.tiling([_before(sizes, s, pool_time)], sizes[1], pool_time)
        shared = 4 * (4 if pool_time else 1) * (2 * tiles.rows[0] + 2) * (2 * tiles.columns[0] + 16)
        parameters = c.SynthesisAdjoint(
            c.volume(grad), role, spreading, shape, tiles, c.filled(c.FLOAT, scale), s, kind == "laplacian"
        )
        name = f"pyramid_merge_adjoint{'_time' if pool_time else ''}"
        more = [] if rest is None else [rest]
        launch(name, parameters, tiles.per_sample * sizes[0], c.THREADS, shared, [grad, *reads], [*writes, *more])
        grad = rest


def merge(outputs, parts, sizes, kind, pool_time, scale, impl, *, launch):
    """Launcher of pyramid_merge."""
    _synthesise(outputs[0], parts, [], [], None, sizes, kind, pool_time, scale, launch)


def merge_backward(outputs, grad, sizes, kind, pool_time, scale, impl, *, launch):
    """Launcher of its backward."""
    _synthesise_adjoint(outputs, grad, None, sizes, kind, pool_time, scale, False, launch)


def flow_step(
    outputs, z, cond, uncond, table, sizes, active, upcoming, kind, pool_time, scale, dtype, patch, zero, merge, impl, *, launch
):  # fmt: skip
    """Launcher of pyramid_flow_step."""
    if merge:
        _synthesise(outputs[0], z, cond, uncond, table, sizes, kind, pool_time, scale, launch)
        return
    state, model_input = outputs
    n_given = (levels.level_count(sizes) if zero else upcoming) if model_input.numel() else 0
    n = max(active, upcoming, n_given)
    stepping, reads = _stepping(z[:n], cond, uncond, table, [1.0] * n)
    kept = c.laid_out(state, sizes, active, [], pool_time)[0]
    given = c.laid_out(model_input, sizes, n_given, patch, pool_time)[0] if n_given else c.Role()
    shape = c.shape_of(sizes, pool_time, patch, n)
    runs = c.blocks(shape, tokens=bool(patch) and n_given > 0)
    parameters = c.Step(kept, given, stepping, shape, runs, active, upcoming, active, n_given)
    writes = [state, model_input] if n_given else [state]
    launch("pyramid_flow_step", parameters, runs.per_sample * sizes[0], c.THREADS, 0, reads, writes)


def flow_step_backward(
    outputs, dstate, dinput, table, sizes, active, upcoming, guided, kind, pool_time, scale, z_dtype, v_dtype, patch, zero, merge, impl,
    *, launch,
):  # fmt: skip
    """Launcher of its backward."""
    if merge:
        _synthesise_adjoint(outputs, dstate, table, sizes, kind, pool_time, scale, guided, launch)
        return
    dinput = None if dinput is None or dinput.numel() == 0 else dinput
    n = max(active, upcoming)
    state, kept = (c.Role(), []) if dstate is None else c.laid_out(dstate, sizes, active, [], pool_time)
    n_given = levels.level_count(sizes) if zero else upcoming
    given, more = (c.Role(), []) if dinput is None else c.laid_out(dinput, sizes, n_given, patch, pool_time)
    table = unit_stride(table)
    shape = c.shape_of(sizes, pool_time, patch, n)
    runs = c.blocks(shape, tokens=bool(patch) and dinput is not None)
    parameters = c.StepAdjoint(
        state, given, _spreading(outputs, sizes, [n, active, active], table, guided), shape, runs, c.filled(c.FLOAT, [1.0] * n), active,
        upcoming, dstate is not None, dinput is not None,
    )  # fmt: skip
    writes = [t for t in outputs if t.numel()]
    launch("pyramid_flow_step_adjoint", parameters, runs.per_sample * sizes[0], c.THREADS, 0, [*kept, *more, table], writes)


# ---- loss -----------------------------------------------------------------------------------------------------------------------
def _sides(pred, target, sizes, patch, pool_time):
    if patch:
        return [c.laid_out(t[0], sizes, None, patch, pool_time) for t in (pred, target)]
    return [c.listed(t) for t in (pred, target)]


def flow_loss(outputs, pred, target, mask, sizes, active, patch, pool_time, impl, *, launch):
    """Launcher of pyramid_flow_loss."""
    loss, means = outputs
    shape, batch = c.shape_of(sizes, pool_time, patch), sizes[0]
    (p, p_kept), (t, t_kept) = _sides(pred, target, sizes, patch, pool_time)
    alive, kept_mask = c.alive_of(mask, active)
    runs = c.blocks(shape, LOSS_TURNS, bool(patch))
    ends = [*runs.first[1 : shape.levels], runs.per_sample]
    counts = [b - a for a, b in zip(runs.first, ends)]
    sums = loss.new_empty(max(counts) * batch * shape.levels)
    parameters = c.Loss(p, t, alive, shape, runs, sums.data_ptr(), batch)
    launch("pyramid_flow_loss", parameters, runs.per_sample * batch, c.THREADS, 16, [*p_kept, *t_kept, *kept_mask], [sums])
    parameters = c.LossSum(
        sums.data_ptr(), loss.data_ptr(), means.data_ptr(),
        c.filled(c.DOUBLE, [1 / n for n in shape.count[: shape.levels]]), 1 / batch, c.filled(c.I32, counts), batch, shape.levels,
    )  # fmt: skip
    launch("pyramid_flow_loss_sum", parameters, 1, c.THREADS, 32, [sums], [loss, means])


def flow_loss_backward(outputs, dloss, dmeans, pred, target, mask, sizes, active, patch, pool_time, impl, *, launch):
    """Launcher of its backward."""
    shape, batch = c.shape_of(sizes, pool_time, patch), sizes[0]
    (p, p_kept), (t, t_kept) = _sides(pred, target, sizes, patch, pool_time)
    d, _ = c.laid_out(outputs[0], sizes, None, patch, pool_time)
    alive, kept_mask = c.alive_of(mask, active)
    # Of the loss and the means, whose dtype is float32.
    grads = [None if g is None else g.contiguous() for g in (dloss, dmeans)]
    runs = c.blocks(shape, tokens=bool(patch))
    pointers = [None if g is None else g.data_ptr() for g in grads]
    parameters = c.LossAdjoint(p, t, d, alive, shape, runs, *pointers, batch)
    reads = [*p_kept, *t_kept, *kept_mask, *(g for g in grads if g is not None)]
    launch("pyramid_flow_loss_adjoint", parameters, runs.per_sample * batch, c.THREADS, 0, reads, [outputs[0]])
