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
KIND, UNPACKED, PACKED, DICTIONARY = 1, 2, 3, 7
DICTIONARY_PAGE = 2
# Types of Thrift's compact protocol
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)


class Page(NamedTuple):
    """A page: whether it is a dictionary, the bytes that it unpacks to, and a dictionary's values."""

    dictionary: bool
    size: int
    values: int


def pages(path: Path, start: int, stop: int) -> Iterator[Page]:
    """The pages that lie between two places in a file.

    Raises:
        ValueError: one has no header that can be read, or is longer than the space there is.
    """
    with path.open("rb") as file:
        while start < stop:
            header, length = _header(file, start)
            sizes = [header.get(field) for field in (UNPACKED, PACKED)]
            if not all(isinstance(size, int) and size >= 0 for size in sizes):
                raise ValueError(f"the page at byte {start} does not tell its size")
            unpacked, packed = sizes
            start += length + packed  # type: ignore[operator]
            if start > stop:
                raise ValueError(f"the page that ends at byte {start} leaves its column, which ends at byte {stop}")
            of_dictionary = header.get(DICTIONARY)
            values = of_dictionary.get(1) if isinstance(of_dictionary, dict) else 0
            yield Page(header.get(KIND) == DICTIONARY_PAGE, unpacked, values if isinstance(values, int) else 0)  # type: ignore[arg-type]


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
    raise ValueError(f"the page at byte {place} has no header")


class _Compact:
    """Reads Thrift's compact protocol: structs as dicts of their whole numbers and structs by field; others are passed.

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
            raise ValueError(f"a page's header has structs in more than {DEEPEST} others")
        field = 0
        while (first := self._byte()) & 15 != STOP:
            field = field + (first >> 4) if first >> 4 else self._number()
            kind = first & 15
            if kind == I32:
                found[field] = self._number()
            elif kind == STRUCT:
                before = found.get(field)
                found[field] = self._struct(before if isinstance(before, dict) else {}, depth + 1)
            elif kind not in (TRUE, FALSE):
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
            raise ValueError(f"a page's header has a value of the unknown type {kind}")

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
                raise ValueError("a page's header has a number of more than 64 bits")

    def _number(self) -> int:
        """A signed one."""
        number = self._varint()
        return number >> 1 ^ -(number & 1)
