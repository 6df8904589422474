"""The error of this package, and the checks that several of its functions share."""

from vidkern.errors import UserError


class SceneError(UserError, ValueError):
    """An argument of a scene function is not what was expected."""


def whole(name: str, value, least: int) -> int:
    """``value`` where it is an int of at least ``least``; anything else (a bool too) raises `SceneError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SceneError(f"{name}={value!r}: expected an integer of at least {least}")
    return value


def choice(name: str, value, known) -> str:
    """``value`` where it is one of ``known``."""
    if value not in tuple(known):
        raise SceneError(f"{name}={value!r}: expected one of {', '.join(known)}")
    return value


def image_size(size) -> tuple[int, int]:
    """(height, width) from a pair or one int; both at least 2."""
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(type(n) is not int or n < 2 for n in pair):
        raise SceneError(f"size={size!r}: expected (height, width) or one integer, at least 2 pixels each")
    return tuple(pair)
