"""Launchers of the CUDA kernels of Pyramidal Flow's stages."""

from __future__ import annotations

from ..launch import unit_stride
from . import cuda_structures as c
from . import levels

_MOST_THREADS = 2**32 - c.THREADS


def _runs(shape, fine_width: int, rows: int) -> tuple[c.Runs, int]:
    """A thread for eight fine columns of ``rows`` rows, and the blocks of them."""
    batch, channels, frames = shape[:3]
    runs = c.Runs(channels, frames, rows, -(-fine_width // c.RUN), batch)
    threads = batch * channels * frames * rows * runs.runs
    if threads > _MOST_THREADS:
        raise RuntimeError(f"x: {tuple(shape)} takes {threads} threads, expected at most {_MOST_THREADS}")
    return runs, -(-threads // c.THREADS)


def stage_inputs(outputs, x, noise, table, sizes, stage, seed, offset, first_sample, dtype, impl, *, launch):
    """Launcher of pyramid_stage_inputs."""
    z, v = outputs
    top = levels.level_count(sizes) - 1
    x, noise = unit_stride(x), unit_stride(noise)
    rows, kept = c.table_of(table)
    height, width = z.shape[3:]
    runs, blocks = _runs(z.shape, x.shape[4], -(-height // 2))
    parameters = c.Stage(
        c.volume(x), c.volume(noise), c.volume(z), c.volume(v), rows, c.random_of(seed, offset, first_sample), runs, height, width, top,
        stage == 0, noise is not None,
    )  # fmt: skip
    reads = [x, *kept, *([] if noise is None else [noise])]
    launch(f"pyramid_stage_inputs_{1 << (top - stage)}", parameters, blocks, c.THREADS, 0, reads, [z, v])


def stage_inputs_backward(outputs, dz, dv, table, x_dtype, sizes, stage, impl, *, launch):
    """Launcher of its backward."""
    out = outputs[0]
    top = levels.level_count(sizes) - 1
    dz, dv = unit_stride(dz), unit_stride(dv)
    rows, kept = c.table_of(table)
    like = dz if dz is not None else dv
    height, width = like.shape[3:]
    runs, blocks = _runs(out.shape, out.shape[4], -(-height // 2))
    parameters = c.StageAdjoint(
        c.volume(out), c.volume(dz), c.volume(dv), rows, runs, height, width, stage == 0, dz is not None, dv is not None
    )  # fmt: skip
    reads = [*kept, *(g for g in (dz, dv) if g is not None)]
    launch(f"pyramid_stage_adjoint_{1 << (top - stage)}", parameters, blocks, c.THREADS, 0, reads, [out])


def stage_transition(outputs, z, noise, table, sizes, level, seed, offset, first_sample, impl, *, launch):
    """Launcher of pyramid_stage_transition."""
    out = outputs[0]
    z, noise = unit_stride(z), unit_stride(noise)
    rows, kept = c.table_of(table)
    runs, blocks = _runs(out.shape, out.shape[4], z.shape[3])
    parameters = c.Transition(
        c.volume(z), c.volume(noise), c.volume(out), rows, c.random_of(seed, offset, first_sample), runs, *z.shape[3:], level,
        noise is not None,
    )  # fmt: skip
    reads = [z, *kept, *([] if noise is None else [noise])]
    launch("pyramid_stage_transition", parameters, blocks, c.THREADS, 0, reads, [out])


def stage_transition_backward(outputs, grad, table, sizes, impl, *, launch):
    """Launcher of its backward."""
    out, grad = outputs[0], unit_stride(grad)
    rows, kept = c.table_of(table)
    runs, blocks = _runs(out.shape, grad.shape[4], out.shape[3])
    parameters = c.TransitionAdjoint(c.volume(out), c.volume(grad), rows, runs, out.shape[4])
    launch("pyramid_stage_transition_adjoint", parameters, blocks, c.THREADS, 0, [grad, *kept], [out])
