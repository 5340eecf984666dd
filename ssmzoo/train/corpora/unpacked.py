"""How much memory a stretch of a table takes, told by its description before it is unpacked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

ROWS, ROOM = 64, 2**26  # of Parquet, read at once, and the bytes that they should have at most
HEADER = 32  # bytes within which the first three numbers of a page's header are
DICTIONARY_PAGE = 2


def rows_at_once(path: Path, file: Any, group: int, key: str) -> int:
    """How many rows of a column of Parquet are read at once.

    A row has the bytes of the others, as the file says; or all bytes of the column's dictionary, to which any number
    of rows can point.

    Args:
        path: of the file.
        file: PyArrow's, of which the first row of this group has been read.
        group: of rows.
        key: the column.
    """
    names = [file.schema.column(i).path for i in range(len(file.schema))]
    described = file.metadata.row_group(group)
    column = described.column(names.index(key))
    mean = column.total_uncompressed_size // max(described.num_rows, 1)
    first = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
    return max(1, min(ROWS, ROOM // max(mean, _dictionary_bytes(path, first), 1)))


def _dictionary_bytes(path: Path, place: int) -> int:
    """The bytes of the dictionary that a column begins with, unpacked; 0 if it begins with something else.

    A page's header is a struct of Thrift's compact protocol, whose first fields are its kind and its size.
    """
    with path.open("rb") as file:
        file.seek(place)
        header = file.read(HEADER)
    found, at = [], 0
    for _ in range(2):
        if header[at : at + 1] != b"\x15":  # the next field, an int32
            return 0
        number = shift = 0
        at += 1
        while at < len(header):
            number |= (header[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if header[at - 1] < 128:
                break
        found.append(number >> 1 ^ -(number & 1))
    return max(found[1], 0) if found[0] == DICTIONARY_PAGE else 0


def batch_bytes(message: Any) -> int:
    """The bytes of a record batch of Arrow, unpacked if its buffers are compressed.

    Its description is a table of FlatBuffers (Arrow's Message.fbs); each compressed buffer begins with its length.

    Raises:
        struct.error: it is damaged.
    """
    described, body = memoryview(message.metadata), memoryview(message.body)
    batch = _field(described, _offset(described, 0), 2)
    if not batch or not _field(described, batch, 3):
        return len(body)
    buffers, total = _field(described, batch, 2), 0
    for i in range(struct.unpack_from("<I", described, buffers)[0]):
        place, length = struct.unpack_from("<qq", described, buffers + 4 + 16 * i)
        size = struct.unpack_from("<q", body, place)[0] if length else 0
        total += length if size < 0 else size
    return total


def _field(described: memoryview, table: int, number: int) -> int:
    """Where a table or vector begins that is a field of a table; 0 where it is not there."""
    names = table - struct.unpack_from("<i", described, table)[0]
    (size,) = struct.unpack_from("<H", described, names)
    if 4 + 2 * number >= size:
        return 0
    (here,) = struct.unpack_from("<H", described, names + 4 + 2 * number)
    return _offset(described, table + here) if here else 0


def _offset(described: memoryview, at: int) -> int:
    return int(at + struct.unpack_from("<I", described, at)[0])
