"""``ssmzoo tokenize datasets:OWNER/NAME``: a hub that moves and refuses, in a package that stands for it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from ssmzoo.commands import tokenize as command
from ssmzoo.train.corpora import hub, read_manifest, tokenize
from ssmzoo.train.corpora.tokenize import PLAN

PACKAGE = """
import json
from pathlib import Path
from types import SimpleNamespace

__version__ = "4.0.0"

def _hub():
    return json.loads((Path(__file__).parents[2] / "hub.json").read_text())  # other processes have other variables

def _commit(repository, revision):
    if repository not in _hub():
        raise FileNotFoundError(f"Dataset '{repository}' doesn't exist on the Hub or cannot be accessed.")
    found = _hub()[repository]
    name = found["newest"] if revision in (None, "newest") else revision
    if name not in found:
        raise FileNotFoundError(f"Revision '{revision}' doesn't exist for dataset '{repository}' on the Hub.")
    return name, found[name]

def get_dataset_config_names(repository, revision=None):
    return list(_commit(repository, revision)[1])

def load_dataset_builder(repository, config=None, revision=None):
    name, configs = _commit(repository, revision)
    if config is None and len(configs) > 1:
        raise ValueError(f"Config name is missing.\\nPlease pick one among the available configs: {list(configs)}")
    config = config or next(iter(configs))
    if config not in configs:
        raise ValueError(f"BuilderConfig '{config}' not found. Available: {list(configs)}")

    size = _hub()[repository].get("bytes")
    splits = None if size is None else {split: SimpleNamespace(num_bytes=size) for split in configs[config]}

    def streaming(split):
        if split not in configs[config]:
            raise ValueError(f"Bad split: {split}. Available splits: {list(configs[config])}")
        return Stream(configs[config][split])

    return SimpleNamespace(
        hash=name, config=SimpleNamespace(name=config), info=SimpleNamespace(splits=splits),
        as_streaming_dataset=streaming,
    )

class Stream:
    column_names = None

    def __init__(self, files, keys=None):
        self.files = files
        self.num_shards = len(files)

    def shard(self, num_shards, index):
        assert num_shards == self.num_shards
        return Stream([self.files[index]])

    def __iter__(self):
        for rows in self.files:
            for row in rows:
                if row == "break off":
                    raise ConnectionError("the line is dead")
                yield row
"""


def rows(*texts):
    return [{"text": text, "n": 1} for text in texts]


FIRST = {"default": {"train": [rows("one", None, "two\nlines"), rows(), rows("café", "")], "test": [rows("last")]}}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts datasets on the hub: repository → commit → config → split → files of rows."""
    package, place = tmp_path / "packages" / "datasets", tmp_path / "hub.json"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(hub, "_check_reach", lambda source, repository: None)

    def put(**repositories):
        hub._stream.cache_clear()
        place.write_text(json.dumps({"o/" + name: content for name, content in repositories.items()}))

    put(n={"newest": "c1", "c1": FIRST})
    yield put
    sys.modules.pop("datasets", None)
    hub._stream.cache_clear()


def documents(folder):
    manifest, found = read_manifest(folder), []
    for shard in manifest.shards:
        ids, ends = (
            np.fromfile(folder / f"{shard.name}{end}", kind) for end, kind in ((".ids", "u1"), (".ends", "<i8"))
        )
        found += [bytes(part).decode() for part in np.split(ids, ends)[:-1]]
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_documents(tmp_path, fake, workers):
    made = tokenize("datasets:o/n", tmp_path / "out", workers=workers)
    assert documents(tmp_path / "out") == ["one", "two\nlines", "café"]
    assert made.sources == ["n"]
    assert made.made_from["datasets:o/n"] == "c1"
    assert tokenize("datasets:o/n", tmp_path / "out", workers=1) == made


