"""One exception for everything a user can get wrong, so that every entry point can print it without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal


class JointNASError(ValueError):
    """Bad input or an environment that cannot do what was asked. The message says what, where and what is allowed."""


# no room, no right, no healthy disk
REFUSALS = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EMFILE,
    errno.ENFILE, errno.ENAMETOOLONG, errno.ESTALE,
))  # fmt: skip


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


def writable(path: str | Path, kind: Literal["file", "folder"] = "folder", what: str = "out") -> Path:
    """The path, which can be made or written here; asked before work whose result goes there. Makes nothing.

    Args:
        path: of a file or folder that need not exist, nor the folders above it.
        kind: what it is going to be.
        what: the option it comes from, for the message.

    Raises:
        JointNASError: a part of the path is a file, it is itself of the other kind, or may not be written to.
    """
    if not str(path):
        raise JointNASError(f"{what} is empty; give a path")
    path = Path(path)
    try:
        there = _nearest(path)
        is_folder = there.is_dir()
    except OSError as error:  # a folder that cannot be searched, or a name that is too long
        raise JointNASError(f"{what} {str(path)!r} cannot be made: {error.strerror}") from None
    except ValueError:
        raise JointNASError(f"{what} {str(path)!r} cannot be made: no path contains a zero byte") from None
    if is_folder != (there != path or kind == "folder"):
        is_one = "folder, not a file" if is_folder else "file, not a folder"
        raise JointNASError(f"{what} {str(path)!r}: {str(there)!r} is a {is_one}; choose another path")
    if not os.access(there, os.W_OK | (os.X_OK if is_folder else 0)):
        raise JointNASError(f"{what} {str(path)!r}: {str(there)!r} may not be written to; choose another path")
    return path


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What the system refuses inside, a full disk above all, as one sentence about this path.

    Args:
        path: what is written; nothing else may be replaced inside, so that nothing is lost.

    Raises:
        JointNASError: it cannot be written.
    """
    try:
        yield
    except Exception as error:  # of the system, or what libraries of other languages make of it
        reason = None if isinstance(error, JointNASError) else refusal(error)
        if reason is None:
            raise
        named = getattr(error, "filename", None)
        where = "" if named is None else f" ({named})"
        raise JointNASError(
            f"{path} cannot be written: {reason}{where}. What was there before is as it was, and nothing is left half "
            "written; mend that, and give the same command again (a run goes on with --resume auto)"
        ) from None


@contextlib.contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """What is wrong with a file's contents as one sentence. Inside stands only what takes them apart: whatever is
    raised there is taken for the file's fault.

    Args:
        what: is read, for the message.
        advice: how to go on.

    Raises:
        JointNASError: it cannot be read.
    """
    try:
        with panics():
            yield
    except JointNASError:
        raise
    except MemoryError:
        raise JointNASError(f"{what} cannot be read: it asks for more memory than there is") from None
    except Exception as error:  # parsers of other libraries raise anything
        lines = str(error).strip().splitlines() or [""]
        named = isinstance(error, (KeyError, AttributeError, IndexError, TypeError))
        reason = f"{type(error).__name__} {lines[0][:300]}" if named or not lines[0] else lines[0][:300]
        raise JointNASError(f"{what} cannot be read: {reason}{advice and '; '}{advice}") from None


@contextlib.contextmanager
def panics() -> Iterator[None]:
    """A panic of a library in Rust (tokenizers, safetensors), which is no Exception, as a RuntimeError."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ == "pyo3_runtime":
            raise RuntimeError(str(error)) from None
        raise


def refusal(error: Exception) -> str | None:
    """Why the system did not let a file be written, in words; None: it is another error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (told := re.search(r"\((?:os error|errno) (\d+)\)|\[errno (\d+)\]", str(error), re.I)):
        number = int(told[1] or told[2])
    return os.strerror(number) if number in REFUSALS else None


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    for part in (path, *path.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            part.lstat()
            return part
    return path
