"""Files that take the place of others."""

from __future__ import annotations

import os
import threading

import pytest

from ssmzoo.files import replacing


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