def test_configurations_splits_and_names(tmp_path, fake):
    two = {"a": {"train": [rows("a")], "b": [rows("ab")]}, "b": {"train": [rows("b")], "x": [rows("bx")]}}
    fake(n={"newest": "c1", "c1": two}, m={"newest": "c9", "c9": FIRST}, **{"old.set-1": {"newest": "c", "c": FIRST}})
    for source, wanted in (("n:a", ["a"]), ("n:b", ["b"]), ("n:a:b", ["ab"]), ("n:b:x", ["bx"]), ("m:test", ["last"])):
        tokenize(f"datasets:o/{source}", tmp_path / source, workers=1)
        assert documents(tmp_path / source) == wanted
    assert hub.found("datasets:o/old.set-1@c", None).address == "datasets:o/old.set-1@c:default:train"
    named = command.named(["web=datasets:o/m:test", "code=datasets:o/n:a"])
    assert tokenize(named, tmp_path / "mixed", workers=1).sources == ["web", "code"]
    assert documents(tmp_path / "mixed") == ["last", "a"]


@pytest.mark.parametrize("name", ["My Config", "en (US)", "zh-CN,à", "a=b"])
def test_names_of_configurations_have_spaces_and_more(tmp_path, fake, name):
    fake(
        n={"newest": "c1", "c1": {name: FIRST["default"]}},
        m={"newest": "c1", "c1": {"other": {}, name: {"x": [rows("m")]}}},
    )
    for source, wanted in (("n", "one"), (f"n:{name}", "one"), (f"m:{name}:x", "m")):
        out = tmp_path / source
        tokenize(command.named([f"datasets:o/{source}"]), out, workers=1)
        assert documents(out)[0] == wanted


def test_files_of_unknown_sizes_are_parts_and_small_ones_share_one(tmp_path, fake):
    for i, (size, shards) in enumerate(
        [(None, 3), (24, 1), (0, 3), (-5, 3), ("many", 3), (math.nan, 3), (2**99, 3), (True, 3)]
    ):
        fake(n={"newest": "c1", "c1": FIRST, "bytes": size})
        made = tokenize("datasets:o/n", tmp_path / str(i), workers=1)
        assert len(made.shards) == shards, size
        assert documents(tmp_path / str(i)) == ["one", "two\nlines", "café"]


def test_a_branch_that_moves_leaves_a_corpus_at_its_commit(tmp_path, fake):
    tokenize("datasets:o/n@newest", tmp_path / "out", workers=1)
    fake(n={"newest": "c2", "c1": FIRST, "c2": {"default": {"train": [rows("another")]}}})
    assert tokenize("datasets:o/n@newest", tmp_path / "out", workers=1).made_from["datasets:o/n@newest"] == "c1"
    assert tokenize("datasets:o/n@newest", tmp_path / "new", workers=1).made_from["datasets:o/n@newest"] == "c2"


@pytest.mark.parametrize("row", [None, 3, "text", ["text"]])
def test_rows_have_columns(tmp_path, fake, row):
    fake(n={"newest": "c1", "c1": {"default": {"train": [[*rows("one"), row, *rows("two")]]}}})
    with pytest.raises(ValueError, match=f"must have rows of named columns; got {type(row).__name__}"):
        tokenize("datasets:o/n", tmp_path / "out", workers=1)


