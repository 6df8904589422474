"""What merging costs, and the named sample inputs that tests and benches share."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def forward_flops(parts: int, batch: int, heads: int, length: int, dim: int) -> int:
    """One multiply-add per part and output element."""
    return 2 * parts * batch * heads * length * dim


def backward_flops(parts: int, batch: int, heads: int, length: int, dim: int) -> int:
    """One multiply and one dot product with the output gradient per part."""
    return 4 * parts * batch * heads * length * dim


def forward_bytes(parts: int, batch: int, heads: int, length: int, dim: int, itemsize: int) -> int:
    """Every part and lse read once, one output and lse written."""
    return (parts + 1) * batch * heads * length * (dim * itemsize + 4)


@dataclass(frozen=True, eq=False)
class Sample:
    """Named inputs of ``merge_attention``: partial outputs of unit normal values and their lses."""

    name: str
    parts: int
    batch: int
    heads: int
    length: int
    dim: int
    layout: str = "bhld"
    signs: tuple[int, ...] | None = None
    empty: bool = False

    @property
    def flops(self) -> int:
        """Forward FLOPs."""
        return forward_flops(self.parts, self.batch, self.heads, self.length, self.dim)

    def tensors(self, dtype=torch.float32, device="cpu", seed=0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Lists of outs and lses; with ``empty`` a third of each part's rows and one whole row see nothing."""
        generator = torch.Generator(device).manual_seed(seed)
        shape = (self.batch, self.heads, self.length, self.dim)
        outs, lses = [], []
        for i in range(self.parts):
            out = torch.randn(shape, generator=generator, device=device).to(dtype)
            lse = torch.randn(shape[:3], generator=generator, device=device)
            if self.signs and self.signs[i] < 0:
                # A part to subtract is contained in the others: its weight stays below theirs.
                lse = lse - 6
            if self.empty:
                hidden = torch.rand(shape[:3], generator=generator, device=device) < 1 / 3
                hidden[..., 0] = True
                lse = lse.masked_fill(hidden, -torch.inf)
                out = out.masked_fill(hidden[..., None], 0)
            if self.layout == "blhd":
                out = out.transpose(1, 2).contiguous()
            outs.append(out)
            lses.append(lse)
        return outs, lses

    def call(self, outs, lses, **more):
        """Run the public function on this sample."""
        import vidkern

        return vidkern.merge_attention(outs, lses, signs=self.signs, layout=self.layout, **more)


SAMPLES = (
    Sample("two", 2, 2, 3, 65, 64),
    Sample("two_token_major", 2, 2, 3, 65, 64, layout="blhd"),
    Sample("one", 1, 1, 2, 7, 8),
    Sample("five", 5, 1, 2, 113, 40),
    Sample("empty_rows", 3, 1, 2, 33, 72, empty=True),
    Sample("signed", 3, 2, 4, 101, 128, signs=(1, 1, -1)),
)
