"""Documents in tables: Parquet, and the Arrow streams that ``datasets`` keeps its data in.

A table is read in stretches: row groups of Parquet, record batches of Arrow. ``Dataset.save_to_disk`` writes a folder
of ``.arrow`` files, and descriptions of them that are no documents.

A small file can hold any amount of text: rows of one large value, or bytes that are alike, and may say of itself what
it likes. So few rows of Parquet are read at once that they fit even if each is as large as the largest page, and what a
batch of Arrow unpacks to is known before (:mod:`ssmzoo.train.corpora.unpacked`).
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssmzoo.train.corpora import unpacked

PARQUET, ARROW = (".parquet",), (".arrow",)
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")  # beside Arrow files

LONGEST = 2**30  # bytes of a document, and of a compressed batch of Arrow, which are in memory whole
PAGE = 2**20  # bytes of a page of Parquet beside the longest document in it
READ = 2**20  # bytes of Parquet that are read from disk at once
LISTED = 8  # names in an error


def listed(names: Sequence[str]) -> str:
    """Names out of a file for a line of an error, however many and long they are."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(f"{name!r:.80}" for name in names[:LISTED]) + more or "nothing"


def sizes(path: Path) -> list[int]:
    """The bytes of each stretch of a table."""
    if path.name.endswith(PARQUET):
        metadata = _parquet(path).metadata
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [_unpacked(path, message) for message in _messages(path) if message.type == "record batch"]


def texts(path: Path, start: int, stop: int, key: str) -> Iterator[str]:
    """The texts in a column, in some stretches; without those that are null.

    Raises:
        ValueError: the table is damaged, or has no such column of text.
    """
    if path.name.endswith(PARQUET):
        file = _parquet(path)
        _check_column(path, file.schema_arrow, key)
        for group in range(start, stop):
            try:
                rows = unpacked.rows_at_once(path, file, group, key, LONGEST + PAGE)
            except Exception as error:  # whatever PyArrow raises where a description is damaged
                raise _damaged(path, "Parquet", error) from None
            batches = file.iter_batches(rows, row_groups=[group], columns=[key])
            yield from _column(path, "Parquet", _batches(path, "Parquet", batches), key)
        return
    with _arrow(path) as reader:
        _check_column(path, reader.schema, key)
        batches = itertools.islice(_batches(path, "Arrow stream", iter(reader)), start, stop)
        yield from _column(path, "Arrow stream", batches, key)


def _column(path: Path, kind: str, batches: Iterator[Any], key: str) -> Iterator[str]:
    for batch in batches:
        column = batch.column(key)
        try:
            column.validate(full=True)  # of a damaged one PyArrow would read memory that is not its own
        except Exception as error:
            raise _damaged(path, kind, error) from None
        if len(column) and column.nbytes > LONGEST and _longest(column) > LONGEST:
            raise ValueError(f"the file {path} must have at most {LONGEST} bytes in a row of {key!r:.80}; got more")
        for text in column:
            if text.is_valid:
                yield text.as_py()


def _longest(column: Any) -> int:
    """Bytes of the longest value."""
    from pyarrow import compute

    return compute.max(compute.binary_length(column)).as_py() or 0


def _messages(path: Path) -> Iterator[Any]:
    """The messages of an Arrow stream, as they are in the file."""
    import pyarrow

    try:
        reader = pyarrow.ipc.MessageReader.open_stream(pyarrow.memory_map(str(path)))
        while True:
            try:
                yield reader.read_next_message()
            except StopIteration:
                return
    except Exception as error:
        raise _damaged(path, "Arrow stream", error) from None


def _unpacked(path: Path, message: Any) -> int:
    try:
        size = unpacked.batch_bytes(message)
    except (struct.error, ValueError) as error:
        raise _damaged(path, "Arrow stream", error) from None
    if size > max(LONGEST, len(message.body)):  # what is not compressed stays in the file
        raise ValueError(f"the file {path} must have at most {LONGEST} bytes in a batch of rows; got {size}")
    return size


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ)  # not a whole group of rows at once
    except Exception as error:  # whatever its parsers raise
        raise _damaged(path, "Parquet", error) from None


def _arrow(path: Path) -> Any:
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path)))
    except Exception as error:
        raise _damaged(path, "Arrow stream", error) from None


def _batches(path: Path, kind: str, batches: Iterator[Any]) -> Iterator[Any]:
    """The record batches of a table, whatever its reader raises told as damage."""
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            raise _damaged(path, kind, error) from None
        yield batch


def _damaged(path: Path, kind: str, error: Exception) -> ValueError:
    return ValueError(f"the file {path} is no {kind}, or damaged: {' '.join(str(error).split())}")


def _check_column(path: Path, schema: Any, key: str) -> None:
    if (found := schema.names.count(key)) != 1:
        number = f"{found} columns" if found else "no column"
        raise ValueError(f"the file {path} has {number} {key!r:.80}, only {listed(schema.names)}: name one by --key")
    kind = str(schema.field(key).type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"the file {path} must have text in the column {key!r}; got {kind}")