def test_a_text_beyond_memory_is_refused(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(hub, "LONGEST", 40)
    fake(n={"newest": "c1", "c1": {"default": {"train": [rows("é" * 20)], "x": [rows("é" * 21)]}}})
    assert tokenize("datasets:o/n", tmp_path / "out", workers=1).bytes == 40
    with pytest.raises(ValueError, match=r"must have at most 40 bytes in a row of 'text' \(--key\); got more"):
        tokenize("datasets:o/n:x", tmp_path / "new", workers=1)


def test_a_hub_out_of_reach_is_told_at_once(monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants", reason="needs huggingface_hub")
    with socket.socket() as listener:  # a port where nobody listens once it is closed
        listener.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="datasets:o/n is out of reach: .*Call again to go on"):
        hub._check_reach("datasets:o/n", "o/n")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the cache may have it
    hub._check_reach("datasets:o/n", "o/n")


def test_what_breaks_off_goes_on_at_the_same_commit(tmp_path, fake, monkeypatch):
    monkeypatch.setattr("ssmzoo.train.corpora.sources.SMALLEST", 1)
    monkeypatch.setattr("ssmzoo.train.corpora.sources.LARGEST", 1)
    broken = {"default": {"train": [*FIRST["default"]["train"][:2], [*rows("café"), "break off"]]}}
    fake(n={"newest": "c1", "c1": broken})
    with pytest.raises(
        ConnectionError, match=r"datasets:o/n@c1:default:train is out of reach: the line is dead. Call ag"
    ):
        tokenize("datasets:o/n", tmp_path / "out", workers=1)
    assert (tmp_path / "out" / PLAN).is_file()
    fake(n={"newest": "c2", "c1": FIRST, "c2": {"default": {"train": [rows("another")]}}})
    assert tokenize("datasets:o/n", tmp_path / "out", workers=1).made_from["datasets:o/n"] == "c1"
    assert documents(tmp_path / "out") == ["one", "two\nlines", "café"]
    assert tokenize("datasets:o/n", tmp_path / "new", workers=1).made_from["datasets:o/n"] == "c2"
    with pytest.raises(ValueError, match="made from another `datasets:o/n`: choose another --out"):
        tokenize("datasets:o/n@c1", tmp_path / "new", workers=1)


@pytest.mark.parametrize(
    ("source", "error", "said"),
    [
        ("datasets:", ValueError, "`sources` must name datasets as datasets:OWNER/NAME, with @REVISION, :CONFIG and"),
        ("datasets:o/n:a:b:c", ValueError, "`sources` must name datasets as"),
        ("datasets:../n/x", ValueError, "`sources` must name datasets as"),
        ("datasets:o/none", FileNotFoundError, "datasets:o/none is not there, or not for you: Dataset 'o/none' d"),
        ("datasets:o/n@c7", FileNotFoundError, "Revision 'c7' doesn't exist"),
        ("datasets:o/n:none", ValueError, "datasets:o/n:none cannot be read: Bad split: none. Available splits: ['t"),
        ("datasets:o/n:none:test", ValueError, "BuilderConfig 'none' not found"),
        ("datasets:o/two", ValueError, "Config name is missing. Please pick one among"),
        ("datasets:o/bad", ValueError, "must have text in the column 'text' (--key); got int"),
        ("datasets:o/body", ValueError, "has no column 'text', only 'body', 'n': name one by --key"),
    ],
)
def test_what_is_not_there(tmp_path, fake, source, error, said):
    fake(
        n={"newest": "c1", "c1": FIRST},
        two={"newest": "c1", "c1": {"a": {}, "b": {}}},
        bad={"newest": "c1", "c1": {"default": {"train": [[{"text": 3}]]}}},
        body={"newest": "c1", "c1": {"default": {"train": [[{"body": "x", "n": 3}]]}}},
    )
    with pytest.raises(error) as caught:
        tokenize(source, tmp_path / "out", workers=1)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_package_is_needed_and_runs_no_code(tmp_path, fake, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(
        ImportError, match="needs version 4 of datasets or a newer one, which run no code of a reposito"
    ):
        tokenize("datasets:o/n", tmp_path / "out", workers=1)
    with monkeypatch.context() as within:
        within.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match="datasets:o/n is on the Hugging Face hub, which needs datasets: pip in"):
            tokenize("datasets:o/n", tmp_path / "out", workers=1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "o" / "n").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'datasets:o/n', and o/n is here: name it without datasets:"):
        tokenize("datasets:o/n", tmp_path / "out", workers=1)


def test_the_cache_serves_offline(tmp_path):
    """With the package itself: a dataset that has been loaded before, and one that has not."""
    pytest.importorskip("datasets", minversion="4", reason="needs datasets 4")
    program = tmp_path / "offline.py"
    program.write_text(OFFLINE)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, program, tmp_path], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "datasets:owner/none" in done.stdout.splitlines()[-1]


OFFLINE = """
import shutil, sys
from pathlib import Path

import datasets

from ssmzoo.train.corpora import tokenize

if __name__ == "__main__":
    folder, cache = Path(sys.argv[1]), Path(datasets.config.HF_DATASETS_CACHE)
    (folder / "set").mkdir()
    (folder / "set" / "train.jsonl").write_text('{"text": "one", "n": 1}\\n{"text": "two", "n": 2}\\n')
    datasets.load_dataset(str(folder / "set"))
    shutil.move(cache / "set", cache / "owner___set")
    for workers in (1, 2):
        made = tokenize("datasets:owner/set", folder / f"out{workers}", workers=workers)
        assert (made.documents, made.bytes) == (2, 6), made
        assert len(made.made_from["datasets:owner/set"]) > 8
    try:
        tokenize("datasets:owner/none", folder / "none")
    except (FileNotFoundError, ConnectionError) as error:
        print(error)
"""
