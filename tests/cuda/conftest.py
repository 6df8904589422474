"""The executor's harness stands beside its tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "executor"))
