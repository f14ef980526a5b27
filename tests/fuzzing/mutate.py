"""Mutations of bytes and of JSON-like values, each a pure function of a generator."""

from __future__ import annotations

import copy
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.bombs import in_base_256, png_chunk, with_checksum

EXTREMES = (0, 1, -1, 127, 128, 255, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "x", "é\u0000\ud800", "a" * 5_000, [], {}, [[]], {"": {}}, [None], 0.5, -0.0),
    *(float("nan"), float("inf"), -float("inf"), 1e308, 1e-308, 10**30, -(10**30), 10**400, *EXTREMES),
    *("1e-4", "nan", "inf", "null", "../../etc/passwd", "/", "timm:resnet18", "w1-d1", "0" * 64, [1, 2], [1.5, "a"]),
)
"""What stands in the place of a value."""

MAX_PARTS = 3_000
MAX_NESTING = 60
"""A value of more parts, or nested more deeply, is not mutated further."""

Rng = np.random.Generator


def mutated_bytes(content: bytes, rng: Rng) -> bytes:
    """The content after one to four mutations, most often one."""
    for _ in range(_few(rng)):
        content = _pick(_BYTES, rng)(content, rng)
    return content[: 2**20]


def mutated_value(value: Any, rng: Rng) -> Any:
    """A JSON-like value after one to four mutations, most often one; the original is left alone."""
    found = copy.deepcopy(value)
    for _ in range(_few(rng)):
        found = _mutate_one(found, rng)
    return found


def mutated_tar(content: bytes, rng: Rng) -> bytes:
    """An archive of which header fields are changed, most often with a right checksum."""
    blocks = [content[start : start + 512] for start in range(0, len(content), 512)]
    headers = [place for place, block in enumerate(blocks) if block[257:262] == b"ustar"]
    for _ in range(int(rng.integers(1, 4))):
        place = int(_pick(headers, rng)) if headers and rng.random() < 0.8 else int(rng.integers(len(blocks)))
        block = bytearray(blocks[place].ljust(512, b"\0"))
        start, length = _pick(_TAR_FIELDS, rng)
        block[start : start + length] = _tar_field(length, rng)
        blocks[place] = with_checksum(block) if rng.random() < 0.9 else bytes(block)
        if rng.random() < 0.2:
            blocks.insert(int(rng.integers(len(blocks))), _pick(blocks, rng))
    return b"".join(blocks)


