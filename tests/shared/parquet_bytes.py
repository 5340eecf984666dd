"""Parquet files of one column of text, byte by byte, so that any number in them can be a lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12  # types of Thrift's compact protocol
DATA, DICTIONARY = 0, 2  # kinds of pages
PLAIN, DELTA_LENGTH, DELTA_BYTES, RLE_DICTIONARY = 0, 6, 7, 8
UNCOMPRESSED, ZSTD = 0, 6
BYTE_ARRAY, REQUIRED, UTF8 = 6, 0, 0

Field = tuple[int, int, Any]


def number(value: int) -> bytes:
    """A whole number without a sign, seven bits a byte."""
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def signed(value: int) -> bytes:
    """One with a sign, which goes into the lowest bit."""
    return number(value << 1 if value >= 0 else (-value << 1) - 1)


def thrift(fields: Sequence[Field]) -> bytes:
    """A struct of fields: their numbers, types and values, in whichever order."""
    found = b""
    for field, kind, value in fields:
        found += bytes([kind]) + signed(field) + _value(kind, value)
    return found + b"\0"


def _value(kind: int, value: Any) -> bytes:
    if kind in (I32, I64):
        return signed(value)
    if kind == BINARY:
        return number(len(value)) + value
    if kind == STRUCT:
        return thrift(value)
    of, items = value  # a list
    return bytes([0xF0 | of]) + number(len(items)) + b"".join(_value(of, item) for item in items)


@dataclass
class Page:
    """A page as it is, and what its header says of it where that is something else."""

    kind: int
    body: bytes
    values: int
    encoding: int = PLAIN
    size: int | None = None  # unpacked
    packed: int | None = None
    backwards: bool = False  # the header's fields in the opposite order
    codec: int = UNCOMPRESSED

    def bytes(self) -> bytes:
        """Header and content."""
        import pyarrow

        body = pyarrow.compress(self.body, "zstd", asbytes=True) if self.codec == ZSTD else self.body
        counts: list[Field] = [(1, I32, self.values), (2, I32, self.encoding)]
        if self.kind == DATA:
            counts += [(3, I32, 3), (4, I32, 3)]
        header: list[Field] = [
            (1, I32, self.kind),
            (2, I32, len(self.body) if self.size is None else self.size),
            (3, I32, len(body) if self.packed is None else self.packed),
            (7 if self.kind == DICTIONARY else 5, STRUCT, counts),
        ]
        return thrift(header[::-1] if self.backwards else header) + body


def plain(*texts: bytes) -> bytes:
    """Values one after another, each after its length."""
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def same(rows: int) -> bytes:
    """So many times the first value of a dictionary."""
    return bytes([1]) + number(rows << 1) + b"\0"


def parquet(pages: Sequence[Page], rows: int, **lies: int) -> bytes:
    """A file with these pages. ``lies``: ``values``, ``unpacked``, ``packed``, ``first`` and ``rows_said``."""
    content, places = b"PAR1", []
    for page in pages:
        places.append(len(content))
        content += page.bytes()
    dictionary = pages[0].kind == DICTIONARY
    column: list[Field] = [
        (1, I32, BYTE_ARRAY),
        (2, LIST, (I32, sorted({page.encoding for page in pages}))),
        (3, LIST, (BINARY, [b"text"])),
        (4, I32, pages[0].codec),
        (5, I64, lies.get("values", rows)),
        (6, I64, lies.get("unpacked", sum(len(page.body) for page in pages))),
        (7, I64, lies.get("packed", len(content) - 4)),
        (9, I64, lies.get("first", places[dictionary])),
    ]
    if dictionary:
        column.append((11, I64, places[0]))
    chunk: list[Field] = [(2, I64, 4), (3, STRUCT, column)]
    said = lies.get("rows_said", rows)
    group: list[Field] = [(1, LIST, (STRUCT, [chunk])), (2, I64, 1), (3, I64, said)]
    leaf: list[Field] = [(1, I32, BYTE_ARRAY), (3, I32, REQUIRED), (4, BINARY, b"text"), (6, I32, UTF8)]
    schema = [[(4, BINARY, b"root"), (5, I32, 1)], leaf]
    footer = thrift([(1, I32, 1), (2, LIST, (STRUCT, schema)), (3, I64, said), (4, LIST, (STRUCT, [group]))])
    return content + footer + struct.pack("<I", len(footer)) + b"PAR1"
