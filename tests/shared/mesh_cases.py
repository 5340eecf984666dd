"""Training over a mesh of processes, against the same in one process; run on each of them."""

from __future__ import annotations

import contextlib
import copy
import csv
import io
import os
import resource
import time
from pathlib import Path
from typing import Any

import curves
import torch
import torch.distributed as dist
from context_cases import close, gradients, mixer, weight_of
from torch import Tensor, nn

import ssmzoo
from ssmzoo.mlp import build_mlp
from ssmzoo.parallel.plan import Plan
from ssmzoo.parallel.tensor.plans import plan_of
from ssmzoo.parallel.tensor.share import Share
from ssmzoo.parallel.tensor.sums import Enter
from ssmzoo.train import TrainConfig, resume, train
from ssmzoo.train.mesh.trainer import MeshTrainer

SETTINGS = {"steps": 8, "batch_size": 2, "length": 12, "eval_every": 8, "eval_batches": 3, "save_every": 8}
SETTINGS |= {"lr": 0.01, "cpu": True, "validation": 0.3, "warmup_steps": 2, "keep": 9}


def ids() -> Tensor:
    return torch.randint(0, 256, (3000,), generator=torch.Generator().manual_seed(0))


@curves.quick()
def trains(group: Any, config: dict[str, Any], data: Any, settings: dict[str, Any], out: Path) -> None:
    """A run from its beginning; without a group in one process.

    It is in float64, in which sums in another order make no difference to speak of.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ssmzoo.build(config).double()
    train(model, ids() if data is None else data, TrainConfig(**(SETTINGS | settings)), out, quiet=True)


@curves.quick()
def trains_narrow(group: Any, config: dict[str, Any], settings: dict[str, Any], out: Path) -> None:
    """Likewise in float32, or what the settings say."""
    torch.set_num_threads(1)
    train(ssmzoo.ModelConfig.from_dict(config), ids(), TrainConfig(**(SETTINGS | settings)), out, quiet=True)


def ways_of_attention(group: Any, config: dict[str, Any], settings: dict[str, Any], out: Path) -> set[str]:
    """A run; the ways in which attention has crossed the cuts."""
    found: set[str] = set()
    told = Plan.told

    def noted(self: Plan, rank: int) -> str:
        found.add(self.how)
        return told(self, rank)

    Plan.told = noted  # type: ignore[method-assign]
    try:
        trains_narrow(group, config, settings, out)
    finally:
        Plan.told = told  # type: ignore[method-assign]
    return found


def gathers(group: Any, config: dict[str, Any], settings: dict[str, Any], out: Path) -> set[torch.dtype]:
    """A run; the dtypes of linear maps' weights as blocks see them."""
    found: set[torch.dtype] = set()

    def note(module: nn.Module, _: Any) -> None:
        found.update(p.dtype for p in module.parameters(recurse=False))

    placed = MeshTrainer.placed

    def watched(self: Any, model: Any) -> Any:
        model = placed(self, model)
        for module in model.modules():
            module.register_forward_pre_hook(note)
        return model

    MeshTrainer.placed = watched  # type: ignore[method-assign]
    try:
        trains_narrow(group, config, settings, out)
    finally:
        MeshTrainer.placed = placed  # type: ignore[method-assign]
    return found


@curves.quick()
def goes_on(group: Any, settings: dict[str, Any], out: Path) -> None:
    """The rest of a run."""
    torch.set_num_threads(1)
    resume(out, ids(), quiet=True, **settings)


def goes_on_from_torchrun(group: Any, settings: dict[str, Any], out: Path) -> None:
    """The rest of a run, of which each process knows its number on this machine."""
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    try:
        goes_on(group, settings, out)
    finally:
        del os.environ["LOCAL_RANK"]


def fails(group: Any, function: Any, *args: Any) -> tuple[str, str]:
    """The error of a function, and what it printed as an error."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        try:
            function(group, *args)
        except Exception as error:
            return f"{type(error).__name__}: {error}", printed.getvalue()
    return "", printed.getvalue()


def breaks_down(group: Any, config: dict[str, Any], out: Path) -> None:
    """A run whose third step fails on every process."""
    begin = MeshTrainer.begin_step

    def third(self: Any, parts: list[Any]) -> None:
        begin(self, parts)
        if self.step == 3:
            raise MemoryError("no room for the third step")

    MeshTrainer.begin_step = third  # type: ignore[method-assign]
    try:
        trains(group, config, None, {"parallel": {"shard": 2}}, out)
    finally:
        MeshTrainer.begin_step = begin  # type: ignore[method-assign]


@curves.quick()
def differs(group: Any, config: dict[str, Any], settings: dict[str, Any], what: str, out: Path) -> None:
    """A run in which the second process has something of its own."""
    torch.set_num_threads(1)
    other, tokens = dist.get_rank() == 1, ids()
    if other and what == "data":
        tokens = tokens.flip(0)
    torch.manual_seed(int(other and what == "weights"))
    if other and what == "out":
        out = out.with_name("another")
    if other and what == "seed":
        settings = settings | {"seed": 5}
    train(ssmzoo.build(config), tokens, TrainConfig(**(SETTINGS | settings)), out, quiet=True)


def fills_a_disk(group: Any, config: dict[str, Any], settings: dict[str, Any], out: Path) -> None:
    """A run in which the second process cannot write the second checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def begin(self: Any, parts: list[Any]) -> None:
        if dist.get_rank() == 1:
            first, limit = out / "checkpoints", time.monotonic() + 300
            while not [*first.glob("*step-0000000*/.metadata")] and time.monotonic() < limit:  # it may be under way
                time.sleep(0.01)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        before(self, parts)

    before, MeshTrainer.begin_step = MeshTrainer.begin_step, begin  # type: ignore[method-assign]
    try:
        trains_narrow(group, config, settings, out)
    finally:
        MeshTrainer.begin_step = before  # type: ignore[method-assign]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def losses(run: Path) -> list[list[float]]:
    """Of each step: loss, validation loss and gradient norm; 0 where there is none."""
    with (run / "log.csv").open() as file:
        names = ("step", "loss", "gradient_norm", "validation_loss")
        return [[float(row[name] or 0) for name in names] for row in csv.DictReader(file)]


def divides(group: dist.ProcessGroup, name: str, options: dict[str, Any], kind: str) -> None:
    """A layer of which each process has its share, against the whole: outputs and every gradient."""
    torch.manual_seed(0)
    if kind == "mlp":
        whole = build_mlp(16, {"kind": name} | options)
        assert whole is not None
        whole.double()
    else:
        whole = mixer(name, options)
    part, share = copy.deepcopy(whole), Share(group)
    plan_of(part)(share, part)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    here = x.clone().requires_grad_()
    x.requires_grad_()
    expected = whole(x)
    weight = weight_of(expected)
    (expected * weight).sum().backward()
    y = part(Enter.apply(here, group))
    close("output", y, expected)
    (y * weight).sum().backward()
    close("gradient of x", here.grad, x.grad)
    layouts = {id(owner._parameters[name]): layout for (owner, name), layout in share.layouts.items()}
    found, parameters = gradients(part), dict(part.named_parameters())
    for path, grad in gradients(whole).items():
        layout = layouts.get(id(parameters[path]))
        mine = found[path]
        if layout is not None:
            grad = layout.piece(grad, group.rank(), group.size())
            for common in layout.common(group.size()):
                summed = mine[common].clone()
                dist.all_reduce(summed, group=group)
                mine[common] = summed
        close(f"gradient of {path}", mine, grad)
