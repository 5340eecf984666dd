"""A model whose sequences are cut over processes, against the same in one process; run on each of them."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import ssmzoo
from ssmkernels import attention
from ssmkernels.core.crossing import crossing
from ssmkernels.core.dispatch import Op
from ssmzoo import parallel
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.parts import Parts

TOLERANCE = 1e-9  # of the largest value, in float64


def close(what: str, actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} for {tuple(expected.shape)}"
    if actual.numel():
        error = float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1))
        assert error <= TOLERANCE, f"{what}: differs by {error:.1e} of the largest value"


def weight_of(x: Tensor) -> Tensor:
    """What outputs are multiplied by before they are summed to a loss."""
    return torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def here(group: dist.ProcessGroup, lengths: list[int]) -> slice:
    """This process's tokens."""
    start = sum(lengths[: group.rank()])
    return slice(start, start + lengths[group.rank()])


def packing(borders: list[int] | None) -> Tensor | None:
    """The borders of packed sequences as calls take them."""
    return None if borders is None else torch.tensor(borders, dtype=torch.int32)


def mixer(name: str, options: dict[str, Any], d_model: int = 16) -> ssmzoo.Mixer:
    torch.manual_seed(0)
    return ssmzoo.build_mixer(name, d_model, **options).double().eval()


class Case(NamedTuple):
    """A mixer, and sequences that are cut over processes into parts of these lengths."""

    name: str
    options: dict[str, Any]
    lengths: list[int]
    borders: list[int] | None  # of packed sequences; without, they are a batch of two
    reference: bool

    def tokens(self, d_model: int) -> tuple[Tensor, Tensor | None, int]:
        """Random inputs of the mixer, the borders as it takes them, and how many sequences there are."""
        batch = 2 if self.borders is None else 1
        x = torch.randn(batch, sum(self.lengths), d_model, dtype=torch.float64)
        return x, packing(self.borders), batch if self.borders is None else len(self.borders) - 1


def trains(group: dist.ProcessGroup, case: Case) -> None:
    """Outputs and every gradient; without borders of a batch of two."""
    whole, mine = mixer(case.name, case.options), here(group, case.lengths)
    cut = copy.deepcopy(whole)
    x, cu_seqlens, _ = case.tokens(whole.d_model)
    part = x[:, mine].clone().requires_grad_()
    x.requires_grad_()
    expected = whole(x, cu_seqlens=cu_seqlens)
    weight = weight_of(expected)
    (expected * weight).sum().backward()
    y = parallel.context(cut, group, reduce_gradients=True, reference=case.reference)(part, cu_seqlens=cu_seqlens)
    (y * weight[:, mine]).sum().backward()
    close("output", y, expected[:, mine])
    if part.numel():
        close("gradient of x", part.grad, x.grad[:, mine])
    found = gradients(cut)
    for parameter, grad in gradients(whole).items():
        close(f"gradient of {parameter}", found[parameter], grad)


def goes_on(group: dist.ProcessGroup, case: Case) -> None:
    """Two prefills over the processes, the second from the first one's state, then tokens on each process."""
    whole, mine = mixer(case.name, case.options), here(group, case.lengths)
    if not (whole.has_state and whole.causal):
        return
    cut = parallel.context(whole, group, reference=case.reference)
    x, cu_seqlens, sequences = case.tokens(whole.d_model)
    with torch.no_grad():
        expected, theirs = whole(x, whole.initial_state(sequences), cu_seqlens=cu_seqlens)
        y, state = cut(x[:, mine], cut.initial_state(sequences), cu_seqlens=cu_seqlens)
        close("output", y, expected[:, mine])
        expected, theirs = whole(-x, theirs, cu_seqlens=cu_seqlens)
        y, state = cut(-x[:, mine], state, cu_seqlens=cu_seqlens)
        close("output of a further call", y, expected[:, mine])
        tokens = x.reshape(-1, whole.d_model)[:sequences, None]
        for _ in range(2):
            expected, theirs = whole(tokens, theirs)
            y, state = whole(tokens, state)
            close("output after a prefill", y, expected)


