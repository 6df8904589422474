"""Run by the Python that an installed wheel is to be tried with, from any folder: is everything there and does it work?

No pytest, and nothing from the checkout but this file. Prints one line and exits 0, or fails with an assertion.
"""

import json
import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() != Path(__file__).resolve().parent]

import torch  # noqa: E402

import vidkern  # noqa: E402
import vidkern.bench  # noqa: E402
import vidkern.models.shared  # noqa: E402
from vidkern import _cpu  # noqa: E402
from vidkern.data import bundled_clip, bundled_clips  # noqa: E402

package = Path(vidkern.__file__).resolve().parent
checkout = Path(__file__).resolve().parents[2]
assert checkout not in package.parents, f"imported from the checkout: {package}"
for module in (vidkern.bench, vidkern.models, _cpu):
    assert package in Path(module.__file__).resolve().parents, module.__file__
assert list((package / "csrc").rglob("*.h")), "csrc is not in the package"
assert (package / "py.typed").is_file()
assert json.loads((package / "_build_info.json").read_text())["compiled"] is True
assert all(bundled_clip(name).stat().st_size > 10_000 for name in bundled_clips())

V, T, N = 2, 3, 5
q, k, v = torch.randn(3, 1, 2, V * T * N, 16).unbind()
frame = torch.arange(V * T).repeat_interleave(N)
view, time = frame // T, frame % T
mask = (view[:, None] == view) | (time[:, None] == time)
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
found = vidkern.grid_attention(q, k, v, grid=(V, T), impl="cpu")
assert (found - expected).abs().max() < 1e-5, (found - expected).abs().max()
print(f"vidkern {vidkern.__version__} in {package}: {', '.join(_cpu.isas())}")
