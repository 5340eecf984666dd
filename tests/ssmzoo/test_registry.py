"""Mixers by name."""

import pytest
import torch

import ssmzoo


def test_the_mixers_asked_for_are_there():
    mixers = ssmzoo.list_mixers()
    assert {"mamba", "s4d", "attention", "lstm", "gru", "parallel"} <= set(mixers)
    for info in mixers.values():
        assert info.summary
        assert info.available == (not info.missing)
    assert mixers["mamba"].options["d_state"] == 16


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match="unknown mixer: 'atention'. Did you mean 'attention'.*There are: .*mamba"):
        ssmzoo.build_mixer("atention", 16)


def test_registering():
    @ssmzoo.register_mixer("test-identity")
    class Identity(ssmzoo.Mixer):
        """Nothing."""

        def __init__(self, d_model: int, *, scale: float = 1.0):
            super().__init__(d_model)
            self.scale = scale

        def mix(self, x, state, cu_seqlens):
            return x * self.scale, state

    assert ssmzoo.list_mixers()["test-identity"].options == {"scale": 1.0}
    assert ssmzoo.build_mixer("test-identity", 3, scale=2)(torch.ones(1, 1, 3)).sum() == 6
    with pytest.raises(TypeError, match="unknown option of mixer 'test-identity': 'scael'. Did you mean 'scale'"):
        ssmzoo.build_mixer("test-identity", 3, scael=2)

    with pytest.raises(ValueError, match="'test-identity' is taken by"):

        @ssmzoo.register_mixer("test-identity")
        class Other(ssmzoo.Mixer):
            pass


def test_a_name_of_the_zoo_is_taken():
    with pytest.raises(ValueError, match="'mamba' belongs to a mixer of ssmzoo"):

        @ssmzoo.register_mixer("mamba")
        class Mine(ssmzoo.Mixer):
            pass


def test_only_mixers_and_words():
    with pytest.raises(TypeError, match="`cls` must be a subclass of ssmzoo.Mixer"):
        ssmzoo.register_mixer("test-linear")(torch.nn.Linear)
    with pytest.raises(ValueError, match="must be a word"):
        ssmzoo.register_mixer("two words")


def test_what_is_missing_is_said():
    @ssmzoo.register_mixer("test-needy")
    class Needy(ssmzoo.Mixer):
        """Needs what is not there."""

        requires = ("no_such_package",)

    info = ssmzoo.list_mixers()["test-needy"]
    assert not info.available
    assert info.missing == ("no_such_package",)
    with pytest.raises(ImportError, match="'test-needy' needs no_such_package: pip install no_such_package"):
        ssmzoo.build_mixer("test-needy", 3)


@pytest.mark.parametrize("d_model", [0, -1, 1.5, "8"])
def test_d_model(d_model):
    with pytest.raises(ValueError, match="`d_model` must be a positive int"):
        ssmzoo.build_mixer("gru", d_model)


def test_mixers_load_when_first_built(apart):
    apart(
        "import sys, ssmzoo\n"
        "assert 'ssmzoo.mixers.mamba' not in sys.modules\n"
        "ssmzoo.build_mixer('mamba', 16)\n"
        "assert 'ssmzoo.mixers.mamba' in sys.modules and 'ssmzoo.mixers.s4d' not in sys.modules\n"
    )
