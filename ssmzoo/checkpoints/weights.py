"""Weights of a model: compared with what the model wants, and put into it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel

SHOWN, WIDEST = 3, 200  # tensors that an error names, and letters of a name


def skeleton(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    weights: Mapping[str, Tensor] | None = None,
    source: str = "",
) -> SequenceModel:
    """A model for weights that are to come by :func:`assign`: they are on the meta device and take no memory.

    Buffers that are not in a ``state_dict`` are made anew on ``device``, by ``reset_parameters`` of their module. If a
    module keeps tensors that neither a ``state_dict`` nor ``reset_parameters`` brings back, then the whole model is
    built on ``device`` instead.

    Raises:
        ValueError: ``weights`` are given, and do not have the model's names and shapes. A config that asks for more
            memory than its weights take is refused before any of it is made.
    """
    with torch.device("meta"):
        model = SequenceModel(config)
    if weights is not None:
        _match(model, weights, source, values=False)
    if dtype is not None:
        model.to(dtype)
    if not all(_renewable(module) for module in model.modules()):
        with device:
            model = SequenceModel(config)
        return model if dtype is None else model.to(dtype)
    for module in model.modules():
        lost = unstored(module)
        module._buffers.update({name: torch.empty_like(buffer, device=device) for name, buffer in lost.items()})
        if lost:
            module.reset_parameters()  # type: ignore[operator]  # its weights are still on meta
    return model


@torch.no_grad()
def fill(model: SequenceModel, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies weights into a model, whose dtypes and devices stay.

    Raises:
        ValueError: naming ``source`` and the first tensors that are missing, unexpected, of another shape or kind of
            number, or hold NaN.
    """
    for names, tensor in _match(model, weights, source):
        tensor.copy_(weights[_given(names, weights)[0]])


@torch.no_grad()
def assign(model: SequenceModel, weights: dict[str, Tensor], source: str, device: torch.device) -> None:
    """Makes given tensors the model's own, on a device and in the model's dtypes, and takes them out of ``weights``.

    A tensor that has both already is not copied. Of the others one at a time is there twice.

    Raises:
        ValueError: as :func:`fill`, and nothing has changed then.
    """
    state: dict[str, Tensor] = {}
    storages: set[int] = set()
    for names, wanted in _match(model, weights, source):
        given = [weights.pop(name) for name in _given(names, weights)].pop()
        tensor = given.to(device, wanted.dtype).contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() > tensor.nbytes:
            tensor = tensor.clone()  # the file has views of one storage, and these are weights of their own
        storages.add(tensor.untyped_storage().data_ptr())
        state |= dict.fromkeys(names, tensor)
        del given
    model.load_state_dict(state, assign=True)


def stored_weights(model: SequenceModel) -> list[tuple[list[str], Tensor]]:
    """Each tensor of the model's ``state_dict`` with all its names."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [(names[key], tensors[key]) for key in names]


def check_storable(model: SequenceModel) -> None:
    """Checks that a model would load again: its tensors are those that its config asks for, and none holds NaN.

    Raises:
        ValueError: they are on the meta device, an adapter or a parametrisation has others, or one holds NaN; names the
            first.
    """
    own = model.state_dict(keep_vars=True)
    without = [name for name, tensor in own.items() if tensor.is_meta]
    if without:
        raise ValueError(f"save: `model` must have weights; on the meta device are {some(without)}")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        wanted = SequenceModel(model.config).state_dict(keep_vars=True)
    shapes, asked = ({name: t.shape for name, t in held.items()} for held in (own, wanted))
    if shapes != asked:
        lacking = [name for name, shape in asked.items() if shapes.get(name) != shape]
        more = [name for name in shapes if name not in asked]
        raise ValueError(
            f"save: `model` must hold the weights of its config alone: merge adapters and remove parametrisations "
            f"first. Tensors missing or of another shape: {some(lacking) or 'none'}; unexpected: {some(more) or 'none'}"
        )
    broken = [name for name, tensor in own.items() if _has_nan(tensor)]
    if broken:
        raise ValueError(f"save: `model` must hold numbers, as it would not load again; NaN is in {some(broken)}")


def main_dtype(weights: Mapping[str, Tensor]) -> torch.dtype | None:
    """That of the largest floating-point tensor: some small ones are float32 whatever the others are.

    Of quantised weights, whose scales have dtypes of their own, and beside which the small ones may be the largest,
    that of the first norm's weight.
    """
    floating = {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}
    if any(name.endswith(".weight_q") for name in weights):
        norms = (tensor.dtype for name, tensor in floating.items() if "norm" in name)
        return next(norms, None)
    return max(floating.values(), key=Tensor.numel).dtype if floating else None


def some(names: list[str]) -> str:
    """The first names of a list, which may come from a file, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(_shown(name) for name in names[:SHOWN]) + more


