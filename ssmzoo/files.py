"""Replacing files so that a crash leaves the old or the new one, and tidying up after processes that were killed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

LEFT_OVER = re.compile(r"\..+\.tmp")  # what a process that was killed may leave
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes, in Linux; macOS has shorter paths
ROOM = 48  # bytes of a temporary file's name beside that of the file


def sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of files, to disk now."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Has errors of the system in the block name ``path`` where they name no file: those of writing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def unfinished(path: Path) -> Path:
    """A hidden name beside a path that no other thread or process writes to."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME - ROOM:
        name = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}-{threading.get_ident()}.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its place on disk once the block has succeeded.

    Raises:
        OSError: the file cannot be written; it names ``path``, whose content is as it was. Devices and pipes, which a
            file would take the place of, are refused.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(f"{path} is no regular file, and is not replaced by one")
    temporary = unfinished(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        if error.errno is None and type(error) is OSError:  # NumPy's, on a full disk
            raise OSError(f"cannot write {path}: {error}") from error
        if error.errno is not None:  # or it is what was being written that could not be had, as from a hub
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def too_long(path: str | bytes) -> str:
    """Why the system takes no such path, in a line that shows its beginning."""
    text = os.fsdecode(path)
    name = max(len(os.fsencode(part)) for part in text.split(os.sep))
    got = f"{name} bytes in a name" if name > LONGEST_NAME else f"{len(os.fsencode(text))} bytes"
    most = f"at most {LONGEST_NAME} bytes in each name, and {LONGEST_PATH} in all"
    return f"no file can be at {text!r:.80}: a path must have {most}; got {got}"


def link(source: Path, target: Path) -> None:
    """A second name for a file, which takes no room; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def remove(folder: Path) -> None:
    """Removes a folder so that no crash leaves half of it under its name."""
    hidden = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def sweep(folder: Path) -> None:
    """Removes what killed processes have left unfinished in a folder that no other process writes to."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
