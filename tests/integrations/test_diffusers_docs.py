"""The code of docs/diffusers.md runs, and its table is what it counts."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")


def test_the_page_runs(capsys):
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        if "from_pretrained" not in code:      # needs a download
            exec(compile(code, "docs/diffusers.md", "exec"), namespace)
    first, *counts, wan = capsys.readouterr().out.splitlines()
    assert float(first.rsplit(" ", 1)[1]) < 1e-5
    dense, window, anchored = (float(re.search(r"([\d.]+) GFLOP", line)[1]) for line in counts)
    assert anchored < window < dense
    shown = float(re.search(r"`dict\(causal_time=True\)` \| ([\d.]+)", PAGE)[1])
    assert float(wan) == pytest.approx(shown, abs=0.05)