def _shown(name: str) -> str:
    """A name for one line of an error, however long it is and whatever it holds."""
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= WIDEST else f"{name[:WIDEST]}…"


def _match(
    model: SequenceModel, weights: Mapping[str, Tensor], source: str, values: bool = True
) -> list[tuple[list[str], Tensor]]:
    """:func:`stored_weights`, once it is known that each of them is given and fits; by its ``values``, too, or not.

    Raises:
        ValueError: naming ``source`` and the first tensors that do not fit.
    """
    wanted = stored_weights(model)
    problems: dict[str, list[str]] = {
        "missing": [],
        "unexpected": [],
        "of another shape": [],
        "not one and the same": [],
        "of unfit values": [],
    }
    for names, tensor in wanted:
        found = _given(names, weights)
        if not found:
            problems["missing"].append(names[0])
            continue
        given = weights[found[0]]
        if given.shape != tensor.shape:
            problems["of another shape"].append(f"{found[0]} {tuple(given.shape)} for {tuple(tensor.shape)}")
        elif not values:
            continue
        elif (reason := _unfit(given, tensor)) is not None:
            problems["of unfit values"].append(f"{found[0]} {reason}")
        elif not all(torch.equal(given, weights[name]) for name in found[1:]):
            problems["not one and the same"].append(" and ".join(found))
    known = {name for names, _ in wanted for name in names}
    problems["unexpected"] += [name for name in weights if name not in known]
    said = [f"{what}: {some(names)}" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"the weights in {source} do not fit the config. Tensors " + "; ".join(said))
    return wanted


def _given(names: list[str], weights: Mapping[str, Tensor]) -> list[str]:
    return [name for name in names if name in weights]


def _unfit(given: Tensor, wanted: Tensor) -> str | None:
    """Why the values of a stored weight cannot become those of a model's tensor; None if they can."""
    kinds = [(tensor.is_floating_point(), tensor.is_complex()) for tensor in (given, wanted)]
    if kinds[0] != kinds[1]:
        return f"{given.dtype} for {wanted.dtype}"
    return "has NaN" if _has_nan(given) else None


def _has_nan(given: Tensor) -> bool:
    given = given.detach()
    if given.is_meta or given.numel() == 0 or not (given.is_floating_point() or given.is_complex()):
        return False
    numbers = torch.view_as_real(given.resolve_conj()) if given.is_complex() else given
    if numbers.element_size() == 1:
        numbers = numbers.float()
    return bool(numbers.amax().isnan())  # a NaN is the largest; no tensor of booleans is made


def unstored(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of a module itself that its ``state_dict`` leaves out."""
    names = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None and name in names}


def _renewable(module: nn.Module) -> bool:
    """Whether a ``state_dict`` and ``reset_parameters`` bring back all tensors of a module built on meta."""
    if any(isinstance(value, Tensor) and value.is_meta for value in vars(module).values()):
        return False
    return not unstored(module) or hasattr(module, "reset_parameters")
