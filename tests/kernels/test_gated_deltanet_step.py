"""One token of a whole gated DeltaNet layer: what it refuses, and which implementation runs."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import explain, gated_deltanet_step, native
from ssmkernels.check.spec import spec_of


def arguments(**sizes):
    spec = spec_of("gated_deltanet_step")
    return spec.inputs(spec.case(sizes), torch.float32, "cpu", 0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("q_proj", torch.zeros(11, 5), "`q_proj` must have g k rows, with k=5"),
        ("v_proj", torch.zeros(13, 5), "`v_proj` must have h v = 12 rows"),
        ("norm_weight", torch.zeros(4), "`norm_weight` must have shape"),
        ("beta_scale", -1.0, "`beta_scale` must be finite and at least 0"),
    ],
)
def test_refusals(name, value, words):
    given = arguments() | {name: value}
    rows = {
        "q_proj": ("k_proj", "q_conv", "k_conv", "q_state", "k_state"),
        "v_proj": ("g_proj", "v_conv", "v_state", "o_proj"),
    }
    for other in rows.get(name, ()):  # they have as many rows
        given[other] = resized(given[other], *{"q_proj": (10, 11), "v_proj": (12, 13)}[name])
    with pytest.raises(ValueError, match=r"^gated_deltanet_step: ") as error:
        gated_deltanet_step(**given)
    assert words in str(error.value)


def resized(x, size, to):
    return torch.zeros([to if length == size else length for length in x.shape])


@pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}")
def test_many_sequences_take_matrix_products():
    assert explain(gated_deltanet_step, **arguments(b=8)).chosen == "cpu"
    assert explain(gated_deltanet_step, **arguments(b=native.FEW + 1)).chosen == "steps"
