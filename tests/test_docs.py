"""The examples of the docs and of the README run as they stand, one after the other."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def shrunk(code):
    """The same example at a size that takes no time."""
    return code.replace("tokens = 4, 8, 256", "tokens = 2, 3, 16")


@pytest.mark.parametrize("page, least", [("docs/ops.md", 8), ("docs/motion.md", 2), ("README.md", 1)])
def test_examples_run(page, least):
    names, ran = {}, 0
    for code in blocks(page):
        if "pipe.transformer" not in code:  # needs a pipeline of the reader's
            exec(compile(shrunk(code), page, "exec"), names)
            ran += 1
    assert ran >= least
    torch._dynamo.reset()
