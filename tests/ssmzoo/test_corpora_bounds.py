"""``ssmzoo tokenize``: a wrong option costs nothing, and small files that unpack to much do not take memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import parquet_attack
import pytest

from ssmzoo.train.corpora import read_manifest, sources, tables, tokenize, unpacked
from ssmzoo.train.corpora.tokenize import PLAN

ROWS = '{"text": "one", "body": "two"}\n' * 9


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(ROWS)
    return path


def test_a_wrong_option_is_put_right_by_the_next_call(tmp_path, lines):
    out = tmp_path / "corpus"
    for wrong, message in (({"key": "txt"}, "has no 'txt'"), ({"key": "n"}, "has no 'n'")):
        with pytest.raises(ValueError, match=message):
            tokenize(lines, out, workers=1, **wrong)
    assert (out / PLAN).is_file()
    assert tokenize(lines, out, key="body", workers=1).bytes == 27
    assert sorted(path.name for path in out.iterdir() if "lock" not in path.name) == [
        "00000.ends",
        "00000.ids",
        "manifest.json",
    ]
    assert read_manifest(out).made_from["key"] == "body"


def test_files_without_text_are_replaced_by_others(tmp_path, lines):
    empty = tmp_path / "y.jsonl"
    empty.write_text('{"text": ""}\n' * 9)
    with pytest.raises(ValueError, match="`sources` hold no text"):
        tokenize(empty, tmp_path / "corpus", workers=1)
    assert tokenize(lines, tmp_path / "corpus", workers=1).documents == 9


def test_work_that_is_done_is_not_thrown_away(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(sources, "SMALLEST", len(ROWS) // 3)
    monkeypatch.setattr(sources, "LARGEST", len(ROWS) // 3)
    lines.write_text(ROWS + '{"body": "three"}\n')
    out = tmp_path / "corpus"
    with pytest.raises(ValueError, match="has no 'text', only 'body'"):
        tokenize(lines, out, workers=1)
    with pytest.raises(ValueError, match=r"holds 3 shards of a corpus that is not finished, made from another `key`"):
        tokenize(lines, out, key="body", workers=1)
    with pytest.raises(ValueError, match=r"another `key` \('text'\): choose another --out, or remove it"):
        tokenize(lines, out, key="body", workers=1)


def test_rows_that_share_a_value_are_read_one_by_one(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    monkeypatch.setattr(unpacked, "ROOM", 2**21)
    path, text = tmp_path / "x.parquet", "x" * 2**20
    parquet.write_table(pyarrow.table({"text": [text] * 256}), path, dictionary_pagesize_limit=2**22)
    assert path.stat().st_size < 2**18
    pool = pyarrow.default_memory_pool()
    before, count, most = pool.bytes_allocated(), 0, 0
    for found in tables.texts(path, 0, 1, "text"):
        assert found == text
        count, most = count + 1, max(most, pool.bytes_allocated() - before)
    assert count == 256
    assert most < 8 * 2**20


def test_few_rows_are_read_at_once_where_they_are_long(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    monkeypatch.setattr(unpacked, "ROOM", 2**22)
    path, texts = tmp_path / "x.parquet", [chr(ord("a") + i) * 2**21 for i in range(26)]
    apart = {"use_dictionary": False, "data_page_size": 2**20, "write_batch_size": 1}
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", **apart)
    pool = pyarrow.default_memory_pool()
    before, most, found = pool.bytes_allocated(), 0, []
    for text in tables.texts(path, 0, 1, "text"):
        found.append(text)
        most = max(most, pool.bytes_allocated() - before)
    assert found == texts
    assert most < 16 * 2**20


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc, for a process's memory")
def test_parquet_that_lies(tmp_path):
    """About sizes, counts and places, in the footer and in pages: each file is read, or refused in a line, in little
    memory, of which all rows at once would take more."""
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment |= {"OMP_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    command = [sys.executable, "-W", "error", parquet_attack.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr[-2000:]


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_rows_that_repeat_the_one_before_are_read_one_by_one(tmp_path, monkeypatch, encoding, version):
    """A page holds of each only what differs, so that a batch of rows may be many times as large."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    monkeypatch.setattr(unpacked, "ROOM", 2**18)
    path, texts = tmp_path / "x.parquet", ["x" * 2**17] * 64 + [None, "", "y"]
    options = {"use_dictionary": False, "column_encoding": {"text": encoding}, "data_page_version": version}
    parquet.write_table(pyarrow.table({"text": texts}), path, data_page_size=2**24, **options)
    pool = pyarrow.default_memory_pool()
    before, most, found = pool.bytes_allocated(), 0, []
    for text in tables.texts(path, 0, 1, "text"):
        found.append(text)
        most = max(most, pool.bytes_allocated() - before)
    assert found == [*texts[:64], "", "y"]
    page = 2**17 if encoding == "DELTA_BYTE_ARRAY" else 2**23
    assert most < 3 * page + 2**20


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip", "lz4", "brotli"])
@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("nulls", [True, False])
def test_texts_as_differences(tmp_path, codec, encoding, version, nulls):
    """In pages that begin amid them, some of them of nulls alone."""
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    texts = [f"{'beginning ' * (i % 7)}{i}" for i in range(2000)]
    texts += ([None] * 1500 if nulls else []) + ["the last"]
    table = pyarrow.table([texts], schema=pyarrow.schema([pyarrow.field("text", pyarrow.string(), nulls)]))
    options = {"use_dictionary": False, "column_encoding": {"text": encoding}, "data_page_version": version}
    parquet.write_table(
        table, tmp_path / "x.parquet", compression=codec, data_page_size=2**9, write_batch_size=100, **options
    )
    assert list(tables.texts(tmp_path / "x.parquet", 0, 1, "text")) == [text for text in texts if text is not None]


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_a_row_beyond_memory_is_refused(tmp_path, monkeypatch, kind):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    monkeypatch.setattr(tables, "LONGEST", 1000)
    path = tmp_path / "x.parquet"
    texts = pyarrow.array(["x" * 400] * 5, getattr(pyarrow, kind)())
    parquet.write_table(pyarrow.table({"text": texts}), path)
    assert tokenize(path, tmp_path / "corpus", workers=1).documents == 5
    parquet.write_table(pyarrow.table({"text": ["x" * 1001]}), path)
    with pytest.raises(ValueError, match=r"x.parquet must have at most 1000 bytes in a row of 'text'; got more"):
        tokenize(path, tmp_path / "other", workers=1)


@pytest.mark.parametrize("codec", [None, "zstd", "lz4"])
def test_batches_of_arrow_are_weighed_before_they_are_unpacked(tmp_path, monkeypatch, codec):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    path = tmp_path / "x.arrow"
    table = pyarrow.table({"n": range(64), "text": ["y" * 2**14] * 64})
    with pyarrow.ipc.new_stream(path, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=codec)) as stream:
        stream.write_table(table, max_chunksize=32)
    plain = sum(batch.nbytes for batch in table.to_batches(32))
    assert sum(tables.sizes(path)) == pytest.approx(plain, rel=0.01)
    assert list(tables.texts(path, 1, 2, "text")) == ["y" * 2**14] * 32
    assert tokenize(path, tmp_path / "corpus", workers=1).documents == 64
    monkeypatch.setattr(tables, "LONGEST", 2**18)
    before = pyarrow.default_memory_pool().bytes_allocated()
    if codec is None:  # is read where it lies in the file
        tables.sizes(path)
        return
    with pytest.raises(ValueError, match=r"x.arrow must have at most 262144 bytes in a batch of rows; got 52"):
        tokenize(path, tmp_path / "other", workers=1)
    assert pyarrow.default_memory_pool().bytes_allocated() - before < 2**18
