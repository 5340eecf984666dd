"""Documents in files of text, JSON lines (plain, gzip or zstd) and tables, cut into parts to be read by themselves."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ssmzoo.train.corpora import hub, tables
from ssmzoo.train.data import is_text, walk
from ssmzoo.train.stored import Stored
from ssmzoo.train.vocabulary import cut

SMALLEST, LARGEST = 2**24, 2**26  # bytes of a part: a part is done at once or, after a break, again
PARTS = 1024  # parts of a corpus, if their size allows it
LONGEST = 2**30  # bytes of a line of JSON, which is in memory whole: a small compressed file may hold any number
FRAGMENT, REACH = 2**18, 2**12  # characters of a document that are encoded at once; where a line end is looked for

LINES = (".jsonl", ".ndjson")
GZIP = tuple(f"{suffix}.gz" for suffix in LINES)
ZSTD = tuple(f"{suffix}.zst" for suffix in LINES)
TABLES = (*tables.PARQUET, *tables.ARROW)
FORMATS = (*GZIP, *ZSTD, *LINES, *TABLES)  # by their names' ends; others are text


class Piece(NamedTuple):
    """A stretch of a file: bytes of text or JSON lines, stretches of a table, all of a compressed file; data files of a
    dataset on the hub, whose address is the path."""

    path: str
    start: int
    stop: int


class Part(NamedTuple):
    """What becomes one shard."""

    source: str
    size: int  # bytes in files
    pieces: tuple[Piece, ...]


def files_of(source: Path, corpus: Path | None = None) -> list[Path]:
    """The files that a source stands for, in a fixed order: itself, or those in a folder that hold documents.

    Args:
        source: a file or folder.
        corpus: a folder within the source that is none of it: what is being made.

    Raises:
        FileNotFoundError, ValueError: there is none, or a file that was named is no text.
    """
    if source.is_dir():
        made = None if corpus is None else corpus.resolve()
        paths = (path for path in walk(source) if made is None or made not in path.resolve().parents)
        found = [path for path in paths if path.name.endswith(FORMATS) or is_text(path)]
        of_tables = {path.parent for path in found if path.name.endswith(tables.ARROW)}
        of_tables |= {folder.parent for folder in of_tables}
        found = [path for path in found if path.name not in tables.DESCRIPTIONS or path.parent not in of_tables]
        if not found:
            raise ValueError(
                f"the folder {source} holds no text, JSON lines or tables; name files, or a folder of them"
            )
        return found
    if not source.exists():
        raise FileNotFoundError(f"no file or folder {source}")
    if not source.is_file():  # a pipe has no size and no places to come back to, and may never end
        raise ValueError(f"tokenize: `sources` must be files and folders; got {source}, a pipe or a device")
    if not source.name.endswith(FORMATS) and not is_text(source):
        raise ValueError(
            f"the file {source} is empty, or is not UTF-8 text; other formats are known by their names' ends: "
            f"{', '.join(FORMATS)}"
        )
    return [source]


def parts_of(sources: Mapping[str, Sequence[Path | hub.Split]]) -> list[Part]:
    """Cuts files into parts of similar size, always in the same way.

    Args:
        sources: files, or a dataset of the hub, by the name of their source.

    Raises:
        ImportError: a package that reads one of the formats is not installed.
        ValueError: a file is damaged.
    """
    every = [path for paths in sources.values() for path in paths]
    check_readers(path for path in every if isinstance(path, Path))
    total = sum(path.stat().st_size if isinstance(path, Path) else path.size for path in every)
    size = min(max(total // PARTS, SMALLEST), LARGEST)
    found = []
    for source, paths in sources.items():
        pieces: list[Piece] = []
        filled = 0
        for piece, weight in (found for path in paths for found in _pieces(path, size)):
            pieces.append(piece)
            filled += weight
            if filled >= size:
                found.append(Part(source, filled, tuple(pieces)))
                pieces, filled = [], 0
        if pieces:
            found.append(Part(source, filled, tuple(pieces)))
    return found


def check_readers(paths: Iterable[Path]) -> None:
    """Whatever reads the files is installed.

    Raises:
        ImportError: it is not.
    """
    names = [path.name for path in paths]
    for suffixes, modules, package in (
        (tables.PARQUET, ("pyarrow",), "pyarrow"),
        (tables.ARROW, ("pyarrow",), "pyarrow"),
        (ZSTD, ("compression.zstd", "zstandard"), "zstandard"),
    ):
        if any(name.endswith(suffixes) for name in names) and not any(map(_installed, modules)):
            raise ImportError(f"reading {suffixes[0]} files needs {package}: pip install {package}")


def documents(piece: Piece, key: str) -> Iterator[tuple[str, bool]]:
    """The documents of a piece that are not empty: fragments of their text, and whether a document ends with each.

    Args:
        piece: of a file.
        key: of JSON and tables, the name of the text.

    Raises:
        ValueError: something else is there; names the file and the place.
    """
    for text in _texts(piece, key):
        start = 0
        while len(text) - start > FRAGMENT:
            end = text.find("\n", start + FRAGMENT, start + FRAGMENT + REACH) + 1
            yield text[start : end or start + FRAGMENT], False
            start = end or start + FRAGMENT
        if text:
            yield text[start:], True


def _pieces(path: Path | hub.Split, size: int) -> Iterator[tuple[Piece, int]]:
    """A file's pieces, and how many bytes each has."""
    if isinstance(path, hub.Split):
        for i in range(path.files):  # of unknown sizes each is a part, so that processes share them
            yield Piece(path.address, i, i + 1), path.size // path.files if path.size else size
        return
    name, length = path.name, path.stat().st_size
    if name.endswith((*GZIP, *ZSTD)):
        yield Piece(str(path), 0, length), length
    elif name.endswith(TABLES):
        for i, weight in enumerate(tables.sizes(path)):
            yield Piece(str(path), i, i + 1), weight
    else:
        text, start = Stored(path), 0
        while start < length:
            # Readers of JSON lines find the line ends themselves.
            stop = min(start + size, length) if name.endswith(LINES) else cut(text, start + size)  # type: ignore[arg-type]
            yield Piece(str(path), start, stop), stop - start
            start = stop


