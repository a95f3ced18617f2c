"""One exception for everything a user can get wrong, so that every entry point can print it without a traceback."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path


class JointNASError(ValueError):
    """Bad input or an environment that cannot do what was asked. The message says what, where and what is allowed."""


def unknown(kind: str, name: object, allowed: Iterable[object], where: str = "") -> JointNASError:
    """The error for a name outside a closed set, with the nearest allowed name.

    Example: ``raise unknown("search-space key", "hiden", fields, where="space.yaml")``.
    """
    names = [str(a) for a in allowed]
    longer = [n for n in names if name and n.startswith(str(name))]  # what was cut short, before what looks alike
    near = longer[:1] or difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    place = f" in {where}" if where else ""
    return JointNASError(f"unknown {kind} {str(name)!r}{place}.{hint} Allowed: {', '.join(names) or '(none)'}.")


def writable(path: str | Path, what: str = "out") -> Path:
    """The path, which can be made or written here; asked before work whose result goes there. Makes nothing.

    Args:
        path: of a file or folder that need not exist, nor the folders above it.
        what: the option it comes from, for the message.

    Raises:
        JointNASError: a part of the path is a file, or may not be written to.
    """
    path = Path(path)
    try:
        there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if there != path and not there.is_dir():
            raise JointNASError(f"{what} {str(path)!r}: {str(there)!r} is a file, not a folder; choose another path")
    except OSError as error:  # a name that is too long, a folder that cannot be searched
        raise JointNASError(f"{what} {str(path)!r} cannot be made: {error.strerror}") from None
    if not os.access(there, os.W_OK | (os.X_OK if there.is_dir() else 0)):
        raise JointNASError(f"{what} {str(path)!r}: {str(there)!r} may not be written to; choose another path")
    return path
