"""One exception for everything a user can get wrong, so that every entry point can print it without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class JointNASError(ValueError):
    """Bad input or an environment that cannot do what was asked. The message says what, where and what is allowed."""


def unknown(kind: str, name: object, allowed: Iterable[object], where: str = "") -> JointNASError:
    """The error for a name outside a closed set, with the nearest allowed name.

    Example: ``raise unknown("search-space key", "hiden", fields, where="space.yaml")``.
    """
    names = [str(a) for a in allowed]
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    place = f" in {where}" if where else ""
    return JointNASError(f"unknown {kind} {str(name)!r}{place}.{hint} Allowed: {', '.join(names) or '(none)'}.")