def mutated_png(content: bytes, rng: Rng) -> bytes:
    """A PNG of which chunks are changed, moved or repeated, with right checksums."""
    chunks, start = [], 8
    while start + 12 <= len(content):
        length = int.from_bytes(content[start : start + 4], "big")
        chunks.append((content[start + 4 : start + 8], content[start + 8 : start + 8 + length]))
        start += 12 + length
    place = int(rng.integers(len(chunks)))
    kind, body = chunks[place]
    choice = rng.random()
    if choice < 0.5:
        chunks[place] = (kind, mutated_bytes(body, rng))
    elif choice < 0.7:
        chunks.insert(int(rng.integers(len(chunks))), (kind, body))
    elif choice < 0.9:
        kinds = (b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"PLTE", b"tRNS", b"gAMA")
        made = _pick((body, b"k\0\0" + zlib.compress(bytes(int(rng.integers(10**6)))), rng.bytes(26)), rng)
        chunks.insert(int(rng.integers(1, len(chunks))), (_pick(kinds, rng), made))
    else:
        del chunks[place]
    return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def mutated_safetensors(content: bytes, rng: Rng) -> bytes:
    """A file of tensors of which the header, a JSON object, is changed, most often with a right length."""
    import json

    length = int.from_bytes(content[:8], "little")
    header = mutated_value(json.loads(content[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    shown = len(text) if rng.random() < 0.9 else int(_pick(EXTREMES, rng)) % 2**64
    return struct.pack("<Q", shown) + text + content[8 + length :]


def _few(rng: Rng) -> int:
    return int(_pick((1, 1, 1, 1, 2, 2, 3, 4), rng))


def _pick(choices: Any, rng: Rng) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _span(content: bytes, rng: Rng, most: int = 600) -> tuple[int, int]:
    start = int(rng.integers(len(content) + 1))
    return start, min(len(content), start + int(rng.integers(1, most)))


def _flip(content: bytes, rng: Rng) -> bytes:
    changed = bytearray(content)
    for place in rng.integers(len(changed), size=int(rng.integers(1, 9))) if changed else ():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwrite(content: bytes, rng: Rng) -> bytes:
    start, end = _span(content, rng, 40)
    return content[:start] + rng.bytes(end - start) + content[end:]


def _cut(content: bytes, rng: Rng) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def _remove(content: bytes, rng: Rng) -> bytes:
    start, end = _span(content, rng)
    return content[:start] + content[end:]


def _repeat(content: bytes, rng: Rng) -> bytes:
    start, end = _span(content, rng)
    return content[:end] + content[start:end] * int(rng.integers(1, 50)) + content[end:]


def _splice(content: bytes, rng: Rng) -> bytes:
    start, end = _span(content, rng)
    place = int(rng.integers(len(content) + 1))
    return content[:place] + content[start:end] + content[place:]


def _number(content: bytes, rng: Rng) -> bytes:
    """An extreme number over what is there, in any width and order of bytes."""
    code, place = _pick(("<H", ">H", "<I", ">I", "<Q", ">Q"), rng), int(rng.integers(len(content) + 1))
    written = struct.pack(code, int(_pick(EXTREMES, rng)) % 2 ** (8 * struct.calcsize(code)))
    return content[:place] + written + content[place + len(written) :]


def _digits(content: bytes, rng: Rng) -> bytes:
    """An extreme number in decimal digits."""
    place = int(rng.integers(len(content) + 1))
    return content[:place] + str(_pick((*EXTREMES, 10**30), rng)).encode() + content[place + int(rng.integers(3)) :]


_BYTES: tuple[Callable[[bytes, Rng], bytes], ...] = (
    *(_flip, _flip, _overwrite, _cut, _remove, _repeat, _splice, _number, _number, _digits),
)
_TAR_FIELDS = (
    (0, 100),
    (124, 12),
    (124, 12),
    (124, 12),
    (136, 12),
    (156, 1),
    (156, 1),
    (157, 100),
    (345, 155),
    (386, 110),
)


def _tar_field(length: int, rng: Rng) -> bytes:
    if length == 1:
        return bytes([int(_pick(b"01234567LKxgXSVDMN\0\xff", rng))])
    if length == 12:
        number = int(_pick((*EXTREMES, -512, -1024, 2**40, 2**80, int(rng.integers(10_000))), rng))
        return _pick((in_base_256(number), b"%011o\0" % abs(number), b" " * 12, b"9" * 12, rng.bytes(12)), rng)[:12]
    names = (b"../up.png", b"/root.png", b"a\0b.png", b"\xff\xfe.png", b"a/" * 40 + b"1.png", b"1.cls", b"", b"..")
    return bytes(_pick((*names, rng.bytes(length)), rng))[:length].ljust(length, b"\0")


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += _paths(part, (*path, key))
    return found


def _mutate_one(value: Any, rng: Rng) -> Any:
    paths = _paths(value)
    path = _pick(paths, rng)
    if not path or len(paths) > MAX_PARTS or max(map(len, paths)) > MAX_NESTING:
        return copy.deepcopy(_pick(ODD_VALUES, rng)) if rng.random() < 0.1 else value
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    last, choice = path[-1], rng.random()
    if choice < 0.1:
        del parent[last]
    elif choice < 0.2 and isinstance(parent, dict):
        parent[str(_pick(("", "x" * 300, "__class__", "é", last), rng))] = parent.pop(last)
    elif choice < 0.35:
        parent[last] = _reshaped(parent[last], rng)
    elif choice < 0.45:
        part = value
        for key in _pick(paths, rng):
            part = part[key]
        parent[last] = copy.deepcopy(part)
    else:
        parent[last] = copy.deepcopy(_pick(ODD_VALUES, rng))
    return value


def _reshaped(value: Any, rng: Rng) -> Any:
    """The same in another shape: a number as a text, a list repeated, a value nested."""
    if isinstance(value, bool | str) or value is None:
        return _pick(([value], {"a": value}, str(value) * 20), rng)
    if isinstance(value, int | float):
        grown = value * 10**9 if abs(value) < 10**30 else -1
        return _pick((repr(grown), -value, grown, grown + 0.5, [value] * 50), rng)
    nested = value
    for _ in range(int(_pick((1, 5, 50), rng))):
        nested = [nested]
    return _pick((list(value) * 30, nested, str(value)[:2_000]), rng)
