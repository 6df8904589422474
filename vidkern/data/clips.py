"""The clips that come with the package: short, continuous shots that every demo and test can use without a download.

Sources, authors, licences and the changes made are in ``assets/NOTICE.txt``.
"""

from pathlib import Path

from vidkern.errors import UserError

ASSETS = Path(__file__).resolve().parent / "assets"


class ClipNameError(UserError, ValueError):
    """No bundled clip has this name."""


def bundled_clips() -> tuple[str, ...]:
    """The names that :func:`bundled_clip` knows, the default first."""
    return ("box", "bunny")


def bundled_clip(name: str = "box") -> Path:
    """The path of a bundled clip (mp4, h264, 4:3, no sound), for :func:`vidkern.data.read_video`.

    Args:
        name: "box" (real footage: a hand turns a colourful box over a table, the camera hardly moves) or
            "bunny" (animated film: Big Buck Bunny comes out of his burrow).

    Raises:
        ClipNameError: another name.
    """
    if name not in bundled_clips():
        raise ClipNameError(f"name={name!r}: expected one of {', '.join(bundled_clips())}")
    return ASSETS / f"{name}.mp4"
