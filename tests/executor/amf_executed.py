"""For test_amf_cuda.py: attention motion flow's launchers over the executor, float32 through them, and their results beside the reference's."""

import itertools

import torch

from vidkern.ops.attention_motion_flow import cuda, reference

EVERY = ("mean", "index", "lse", "top", "entropy")
seeds = itertools.count()


def launcher(programs, counted=None):
    """Runs kernels on the executor, every launch under another schedule; ``counted`` takes (name, counts)."""

    def launch(name, given, blocks, threads, shared, reads, writes):
        (stem,) = [stem for stem, prefixes in cuda.SOURCES.items() if name.startswith(prefixes)]
        how = {"blocks": blocks, "threads": threads, "shared": shared, "reads": reads, "writes": writes}
        counts = programs[stem].run(name, given, **how, seed=next(seeds))
        if counted is not None:
            counted.append((name, counts))

    return launch


# float32 as six products of bfloat16 parts side by side: what is left out is 2^-24 of the logits. So the properties of an exact
# implementation hold as they stand.
LEFT, RIGHT = (0, 0, 0, 1, 1, 2), (0, 1, 2, 0, 1, 0)


def parts(t, which):
    first = t.bfloat16()
    second = (t - first.float()).bfloat16()
    third = (t - first.float() - second.float()).bfloat16()
    return torch.cat([(first, second, third)[i] for i in which], -1)


def launchers(programs, counted=None) -> dict:
    launch = launcher(programs, counted)

    def operands(q, k):
        return (parts(q, LEFT), parts(k, RIGHT)) if q.dtype == torch.float32 else (q, k)

    def forward(q, k, *args, **more):
        cuda.forward(*operands(q, k), *args, **more, launch=launch)

    def vote(q, k, *args, **more):
        cuda.vote(*operands(q, k), *args, **more, launch=launch)

    def backward(dmean, dlse, q, k, *args, dq, dk, **more):
        if q.dtype != torch.float32:
            return cuda.backward(dmean, dlse, q, k, *args, **more, dq=dq, dk=dk, launch=launch)
        wide = operands(q, k)
        found = [torch.empty_like(t) for t in wide]
        cuda.backward(dmean, dlse, *wide, *args, **more, dq=found[0], dk=found[1], launch=launch)
        # Blocks whose other factors add up to the whole of it.
        for out, t, blocks in ((dq, found[0], (0, 1, 2)), (dk, found[1], (0, 3, 5))):
            each = t.float().unflatten(-1, (6, -1))
            out.copy_(sum(each[..., b, :] for b in blocks))

    return {"forward": forward, "vote": vote, "backward": backward}


def every_pair(frames):
    return tuple((i, j) for i in range(frames) for j in range(frames))


def operands(groups=1, heads=1, dim=16, grid=(2, 5, 7), *, batch=1, beside=False, dtype=torch.bfloat16):
    """Small whole numbers: products are exact, and many are equal."""
    g = torch.Generator().manual_seed(7)
    size = grid[0] * grid[1] * grid[2]
    shape = (batch, size, groups, heads, dim) if beside else (batch, groups, heads, size, dim)
    draw = [torch.randint(-2, 3, shape, generator=g).to(dtype) for _ in range(2)]
    return [t.permute(0, 2, 3, 1, 4) for t in draw] if beside else draw


def empty(q, pairs, grid, wanted=EVERY, dtype=torch.float32):
    rows = (*q.shape[:2], len(pairs), grid[1] * grid[2])
    new = {n: torch.full(rows + (2,) * (n == "mean"), torch.nan, dtype=dtype) for n in EVERY if n != "index"}
    new["index"] = torch.full(rows, -1, dtype=torch.int32)
    return {n: new[n] if n in wanted else None for n in EVERY}


