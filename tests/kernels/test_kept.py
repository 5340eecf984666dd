"""What linear attention, the delta rules and the matrix memory keep for their backward passes on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmkernels import native
from ssmkernels.check.running import with_gradients
from ssmkernels.check.spec import spec_of, tensors_of

pytestmark = [
    pytest.mark.op("delta_rule", "generalized_delta_rule", "linear_attention", "mlstm"),
    pytest.mark.skipif(native.missing() is not None, reason=f"needs the native library: {native.missing()}"),
]


class Kind(NamedTuple):
    """An op with one kind of decay: the changes of its base case."""

    op: str
    changes: dict[str, Any]


KINDS = [
    Kind("delta_rule", {"decay": ""}),
    Kind("delta_rule", {"decay": "h"}),
    Kind("delta_rule", {"decay": "k"}),
    Kind("generalized_delta_rule", {}),
    Kind("linear_attention", {"decay": "token"}),
    Kind("linear_attention", {"decay": "key"}),
    Kind("mlstm", {}),
]
GROUPED = ("delta_rule", "linear_attention")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join([kind.op, *kind.changes.values()]))
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def arguments(kind: Kind, dtype: torch.dtype, **changes: Any) -> dict[str, Any]:
    """The inputs of a case, with gradients."""
    spec = spec_of(kind.op)
    return with_gradients(spec.inputs(spec.case(kind.changes | changes), dtype, "cpu", 0))


def one_group(kind: Kind) -> dict[str, int]:
    return {"g": 1} if kind.op in GROUPED else {}


def results(kind: Kind, given: dict[str, Any]) -> list[Tensor]:
    returned = spec_of(kind.op).function()(**{"implementation": "cpu"} | given)
    return [t for t in tensors_of(returned) if t.requires_grad]


def incoming(outputs: list[Tensor], rounded: torch.dtype) -> list[Tensor]:
    """Random gradients; of the first result, the only one in the dtype of activations, rounded to this one."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(o.shape, generator=generator) for o in outputs]
    return [x.to(o.dtype) for x, o in zip([drawn[0].to(rounded), *drawn[1:]], outputs, strict=True)]


def gradients(
    outputs: list[Tensor], given: dict[str, Any], rounded: torch.dtype = torch.float64, **options: Any
) -> list[Tensor]:
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(outputs, leaves, incoming(outputs, rounded), **options))


