"""Parameters and buffers that stand at several places of a module stay one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Places = list[tuple[dict[str, Any], str]]  # parameters or buffers of modules, and the name among them


class KeepsTies(nn.Module):
    """A module whose shared parameters and buffers stay shared where PyTorch would make a new one at each place.

    That is in ``to_empty`` and other moves from the meta device, and in ``load_state_dict`` with ``assign``.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        shared = shared_parameters(self)
        super()._apply(fn, recurse)
        share_again(shared)
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As PyTorch's, but for what is shared.

        Raises:
            RuntimeError: as PyTorch's, for names or shapes that do not fit.
        """
        shared = shared_parameters(self)
        result = super().load_state_dict(state_dict, strict, assign)
        share_again(shared)
        return result


def shared_parameters(module: nn.Module) -> list[Places]:
    """The places of each parameter and buffer that has more than one in a module and its submodules."""
    places: dict[Tensor, Places] = {}
    for owner in module.modules():
        for held in (owner._parameters, owner._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    places.setdefault(tensor, []).append((held, name))
    return [found for found in places.values() if len(found) > 1]


def share_again(shared: list[Places]) -> None:
    """Puts what is at the first of its places at the others."""
    for (first, name), *others in shared:
        for owner, other in others:
            owner[other] = first[name]
