"""Pyramid ops on DTensors: samples are independent, so every rank works on its own part of the batch, with its own noise of the whole.

A sharding rule of the dispatcher cannot say this: levels share one piece of memory, which is no shard of the whole batch's, and the noise
depends on where in the batch a shard begins.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys

import torch

PER_LEVEL = ("dt", "guidance")  # arguments that may be one number per level, [S]


def by_batch(function):
    """Let ``function``, whose first argument (a tensor, or a list of them) has the batch first, take DTensors.

    Sharded along the batch they stay so, and so does what comes back: nothing is sent. Shards of other axes, and of a batch that the mesh
    does not divide, are gathered first. Plain tensors beside them are the whole batch's, the same on every rank. Of a mean over samples
    every rank holds its share (``Partial``). ``first_sample`` counts from the first sample of the whole batch.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(first, *args, **kwargs):
        module = sys.modules.get("torch.distributed.tensor")
        if module is None or not _is_sharded(first, module):
            return function(first, *args, **kwargs)
        given = signature.bind(first, *args, **kwargs)
        if given.arguments.get("out") is not None:
            raise ValueError("out: given with DTensors, expected None")
        return _on_shards(function, given, module)

    return call


def _is_sharded(first, module) -> bool:
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return isinstance(first, module.DTensor)


def _on_shards(function, given, module):
    arguments = given.arguments
    first = next(iter(arguments.values()))
    like = first[0] if isinstance(first, (list, tuple)) else first
    mesh, batch = like.device_mesh, like.shape[0]
    split = [i for i, p in enumerate(like.placements) if p.is_shard(0)]
    parts = math.prod(mesh.size(i) for i in split)
    if batch % parts:
        split, parts = [], 1
    placements = [module.Shard(0) if i in split else module.Replicate() for i in range(mesh.ndim)]
    everywhere = [module.Replicate()] * mesh.ndim
    index = 0
    for i in split:
        index = index * mesh.size(i) + mesh.get_local_rank(i)
    own = batch // parts
    begin = index * own

    def local(name, value):
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            return [local(name, v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        per_sample = value.dim() > (1 if name in PER_LEVEL else 0) and value.shape[0] == batch
        if isinstance(value, module.DTensor):
            return value.redistribute(mesh, placements if per_sample else everywhere).to_local()
        return value[begin : begin + own] if per_sample else value

    def whole(value):
        if isinstance(value, (list, tuple)):
            return type(value)(whole(v) for v in value)
        if not isinstance(value, torch.Tensor):
            return value
        if value.dim():
            return module.DTensor.from_local(value, mesh, placements, run_check=False)
        shares = [module.Partial() if i in split else module.Replicate() for i in range(mesh.ndim)]
        return module.DTensor.from_local(value / parts, mesh, shares, run_check=False)

    for name, value in arguments.items():
        arguments[name] = local(name, value)
    if "first_sample" in inspect.signature(function).parameters:
        arguments["first_sample"] = arguments.get("first_sample", 0) + begin
    if isinstance(arguments.get("shape"), (list, tuple, torch.Size)):
        arguments["shape"] = (own, *arguments["shape"][1:])
    return whole(function(*given.args, **given.kwargs))
