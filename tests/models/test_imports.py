"""The package as others see it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_bare_models_import_is_refused(tmp_path):
    done = python("import models", tmp_path)
    assert done.returncode == 1 and "ImportError: this package is vidkern.models, not 'models'" in done.stderr


def test_parts_can_be_taken_alone(tmp_path):
    done = python("from vidkern.models.shared import VideoDiT; import sys; print('vidkern.models.shared.train' in sys.modules,"
                  " 'av' in sys.modules, VideoDiT.__module__)", tmp_path)
    assert done.stdout.split() == ["False", "False", "vidkern.models.shared.dit"], done.stderr


@pytest.mark.parametrize("package", ["dfm", "ditflow", "four_real", "mobile_dit", "shared"])
def test_every_public_name_resolves(package):
    import importlib

    module = importlib.import_module(f"vidkern.models.{package}")
    assert all(callable(getattr(module, name)) for name in module.__all__)
    with pytest.raises(AttributeError):
        module.nothing
