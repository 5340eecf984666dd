"""Attention to selected blocks: beside block masks, one query at a time, what is hidden, and its errors."""

from __future__ import annotations

import pytest
import torch

from ssmkernels import attention, native, selected_attention
from ssmkernels.masks import from_function

IMPLEMENTATIONS = ("tiled", "reference", *(["cpu"] if native.missing() is None else []))


def arguments(l=21, m=None, h=4, h_kv=2, g=2, n=3, size=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    m = l if m is None else m
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    blocks = torch.randint(-1, -(-m // size), (2, l, g, n), generator=generator, dtype=torch.int32)
    return {
        "q": draw(2, l, h, 8),
        "k": draw(2, m, h_kv, 8),
        "v": draw(2, m, h_kv, 6),
        "blocks": blocks,
        "block_size": size,
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("l", "m"), [(21, 21), (3, 40)])
def test_each_query_alone(implementation, l, m):
    given = arguments(l, m)
    out, lse = selected_attention(**given, return_lse=True, implementation=implementation)
    q, k, v, size = (given[name] for name in ("q", "k", "v", "block_size"))
    for i in range(l):
        for head in range(4):
            for row in range(2):
                named = set(given["blocks"][row, i, head // 2].tolist())
                keys = [j for j in range(i + m - l + 1) if j // size in named]
                if not keys:
                    assert (out[row, i, head] == 0).all()
                    assert lse[row, head, i] == -torch.inf
                    continue
                logits = k[row, keys, head // 2] @ q[row, i, head] / 8**0.5
                torch.testing.assert_close(out[row, i, head], logits.softmax(0) @ v[row, keys, head // 2])
                torch.testing.assert_close(lse[row, head, i], logits.logsumexp(0))


@pytest.mark.parametrize("lse", [False, True])
def test_gradients_are_those_under_a_mask(lse):
    """A selection that all sequences and heads share is a mask of queries and keys."""
    given = arguments(g=1, h_kv=1)
    given["blocks"] = given["blocks"][:1].expand(2, -1, -1, -1)
    size = given["block_size"]
    chosen = (given["blocks"][0, :, 0, :, None] == torch.arange(6)).any(1)  # queries by blocks of keys
    mask = from_function(lambda h, i, j: chosen[i, j // size], 21, block_size=8)
    leaves = [given[name].requires_grad_() for name in ("q", "k", "v")]
    found = selected_attention(**given, return_lse=True, implementation="tiled")
    wanted = attention(*leaves, causal=True, block_mask=mask, return_lse=True, implementation="reference")
    seen = wanted[1] > -torch.inf
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(wanted[0].shape, dtype=torch.float64, generator=generator), seen.double()
    gradients = []
    for out, sums in (found, wanted):
        loss = (out * weights[0]).sum() + (sums[seen].sum() if lse else 0)
        gradients.append(torch.autograd.grad(loss, leaves))
    for one, other in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_order_and_repetition_do_not_matter(implementation):
    given = arguments()
    out = selected_attention(**given, implementation=implementation)
    doubled = torch.cat([given["blocks"].flip(3), given["blocks"]], dim=3)
    assert torch.equal(out, selected_attention(**given | {"blocks": doubled}, implementation=implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("l", [21, 3])
def test_what_is_hidden_may_be_anything(implementation, l):
    """NaN at keys and values that a query does not see, later ones in its own block included."""
    given = arguments(l, 21, dtype=torch.float32)
    given["blocks"] = torch.where(given["blocks"] == 2, 1, given["blocks"])
    given["blocks"][..., 0] = (torch.arange(21 - l, 21, dtype=torch.int32) // 4)[:, None]
    clean = selected_attention(**given, implementation=implementation)
    for name in ("k", "v"):
        given[name] = given[name].clone()
        given[name][:, 9:12] = torch.nan  # in block 2, which only its own queries see
    found = selected_attention(**given, implementation=implementation)
    own = (torch.arange(21 - l, 21) >= 9) & (torch.arange(21 - l, 21) < 12)
    torch.testing.assert_close(found[:, ~own], clean[:, ~own])
    assert found[:, own].isnan().all()


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1; got 0"),
        ({"blocks": torch.full((2, 21, 2, 1), 6, dtype=torch.int32)}, ValueError, "between -1 and 5, for 21 keys .* 6"),
        ({"blocks": torch.full((2, 21, 2, 1), -2, dtype=torch.int32)}, ValueError, "between -1 and 5, .* got -2"),
        ({"blocks": torch.zeros(2, 21, 3, 1, dtype=torch.int32)}, ValueError, "divide the 4 of `q` .* 2 of `k`; got 3"),
        ({"blocks": torch.zeros(2, 21, 1, 1, dtype=torch.int32)}, ValueError, "multiple of the 2 of `k`; got 1"),
        ({"blocks": torch.zeros(2, 21, 2, 1)}, TypeError, "`blocks` must be .*int32"),
        ({"blocks": torch.zeros(2, 20, 2, 1, dtype=torch.int32)}, ValueError, "`blocks`"),
    ],
)
def test_errors(changes, error, told):
    with pytest.raises(error, match=told):
        selected_attention(**arguments() | changes)