def _texts(piece: Piece, key: str) -> Iterator[str]:
    name = os.path.basename(piece.path)
    if hub.is_hub(piece.path):  # paths are absolute
        for number in range(piece.start, piece.stop):
            yield from map(_whole, hub.texts(piece.path, number, key))
    elif name.endswith(GZIP):
        yield from _json_texts(piece.path, _undamaged(piece.path, gzip.GzipFile(piece.path)), key)
    elif name.endswith(ZSTD):
        yield from _json_texts(piece.path, _undamaged(piece.path, _open_zstd(piece.path)), key)
    elif name.endswith(LINES):
        yield from _json_texts(piece.path, _lines(piece), key)
    elif name.endswith(TABLES):
        yield from tables.texts(Path(piece.path), piece.start, piece.stop, key)
    else:
        path = piece.path
        with open(path, "rb") as file:
            file.seek(piece.start)
            content = file.read(piece.stop - piece.start)
        try:
            yield content.decode()
        except UnicodeDecodeError as error:
            place = piece.start + error.start
            raise ValueError(
                f"the file {path} is not UTF-8 text at byte {place}; convert it, or leave it out"
            ) from None


def _lines(piece: Piece) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a piece, and where."""
    with open(piece.path, "rb") as file:
        if piece.start:
            file.seek(piece.start - 1)
            while not (rest := file.readline(SMALLEST)).endswith(b"\n") and rest:  # of a line of the piece before
                pass
        at = file.tell()
        while at < piece.stop and (line := file.readline(LONGEST + 1)):
            _check_length(piece.path, at, line)
            yield at, line
            at += len(line)


def _undamaged(path: str, file: BinaryIO | gzip.GzipFile) -> Iterator[tuple[int, bytes]]:
    """The lines of a compressed file, and where they begin in its text."""
    at = 0
    with file:
        while True:
            try:
                line = file.readline(LONGEST + 1)
            except Exception as error:  # each format has errors of its own
                known = isinstance(error, OSError | EOFError | zlib.error) or type(error).__name__ == "ZstdError"
                if not known:
                    raise
                raise ValueError(f"the file {path} is damaged after byte {at} of its text: {error}") from None
            if not line:
                return
            _check_length(path, at, line)
            yield at, line
            at += len(line)


def _check_length(path: str, at: int, line: bytes) -> None:
    if len(line) > LONGEST:
        raise ValueError(
            f"the file {path}, in the line at byte {at} of its text, must end the line within {LONGEST} bytes; got more"
        )


def _json_texts(path: str, lines: Iterator[tuple[int, bytes]], key: str) -> Iterator[str]:
    for at, line in lines:
        if not line.strip():
            continue
        where = f"the file {path}, in the line at byte {at} of its text,"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        yield _whole(_text(where, found, key))


def _text(where: str, found: Any, key: str) -> str:
    if not isinstance(found, dict):
        raise ValueError(f"{where} must have a JSON object; got {type(found).__name__}")
    if key not in found:
        raise ValueError(f"{where} has no {key!r:.80}, only {tables.listed(list(found))}: name one by --key")
    text = found[key]
    if not isinstance(text, str):
        raise ValueError(f"{where} must have text under {key!r:.80}; got {type(text).__name__}")
    return text


def _whole(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _open_zstd(path: str) -> BinaryIO:
    if _installed("compression.zstd"):
        from compression import zstd

        return zstd.open(path, "rb")
    import zstandard

    stream = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True, closefd=True)  # noqa: SIM115
    return io.BufferedReader(stream)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold it
        return False
