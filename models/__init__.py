"""Video models built on vidkern's public ops: `vidkern.models.shared` (parts) and one package per method.

The folder is installed as ``vidkern.models``. Importing it as a bare ``models`` would create a second copy of every class, so
it is refused.
"""

if __name__ != "vidkern.models":
    raise ImportError(f"this package is vidkern.models, not {__name__!r}: install vidkern and use `import vidkern.models`")

import importlib

__all__ = ["dfm", "ditflow", "four_real", "mobile_dit", "shared"]


def __getattr__(name):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__():
    return sorted(__all__)
