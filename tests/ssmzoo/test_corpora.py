"""``ssmzoo tokenize``: every document arrives, whatever the format, however the work is cut, wherever it breaks off."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal

import numpy as np
import pytest
import typer

from ssmzoo.bench import approximate
from ssmzoo.commands import tokenize as tokenize_command
from ssmzoo.planning import validation
from ssmzoo.train.corpora import read_manifest, sources, tokenize
from ssmzoo.train.corpora.processes import over_processes
from ssmzoo.train.vocabulary import Tokenizer, decode

TEXTS = ["one", "two\nlines", "café 猫 " * 9, "x" * 200, 'a "quoted" \\ one', *(f"<{i}>" * (i % 7) for i in range(60))]
WHOLE = [text for text in TEXTS if text]


@pytest.fixture
def small_parts(monkeypatch):
    """Many shards of little text."""
    monkeypatch.setattr(sources, "SMALLEST", 150)
    monkeypatch.setattr(sources, "LARGEST", 150)


def json_lines(texts=TEXTS, key="text") -> bytes:
    return "".join(
        json.dumps({"n": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(texts)
    ).encode()


def write(path, content: bytes | str):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def documents(folder) -> list[bytes]:
    """The text of a corpus of bytes."""
    manifest, found = read_manifest(folder), []
    for shard in manifest.shards:
        ids = np.memmap(folder / f"{shard.name}.ids", manifest.dtype, "r") if shard.tokens else np.empty(0)
        ends = np.fromfile(folder / f"{shard.name}.ends", "<i8")
        assert len(ends) == shard.documents
        found += [bytes(part) for part in np.split(ids, ends)[:-1]]
    return found


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_parquet(path):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    parquet.write_table(arrow.table({"n": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=7)


def as_arrow(path):
    """As `datasets` writes it: a stream of record batches."""
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    table = arrow.table({"n": range(len(TEXTS)), "text": TEXTS})
    with arrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table, max_chunksize=7)


def as_zstd(path):
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard")
    half = len(json_lines()) // 2
    frames = [zstandard.compress(part) for part in (json_lines()[:half], json_lines()[half:])]
    path.write_bytes(b"".join(frames))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("docs.jsonl", lambda path: write(path, json_lines() + b"\n \n")),
        ("docs.jsonl", lambda path: write(path, json_lines()[:-1].replace(b"\n", b"\r\n"))),
        (
            "docs.ndjson.gz",
            lambda path: write(path, gzip.compress(json_lines()[:99]) + gzip.compress(json_lines()[99:])),
        ),
        ("docs.jsonl.zst", as_zstd),
        ("docs.parquet", as_parquet),
        ("docs.arrow", as_arrow),
    ],
)
def test_every_document_arrives_in_its_place(tmp_path, name, make):
    make(tmp_path / name)
    made = tokenize(tmp_path / name, tmp_path / "corpus", workers=1)
    assert documents(tmp_path / "corpus") == [text.encode() for text in WHOLE]
    assert (made.documents, made.bytes) == (len(WHOLE), sum(len(text.encode()) for text in WHOLE))
    assert made.sources == ["docs"]
    if name == "docs.jsonl":
        assert len(made.shards) > 10


def test_pieces_of_lines_may_end_anywhere(tmp_path, monkeypatch):
    lines = [b'{"text": "a"}\n', b'{"text": "bc"}\n', b'{"text": "d"}']
    path = write(tmp_path / "x.jsonl", b"".join(lines))
    for size in range(1, 45):
        monkeypatch.setattr(sources, "SMALLEST", size)
        monkeypatch.setattr(sources, "LARGEST", size)
        parts = sources.parts_of({"x": [path]})
        assert [text for part in parts for piece in part.pieces for text, _ in sources.documents(piece, "text")] == [
            "a",
            "bc",
            "d",
        ]


def test_text_files_are_a_document_each_and_large_ones_several(tmp_path, small_parts):
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for i in range(30):
        write(folder / "deep" / f"{i:02d}.md", f"number {i}")
    large = write(folder / "large.txt", "a line of text\n" * 40).read_bytes()
    write(folder / "picture.png", b"\x89PNG\0")
    write(folder / "more.jsonl", json_lines(["from a line"]))
    tokenize(folder, tmp_path / "corpus", workers=1)
    found = documents(tmp_path / "corpus")
    assert found[:30] == [f"number {i}".encode() for i in range(30)]
    assert found[-1] == b"from a line"
    assert b"".join(found[30:-1]) == large
    assert all(part.endswith(b"\n") for part in found[30:-1])
    assert len(found[30:-1]) == 4


def test_long_documents_stay_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FRAGMENT", 10)
    monkeypatch.setattr(sources, "REACH", 4)
    path = write(tmp_path / "x.jsonl", json_lines(["0123456789" * 5, "ab\n" * 20, "x" * 10]))
    tokenize(path, tmp_path / "corpus", workers=1)
    assert documents(tmp_path / "corpus") == [b"0123456789" * 5, b"ab\n" * 20, b"x" * 10]


def test_a_tokenizer_and_an_end(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    words = {"the": 0, "cat": 1, "sat": 2, "?": 3, "<end>": 300}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.add_special_tokens(["<end>"])
    made.save(str(tmp_path / "words.json"))
    path = write(tmp_path / "x.jsonl", json_lines(["the cat", "the cat sat", ""], key="body"))
    corpus = tokenize([path], tmp_path / "corpus", tmp_path / "words.json", key="body", end="<end>", workers=1)
    assert (corpus.dtype, corpus.vocab_size, corpus.tokens, corpus.documents) == ("uint16", 301, 7, 2)
    ids = np.fromfile(tmp_path / "corpus" / "00000.ids", "<u2").tolist()
    assert ids == [0, 1, 300, 0, 1, 2, 300]
    assert decode(Tokenizer(tmp_path / "corpus" / "tokenizer.json"), ids[3:6]) == "the cat sat"
    with pytest.raises(
        ValueError, match=r"`end` must be a token of the tokenizer; got '</s>', and .*words.json has none"
    ):
        tokenize(path, tmp_path / "other", tmp_path / "words.json", end="</s>")
    with pytest.raises(ValueError, match="`end` must be .* bytes have none"):
        tokenize(path, tmp_path / "other", end="</s>")


def test_halves_of_surrogate_pairs_become_the_replacement_character(tmp_path):
    path = write(tmp_path / "x.jsonl", r'{"text": "a\ud83db \ud83d\ude00"}')
    tokenize(path, tmp_path / "corpus", workers=1)
    assert documents(tmp_path / "corpus") == ["a\ufffdb 😀".encode()]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.slow
def test_two_processes_write_what_one_does(tmp_path):
    path, told = write(tmp_path / "x.jsonl", json_lines()), []
    tokenize(path, tmp_path / "one", workers=1)
    tokenize(path, tmp_path / "two", workers=2, progress=lambda done, total: told.append((done, total)))
    assert content(tmp_path / "one") == content(tmp_path / "two")
    size = path.stat().st_size
    assert told[0] == (0, size)
    assert told[-1] == (size, size)
    assert told == sorted(told)
    assert sorted(over_processes(math.sqrt, [1.0, 4.0, 9.0], 2)) == [1, 2, 3]
    with pytest.raises(ValueError, match="math domain error|nonnegative"):
        list(over_processes(math.sqrt, [1.0, -1.0, 4.0], 2))
    with pytest.raises(RuntimeError, match="a process ended with status -9 amid its work"):
        list(over_processes(signal.raise_signal, [signal.SIGKILL] * 3, 2))


def tokenize_until(at: int, path, folder) -> bool:
    """Has a process killed at its ``at``-th change of files; returns whether it came to that."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        return status == 9
    try:
        calls = iter(range(at))

        def dying(change):
            return lambda *a, **k: os._exit(9) if next(calls, None) is None else change(*a, **k)

        for name in ("replace", "fsync", "unlink", "ftruncate"):
            setattr(os, name, dying(getattr(os, name)))
        tokenize(path, folder, workers=1)
        os._exit(0)
    finally:
        os._exit(1)  # an error ends this process too


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_change_of_files_leaves_nothing_torn(tmp_path, small_parts):
    path = write(tmp_path / "x.jsonl", json_lines(["a" * 150, "b"]))
    tokenize(path, tmp_path / "whole", workers=1)
    wanted, at = content(tmp_path / "whole"), 0
    while tokenize_until(at, path, tmp_path / f"at{at}"):
        tokenize(path, tmp_path / f"at{at}", workers=1)
        assert content(tmp_path / f"at{at}") == wanted
        at += 1
    assert at > 20


