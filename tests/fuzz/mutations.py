"""Valid files, changed at random: bytes of any file, entries of JSON and YAML, headers of safetensors."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import yaml

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**12, 2**63, 10**400, 0.5, -0.5, 1e-308, 1e308, float("nan"),
    float("inf"), "", " ", "x", "none", "auto", "64", "x" * 3000, "\ud800", "\0", "ü漢\n", "../../etc", "/dev/null", [],
    {}, [[]], [None], [0], [-1], [1, 1], ["x"], {"x": 1}, {"": None}, [[1, 2], [3]], [10**9], [1.5],
)  # fmt: skip


def nested(generator: random.Random) -> Any:
    """Something far deeper than anything that is meant."""
    value: Any = 1
    for _ in range(generator.choice((5, 60, 400))):
        value = [value] if generator.random() < 0.5 else {"x": value}
    return value


def entries(value: Any, generator: random.Random) -> Any:
    """Plain values with one entry changed, anywhere inside."""
    places: list[tuple[Any, Any]] = []
    todo = [value]
    while todo:
        one = todo.pop()
        keys = list(one) if isinstance(one, dict) else range(len(one)) if isinstance(one, list) else ()
        for key in list(keys)[:200]:
            places.append((one, key))
            todo.append(one[key])
    if not places:
        return generator.choice(ODD)
    holder, key = generator.choice(places)
    how = generator.randrange(9)
    old = holder[key]
    if how == 0:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[generator.choice(("x", "", f"{key}s", str(key).upper(), str(key)[:-1]))] = holder.pop(key)
    elif how == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
        try:
            holder[key] = generator.choice((-old, old + 1, old - 1, old * 2, old / 3, old * 10**9, str(old), [old]))
        except OverflowError:
            holder[key] = 0
    elif how == 3 and isinstance(old, str):
        at = generator.randint(0, len(old))
        holder[key] = generator.choice((old[:at], old + old, old[:at] + "é" + old[at:], old.upper(), [old], {old: old}))
    elif how == 4 and isinstance(old, list):
        holder[key] = generator.choice((old + old, old[:-1], old[::-1], [old], dict(enumerate(map(str, old)))))
    elif how == 5:
        other, at = generator.choice(places)
        holder[key] = other[at] if at in (other if isinstance(other, dict) else range(len(other))) else None
        return json.loads(json.dumps(value)) if not _circular(value) else None
    elif how == 6 and isinstance(holder, dict):
        name = generator.choice(("x", "__class__", "auto_map", "version", "quantization_config"))
        holder[name] = generator.choice(ODD)
    elif how == 7:
        holder[key] = nested(generator)
    else:
        holder[key] = generator.choice(ODD)
    return value


def _circular(value: Any) -> bool:
    try:
        json.dumps(value)
    except (ValueError, RecursionError):
        return True
    return False


def octets(content: bytes, generator: random.Random) -> bytes:
    """A file with some bytes changed, lost or added, or cut."""
    size, how = len(content), generator.randrange(8)
    at = generator.randint(0, size)
    near = generator.randint(0, min(size, 400))  # headers stand at the beginning
    at = generator.choice((at, near))
    length = generator.choice((1, 2, 8, 64, 1000))
    noise = generator.randbytes(length)
    if how == 0 and size:
        at = min(at, size - 1)
        return content[:at] + bytes([content[at] ^ (1 << generator.randrange(8))]) + content[at + 1 :]
    if how == 1:
        return content[:at]
    if how == 2:
        return content[:at] + content[at + length :]
    if how == 3:
        return content[:at] + noise + content[at:]
    if how == 4:
        return content[:at] + noise + content[at + length :]
    if how == 5:
        return content[:at] + content[max(0, at - length) : at] * generator.choice((1, 2, 50)) + content[at:]
    if how == 6:
        number = generator.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
        return content[:at] + struct.pack("<Q", number) + content[at + 8 :]
    return generator.choice((b"", b"\n", b"\0" * 64, noise, b"version https://git-lfs.github.com/spec/v1\n"))


def text_of(value: Any, generator: random.Random) -> bytes:
    """JSON with one entry changed, or its text with bytes changed."""
    if generator.random() < 0.25:
        return octets(json.dumps(value).encode(), generator)
    return json.dumps(entries(json.loads(json.dumps(value)), generator)).encode()


def lines_of(rows: list[Any], generator: random.Random) -> bytes:
    """JSON lines with one of them changed, lost, twice, or the whole text with bytes changed."""
    rows = json.loads(json.dumps(rows))
    lines = [json.dumps(row).encode() for row in rows]
    at, how = generator.randrange(len(lines)), generator.randrange(6)
    if how == 0:
        lines.pop(at)
    elif how == 1:
        lines.insert(generator.randint(0, len(lines)), lines[at])
    elif how == 2:
        return octets(b"\n".join(lines) + b"\n", generator)
    else:
        lines[at] = text_of(rows[at], generator)
    return b"\n".join(lines) + generator.choice((b"\n", b"", b"\r\n"))


def yaml_of(value: Any, generator: random.Random) -> bytes:
    """YAML with one entry changed, or its text with bytes changed."""
    if generator.random() < 0.25:
        return octets(yaml.safe_dump(value).encode(), generator)
    changed = entries(json.loads(json.dumps(value)), generator)
    try:
        return yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (RecursionError, ValueError, yaml.YAMLError):
        return b"x: [" * 100


def safetensors_of(content: bytes, generator: random.Random) -> bytes:
    """A safetensors file with an entry of its header changed (its length kept true), or bytes anywhere."""
    if generator.random() < 0.4:
        return octets(content, generator)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(entries(json.loads(content[8 : 8 + length]), generator)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
