"""All ops in one graph. Each op's own tests compile it alone."""

from __future__ import annotations

import shutil

import pytest
import torch

from ssmkernels import causal_conv1d, diagonal_kernel, fft_conv, rms_norm, selective_scan


def together(x, weight, A, B, C, dt):
    x, window = causal_conv1d(x, weight, activation="silu", return_final_state=True)
    x, state = selective_scan(x, x, A, B, C, delta_softplus=True, return_final_state=True)
    kernel = diagonal_kernel(A, A, A, dt, x.shape[1])
    return rms_norm(fft_conv(x, kernel, kernel_reverse=kernel), dt), window, state


@pytest.fixture
def arguments(randn):
    def make(l, b=2, d=4, n=3):
        shapes = {"x": (b, l, d), "weight": (d, 4), "A": (d, n), "B": (b, l, n), "C": (b, l, n), "dt": (d,)}
        made = {name: randn(*shape, dtype=torch.float32) for name, shape in shapes.items()}
        return made | {"A": -made["A"].abs(), "dt": made["dt"].abs()}

    return make


def test_one_graph_for_all_lengths(arguments, run, assert_same):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(together, fullgraph=True, dynamic=True, backend=backend)
    for made in map(arguments, (17, 32, 5)):
        assert_same(run(compiled, **made), run(together, **made))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="the compiler of PyTorch needs a C++ compiler")
def test_with_the_default_backend(arguments, run, assert_same):
    torch._dynamo.reset()
    made = arguments(17)
    assert_same(run(torch.compile(together, fullgraph=True), **made), run(together, **made))
