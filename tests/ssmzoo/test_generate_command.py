"""``ssmzoo generate`` on the command line: options that ``generate`` takes as objects."""

from __future__ import annotations

import sys

import pytest
import torch

import ssmzoo
from ssmzoo import cli
from ssmzoo.commands._biases import parse_biases

CONFIG = {"d_model": 16, "n_layers": 1, "pattern": ["lstm"], "vocab_size": 256}


@pytest.fixture
def model(tmp_path):
    """A folder with a model of bytes."""
    torch.manual_seed(0)
    ssmzoo.save(ssmzoo.build(ssmzoo.ModelConfig.from_dict(CONFIG)), tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def say(capsys, monkeypatch, model):
    """Runs ``ssmzoo generate`` with options → what it printed."""

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["ssmzoo", "generate", model, "ab", "--max-new-tokens", "12", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return captured.err if stop.value.code else captured.out

    return call


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], None),
        (["7=2.5"], {7: 2.5}),
        (["7=2.5", "0=-100", " 9 = 1e1 "], {7: 2.5, 0: -100.0, 9: 10.0}),
        (['{"50256": -100, "0": 1.5}'], {50256: -100, 0: 1.5}),
        ([' {"1": 2}', "3=4"], {1: 2, 3: 4.0}),
        (["{}"], None),
    ],
)
def test_both_forms(options, found):
    assert parse_biases(options) == found


@pytest.mark.parametrize("options", [["97=100"], ['{"97": 100}']])
def test_a_bias_makes_a_token_come(say, options):
    words = [word for option in options for word in ("--logit-bias", option)]
    assert say("--temperature", "0", *words) == "ab" + 12 * "a" + "\n"
    assert say("--seed", "0", *words, "--logit-bias", "98=-100") == "ab" + 12 * "a" + "\n"


def test_the_text_is_that_of_generate(say, model):
    built = ssmzoo.build(model)
    biases = dict.fromkeys(range(97, 123), 5.0) | {97: -100.0}
    ids = built.generate([[97, 98]], 12, temperature=0.8, seed=3, logit_bias=biases)[0]
    words = [word for id, by in biases.items() for word in ("--logit-bias", f"{id}={by}")]
    assert say("--seed", "3", *words) == bytes(int(id) for id in ids).decode("utf-8", "replace") + "\n"


FORMS = "--logit-bias takes ID=NUMBER or a JSON object"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("97", f"{FORMS} such as"),
        ("", f"{FORMS} such as"),
        ("=1", "with ids from 0 on; got the id ''"),
        ("-1=1", "with ids from 0 on; got the id '-1'"),
        ("01=1", "with ids from 0 on; got the id '01'"),
        ("a=1", "with ids from 0 on; got the id 'a'"),
        ("97=", "--logit-bias 97: `value` must be a number from -100 to 100; got ''"),
        ("97=much", "--logit-bias 97: `value` must be a number from -100 to 100; got 'much'"),
        ("97=101", "`logit_bias` must be a dict of ids with a number from -100 to 100 each"),
        ("97=nan", "`logit_bias` must be a dict of ids with a number from -100 to 100 each"),
        ("256=1", "`logit_bias` must be of ids from 0 to 255, the vocabulary; got 256"),
        ('{"97": 1', "which is no JSON"),
        ('{"97": 1} x', "which is no JSON"),
        ("{" + 9999 * '"1":{', "which is no JSON"),
        ('{"97": 1, "97": 2}', "--logit-bias must give each id one number; got 97 twice"),
        ('{"97": "1"}', "`value` must be a number from -100 to 100; got '1'"),
        ('{"97": true}', "`value` must be a number from -100 to 100; got True"),
        ('{"97": {"98": 1}}', "`value` must be a number from -100 to 100; got [("),
        ('{"97": 1e999}', "`logit_bias` must be a dict of ids with a number from -100 to 100 each"),
        ('{"a": 1}', "with ids from 0 on; got the id 'a'"),
        ("{" + 2**20 * " ", "--logit-bias takes at most 1048576 characters; got 1048577"),
    ],
)
def test_errors(say, option, message):
    words = ["--logit-bias", option] if len(option) < 99_999 else []
    if not words:  # longer than a system's command line may be
        with pytest.raises(ValueError, match="at most"):
            parse_biases([option])
        return
    found = " ".join(say(*words).split())
    assert found.startswith("error: ")
    assert message in found


def test_twice_over_several_options(say):
    found = say("--logit-bias", "97=1", "--logit-bias", '{"97": 1}')
    assert "--logit-bias must give each id one number; got 97 twice" in " ".join(found.split())


def test_beams_take_no_bias(say):
    assert "`logit_bias`" in say("--num-beams", "2", "--logit-bias", "97=1")
