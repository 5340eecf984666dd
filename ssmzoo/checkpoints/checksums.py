"""Folders whose files belong together: replaced so that a crash leaves all old or all new ones, with checksums.

``checksums.json`` lists the versions of a folder's files that are whole: one, or two during a replacement.
A folder without it is not checked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ssmzoo.files import replacing, sync, unfinished

SUMS = "checksums.json"
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints

Version = dict[str, str]  # file name → checksum


def checksum(path: Path) -> str:
    """A file's BLAKE2 checksum."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while piece := file.read(2**20):
            found.update(piece)
    return found.hexdigest()


def install(folder: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Replaces or adds files of a folder and renews its checksums.

    A crash at any moment leaves each file old or new; :func:`check` accepts all old or all new ones, and
    refuses a mixture.

    Args:
        folder: where the files are.
        writers: functions that write a file to the path that they are given, by the file's name.
    """
    old: list[Version] = []
    with contextlib.suppress(ValueError):  # damaged files have no version to keep
        old = [version for version in [check(folder)] if version is not None]
    new: Version = dict(old[0]) if old else {}
    with contextlib.ExitStack() as stack:
        temporaries: dict[str, Path] = {}
        for name, write in writers.items():
            temporaries[name] = unfinished(folder / name)
            stack.callback(temporaries[name].unlink, missing_ok=True)
            temporaries[name].unlink(missing_ok=True)
            write(temporaries[name])
            sync(temporaries[name])
            new[name] = checksum(temporaries[name])
        if old:
            _write_versions(folder, [*old, new])
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
        sync(folder)
        _write_versions(folder, [new])


def seal(folder: Path) -> None:
    """Writes the files of a new folder to disk, with their checksums."""
    paths = sorted(folder.iterdir())
    for path in paths:
        sync(path)
    _write_versions(folder, [{path.name: checksum(path) for path in paths}])


def versions(folder: Path) -> list[Version]:
    """What ``checksums.json`` lists; nothing where there is none.

    Raises:
        ValueError: it is damaged.
    """
    try:
        content = (folder / SUMS).read_bytes()
    except FileNotFoundError:
        return []
    try:
        found = json.loads(content)
        whole = isinstance(found, dict) and found["checksum"] == _digest(found["versions"])
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{folder / SUMS} is damaged: copy the folder again, or use another")
    return found["versions"]


def check(folder: Path) -> Version | None:
    """Compares the files of a folder with its checksums.

    Returns:
        The version that they all belong to; None where the folder has no checksums.

    Raises:
        ValueError: a file is damaged or missing; names it.
    """
    known = versions(folder)
    found = [_differences(folder, version) for version in known]
    for version, differences in zip(known, found, strict=True):
        if not differences:
            return version
    if not known:
        return None
    name, state = min(found, key=len)[0]
    raise ValueError(f"{folder / name} {state}: copy it again, or use another folder")


def newest(folder: Path, weights: str) -> Path:
    """The folder whose model counts: the newest checkpoint of a run that was killed before it renewed its own files.

    Args:
        folder: of a model, a run or a checkpoint.
        weights: the name of the file of weights.

    Raises:
        ValueError: a file differs from its checksum.
    """
    steps = checkpoints(folder)
    known = check(folder)
    own = (known or {}).get(weights)
    if own is None and steps and (folder / weights).is_file():
        own = checksum(folder / weights)  # killed before the first checksums, or a model was saved over the run
    older = [version.get(weights) for step in steps[:-1] for version in versions(step)]
    last = [version.get(weights) for step in steps[-1:] for version in versions(step)]
    if steps and (own is None or (own in older and own not in last)):
        check(steps[-1])
        return steps[-1]
    return folder


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, by their steps, lowest first."""
    found = []
    if (run / CHECKPOINTS).is_dir():
        for path in (run / CHECKPOINTS).iterdir():
            match = re.fullmatch(r"step-([0-9]+)", path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path.name, path))
    return [path for _, _, path in sorted(found)]


def _differences(folder: Path, version: Version) -> list[tuple[str, str]]:
    """Files that are not of a version, and what is wrong with each."""
    found = []
    for name, wanted in version.items():
        path = folder / name
        if not path.is_file():
            found.append((name, "is missing"))
        elif checksum(path) != wanted:
            found.append((name, "is damaged: it differs from its checksum"))
    return found


def _write_versions(folder: Path, known: list[Version]) -> None:
    with replacing(folder / SUMS) as path:
        path.write_text(json.dumps({"versions": known, "checksum": _digest(known)}, indent=1))


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
