"""Reads Parquet files that lie, with little memory beyond what a process that has read one has.

``python parquet_attack.py FOLDER`` prints a line for each file that is neither read as it is nor refused in one line.
"""

from __future__ import annotations

import resource
import signal
import sys
from dataclasses import replace
from pathlib import Path

from parquet_bytes import (
    DATA,
    DELTA_BYTES,
    DELTA_LENGTH,
    DICTIONARY,
    RLE_DICTIONARY,
    ZSTD,
    Page,
    number,
    parquet,
    plain,
    same,
    signed,
)

from ssmzoo.train.corpora import tables, unpacked

LARGE, ROWS, MEMORY = 2**21, 64, 96 * 2**20  # all rows at once take more than the memory
HUGE = 2**31 - 1
tables.LONGEST, unpacked.ROOM = 2**24, 2**22
TEXT = b"x" * LARGE


def dictionary(backwards: bool = False, codec: int = ZSTD, values: int = 1) -> list[Page]:
    """A large value to which all rows point."""
    return [
        Page(DICTIONARY, plain(TEXT), values, backwards=backwards, codec=codec),
        Page(DATA, same(ROWS), ROWS, RLE_DICTIONARY, codec=codec),
    ]


def lengths_said(
    count: int, values: int, encoding: int = DELTA_LENGTH, before: bytes = b"", block: int = 2**30
) -> Page:
    """Lengths of zero, as many as it says, in a few bytes: blocks of any size whose differences take no bits."""
    body = before + number(block) + number(1) + number(count) + signed(0) + signed(0) + b"\0" + signed(0) + b"\0"
    return Page(DATA, body, values, encoding)


FEW = number(128) + number(4) + number(10) + signed(0) + signed(0) + bytes(4)  # ten lengths of zero


def page_by_page(**lies: int) -> bytes:
    """Many short rows, and then large ones that have a page each."""
    short = Page(DATA, plain(*[b"a"] * 4000), 4000, codec=ZSTD)
    return parquet([short] * 25 + [Page(DATA, plain(TEXT), 1, codec=ZSTD)] * ROWS, 100_000 + ROWS, **lies)


ONE = Page(DATA, plain(b"a", b"b"), 2)
FILES: dict[str, tuple[bytes, int | None]] = {  # content, and the bytes of text that it has; None: is to be refused
    "an honest one": (parquet([ONE], 2), 2),
    "a dictionary": (parquet(dictionary(), ROWS), ROWS * LARGE),
    "a dictionary that the footer makes small": (parquet(dictionary(), ROWS, unpacked=1), ROWS * LARGE),
    "a header backwards": (parquet(dictionary(backwards=True), ROWS, unpacked=1), ROWS * LARGE),
    "short rows and long ones": (page_by_page(), 100_000 + ROWS * LARGE),
    "long ones that the footer makes small": (page_by_page(unpacked=1), 100_000 + ROWS * LARGE),
    "a page that says it is huge": (parquet([Page(DATA, plain(b"a"), 1, size=HUGE, codec=ZSTD)], 1), None),
    "a page below zero": (parquet([Page(DATA, plain(b"a"), 1, size=-1)], 1), None),
    "a page beyond its column": (parquet([Page(DATA, plain(b"a"), 1, packed=HUGE)], 1), None),
    "a page that goes back": (parquet([Page(DATA, plain(b"a"), 1, packed=-20)], 1), None),
    "more than the header says": (parquet([Page(DATA, plain(TEXT), 1, size=100, codec=ZSTD)], 1), None),
    "a dictionary of many values": (parquet(dictionary(values=HUGE), ROWS), None),
    "many rows in the footer": (parquet([ONE], 2, rows_said=2**60, values=2**60), 2),
    "a column after the file": (parquet([ONE], 2, first=2**40), None),
    "a column of negative length": (parquet([ONE], 2, packed=-5), None),
    "a column longer than the file": (parquet([ONE], 2, packed=2**40), None),
    "many lengths of zero": (parquet([lengths_said(HUGE, HUGE)], HUGE), None),
    "more lengths than values": (parquet([lengths_said(HUGE, 10)], 10), None),
    "more beginnings than values": (parquet([lengths_said(HUGE, 10, DELTA_BYTES)], 10), None),
    "more lengths after beginnings": (parquet([lengths_said(HUGE, 10, DELTA_BYTES, FEW)], 10), None),
    "blocks of no parts": (parquet([lengths_said(10, 10, block=0)], 10), None),
    "differences without an end": (parquet([Page(DATA, FEW[:-2], 10, DELTA_BYTES)], 10), None),
    "more lengths, packed": (parquet([replace(lengths_said(HUGE, 10), codec=ZSTD)], 10), None),
}


def wrong(path: Path, size: int | None) -> str | None:
    """What is wrong with how a file is read or refused; None if nothing is."""
    signal.alarm(120)
    try:
        found = sum(len(text) for text in tables.texts(path, 0, len(tables.sizes(path)), "text"))
    except ValueError as error:
        said = str(error)
        clear = size is None and path.name in said and said.isprintable() and len(said) < 500
        return None if clear else f"refused by {said!r:.300}"
    except BaseException as error:  # whatever it may be
        return f"{type(error).__name__}: {error!s:.200}"
    finally:
        signal.alarm(0)
    return None if found == size else f"{found} bytes were read"


def main(folder: Path) -> None:
    path = folder / "x.parquet"
    path.write_bytes(FILES["an honest one"][0])
    wrong(path, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name, (content, size) in FILES.items():
        path.write_bytes(content)
        if (found := wrong(path, size)) is not None:
            print(f"{name}: {found}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
