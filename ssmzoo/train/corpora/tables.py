"""Documents in tables: Parquet, and the Arrow streams that ``datasets`` keeps its data in.

A table is read in stretches: row groups of Parquet, record batches of Arrow. ``Dataset.save_to_disk`` writes a folder
of ``.arrow`` files, and descriptions of them that are no documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PARQUET, ARROW = (".parquet",), (".arrow",)
DESCRIPTIONS = ("state.json", "dataset_info.json", "dataset_dict.json")  # beside Arrow files

ROWS = 256  # of Parquet, read at once
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
    with _arrow(path) as reader:
        return [batch.nbytes for batch in _batches(path, "Arrow stream", iter(reader))]


def texts(path: Path, start: int, stop: int, key: str) -> Iterator[str]:
    """The texts in a column, in some stretches; without those that are null.

    Raises:
        ValueError: the table is damaged, or has no such column of text.
    """
    if path.name.endswith(PARQUET):
        file = _parquet(path)
        _check_column(path, file.schema_arrow, key)
        groups = file.iter_batches(ROWS, row_groups=list(range(start, stop)), columns=[key])
        yield from _column(path, "Parquet", _batches(path, "Parquet", groups), key)
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
        for text in column.to_pylist():
            if text is not None:
                yield text


def _parquet(path: Path) -> Any:
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
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
