"""A corpus out of files: what ``ssmzoo tokenize`` does, for use in Python."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ssmkernels.native import quota
from ssmzoo.checkpoints.checksums import checksum
from ssmzoo.files import LEFT_OVER, replacing, sweep
from ssmzoo.train.corpora import hub
from ssmzoo.train.corpora.manifest import (
    ENDS,
    FILE,
    IDS,
    TOKENIZER,
    Manifest,
    Shard,
    digest,
    is_corpus,
    read_sealed,
    write_manifest,
    write_sealed,
)
from ssmzoo.train.corpora.processes import over_processes
from ssmzoo.train.corpora.shard import RECORD, Job, finished, intact
from ssmzoo.train.corpora.sources import FORMATS, Part, files_of, parts_of
from ssmzoo.train.lock import FILE as LOCK
from ssmzoo.train.lock import locked
from ssmzoo.train.vocabulary import Bytes, open_vocabulary

PLAN = "plan.json"  # what an unfinished corpus is made from

Path_ = str | os.PathLike[str]


def tokenize(
    sources: Path_ | Sequence[Path_] | Mapping[str, Path_],
    out: Path_,
    tokenizer: Path_ | None = None,
    *,
    key: str = "text",
    end: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Manifest:
    """Turns documents into a corpus of token ids to train on.

    A text file is one document; one beyond 16 MiB may become several, cut at line ends. A line of JSON and a row of
    Parquet or Arrow are one each; empty ones are left out. If the call ends early, in whatever way, the next one does
    the rest. On a corpus that is complete, it compares all shards with their checksums and makes those again that
    differ.

    Args:
        sources: files and folders, and datasets of the hub as ``datasets:OWNER/NAME``
            (:mod:`ssmzoo.train.corpora.hub`); by the names that a mixture calls them, or else named after the files.
        out: the corpus's folder: new, empty, or of an earlier call with the same arguments.
        tokenizer: a file of the `tokenizers` library; text becomes bytes if None.
        key: the name of the text in JSON lines and in tables.
        end: the token, by name, that ends each document; None for none.
        workers: processes; as many as there are cores if None. A script that asks for several has to guard its code by
            ``if __name__ == "__main__"``, as :mod:`multiprocessing` wants it.
        progress: is told how many bytes of all are done.

    Raises:
        ValueError, FileNotFoundError, ImportError, OSError: sources, a tokenizer or a folder that do not serve; names
            the file and says what to do.
        RuntimeError: a process was killed.
    """
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise ValueError(f"tokenize: `workers` must be an int of at least 1, or None; got {workers!r}")
    vocabulary = open_vocabulary(None if tokenizer is None else Path(tokenizer))
    end_id = None if end is None else vocabulary.token_id(end)
    if end is not None and end_id is None:
        what = "bytes have none" if isinstance(vocabulary, Bytes) else f"{tokenizer} has none of this name"
        raise ValueError(f"tokenize: `end` must be a token of the tokenizer; got {end!r}, and {what}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a corpus is a folder: choose another --out")
    named, before = _named(sources), _made_from(folder)
    files: dict[str, list[Path | hub.Split]] = {
        name: [hub.found(path, before.get(path))] if isinstance(path, str) else [*files_of(path, folder)]
        for name, path in named.items()
    }
    parts = parts_of(files)
    listed = [
        (str(p), p.stat().st_size, p.stat().st_mtime_ns) if isinstance(p, Path) else p.address
        for paths in files.values()
        for p in paths
    ]
    sum_ = None if tokenizer is None else checksum(Path(tokenizer))
    made_from = {"tokenizer": str(sum_), "key": key, "end": str(end)}
    made_from |= {path: files[name][0].revision for name, path in named.items() if isinstance(path, str)}  # type: ignore[union-attr]
    made_from |= {"sources": digest([listed, parts])}
    folder.mkdir(parents=True, exist_ok=True)
    _check_folder(folder)
    with locked(folder):
        sweep(folder)
        _check_plan(folder, made_from)
        if tokenizer is not None:
            with replacing(folder / TOKENIZER) as path:
                shutil.copyfile(tokenizer, path)
        dtype = vocabulary.dtype.name
        done = _done(folder, parts, dtype)
        complete = sum(parts[i].size for i in done)
        total = sum(part.size for part in parts)
        progress(complete, total)
        job = Job(folder, None if tokenizer is None else folder / TOKENIZER, key, end_id)
        rest = [(i, part) for i, part in enumerate(parts) if i not in done]
        for i, shard in over_processes(job, rest, workers or cores()):
            done[i] = shard
            complete += parts[i].size
            progress(complete, total)
        shards = [done[i] for i in range(len(parts))]
        manifest = Manifest(dtype, vocabulary.size, sum_, end, made_from, shards)
        if manifest.tokens == 0:
            raise ValueError(f"tokenize: `sources` hold no text; got {len(listed)} files of empty documents")
        write_manifest(folder, manifest)
        for path in [folder / PLAN, *folder.glob(f"[0-9]*{RECORD}")]:
            path.unlink(missing_ok=True)
        return manifest


def _named(sources: Path_ | Sequence[Path_] | Mapping[str, Path_]) -> dict[str, Path | str]:
    """Absolute paths, and datasets of the hub as they are, by names.

    Raises:
        ValueError: there is none, or two have one name.
    """
    if isinstance(sources, Mapping):
        pairs = [(str(name), _place(path)) for name, path in sources.items()]
    else:
        paths = [sources] if isinstance(sources, str | os.PathLike) else sources
        pairs = [(_name(place), place) for place in map(_place, paths)]
    if not pairs:
        raise ValueError("tokenize: `sources` must name at least one file or folder")
    for i, (name, path) in enumerate(pairs):
        if name in dict(pairs[:i]):
            raise ValueError(
                f"tokenize: `sources` must have a name each, and {name!r} is that of two, the second at {path}: name "
                "them, as in web=FOLDER code=FOLDER"
            )
    return dict(pairs)


def _place(source: Path_) -> Path | str:
    return source if isinstance(source, str) and hub.is_hub(source) else Path(source).absolute()


def _name(path: Path | str) -> str:
    """What a source is called that nobody named: its file's or folder's name, without the format."""
    if isinstance(path, str):
        return hub.name_of(path)
    suffix = next((suffix for suffix in (*FORMATS, ".txt") if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)


def _check_folder(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if names & {PLAN, FILE, LOCK} or all(LEFT_OVER.fullmatch(name) for name in names):
        return
    raise ValueError(f"{folder} is not empty, and holds no corpus: choose another --out")


def _made_from(folder: Path) -> dict[str, str]:
    """What the corpus in a folder, whole or begun, is made from; nothing if there is none."""
    for name in (FILE, PLAN):
        if (folder / name).is_file():
            return dict(read_sealed(folder / name)["made_from"])
    return {}


def _check_plan(folder: Path, made_from: Mapping[str, str]) -> None:
    """The corpus in a folder, whole or begun, is made from the same; writes down what it is made from.

    One that has been begun and holds no text yet, as after a wrong option, is begun anew.
    """
    found = _made_from(folder)
    others = [what for what in {**found, **made_from} if found.get(what) != made_from.get(what)] if found else []
    if others and not is_corpus(folder) and not (begun := _begun(folder)):
        for path in (*(p for end in (RECORD, IDS, ENDS) for p in folder.glob(f"[0-9]*{end}")), folder / TOKENIZER):
            path.unlink(missing_ok=True)
    elif others:
        was = f" ({found[others[0]]!r:.80})" if others[0] in ("key", "end") else ""
        changed = ", or its files have changed since" if others[0] == "sources" else ""
        what = "a corpus that was" if is_corpus(folder) else f"{begun} shards of a corpus that is not finished,"
        raise ValueError(
            f"{folder} holds {what} made from another `{others[0]}`{was}{changed}: choose another --out, or remove it"
        )
    if others or not found:
        write_sealed(folder / PLAN, {"made_from": dict(made_from)})


def _begun(folder: Path) -> int:
    """How many shards with text an unfinished corpus has."""
    begun = 0
    for path in folder.glob(f"[0-9]*{RECORD}"):
        with contextlib.suppress(OSError, ValueError, KeyError):  # is made again
            begun += read_sealed(path)["tokens"] > 0
    return begun


def _done(folder: Path, parts: Sequence[Part], dtype: str) -> dict[int, Shard]:
    """The shards that need not be made, by number."""
    if is_corpus(folder):
        known = [Shard(**shard) for shard in read_sealed(folder / FILE)["shards"]]
        return {i: shard for i, shard in enumerate(known) if intact(folder, shard)}
    found = ((i, finished(folder, i, dtype)) for i in range(len(parts)))
    return {i: shard for i, shard in found if shard is not None}


def kept(folder: Path) -> int:
    """How many shards a call that goes on with the corpus in a folder finds finished, if nothing has changed."""
    if is_corpus(folder):
        return len(read_sealed(folder / FILE)["shards"])
    return len([*folder.glob(f"[0-9]*{RECORD}")])


def cores() -> int:
    """The cores that this process may use."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(here, quota.cores() or here)


def summary(manifest: Manifest) -> list[list[str]]:
    """Rows of a table: sources, their documents, tokens and bytes."""
    rows = []
    for source in manifest.sources:
        only = dataclasses.replace(manifest, shards=[s for s in manifest.shards if s.source == source])
        rows.append([source, f"{only.documents:,}", f"{only.tokens:,}", f"{only.bytes:,}"])
    return rows
