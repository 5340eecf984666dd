"""Files that take the place of others."""

from __future__ import annotations

import os
import threading

import pytest

from ssmzoo.files import LEFT_OVER, replacing, too_long, unfinished


def test_threads_that_write_the_same_file(tmp_path):
    """Each writes to a place of its own; the last to end stays, whole."""
    path, together = tmp_path / "file", threading.Barrier(3)
    failed = []

    def write(letter):
        try:
            with replacing(path) as temporary, temporary.open("w") as file:
                for _ in range(5):
                    together.wait(300)
                    file.write(letter)
                    file.flush()
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert path.read_text() in ("aaaaa", "bbbbb", "ccccc")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "b" * 208, "short"])
def test_the_longest_names_have_room_for_a_temporary_one(tmp_path, name):
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("content")
        assert LEFT_OVER.fullmatch(temporary.name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert unfinished(tmp_path / name) != unfinished(tmp_path / f"{name[:-1]}c")


@pytest.mark.parametrize(("path", "got"), [("./" + "é" * 128, "256 bytes in a name"), ("ab/" * 1400, "4200 bytes")])
def test_what_the_system_calls_too_long(path, got):
    with pytest.raises(OSError, match="too long") as error:
        os.stat(path)
    told = too_long(error.value.filename)
    assert told.endswith(f"a path must have at most 255 bytes in each name, and 4095 in all; got {got}")
    assert len(told) < 250


def test_a_pipe_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is no regular file"), replacing(tmp_path / "pipe") as path:
        path.write_text("something")
    assert (tmp_path / "pipe").is_fifo()


def test_errors_without_a_number_name_the_file(tmp_path):
    """NumPy's tell no more than how much was written."""
    said = r"cannot write .*model\.gguf: 8 requested and 4 written"
    with pytest.raises(OSError, match=said), replacing(tmp_path / "model.gguf"):
        raise OSError("8 requested and 4 written")
