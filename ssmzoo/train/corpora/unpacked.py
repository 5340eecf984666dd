"""How much memory a stretch of a table takes, told before it is unpacked."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from ssmzoo.train.corpora.lengths import DELTA_BYTES, DELTA_LENGTH, check_lengths
from ssmzoo.train.corpora.pages import DICTIONARY_PAGE, Damaged, Page, pages

ROWS, ROOM = 64, 2**26  # of Parquet, read at once, and the bytes that they may have at most
POINTER, LENGTH = 16, 4  # bytes that PyArrow keeps for a value of a dictionary, and for a length
CODECS = {"LZ4": "lz4_raw"}  # as PyArrow calls those that it calls otherwise elsewhere


def rows_at_once(path: Path, file: Any, group: int, key: str, longest: int) -> int:
    """How many rows of a column of Parquet are read at once.

    No row is larger than the largest page, whichever way values are written: whole, as what they have beyond the one
    before, or as a place in a dictionary, to which any number of rows can point.

    Args:
        path: of the file.
        file: PyArrow's.
        group: of rows.
        key: the column.
        longest: bytes that a page may have.

    Raises:
        Damaged: a page or a dictionary takes more memory than that, or the column lies outside of the file.
    """
    names = [file.schema.column(i).path for i in range(len(file.schema))]
    column = file.metadata.row_group(group).column(names.index(key))
    start = column.data_page_offset
    if column.has_dictionary_page and 0 < column.dictionary_page_offset < start:
        start = column.dictionary_page_offset
    stop, size = start + column.total_compressed_size, path.stat().st_size
    if not 0 < start <= stop <= size:
        raise Damaged(f"the column's bytes {start} to {stop} are not in a file of {size} bytes")
    largest = 1
    for page in pages(path, start, stop):
        is_dictionary, is_delta = page.kind == DICTIONARY_PAGE, page.encoding in (DELTA_LENGTH, DELTA_BYTES)
        kept = page.values * (POINTER * is_dictionary + LENGTH * is_delta)
        if max(page.size, kept) > longest:
            what = "a dictionary" if is_dictionary else "a page"
            raise Damaged(f"{what} has {page.size} bytes and {page.values} values, more than fit")
        if is_delta and not is_dictionary:
            nulls = file.schema.column(names.index(key)).max_definition_level > 0
            check_lengths(_content(path, page, column.compression, nulls), page.encoding, page.values)
        largest = max(largest, page.size)
    return max(1, min(ROWS, ROOM // largest))


def _content(path: Path, page: Page, codec: str, nulls: bool) -> memoryview:
    """The values of a data page, unpacked; without the levels before them, which tell nulls."""
    import pyarrow

    with path.open("rb") as file:
        file.seek(page.place)
        content = file.read(page.packed)
    levels = page.levels or 0
    if not 0 <= levels <= min(page.size, page.packed):
        raise Damaged(f"a page of {page.size} bytes has {levels} of levels")
    content = content[levels:]
    if codec != "UNCOMPRESSED" and page.is_packed:
        content = pyarrow.decompress(content, page.size - levels, CODECS.get(codec, codec.lower()), asbytes=True)
    if page.levels is None and nulls:
        levels = 4 + struct.unpack_from("<I", content)[0]
        content = content[levels:]
    return memoryview(content)


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