def model_trains(
    group: dist.ProcessGroup, config: dict[str, Any], lengths: list[int], borders: list[int] | None
) -> None:
    """Outputs, loss and every gradient of a model over token ids, with what it has before and after its layers."""
    torch.manual_seed(0)
    whole = ssmzoo.build(config).double().eval()
    cut = copy.deepcopy(whole)
    cu_seqlens = packing(borders)
    ids = torch.randint(0, whole.config.vocab_size, (2 if borders is None else 1, sum(lengths)))
    for last_only in (False, True):
        whole.zero_grad()
        cut.zero_grad()
        expected = whole(ids, cu_seqlens=cu_seqlens, last_only=last_only)
        weight = weight_of(expected)
        (expected * weight).sum().backward()
        model = parallel.context(cut, group)
        y = model(ids[:, here(group, lengths)], cu_seqlens=cu_seqlens, last_only=last_only)
        if y.shape != expected.shape or (not last_only and whole.config.output != "classes"):
            expected, weight = expected[:, here(group, lengths)], weight[:, here(group, lengths)]
        close("output", y, expected)
        (y * weight).sum().backward()
        for name, parameter in cut.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad, group=group)
            close(f"gradient of {name}", grad, gradients(whole)[name])


def model_generates(group: dist.ProcessGroup, config: dict[str, Any], lengths: list[int]) -> None:
    """A prefill over the processes, then tokens on each of them, and a prefill of one token each."""
    torch.manual_seed(0)
    whole = ssmzoo.build(config).double().eval()
    model = parallel.context(whole, group)
    ids = torch.randint(0, whole.config.vocab_size, (2, sum(lengths) + group.size() + 2))
    with torch.no_grad():
        expected = whole(ids)
        last, state = model(ids[:, here(group, lengths)], model.initial_state(2), last_only=True)
        at = sum(lengths)
        close("last output", last[:, 0], expected[:, at - 1])
        y, state = model(ids[:, at + group.rank() : at + group.rank() + 1], state)  # a token on each
        close("output of a further call", y[:, 0], expected[:, at + group.rank()])
        y, state = whole(ids[:, at + group.size() : at + group.size() + 1], state)
        close("output after it", y[:, 0], expected[:, at + group.size()])


def explained(group: dist.ProcessGroup, config: dict[str, Any], lengths: list[int]) -> list[tuple[str, bool]]:
    """What :meth:`ssmzoo.parallel.Context.explain` says on this process."""
    torch.manual_seed(0)
    model = parallel.context(ssmzoo.build(config), group)
    ids = torch.randint(0, 8, (1, lengths[group.rank()]))
    return [(str(step), step.in_turn) for step in model.explain(ids)]


def refused(group: dist.ProcessGroup, borders: list[int], batch: int) -> str:
    """The error of a call with these borders, of parts of as many sequences as their rank, or of a fixed batch."""
    model = parallel.context(ssmzoo.build_mixer("mamba", 8), group)
    x = torch.randn(batch or group.rank() + 1, 3, 8)
    try:
        model(x, cu_seqlens=torch.tensor(borders, dtype=torch.int32) if borders else None)
    except ValueError as error:
        return str(error)
    return ""