class Runs:
    """Forward, vote and backward of the kernels, and of the reference in float64."""

    def __init__(self, programs, counted=None):
        self.ours = launchers(programs, counted)

    def forward(self, q, k, grid, pairs, scale, wanted=EVERY):
        got, want = empty(q, pairs, grid, wanted), empty(q, pairs, grid, wanted, torch.float64)
        self.ours["forward"](q, k, pairs, grid=grid, scale=scale, **got)
        reference.forward(q.double(), k.double(), pairs, grid=grid, scale=scale, **want)
        return got, want

    def vote(self, q, k, grid, pairs, scale, lse):
        rows = (q.shape[0], 1, len(pairs), grid[1] * grid[2])
        kinds = (torch.float32, torch.float64)
        given = [{"index": torch.full(rows, -1, dtype=torch.int32), "top": torch.empty(rows, dtype=d)} for d in kinds]
        self.ours["vote"](q, k, lse[0], pairs, grid=grid, scale=scale, **given[0])
        reference.vote(q.double(), k.double(), lse[1], pairs, grid=grid, scale=scale, **given[1])
        return given

    def backward(self, q, k, grid, pairs, scale, *, dmean=True, dlse=True, live=None, times=1.0):
        """``live`` [G, P, S] says which rows have a gradient."""
        kept = empty(q, pairs, grid, ("mean", "lse"), torch.float64)
        reference.forward(q.double(), k.double(), pairs, grid=grid, scale=scale, **kept)
        g = torch.Generator().manual_seed(3)
        grads = [torch.randn(kept[n].shape, generator=g) * times if given else None for n, given in (("mean", dmean), ("lse", dlse))]
        if live is not None:
            grads = [t if t is None else t * (live[..., None] if t.dim() == 5 else live) for t in grads]
        got, want = ([torch.full_like(t, torch.nan) for t in x] for x in ((q, k), (q.double(), k.double())))
        saved = [kept[n].float() for n in ("mean", "lse")]
        self.ours["backward"](*grads, q, k, *saved, pairs, grid=grid, scale=scale, dq=got[0], dk=got[1])
        exact = (q.double(), k.double(), kept["mean"], kept["lse"])
        reference.backward(*grads, *exact, pairs, grid=grid, scale=scale, dq=want[0], dk=want[1])
        return got, want

    def wrong_forward(self, q, k, grid, pairs, scale, live=None) -> float:
        """Largest error of forward and vote, 1 being what sound kernels stay below: 1e-4, or an index."""
        got, want = self.forward(q, k, grid, pairs, scale)
        voted = self.vote(q, k, grid, pairs, scale, (got["lse"], want["lse"]))
        found = [(got[n], want[n]) for n in EVERY if n != "index"] + [(voted[0]["top"], voted[1]["top"])]
        errors = [((a.double() - b).abs().nan_to_num(9) / 1e-4).max() for a, b in found]
        # Equal products are equal logits; of a vote the sums may differ in their last bits, and then the place.
        place = voted[0]["index"].long()
        errors += [9.0 * (got["index"] != want["index"]).any(), 9.0 * ((place < 0) | (place >= grid[1] * grid[2])).any()]
        lean = empty(q, pairs, grid, ("mean", "lse"))
        self.ours["forward"](q, k, pairs, grid=grid, scale=scale, **lean)
        errors.append(9.0 * any(not torch.equal(lean[n], got[n]) for n in ("mean", "lse")))
        return max(float(e) for e in errors)

    def wrong_backward(self, q, k, grid, pairs, scale, live=None) -> float:
        """Largest error of a gradient, 1 being 1e-2 of its norm. Queries without gradient in any pair hold NaN."""
        if live is not None:
            size, none = grid[1] * grid[2], torch.ones(*q.shape[:2], q.shape[3], dtype=torch.bool)
            for p, (i, _) in enumerate(pairs):
                none[:, :, i * size : (i + 1) * size] &= live[:, p] == 0
            q = q.masked_fill(none[:, :, None, :, None], torch.nan)
        made = zip(*self.backward(q, k, grid, pairs, scale, live=live))
        return max(float((a.double() - b).nan_to_num(1e9, 1e9, 1e9).norm() / b.norm() / 1e-2) for a, b in made)

    def wrong(self, *problem) -> float:
        """The larger of both."""
        return max(self.wrong_forward(*problem), self.wrong_backward(*problem))


# ---- what the kernels of every compute capability must do -----------------------------------------------------------------------
def float16_gradients_of_any_size(runs, form, times):
    """float16 has neither the range of a scaled loss nor that of a mean over many patches."""
    q, k = operands(dtype=torch.float16, **form)
    got, want = runs.backward(q, k, (2, 5, 7), every_pair(2), 0.1 / max(1.0, times), times=times)
    if times < 1:  # what the dtype of dq holds of it
        assert all(bool((a != 0).any()) == bool((b.half() != 0).any()) for a, b in zip(got, want))
    else:
        assert all((a.double() - b).norm() < 2e-3 * b.norm() for a, b in zip(got, want))


def the_same_bits_whatever_the_schedule(runs, form):
    given = (*operands(grid=(2, 9, 9), **form), (2, 9, 9), every_pair(2), 0.1)
    found = [(*runs.forward(*given)[0].values(), *runs.backward(*given)[0]) for _ in "ab"]
    assert all(torch.equal(a, b) for a, b in zip(*found))


def offsets_of_64_bits(runs):
    """Tokens 2^28 values apart, of which a few pages exist."""
    grid, pairs = (2, 2, 3), every_pair(2)
    for heads in (1, 2):
        near = operands(heads=heads, dim=16, grid=grid)
        near += [torch.empty_like(t) for t in near]
        room = [torch.empty(12 * 2**28, dtype=torch.bfloat16) for _ in range(2)]
        far = [room[i // 2].as_strided(near[0].shape, (0, 0, 16, 2**28, 1), i % 2 * 64) for i in range(4)]
        for a, b in zip(far, near):
            a.copy_(b)
        found = []
        for q, k, dq, dk in (far, near):
            outs = empty(q, pairs, grid)
            runs.ours["forward"](q, k, pairs, grid=grid, scale=0.1, **outs)
            runs.ours["backward"](outs["mean"], None, q, k, outs["mean"], outs["lse"], pairs, grid=grid, scale=0.1, dq=dq, dk=dk)
            found.append([*outs.values(), dq.clone(), dk.clone()])
        assert all(torch.equal(a, b) for a, b in zip(*found))
