"""Configs that are hostile or careless: each is refused quickly, in one short line that names what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys

import pytest
import torch

import ssmzoo
from ssmzoo.commands._settings import parse_settings
from ssmzoo.config import load_config
from ssmzoo.footprint import footprint
from ssmzoo.plain import MAX_VALUES, check_plain, short
from ssmzoo.pretrained import save
from ssmzoo.yaml_text import MAX_CHARACTERS, parse_yaml

TINY = {"d_model": 16, "n_layers": 2, "pattern": ["mamba"], "vocab_size": 11}
HEAD = "d_model: 16\nn_layers: 2\nvocab_size: 11\npattern: [mamba]\n"


@contextlib.contextmanager
def quickly(most: int = 5_000_000):
    """Fails, at once, after so many calls of functions, which take seconds: time would depend on the machine."""
    made = 0

    def count(frame, event, argument):
        nonlocal made
        made += event in ("call", "c_call")
        assert made < most, f"{most} calls and no end"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def bomb(levels: int, merge: bool = False) -> str:
    """Each level holds the one before ten times: 10 ** levels values from a few hundred bytes."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x]"]
    for i in range(1, levels + 1):
        inside = ", ".join([f"*a{i - 1}"] * 10)
        lines.append(f"a{i}: &a{i} {{<<: [{inside}]}}" if merge else f"a{i}: &a{i} [{inside}]")
    return "\n".join(lines)


FILES = {
    "alias bomb": (bomb(9), f"more than {MAX_VALUES} values"),
    "merge bomb": (bomb(9, merge=True), f"more than {MAX_VALUES} values"),
    "alias of itself": (HEAD + "mixers: &m {mamba: *m}\n", "must not hold itself"),
    "deep lists": (HEAD + "train: {x: " + "[" * 5000 + "]" * 5000 + "}\n", "nest deeper than"),
    "deep lists, never closed": ("[" * 100_000, "nest deeper than"),
    "large": ("# " + "x" * MAX_CHARACTERS, f"at most {MAX_CHARACTERS} characters"),
    "long value": (HEAD + f"norm: {'x' * 500_000}\n", "`norm` must be"),
    "long key": (HEAD + f"? {'x' * 500_000}\n: 1\n", "unknown key"),
    "long mixer": (HEAD.replace("mamba", "x" * 500_000), "unknown mixer"),
    "huge number": (HEAD.replace("16", "0x" + "f" * 100_000), "`d_model` must be at most"),
    "number with too many digits": (HEAD.replace("16", "9" * 100_000), "no valid YAML"),
    "impossible date": (HEAD + "description: 2001-99-99\n", "no valid YAML"),
    "layers": (HEAD.replace("n_layers: 2", "n_layers: 1000000000"), "`n_layers` must be at most"),
    "branches of itself": (
        "d_model: 16\nn_layers: 2\nvocab_size: 11\npattern: [a]\n"
        "mixers: {a: {kind: parallel, branches: [b]}, b: {kind: parallel, branches: [a]}}\n",
        "must not run itself",
    ),
    "branches doubled at each level": (
        "d_model: 16\nn_layers: 2\nvocab_size: 11\npattern: [a0]\nmixers:\n"
        + "".join(f"  {x}{i}: {{kind: parallel, branches: [a{i + 1}, b{i + 1}]}}\n" for i in range(25) for x in "ab")
        + "  a25: {kind: mamba}\n  b25: {kind: mamba}\n",
        f"more than {MAX_VALUES} mixers",
    ),
    "options in a list": (HEAD + "mixers: {mamba: [1]}\n", "`mixers.mamba` must be dict"),
    "kind in a list": (HEAD + "mixers: {mamba: {kind: [1]}}\n", "`mixers.mamba.kind` must be str"),
    "mlp kind in a list": (HEAD + "mlp: {kind: [1]}\n", "`mlp.kind` must be str"),
    "number in the pattern": (HEAD.replace("[mamba]", "[[mamba]]"), "`pattern` must be str"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_short_line(tmp_path, name):
    text, message = FILES[name]
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, TypeError)) as error, quickly():
        ssmzoo.build(str(path), device="meta")
    assert message in str(error.value)
    assert len(str(error.value)) < 1000


def test_aliases_in_moderation_still_work():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "text") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