def test_a_complete_corpus_is_checked_and_mended(tmp_path, small_parts):
    path = write(tmp_path / "x.jsonl", json_lines())
    tokenize(path, tmp_path / "corpus", workers=1)
    wanted = content(tmp_path / "corpus")
    for name in ("00001.ids", "00003.ends"):
        damaged = bytearray(wanted[name])
        damaged[3] ^= 1
        write(tmp_path / "corpus" / name, bytes(damaged))
    (tmp_path / "corpus" / "00002.ids").unlink()
    with pytest.raises(ValueError, match=r"00002.ids must have \d+ bytes; got no file: call `ssmzoo tokenize` again"):
        read_manifest(tmp_path / "corpus")
    tokenize(path, tmp_path / "corpus", workers=1)
    assert content(tmp_path / "corpus") == wanted
    write(tmp_path / "corpus" / "manifest.json", wanted["manifest.json"].replace(b'"documents": 1', b'"documents": 2'))
    with pytest.raises(ValueError, match=r"manifest.json is damaged: make the corpus again"):
        read_manifest(tmp_path / "corpus")


def test_another_corpus_is_not_touched(tmp_path):
    path = write(tmp_path / "x.jsonl", json_lines())
    tokenize(path, tmp_path / "corpus", workers=1)
    wanted = content(tmp_path / "corpus")
    with pytest.raises(ValueError, match="holds a corpus that was made from another `key`"):
        tokenize(path, tmp_path / "corpus", key="n")
    write(path, json_lines() + b"\n")
    with pytest.raises(ValueError, match="another `sources`, or its files have changed since: choose another --out"):
        tokenize(path, tmp_path / "corpus")
    assert content(tmp_path / "corpus") == wanted
    with pytest.raises(ValueError, match="is not empty, and holds no corpus: choose another --out"):
        tokenize(path, tmp_path)


