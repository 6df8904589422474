"""Guidance as a weighted sum of named evaluations of one model, made in one batched forward and summed in fp32."""

import torch


def cfg_weights(scale, positive="cond", negative="null"):
    """Classifier-free guidance (arXiv 2207.12598): negative + scale * (positive - negative), as weights by name."""
    return {positive: float(scale), negative: 1.0 - float(scale)}


def combine(evaluations, weights):
    """Sum of ``weights[name] * evaluations[name]`` in fp32, in the dtype of the evaluations."""
    unknown = sorted(set(weights) - set(evaluations))
    if unknown:
        raise ValueError(f"weights name {unknown}: expected names among {sorted(evaluations)}")
    total = sum(weight * evaluations[name].float() for name, weight in weights.items())
    return total.to(next(iter(evaluations.values())).dtype)


def guided(model, z, sigma, conditions, weights):
    """Evaluate `model(z, sigma, **condition)` for every named condition with a weight other than 0 and combine them.

    conditions: {name: {argument: tensor with a batch axis, or None}}; all share their keys. The evaluations run as one batch; with
    a single one left (scale 1) the model is called as it is and its output returned untouched.
    """
    names = [name for name, weight in weights.items() if weight != 0.0]
    if len(names) == 1 and weights[names[0]] == 1.0:
        return model(z, sigma, **conditions[names[0]])
    batch = {}
    for key in conditions[names[0]]:
        values = [conditions[name][key] for name in names]
        if any(value is None for value in values) != all(value is None for value in values):
            raise ValueError(f"condition {key!r} is None for some of {names}: expected a tensor for all or for none")
        batch[key] = None if values[0] is None else torch.cat(values)
    out = model(torch.cat([z] * len(names)), torch.cat([sigma] * len(names)), **batch)
    return combine(dict(zip(names, out.chunk(len(names)))), {name: weights[name] for name in names})