def test_nested_data_from_python_is_bounded_too():
    endless: dict = {}
    endless["x"] = endless
    for value in (endless, [[0] * 1000] * 1000):
        with pytest.raises(ValueError, match="`train` must not"):
            ssmzoo.ModelConfig(**TINY, train={"x": value})
        with pytest.raises(ValueError, match="value must not"):
            check_plain(value, "value")
        assert len(short(value)) < 100


def test_settings_are_bounded_too():
    with pytest.raises(ValueError, match="--set d_model must not hold more"):
        parse_settings(["d_model=" + "{" + bomb(9).replace("\n", ", ") + "}"])
    with pytest.raises(ValueError, match="key=value") as error:
        parse_settings(["x" * 10**6])
    assert len(str(error.value)) < 300


NUMBERS = [math.nan, math.inf, -1.0]


@pytest.mark.parametrize("value", NUMBERS)
@pytest.mark.parametrize(
    ("key", "base"),
    [
        ("norm_eps", {}),
        ("mixers.mamba.bcdt_norm_eps", {}),
        ("mixers.attention.softcap", {"pattern": ["attention"]}),
        ("mixers.attention.rope_base", {"pattern": ["attention"]}),
        ("mixers.longformer.rope_base", {"pattern": ["longformer"]}),
        ("mixers.bigbird.rope_base", {"pattern": ["bigbird"]}),
        ("mixers.mla.rope_base", {"pattern": ["mla"]}),
        ("mixers.mla.norm_eps", {"pattern": ["mla"]}),
    ],
)
def test_numbers_that_make_no_sense(key, base, value):
    with pytest.raises(ValueError, match=f"`{key.split('.')[-1]}`.* must be a finite number"):
        ssmzoo.build({**TINY, **base}, device="meta", **{key: value})


def test_nan_is_refused_under_any_name():
    with pytest.raises(ValueError, match="`dropout`.* must be a number; got nan"):
        ssmzoo.build(TINY, dropout=math.nan)


@pytest.mark.parametrize("name", ["mamba-hybrid-tiny", "transformer++-tiny", "s4-classifier", "lstm-tiny", "mla-tiny"])
def test_sizes_are_told_before_building(name):
    state = torch.get_rng_state()
    told = footprint(load_config(name))
    assert torch.equal(torch.get_rng_state(), state)
    model = ssmzoo.build(name, device="meta")
    assert told.bytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert told.parameters == model.num_parameters()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8", "int4", {"layers.1.*": "int4", "lm_head": "int8"}])
def test_sizes_of_quantised_models(scheme, tied):
    if tied and isinstance(scheme, dict):
        scheme = {**scheme, "embedding": "int8"}
    model = ssmzoo.quantize(ssmzoo.build("mamba-hybrid-tiny", n_layers=2, d_model=64, tie_embeddings=tied), scheme)
    told = footprint(model.config)
    assert told.bytes == sum(tensor.nbytes for tensor in {*model.state_dict(keep_vars=True).values()})
    assert told.parameters == model.num_parameters()
    assert told.bytes < footprint(dataclasses.replace(model.config, quantization={})).bytes


def test_a_shared_mixer_counts_once():
    config = ssmzoo.ModelConfig(**{**TINY, "n_layers": 4}, mixers={"mamba": {"shared": True}})
    assert footprint(config).bytes == sum(p.nbytes for p in ssmzoo.build(config).parameters())


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 2**31 - 1, "d_model": 2**20},
        {"d_model": 2**20},
        {"n_layers": 10_000, "d_model": 8192},
        {"mixers.mamba.expand": 2**26},
    ],
)
def test_a_model_that_fits_no_memory_is_refused_before_it_is_made(change):
    with pytest.raises(ValueError, match=r"weights? of this model (take [\d,.]+ GiB|is larger)"), quickly():
        ssmzoo.build(TINY, device="cpu", **change)


def test_a_folder_named_like_a_model_does_not_shadow_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(ssmzoo.build(TINY), tmp_path / "lstm-tiny")
    assert ssmzoo.build("lstm-tiny", device="meta").config.pattern == load_config("lstm-tiny").pattern
    for folder in ("./lstm-tiny", tmp_path / "lstm-tiny", (tmp_path / "lstm-tiny").relative_to(tmp_path)):
        assert ssmzoo.build(folder).config.pattern == ["mamba"]
