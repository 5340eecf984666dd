"""What the pages of a column of Parquet unpack to, told by their own headers.

A file's footer has sums of sizes that nothing depends on, so that they may be anything. A page's header is another
matter: whoever reads the page makes room for as many bytes as the header says, and refuses what unpacks to others. The
headers lie between the pages, in Thrift's compact protocol (parquet-format's parquet.thrift), and are walked through
from one to the next; no page is unpacked for that.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

WINDOWS = (2**8, 2**12, 2**16, 2**20, 2**24)  # bytes of a header: the last is what PyArrow reads at most
DEEPEST = 16  # structs in structs

# Fields of PageHeader
KIND, UNPACKED, PACKED, DATA, DICTIONARY, DATA_2 = 1, 2, 3, 5, 7, 8
DICTIONARY_PAGE, DATA_PAGE_2 = 2, 3
# Fields of what follows: of a dictionary and of data pages; of the second version's, whose levels are apart
VALUES, ENCODING, ENCODING_2, LEVELS, IS_PACKED = 1, 2, 4, (5, 6), 7
# Types of Thrift's compact protocol
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)


class Damaged(Exception):
    """Why a column cannot be read: a reason, which the error about the file puts in."""


class Page(NamedTuple):
    """A page, by its header.

    Attributes:
        kind: ``DICTIONARY_PAGE``, ``DATA_PAGE_2``, or another.
        size: bytes that it unpacks to.
        values: how many, nulls among them.
        encoding: of the values.
        place, packed: where it begins in the file after its header, and how long it is there.
        levels: bytes before the values that are never packed; None where levels are packed with the values.
        is_packed: the rest is.
    """

    kind: int
    size: int
    values: int
    encoding: int
    place: int
    packed: int
    levels: int | None
    is_packed: bool


def pages(path: Path, start: int, stop: int) -> Iterator[Page]:
    """The pages that lie between two places in a file.

    Raises:
        Damaged: one has no header that can be read, or is longer than the space there is.
    """
    with path.open("rb") as file:
        while start < stop:
            header, length = _header(file, start)
            unpacked, packed, kind = (_number(header, field, -1) for field in (UNPACKED, PACKED, KIND))
            if unpacked < 0 or packed < 0:
                raise Damaged(f"the page at byte {start} does not tell its size")
            place, start = start + length, start + length + packed
            if start > stop:
                raise Damaged(f"the page that ends at byte {start} leaves its column, which ends at byte {stop}")
            second = kind == DATA_PAGE_2
            told = header.get(DICTIONARY if kind == DICTIONARY_PAGE else DATA_2 if second else DATA)
            told = told if isinstance(told, dict) else {}
            levels = sum(_number(told, field, 0) for field in LEVELS) if second else None
            encoding = _number(told, ENCODING_2 if second else ENCODING, -1)
            is_packed = told.get(IS_PACKED) is not False
            yield Page(kind, unpacked, _number(told, VALUES, 0), encoding, place, packed, levels, is_packed)


def _number(found: dict[int, Any], field: int, default: int) -> int:
    value = found.get(field)
    return value if type(value) is int else default


def _header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """A page's header, and how many bytes it takes."""
    for window in WINDOWS:
        file.seek(place)
        content = file.read(window)
        try:
            return _Compact(content).struct()
        except (IndexError, struct.error):  # it goes on after the window
            if len(content) < window:
                break
    raise Damaged(f"the page at byte {place} has no header")


class _Compact:
    """Reads Thrift's compact protocol: structs as dicts by field, of whole numbers, truths and structs alone.

    A field that comes again takes the place of the one before, and a struct that does so is filled further, as in the
    readers that Thrift makes.
    """

    def __init__(self, content: bytes):
        self._content, self._at = content, 0

    def struct(self) -> tuple[dict[int, Any], int]:
        """The struct at the beginning, and where it ends."""
        return self._struct({}, 0), self._at

    def _struct(self, found: dict[int, Any], depth: int) -> dict[int, Any]:
        if depth > DEEPEST:
            raise Damaged(f"a page's header has structs in more than {DEEPEST} others")
        field = 0
        while (first := self._byte()) & 15 != STOP:
            field = field + (first >> 4) if first >> 4 else self._number()
            kind = first & 15
            if kind == I32:
                found[field] = self._number()
            elif kind == STRUCT:
                before = found.get(field)
                found[field] = self._struct(before if isinstance(before, dict) else {}, depth + 1)
            elif kind in (TRUE, FALSE):
                found[field] = kind == TRUE
            else:
                self._pass(kind, depth)
        return found

    def _pass(self, kind: int, depth: int) -> None:
        """Over a value that nobody asks for."""
        if kind in (TRUE, FALSE, BYTE):  # of a list, a byte each
            self._skip(1)
        elif kind in (I16, I32, I64):
            self._varint()
        elif kind == DOUBLE:
            self._skip(8)
        elif kind == BINARY:
            self._skip(self._varint())
        elif kind in (LIST, SET):
            head = self._byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self._varint()):
                self._pass(head & 15, depth)
        elif kind == MAP:
            size = self._varint()
            kinds = self._byte() if size else 0
            for _ in range(size):
                self._pass(kinds >> 4, depth)
                self._pass(kinds & 15, depth)
        elif kind == STRUCT:
            self._struct({}, depth + 1)
        else:
            raise Damaged(f"a page's header has a value of the unknown type {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._content[self._at - 1]

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise IndexError

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self._byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise Damaged("a page's header has a number of more than 64 bits")

    def _number(self) -> int:
        """A signed one."""
        number = self._varint()
        return number >> 1 ^ -(number & 1)
