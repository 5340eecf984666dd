"""Which keys the mixers of sparse attention see, and the block masks that say so."""

from __future__ import annotations

import abc
import dataclasses
import functools

import torch
from torch import Tensor

from ssmkernels.core.block_mask import MEMBERS, BlockMask

KINDS: dict[str, type[Pattern]] = {}  # by name, for an operator takes no objects


@dataclasses.dataclass(frozen=True)
class Pattern(abc.ABC):
    """Which keys each query of a sequence sees. Two patterns of the same numbers are the same, and share masks.

    Fields are ints and bools.

    Attributes:
        block: queries and keys of a block.
        heads: of the mask; 1 where all share it.
    """

    block: int
    heads: int

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    @abc.abstractmethod
    def mask(self, q_len: int, k_len: int) -> BlockMask:
        """Of the last ``q_len`` queries of a sequence of ``k_len`` tokens, on the CPU.

        The queries begin with a block, unless the pattern says that they may begin anywhere.
        """

    @abc.abstractmethod
    def seen(self, length: int) -> float:
        """Keys that a query sees, in the mean over a sequence."""

    def few(self, positions: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The keys of a few queries in particular; patterns that are causal have it.

        Args:
            positions: int ``(s, l)`` of the queries.
            longest: no sequence has more tokens.

        Returns:
            positions of keys, int ``(s, l, heads, n)``, and whether they are there and are seen, bool. None is seen
            twice.
        """
        raise NotImplementedError


def mask_of(pattern: Pattern, q_len: int, k_len: int, device: torch.device) -> BlockMask:
    """A pattern's mask, made once; the 64 latest are kept."""
    if not torch.compiler.is_compiling():
        return _made(pattern, q_len, k_len, device)
    # As constants, masks would tie compiled code to one length.
    numbers = [int(getattr(pattern, name)) for name in pattern.__match_args__]
    return BlockMask(q_len, k_len, *_members(type(pattern).__name__, numbers, q_len, k_len, device))


@functools.lru_cache(maxsize=64)
def _made(pattern: Pattern, q_len: int, k_len: int, device: torch.device) -> BlockMask:
    # It may be kept for a backward pass to come, and made where another device is PyTorch's default.
    with torch.inference_mode(False), torch.device("cpu"):
        return pattern.mask(q_len, k_len).to(device)


@torch.library.custom_op("ssmzoo::block_mask", mutates_args=())
def _members(
    kind: str, numbers: list[int], q_len: int, k_len: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Members of the mask of a pattern that is given by its class's name and its fields."""
    mask = _made(KINDS[kind](*numbers), q_len, k_len, device)
    offsets, columns, patterns, bits = (getattr(mask, name).clone() for name in MEMBERS)  # outputs must be its own
    return offsets, columns, patterns, bits


@_members.register_fake
def _(
    kind: str, numbers: list[int], q_len: int, k_len: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    block, heads = numbers[:2]
    context = torch.library.get_ctx()
    visible, distinct = context.new_dynamic_size(), context.new_dynamic_size()
    shapes: tuple[tuple[int | torch.SymInt, ...], ...] = (
        (heads, -(-q_len // block) + 1),
        (visible,),
        (visible,),
        (distinct, block, block // 8),
    )
    offsets, columns, patterns, bits = (
        torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, MEMBERS.values(), strict=True)
    )
    return offsets, columns, patterns, bits