def rounding(gradient: Tensor, dtype: torch.dtype) -> float:
    """Of a gradient beside such activations; one in float32 beside half precision may be off by less than theirs."""
    if gradient.dtype == dtype:
        return max(torch.finfo(dtype).eps, 2**-20)
    return 2**-10


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def kept_bytes(kind: Kind, given: dict[str, Any]) -> int:
    """Of storages that autograd keeps, besides those of arguments and results."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = results(kind, given)
    own = [x for x in given.values() if isinstance(x, Tensor)] + outputs
    known = {x.untyped_storage().data_ptr() for x in own}
    return sum(size for place, size in storages.items() if place not in known)


@EVERY_KIND
@DTYPES
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (128, 256), (256, 256), (256, 512)], ids=str)
def test_no_more_is_kept_than_queries_keys_and_values_take(kind, dtype, sizes):
    k, v = sizes
    given = arguments(kind, dtype, b=1, l=2048, h=1, k=k, v=v, state=False, **one_group(kind))
    assert 0 < kept_bytes(kind, given) <= sum(given[name].nbytes for name in "qkv")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.op in GROUPED], ids=str)
@DTYPES
@pytest.mark.parametrize("heads", [2, 4])
def test_nor_where_heads_share_keys(kind, dtype, heads):
    given = arguments(kind, dtype, b=1, l=2048, h=heads, g=1, k=128, v=128, state=False)
    assert 0 < kept_bytes(kind, given) <= sum(given[name].nbytes for name in "qkv")


@pytest.mark.parametrize("heads", [4, 6, 8])
@pytest.mark.parametrize("decay", ["h", "k"])
@DTYPES
def test_states_further_apart_give_the_same_gradients(heads, decay, dtype):
    """Where heads share keys there are four, eight or sixteen chunks between saved states."""
    kind = Kind("delta_rule", {"decay": decay})
    given = arguments(kind, dtype, b=1, l=2100, h=heads, g=1, k=16, v=64)
    wide = {n: x.detach().double().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
    found, wanted = (gradients(results(kind, x), x, dtype) for x in (given, wide | {"implementation": "tiled"}))
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= rounding(one, dtype) * other.norm()


@EVERY_KIND
@HALF
@pytest.mark.parametrize("sizes", [(17, 33), (33, 129), (48, 257)], ids=str)
def test_compact_rows_cost_less_than_half_precision_itself(kind, dtype, sizes):
    """Against the gradients of the same numbers in float32: as near as one rounding of each gradient brings them."""
    k, v = sizes
    given = arguments(kind, dtype, b=1, l=700, h=1, k=k, v=v, **one_group(kind))
    wide = {n: x.detach().float().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
    found, wanted = (gradients(results(kind, x), x, dtype) for x in (given, wide))
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other).norm() <= rounding(one, dtype) * other.norm()


@EVERY_KIND
@HALF
def test_values_that_are_not_finite_reach_all_gradients_that_they_reach_in_float32(kind, dtype):
    changes = {"b": 1, "l": 300, "h": 1, "k": 16, "v": 150, "state": False}
    given = arguments(kind, dtype, **changes, **one_group(kind))
    given["v"].data[0, 20, 0, 7] = torch.inf
    wide = {n: x.detach().float().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
    found, wanted = (gradients(results(kind, x), x, dtype) for x in (given, wide))
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.isfinite(), other.isfinite())


@EVERY_KIND
@DTYPES
def test_a_graph_that_is_kept_gives_the_same_bits_again(kind, dtype):
    given = arguments(kind, dtype, l=300)
    outputs = results(kind, given)
    first = gradients(outputs, given, retain_graph=True)
    assert same_bits(gradients(outputs, given), first)


@EVERY_KIND
def test_what_is_changed_in_place_before_the_backward_pass_is_refused(kind):
    spec = spec_of(kind.op)
    names = [name for name, x in arguments(kind, torch.bfloat16).items() if isinstance(x, Tensor) and x.requires_grad]
    for name in names:
        given = arguments(kind, torch.bfloat16)
        changed = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
        outputs = [t for t in tensors_of(spec.function()(**changed, implementation="cpu")) if t.requires_grad]
        with torch.no_grad():
            changed[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(outputs, given)


@EVERY_KIND
@HALF
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(kind, dtype, reentrant):
    given = arguments(kind, dtype, l=300)
    wanted = gradients(results(kind, given), given)
    function = functools.partial(spec_of(kind.op).function(), implementation="cpu")
    names = [name for name, x in given.items() if isinstance(x, Tensor)]
    others = {name: x for name, x in given.items() if name not in names}

    def call(*tensors: Tensor) -> Any:
        return function(**dict(zip(names, tensors, strict=True)), **others)

    returned = checkpoint(call, *(given[name] for name in names), use_reentrant=reentrant)
    outputs = [t for t in tensors_of(returned) if t.requires_grad]
    for x in given.values():
        if isinstance(x, Tensor):
            x.grad = None
    torch.autograd.backward(outputs, incoming(outputs, dtype))
    assert same_bits([given[name].grad for name in names if given[name].requires_grad], wanted)


@EVERY_KIND
@HALF
def test_compiled_gradients_are_the_same_bits(kind, dtype):
    given = arguments(kind, dtype, l=300)
    torch._dynamo.reset()
    function = functools.partial(spec_of(kind.op).function(), implementation="cpu")
    compiled: Callable[..., Any] = torch.compile(lambda **a: function(**a), fullgraph=True, backend="aot_eager")
    outputs = [t for t in tensors_of(compiled(**given)) if t.requires_grad]
    assert same_bits(gradients(outputs, given), gradients(results(kind, given), given))


@EVERY_KIND
def test_kept_tensors_may_come_back_with_other_strides(kind):
    """As from hooks that pack them in a way of their own."""
    given = arguments(kind, torch.bfloat16, l=300)

    def unpack(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), unpack):
        outputs = results(kind, given)
    assert same_bits(gradients(outputs, given), gradients(results(kind, given), given))


def test_sequences_that_are_packed_keep_their_own():
    """Sequences of many lengths, of which some end within a segment and one is empty, against each one alone."""
    kind = Kind("delta_rule", {"decay": "h"})
    borders = [0, 3, 300, 300, 557, 900]
    given = arguments(kind, torch.bfloat16, b=1, l=900, h=2, g=1, k=20, v=140, state=False)
    given["cu_seqlens"] = torch.tensor(borders, dtype=torch.int32)
    given["return_final_state"] = False
    outputs = results(kind, given)
    packed, (of_o,) = gradients(outputs, given), incoming(outputs, torch.bfloat16)
    given["cu_seqlens"] = None
    leaves = [name for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad]
    for start, end in zip(borders, borders[1:], strict=False):
        own = {n: x.detach()[:, start:end].requires_grad_() if n in leaves else x for n, x in given.items()}
        alone = torch.autograd.grad(results(kind, own), [own[n] for n in leaves], of_o[:, start:end])
        for whole, part in zip(packed, alone, strict=True):
            assert torch.equal(whole[:, start:end], part)