def disagrees(group: dist.ProcessGroup, case: str) -> str:
    """The error where the first process makes another call than the second."""
    cut = parallel.context(ssmzoo.build({"d_model": 8, "n_layers": 1, "pattern": ["mamba"], "vocab_size": 9}), group)
    first, ids = group.rank() == 0, torch.zeros(1, 4, dtype=torch.int64)
    call: dict[str, Any] = {"inputs": ids, "cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}
    changes: dict[str, dict[str, Any]] = {
        "dims": {"inputs": ids[0]},
        "ids": {"inputs": ids + 99},
        "borders": {"cu_seqlens": torch.tensor([0, 1, 8], dtype=torch.int32)},
        "no borders": {"cu_seqlens": None},
        "last_only": {"last_only": True},
        "state": {"state": cut.initial_state(2)},
        "state of three": {"state": cut.initial_state(3)},
        "no state": {"state": 1},
        "types": {"token_types": ids[:, :3]},
        "gradients": {},
    }
    try:
        with torch.set_grad_enabled(not first or case != "gradients"):
            cut(**(call | changes[case] if first else call))
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def sums_gradients(group: dist.ProcessGroup, lengths: list[int]) -> None:
    """Two backward passes through a model whose convolution is called as a module; gradients add up."""
    whole = mixer("mamba", {"d_state": 3})
    whole.conv1d.register_forward_hook(lambda *_: None)
    cut = copy.deepcopy(whole)
    model = parallel.context(cut, group, reduce_gradients=True)
    for _ in range(2):
        x = torch.randn(2, sum(lengths), whole.d_model, dtype=torch.float64)
        whole(x).square().sum().backward()
        model(x[:, here(group, lengths)]).square().sum().backward()
    found = gradients(cut)
    for name, grad in gradients(whole).items():
        close(f"gradient of {name}", found[name], grad)


def leaves_nothing(group: dist.ProcessGroup, config: dict[str, Any], how: str | None) -> int:
    """How many calls are still known after their backward passes are over."""
    model = parallel.context(ssmzoo.build(config), group, how=how)
    for _ in range(2):
        model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    gc.collect()
    return sum(isinstance(each, Parts) for each in gc.get_objects())


def half_precision(
    group: dist.ProcessGroup, name: str, options: dict[str, Any], lengths: list[int], how: str | None = None
) -> None:
    """bfloat16 weights and inputs: within its rounding of one process."""
    whole = mixer(name, options).bfloat16()
    x = torch.randn(2, sum(lengths), whole.d_model, dtype=torch.bfloat16)
    expected = whole(x)[:, here(group, lengths)]
    y = parallel.context(whole, group, how=how)(x[:, here(group, lengths)])
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.isfinite().all() for p in whole.parameters() if p.grad is not None)
    if y.numel():
        error = float((y - expected).detach().float().abs().max() / expected.detach().float().abs().max())
        assert error < 0.05, f"differs by {error:.1e} of the largest value"


def checkpoints(group: dist.ProcessGroup) -> str:
    """The error of a backward pass that computes a mixer again."""
    inner = mixer("mamba", {"d_state": 3})
    outer = ssmzoo.build_mixer("channel", 16).double()
    outer.mlp = Checkpointed(inner)
    x = torch.randn(1, 3, 16, dtype=torch.float64)
    y = parallel.context(outer, group)(x)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def twice_differentiated(group: dist.ProcessGroup) -> str:
    """The error of a backward pass that should be differentiated itself."""
    layer = mixer("mamba", {"d_state": 3})
    y = parallel.context(layer, group)(torch.randn(1, 3, 16, dtype=torch.float64))
    try:
        torch.autograd.grad(y.sum(), list(layer.parameters()), create_graph=True)
    except ValueError as error:
        return str(error)
    return ""


