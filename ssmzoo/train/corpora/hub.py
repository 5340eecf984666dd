"""Datasets of the Hugging Face hub, streamed by the package ``datasets``. No code from there is ever run.

A source is ``datasets:OWNER/NAME``, with ``@REVISION`` after it if not the newest is meant, and ``:CONFIG`` and
``:SPLIT`` if there are several. Each of a split's data files is read by itself, at the commit that was found first.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PREFIX = "datasets:"
LEAST = 4  # the first version that cannot run a repository's code
WORD = r"[\w.+-]+"
NAME = r"[^:/\\\x00-\x1f\x7f]+"  # of a configuration or a split, where datasets allows spaces and more
SOURCE = re.compile(rf"{PREFIX}({WORD}(?:/{WORD})?)(?:@([\w./+-]+))?((?::{NAME}){{0,2}})")
PATIENCE = 10  # seconds for the hub's first answer
LONGEST = 2**30  # bytes of a document
END = object()
FORM = "datasets:OWNER/NAME, with @REVISION, :CONFIG and :SPLIT after it if need be"


class Split(NamedTuple):
    """A split of a dataset at a commit.

    Attributes:
        repository: on the hub.
        revision: the commit.
        config, split: names in it.
        files: how many data files it has.
        size: bytes of its text, if its description says it; or else 0.
    """

    repository: str
    revision: str
    config: str
    split: str
    files: int
    size: int

    @property
    def address(self) -> str:
        """From which any process finds it again."""
        return f"{PREFIX}{self.repository}@{self.revision}:{self.config}:{self.split}"


def is_hub(source: object) -> bool:
    """Whether a source is a dataset of the hub, and no path."""
    return isinstance(source, str) and source.startswith(PREFIX)


def name_of(source: str) -> str:
    """What a mixture calls it that has no name of its own: that of the repository, without its owner.

    Raises:
        ValueError: it has another form.
    """
    return _parsed(source)[0].rpartition("/")[2]


def found(source: str, pinned: str | None) -> Split:
    """The split that a source names.

    Args:
        source: of the form above.
        pinned: the commit that it had before, where a corpus has been begun: a branch may have moved since.

    Raises:
        ImportError: the package is not installed, or so old that it could run code of the repository.
        FileNotFoundError: no such dataset, or none in the cache while the package is offline.
        ValueError: another form, or no such configuration or split.
        ConnectionError: the hub is out of reach.
    """
    repository, revision, words = _parsed(source)
    if Path(repository).exists():
        raise ValueError(f"tokenize: `sources` has {source!r}, and {repository} is here: name it without {PREFIX}")
    revision = pinned or revision
    datasets = _package(source)
    _check_reach(source, repository)
    config, split = (*words, None, None)[:2]
    with _told(source):
        if len(words) == 1 and words[0] not in datasets.get_dataset_config_names(repository, revision=revision):
            config, split = None, words[0]
        builder = datasets.load_dataset_builder(repository, config, revision=revision)
        split = split or "train"
        files = builder.as_streaming_dataset(split=split).num_shards
    described = (builder.info.splits or {}).get(split)
    size = getattr(described, "num_bytes", None)  # anybody wrote it, and anything
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < 2**63:
        size = 0
    return Split(repository, builder.hash, builder.config.name, split, files, size)


def texts(address: str, number: int, key: str) -> Iterator[str]:
    """The texts in one data file of a split; without those that are null.

    Args:
        address: of :attr:`Split.address`.
        number: of the file.
        key: the column.

    Raises:
        ValueError: there is no such column of text, a text is too long, or the file is damaged.
        ConnectionError: the hub is out of reach.
    """
    stream = _stream(address)
    if stream.column_names is not None:
        _check(address, key, stream.column_names)
        stream = stream.select_columns([key])
    rows = iter(stream.shard(num_shards=stream.num_shards, index=number))
    while True:
        with _told(address):
            row = next(rows, END)
        if row is END:
            return
        if not isinstance(row, dict):
            raise ValueError(f"`sources`: {address} must have rows of named columns; got {type(row).__name__}")
        _check(address, key, list(row))
        text = row[key]
        if text is None:
            continue
        if not isinstance(text, str):
            raise ValueError(f"{address} must have text in the column {key!r:.80} (--key); got {type(text).__name__}")
        if len(text) > LONGEST // 4 and len(text.encode(errors="replace")) > LONGEST:
            raise ValueError(f"{address} must have at most {LONGEST} bytes in a row of {key!r:.80} (--key); got more")
        yield text


def _check(address: str, key: str, columns: list[str]) -> None:
    from ssmzoo.train.corpora.tables import listed

    if key not in columns:
        raise ValueError(f"{address} has no column {key!r:.80}, only {listed(columns)}: name one by --key")


def _parsed(source: str) -> tuple[str, str | None, list[str]]:
    match = SOURCE.fullmatch(source)
    if match is None:
        raise ValueError(f"tokenize: `sources` must name datasets as {FORM}; got {source!r:.200}")
    return match[1], match[2], match[3].split(":")[1:]


@functools.lru_cache(maxsize=4)
def _stream(address: str) -> Any:
    repository, revision, (config, split) = _parsed(address)
    datasets = _package(address)
    with _told(address):
        builder = datasets.load_dataset_builder(repository, config, revision=revision)
        stream = builder.as_streaming_dataset(split=split)
    if builder.hash != revision:
        raise FileNotFoundError(f"{address} is out of reach, and what the cache has is of {builder.hash}")
    return stream


def _check_reach(source: str, repository: str) -> None:
    """One request, as ``datasets`` makes each of many six times, minutes long, before it says that nobody is there.

    Raises:
        ConnectionError: the hub is out of reach, and not because the package is told to be offline.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    try:
        with _told(source):
            HfApi().dataset_info(repository, timeout=PATIENCE)
    except (FileNotFoundError, ValueError):  # there is an answer: datasets tells more about it
        pass


def _package(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source} is on the Hugging Face hub, which needs datasets: pip install datasets") from None
    version = str(datasets.__version__)
    if int(version.partition(".")[0]) < LEAST:
        raise ImportError(
            f"{source} needs version {LEAST} of datasets or a newer one, which run no code of a repository; got "
            f"{version}: pip install --upgrade datasets"
        )
    return datasets


class _told:
    """Whatever ``datasets`` raises becomes one line that names the source."""

    def __init__(self, source: str):
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        source, told = self.source, " ".join(str(error).split())[:400] or type(error).__name__
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(f"{source} is not there, or not for you: {told}") from None
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith(("httpx", "aiohttp")):
            raise ConnectionError(f"{source} is out of reach: {told}. Call again to go on") from None
        raise ValueError(f"{source} cannot be read: {told}") from None