def test_a_corpus_within_its_source_is_none_of_it(tmp_path):
    write(tmp_path / "x.txt", "text")
    wanted = tokenize(tmp_path, tmp_path / "corpus", workers=1)
    assert wanted.tokens == 4
    (tmp_path / "corpus" / "00000.ids").write_bytes(b"damaged")
    assert tokenize(tmp_path, tmp_path / "corpus", workers=1) == wanted
    assert documents(tmp_path / "corpus") == [b"text"]


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("x.jsonl", b'{"text": "a"}\n{"text": ', r"x.jsonl, in the line at byte 14 of its text, is no JSON"),
        ("x.jsonl", b'{"body": "a"}', r"has no 'text', only 'body': name one by --key"),
        ("x.jsonl", b"{}", r"has no 'text', only nothing"),
        ("x.jsonl", b'{"text": 3}', r"must have text under 'text'; got int"),
        ("x.jsonl", b'["text"]', r"must have a JSON object; got list"),
        ("x.jsonl", b'{"text": ""}', r"`sources` hold no text; got 1 files of empty documents"),
        ("x.jsonl.gz", gzip.compress(json_lines())[:-9], r"x.jsonl.gz is damaged after byte \d+ of its text"),
        ("x.jsonl.gz", json_lines(), r"x.jsonl.gz is damaged after byte 0 of its text"),
        ("x.txt", b"good\n" * 20_000 + b"\xff", r"x.txt is not UTF-8 text at byte 100000; convert it, or leave it out"),
        ("x.txt", b"\xff", r"x.txt is empty, or is not UTF-8 text; other formats .* \.parquet"),
        ("x.txt", b"", r"x.txt is empty, or is not UTF-8 text"),
    ],
)
def test_files_that_do_not_serve(tmp_path, name, found, message):
    path = write(tmp_path / name, found)
    with pytest.raises(ValueError, match=message) as error:
        tokenize(path, tmp_path / "corpus", workers=1)
    assert "\n" not in str(error.value)


