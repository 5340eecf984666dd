"""Models on the hub: fetched without code, pinned to their commit, and out of the cache alone when offline."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ssmzoo
from ssmzoo.checkpoints.hub import hub_id

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors", reason="needs huggingface_hub")

TINY = {"d_model": 16, "n_layers": 2, "pattern": ["mamba"], "vocab_size": 20, "residual_in_fp32": True}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A model in a stand-in for the hub, and what is asked of it."""
    model = ssmzoo.build(TINY)
    folder = tmp_path / "cache" / COMMIT
    asked = []

    def snapshot_download(name, *, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        if name != "me/tiny":
            raise errors.HFValidationError("there is\nno such thing")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return model, folder, asked


@pytest.mark.parametrize("format", ["transformers", "original", "ssmzoo"])
def test_a_model_by_its_name(published, tmp_path, format):
    model, folder, asked = published
    ssmzoo.save(model, folder, format)
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of the hub ran')")
    loaded = ssmzoo.build("me/tiny", revision="v1")
    assert torch.equal(loaded.layers[1].mixer.A_log, model.layers[1].mixer.A_log)
    assert loaded.config.source == f"me/tiny@{COMMIT}"
    assert {name for name, _, _ in asked} == {"me/tiny"}
    assert {revision for _, revision, _ in asked} == {"v1"}
    patterns = {pattern for _, _, several in asked for pattern in several}
    assert not any(pattern.endswith((".py", "*")) for pattern in patterns)
    pickles = "pytorch_model*.bin" in patterns
    assert pickles == (format == "original")  # only where there is nothing safer
    ssmzoo.save(loaded, tmp_path / "again")
    assert ssmzoo.build(tmp_path / "again").config.source == f"me/tiny@{COMMIT}"


def test_refusals(published, tmp_path):
    model, folder, _ = published
    with pytest.raises(TypeError, match="build: `revision` must be str or None; got int"):
        ssmzoo.build("me/other", revision=2)
    with pytest.raises(
        FileNotFoundError, match=r"no path me/other, and no such model from .*hub at revision 'v2'"
    ) as error:
        ssmzoo.build("me/other", revision="v2")
    assert "\n" not in str(error.value)
    ssmzoo.save(model, tmp_path / "here")
    with pytest.raises(ValueError, match="`revision` goes with a model on the hub; .*here is a folder"):
        ssmzoo.build(tmp_path / "here", revision="main")
    with pytest.raises(
        ValueError, match="`revision` goes with a model on the hub, such as 'owner/name'; got 'lstm-tiny'"
    ):
        ssmzoo.build("lstm-tiny", revision="main")
    with pytest.raises(ValueError, match="`d_model` cannot change, as a saved model's architecture is fixed"):
        ssmzoo.build("me/tiny", d_model=32)
    folder.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"holds no model"):
        ssmzoo.build("me/tiny")


def test_what_is_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "tiny").mkdir(parents=True)
    assert hub_id("me/other-1.b_c") == "me/other-1.b_c"
    for other in (
        "me/tiny",
        "tiny",
        "a/b/c",
        "../x",
        "./x",
        "me/x.yaml",
        "/x",
        "me/",
        "a b/c",
        "x" * 200 + "/y",
        3,
        None,
    ):
        assert hub_id(other) is None


def test_offline_the_cache_counts(tmp_path):
    """The real ``huggingface_hub``, with a cache that was filled by hand."""
    repo = tmp_path / "hub" / "models--me--tiny"
    ssmzoo.save(ssmzoo.build(TINY), repo / "snapshots" / COMMIT, "transformers")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    code = (
        "import ssmzoo\nprint(ssmzoo.build('me/tiny').config.source)\n"
        "try:\n    ssmzoo.build('me/absent')\nexcept FileNotFoundError as error:\n    print(error)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, refused = done.stdout.splitlines()
    assert found == f"me/tiny@{COMMIT}"
    assert refused.startswith(
        "no path me/absent, and no such model in the cache of the Hugging Face hub; HF_HUB_OFFLINE"
    )


def refused(kind):
    """An error of the hub, as its answer would bring it."""
    if issubclass(kind, errors.HfHubHTTPError):
        return kind("said\nso", response=type("Response", (), {"headers": {}, "request": None})())
    return kind("said\nso")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        ("GatedRepoError", PermissionError, "me/tiny on the Hugging Face hub is gated: accept its terms at"),
        ("RepositoryNotFoundError", FileNotFoundError, "no path me/tiny, and no such model from the .* hub: said$"),
        ("RevisionNotFoundError", FileNotFoundError, "no path me/tiny, and no such model from the .* hub: said$"),
        ("LocalEntryNotFoundError", ConnectionError, "me/tiny is not in the cache, and could not be fetched .*: said$"),
        ("HfHubHTTPError", ConnectionError, "me/tiny is not in the cache, and could not be fetched .*: said$"),
        (TimeoutError, ConnectionError, "could not be fetched from the Hugging Face hub: said$"),
        (RuntimeError, ConnectionError, "could not be fetched from the Hugging Face hub: said$"),
        (OSError, OSError, "said"),
    ],
)
def test_why_nothing_came(monkeypatch, raised, kind, message):
    error = refused(getattr(errors, raised) if isinstance(raised, str) else raised)

    def snapshot_download(*args, **options):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(kind, match=message) as found:
        ssmzoo.build("me/tiny")
    assert type(found.value) is kind
