import pytest
from tree import copy_checkout, with_tiny_sources


@pytest.fixture
def tiny_tree(tmp_path):
    """A copy of the checkout whose C++ sources are a few lines."""
    return with_tiny_sources(copy_checkout(tmp_path / "tree"))