def test_sources_that_do_not_serve(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        tokenize(tmp_path / "nowhere", tmp_path / "corpus")
    with pytest.raises(ValueError, match="holds no text, JSON lines or tables; name files, or a folder of them"):
        tokenize(tmp_path / "empty", tmp_path / "corpus")
    with pytest.raises(ValueError, match="`sources` must name at least one file or folder"):
        tokenize([], tmp_path / "corpus")
    with pytest.raises(ValueError, match="`workers` must be an int of at least 1, or None; got 0"):
        tokenize(tmp_path, tmp_path / "corpus", workers=0)
    path = write(tmp_path / "x.jsonl", json_lines())
    with pytest.raises(ValueError, match=r"x.jsonl is a file, and a corpus is a folder: choose another --out"):
        tokenize(path, path)
    with pytest.raises(
        ValueError, match="'x' is that of two, the second at .*: name them, as in web=FOLDER code=FOLDER"
    ):
        tokenize([path, write(tmp_path / "x.txt", "text")], tmp_path / "corpus")
    monkeypatch.setattr(sources, "_installed", lambda module: False)
    for name, package in (("x.parquet", "pyarrow"), ("x.jsonl.zst", "zstandard")):
        with pytest.raises(ImportError, match=rf"reading \.\w+.* files needs {package}: pip install {package}"):
            tokenize(write(tmp_path / name, "x"), tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.jsonl", json_lines())
    write(tmp_path / "y.txt", "text")
    app = typer.Typer()
    app.command()(tokenize_command.command)
    app(["a=x.jsonl", "b=y.txt", "--out", "corpus", "--workers", "1"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "ssmzoo train MODEL --data corpus" in shown
    assert "tokens in 2 shards" in shown
    assert read_manifest(tmp_path / "corpus").sources == ["a", "b"]
    for words in (["a=x.jsonl", "y.txt"], ["a=x.jsonl", "a=y.txt"], ["=x.jsonl"], ["a="]):
        with pytest.raises(ValueError, match="`SOURCES`: each must have a name of its own, NAME=PATH"):
            app([*words, "--out", "other"], standalone_mode=False)


DAMAGED = """
import random, sys
from pathlib import Path
from ssmzoo.train.corpora import tables

path = Path(sys.argv[1])
random.seed(0)
whole = path.read_bytes()
for i in range(400):
    data = bytearray(whole)
    if i % 3:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    else:
        del data[random.randrange(len(data)) :]
    path.write_bytes(data)
    try:
        list(tables.texts(path, 0, len(tables.sizes(path)), "text"))
    except ValueError as error:
        assert str(path) in str(error), error
        assert "\\n" not in str(error), error
"""


@pytest.mark.parametrize(("name", "make"), [("x.parquet", as_parquet), ("x.arrow", as_arrow)])
def test_damaged_tables_are_told_in_a_line(name, make, tmp_path, apart):
    """Bits that are turned, and ends that are missing: in a process of its own, as damage once reached native code."""
    make(tmp_path / name)
    apart(DAMAGED, tmp_path / name)


def test_a_saved_dataset(tmp_path):
    """Of a dataset that is saved by its splits, rows are documents, and what describes it is none."""
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    splits = {
        "train": datasets.Dataset.from_dict({"text": WHOLE}).select(range(1, len(WHOLE))).shuffle(seed=0),
        "test": datasets.Dataset.from_dict({"text": WHOLE}).select([0]),
    }
    expected = [text for split in ("test", "train") for text in splits[split]["text"]]
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    tokenize(tmp_path / "saved", tmp_path / "out", workers=1)
    assert documents(tmp_path / "out") == [text.encode() for text in expected]


def test_pipes_and_devices_are_no_sources(tmp_path):
    """Opening a pipe waits for somebody who writes into it."""
    for name in ("x.jsonl", "x.txt", "x.parquet", "x.jsonl.gz"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"`sources` must be files and folders; got .*{name}, a pipe or a device"):
            tokenize(tmp_path / name, tmp_path / "corpus")
    with pytest.raises(ValueError, match="got /dev/zero, a pipe or a device"):
        tokenize("/dev/zero", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("pack", [gzip.compress, bytes])
def test_a_line_that_does_not_end(tmp_path, monkeypatch, pack):
    """A document is in memory whole, and a small compressed file may hold any number of bytes without a line end."""
    monkeypatch.setattr(sources, "LONGEST", 1000)
    name = "x.jsonl.gz" if pack is gzip.compress else "x.jsonl"
    fits = b'{"text": "a"}\n' + b'{"text": "' + b"b" * (1000 - 13) + b'"}\n'
    assert tokenize(write(tmp_path / name, pack(fits)), tmp_path / "corpus", workers=1).documents == 2
    path = write(tmp_path / name, pack(fits + b'{"text": "' + b"c" * 10**6))
    with pytest.raises(
        ValueError, match=rf"{name}, in the line at byte 1014 of its text, must end the line within 1000"
    ):
        tokenize(path, tmp_path / "other", workers=1)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([f"key{i}" for i in range(5000)], r"no.* 'text', only 'key0', 'key1', .*'key7' and 4992 more: name one"),
        (["k" * 5000, "\x1b[2J\n"], r"no.* 'text', only 'k{79}, '\\x1b\[2J\\n': name one"),
    ],
)
def test_names_in_a_file_stay_in_one_line(tmp_path, names, said):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    json_file = write(tmp_path / "x.jsonl", json.dumps(dict.fromkeys(names, 1)).encode())
    table = pyarrow.table({name: ["a"] for name in names})
    parquet.write_table(table, tmp_path / "x.parquet")
    for path in (json_file, tmp_path / "x.parquet"):
        with pytest.raises(ValueError, match=said) as error:
            tokenize(path, tmp_path / f"of{path.suffix}", workers=1)
        assert str(error.value).isprintable()


def test_two_columns_of_one_name(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet has 2 columns 'text', only 'text', 'text': name one by --key"):
        tokenize(tmp_path / "x.parquet", tmp_path / "corpus", workers=1)


@pytest.mark.parametrize("word", ["0", "-1", "1.5", "9" * 5000, ""])
@pytest.mark.parametrize(
    ("main", "options"),
    [
        (approximate.main, ["--length", "--samples"]),
        (validation.main, ["--length"]),
    ],
    ids=["approximate", "validation"],
)
def test_numbers_of_commands(capsys, main, options, word):
    for option in options:
        with pytest.raises(SystemExit) as stop:
            main([f"{option}={word}"])
        assert stop.value.code == 2
        shown = capsys.readouterr().err.splitlines()[-1]
        assert f"{option}: must be a whole number from 1 to 999999999; got " in shown
        assert len(shown) < 300


def test_validation_needs_a_token_a_rank(capsys):
    with pytest.raises(SystemExit):
        validation.main(["--length", "1"])
    assert "--length: must be at least 2, a token a rank; got 1" in capsys.readouterr().err
