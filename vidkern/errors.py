"""The error that is meant for a person: one line, no traceback."""

import importlib
from types import ModuleType

# Which extra of vidkern brings a module that the core install does not have.
EXTRA_OF = {
    **dict.fromkeys(("av", "matplotlib", "PIL", "sklearn", "tqdm"), "demo"),
    **dict.fromkeys(("pytest", "pytest_benchmark"), "bench"),
    **dict.fromkeys(("accelerate", "diffusers", "huggingface_hub", "peft", "safetensors", "transformers"), "diffusers"),
    **dict.fromkeys(("pybullet", "pybullet_data"), "scenes"),
    "cuda": "cuda",
    "triton": "triton",
}


class UserError(Exception):
    """A mistake or a lack that the user can mend: a missing file, an argument out of range, an extra that is not installed.

    The message is one line that names the argument, its value and what was expected. `vidkern` prints it to stderr and exits
    with 2. Where a built-in class fits too, a subclass of both is raised (``class X(UserError, ValueError)``).
    """


class MissingExtra(UserError, ImportError):
    """A module of an optional extra is not installed; the message names the extra."""


def import_extra(module: str, purpose: str) -> ModuleType:
    """Imports a module that belongs to an extra.

    Args:
        module: its dotted name; the top-level package is a key of ``EXTRA_OF``.
        purpose: what it is needed for, as the subject of a sentence ("reading video").

    Raises:
        MissingExtra: the package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if missing_extra(error) is None:
            raise
        raise MissingExtra(f"{purpose} needs {error.name}, {missing_extra(error)}") from error


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What would cure ``error``, or None if the missing module belongs to no extra."""
    extra = EXTRA_OF.get((error.name or "").partition(".")[0])
    return extra and f"which is not installed: {comes_with(extra)}"


def comes_with(extra: str) -> str:
    """How to get what an extra brings, one phrase. vidkern is on no index: it is installed from a checkout or from a wheel."""
    return f"it comes with vidkern's extra \"{extra}\", in a checkout by pip install -c constraints.txt -e \".[{extra}]\""