class Checkpointed(nn.Module):
    """A module that is computed again in the backward pass."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(
            lambda x: self.inner(x, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32)), x, use_reentrant=False
        )


class Quarter:
    """One of four processes' part of two sequences, each cut over two of them; what a whole model gives for it.

    Attributes:
        whole, cut: the same model twice; the first has the gradients of both sequences.
        mesh: of sequences and their parts.
    """

    def __init__(self, config: dict[str, Any]):
        torch.manual_seed(0)
        self.whole = ssmzoo.build(config).double().eval()
        self.cut = copy.deepcopy(self.whole)
        ids = torch.randint(0, self.whole.config.vocab_size, (2, 9))
        expected = self.whole(ids)
        weight = weight_of(expected)
        (expected * weight).sum().backward()
        self.mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
        row, column = self.mesh.get_coordinate()
        part = (slice(row, row + 1), slice(0, 4) if column == 0 else slice(4, 9))
        self.ids, self.expected, self.weight = ids[part], expected[part], weight[part]

    def trains(self, model: nn.Module) -> None:
        """Checks outputs, and leaves gradients; ``model`` takes their mean over all four processes."""
        y = model(self.ids)
        close("output", y, self.expected)
        (4 * (y * self.weight).sum()).backward()


def beside_data_parallelism(group: dist.ProcessGroup, config: dict[str, Any]) -> None:
    """Two sequences, each cut over two of four processes, under DDP over all of them: the gradients of both."""
    mine = Quarter(config)
    mine.trains(DistributedDataParallel(parallel.context(mine.cut, mine.mesh["context"]), process_group=group))
    found = gradients(mine.cut)
    for name, grad in gradients(mine.whole).items():
        close(f"gradient of {name}", found[name], grad)


def beside_sharding(group: dist.ProcessGroup, config: dict[str, Any]) -> None:
    """Likewise, with weights sharded over all four by FSDP."""
    mine = Quarter(config)
    everyone = init_device_mesh("cpu", (4,), mesh_dim_names=("shard",))
    for block in mine.cut.blocks:
        fully_shard(block, mesh=everyone)
    fully_shard(mine.cut, mesh=everyone)
    mine.trains(parallel.context(mine.cut, mine.mesh["context"]))
    for (name, parameter), grad in zip(mine.cut.named_parameters(), gradients(mine.whole).values(), strict=True):
        close(f"gradient of {name}", parameter.grad.full_tensor(), grad)


def attends(
    group: dist.ProcessGroup,
    how: str | None,
    options: dict[str, Any],
    lengths: list[int],
    borders: list[int] | None,
    kept: bool = False,
) -> str:
    """Attention over cuts against one process: outputs, log-sum-exp and every gradient. Returns the way it took.

    Args:
        options: of attention; ``h_kv`` are heads of keys, ``per_head`` names arguments of one number for each head.
        kept: as in a layer that is to be computed again.
    """
    torch.manual_seed(0)
    h, batch, given = 12, 2 if borders is None else 1, dict(options)
    h_kv, per_head = given.pop("h_kv", h), given.pop("per_head", ())
    sizes = {"q": (h, 4), "k": (h_kv, 4), "v": (h_kv, 3)}
    whole = {name: torch.randn(batch, sum(lengths), *size, dtype=torch.float64) for name, size in sizes.items()}
    leaves = whole | {name: torch.rand(h, dtype=torch.float64) for name in per_head}
    mine = {name: t[:, here(group, lengths)] if name in sizes else t for name, t in leaves.items()}
    leaves, mine = ({name: t.clone().requires_grad_() for name, t in each.items()} for each in (leaves, mine))
    cu_seqlens = packing(borders)
    expected, sums = attention(**leaves, **given, cu_seqlens=cu_seqlens, return_lse=True)
    weights = weight_of(expected), weight_of(sums)
    ((expected * weights[0]).sum() + (sums * weights[1]).sum()).backward()

    cpu, rank = torch.device("cpu"), group.rank()
    cut = Cut.of_batch(rank, lengths, 2, cpu) if borders is None else Cut.of_packed(rank, lengths, borders, cpu)
    parts = Parts(cut, Line(group), False, False, how, {})
    parts.line.tape = [] if kept else None
    flat = {name: t.flatten(0, 1)[None] if name in sizes else t for name, t in mine.items()}
    with crossing(parts):
        out, lse = attention(**flat, **given, cu_seqlens=cut.cu_seqlens, return_lse=True)
    out, lse = parts.line.close(out, None).view(batch, -1, h, 3), lse.view(h, batch, -1).transpose(0, 1)
    weights = weights[0][:, here(group, lengths)], weights[1][..., here(group, lengths)]
    ((out * weights[0]).sum() + (lse * weights[1]).sum()).backward()
    close("output", out, expected[:, here(group, lengths)])
    close("log-sum-exp", lse, sums[..., here(group, lengths)])
    for name, t in mine.items():
        if name in sizes:
            close(f"gradient of {name}", t.grad, leaves[name].grad[:, here(group, lengths)])
        else:
            dist.all_reduce(t.grad, group=group)
            close(f"gradient of {name}", t.grad, leaves[name].grad)
    return parts.steps[0].how


def checkpoints_blocks(group: dist.ProcessGroup, config: dict[str, Any], lengths: list[int], how: str | None) -> None:
    """Blocks that are computed again in the backward pass: gradients as without, nothing sent, no attention again."""
    torch.manual_seed(0)
    whole = ssmzoo.build(config).double()
    cut = copy.deepcopy(whole)
    for block in cut.blocks:
        block.forward = functools.partial(
            checkpoint, block.forward, use_reentrant=False, context_fn=parallel.checkpoint_contexts
        )
    ids = torch.randint(0, whole.config.vocab_size, (2, sum(lengths)))
    part = ids[:, here(group, lengths)]
    for model in (whole, cut):
        with Sent() as sent, Attended() as attended:
            y = parallel.context(model, group, how=how)(part)
            forward = attended.times
            (y * weight_of(y)).sum().backward()
        assert 0 < forward == attended.times
        if model is whole:
            expected = sent.bytes, attended.times
    assert (sent.bytes, attended.times) == expected
    found = gradients(cut)
    for name, grad in gradients(whole).items():
        close(f"gradient of {name}", found[name], grad)


def sends_as_told(
    group: dist.ProcessGroup, config: dict[str, Any], lengths: list[int], borders: list[int] | None, how: str | None
) -> list[str]:
    """The bytes of a forward and a backward pass are those of the steps that are explained, whose texts it returns."""
    torch.manual_seed(0)
    model = parallel.context(ssmzoo.build(config), group, how=how)
    cu_seqlens = packing(borders)
    part = torch.randint(0, 8, (2 if borders is None else 1, lengths[group.rank()]))
    steps = model.explain(part, cu_seqlens=cu_seqlens)
    told = parallel.traffic(steps)
    with Sent() as sent:
        y = model(part, cu_seqlens=cu_seqlens)
    assert sent.bytes == sum(of_layer.sent for of_layer in told.values()), f"forward: {sent.bytes}; {told}"
    with Sent() as sent:
        y.float().sum().backward()
    assert sent.bytes == sum(of_layer.returned for of_layer in told.values()), f"backward: {sent.bytes}; {told}"
    return [str(step) for step in steps]


class Attended:
    """Within, forward passes of attention are counted, whatever computes them."""

    def __enter__(self) -> Attended:
        self.times, self.kept = 0, Op._run

        def run(op: Op, name: str, a: Any) -> Any:
            self.times += op.name == "attention"
            return self.kept(op, name, a)

        Op._run = run
        return self

    def __exit__(self, *_: object) -> None:
        Op._run = self.kept


COLLECTIVES = ("all_gather", "all_to_all", "all_to_all_single", "all_reduce", "broadcast", "send", "batch_isend_irecv")


class Sent:
    """Within, the bytes that this process sends to others are counted, as :class:`ssmzoo.parallel.Traffic` counts."""

    def __enter__(self) -> Sent:
        self.bytes, self.kept = 0, {}
        for name in COLLECTIVES:
            self.kept[name] = getattr(dist, name)
            setattr(dist, name, functools.partial(self._call, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        group = args[0][0].group if name == "batch_isend_irecv" else kwargs["group"]
        rank, ranks = group.rank(), group.size()
        if name == "all_gather":
            count = (ranks - 1) * args[1].nbytes
        elif name == "all_to_all":
            count = sum(x.nbytes for r, x in enumerate(args[1]) if r != rank)
        elif name == "all_to_all_single":
            _, x, _, sends = args
            count = sum(n for r, n in enumerate(sends) if r != rank) * (x.nbytes // max(1, len(x)))
        elif name == "all_reduce":
            count = 2 * (ranks - 1) * args[0].nbytes // ranks
        elif name == "batch_isend_irecv":
            count = sum(call.tensor.nbytes for call in args[0] if call.op is dist.isend)
        elif name == "broadcast":
            count = (ranks - 1) * args[0].nbytes * (dist.get_global_rank(group, rank) == args[1])
        else:
            count = args[0].nbytes
        self.bytes += count
        return self.kept[name](*args, **kwargs)
