"""``ssmzoo convert``: every tensor is reported, what has no place is named, and a dry run writes nothing."""

from __future__ import annotations

import re

import pytest
import torch
from commands import calling

import ssmzoo

CONFIG = {
    "d_model": 16,
    "n_layers": 2,
    "pattern": ["mamba2", "attention"],
    "mixers": {"mamba2": {"headdim": 8}, "attention": {"head_dim": 8, "rope_dim": 4}},
    "vocab_size": 20,
    "tie_embeddings": False,
    "mlp": {"kind": "swiglu", "d_intermediate": 24},
}


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs ``ssmzoo convert`` in a folder with a model in it."""
    torch.manual_seed(0)
    ssmzoo.save(ssmzoo.build(CONFIG), tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    return calling(monkeypatch, capsys, "convert")


def test_there_and_back(run, tmp_path):
    status, out, _ = run("ours", "theirs", "--to", "transformers")
    assert status == 0
    assert "ours as Bamba" in out
    assert re.search(
        r"model\.layers\.1\.self_attn\.q_proj\.weight +16 16 +float32 +layers\.1\.mixer\.q_proj\.weight", out
    )
    assert re.search(
        r"model\.layers\.0\.feed_forward\.up_proj\.weight +24 16 +float32 +layers\.0\.mlp\.fc1\.weight", out
    )
    assert "written to theirs" in out
    assert run("theirs", "back", "--to", "ssmzoo")[0] == 0
    before, after = ssmzoo.build(tmp_path / "ours"), ssmzoo.build(tmp_path / "back")
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    listed = [line.split()[0] for line in out.splitlines() if "float32" in line]
    assert len(listed) == len(set(listed)) == int(re.search(r"(\d+) tensors, ", out)[1])


def test_a_dry_run(run, tmp_path):
    status, out, _ = run("ours", "theirs", "--to", "transformers", "--dtype", "bfloat16", "--dry-run")
    assert status == 0
    assert "nothing was written" in out
    assert re.search(r"lm_head\.weight +20 16 +bfloat16", out)
    assert re.search(r"mamba\.A_log +4 +float32", out)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("ours", "new", "--to", "original"),
            r"state-spaces' format: `layers\.0\.mlp\.d_intermediate` is 24",
        ),
        (
            ("ours", "new", "--to", "transformers", "--model-type", "jamba"),
            r"Jamba: `layers\.0\.mixer\.kind` is 'mam",
        ),
        (("ours", "new", "--to", "transformer"), "unknown format in --to: 'transformer'. Did you mean 'transformers'"),
        (("ours", "new", "--to", "ssmzoo", "--dtype", "int8"), "unknown --dtype: 'int8'"),
        (("ours", "ours", "--to", "transformers"), "`folder` must be new or empty in this format; ours holds files"),
        (("mamba-130m", "new", "--to", "transformers"), "no weights at 'mamba-130m'"),
        (
            ("absent", "new", "--to", "transformers"),
            "no weights at 'absent': give a model's folder, an RWKV's .pth",
        ),
    ],
)
def test_refusals_are_one_line(run, tmp_path, arguments, said):
    status, out, err = run(*arguments)
    assert status == 1
    assert out == ""
    assert err.count("\n") == 1
    assert re.search(said, err)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
