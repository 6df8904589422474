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


def test_pages_install_from_the_checkout():
    """vidkern is on no index, and without constraints.txt other versions come than those tested together."""
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for line in re.findall(r"pip install [^`\n]*", page.read_text()):
            own = re.search(r'vidkern\[|"\.\[|-e \.| \.$', line)
            assert not own or "-c constraints.txt" in line or "--no-deps" in line, f"{page.name}: {line}"


@pytest.mark.parametrize("page, least", [("docs/ops.md", 8), ("docs/motion.md", 2), ("README.md", 1)])
def test_examples_run(page, least):
    names, ran = {}, 0
    for code in blocks(page):
        if "pipe.transformer" not in code:  # needs a pipeline of the reader's
            exec(compile(shrunk(code), page, "exec"), names)
            ran += 1
    assert ran >= least
    torch._dynamo.reset()
