"""What processes have to do alike in a call, compared before anything depends on it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from ssmzoo.parallel.steps import Traffic, gathered

REFUSED = -1


def agree(
    group: dist.ProcessGroup,
    shape: tuple[int, int],
    alike: Mapping[str, object],
    error: Exception | None,
    device: torch.device,
) -> tuple[list[list[int]], Traffic]:
    """The shapes of all processes, and what it took to find out.

    A process that disagreed would leave the others waiting, or computing nonsense.

    Args:
        group: the processes.
        shape: batch and length here.
        alike: what must be the same on every process, by what it is called; compared as text.
        error: what is wrong with this process's arguments, if something is.
        device: of the tensors that are exchanged.

    Raises:
        Exception: ``error``.
        ValueError: another process has an error, or something differs.
    """
    mine = [REFUSED if error is not None else 0, *shape, *map(_number, alike.values())]
    sent = torch.tensor(mine, device=device)
    received = [torch.empty_like(sent) for _ in range(group.size())]
    dist.all_gather(received, sent, group=group)
    if error is not None:
        raise error
    of_rank = torch.stack(received).tolist()
    for rank, (state, *_) in enumerate(of_rank):
        if state == REFUSED:
            raise ValueError(f"Context: the arguments of process {rank} were refused; its error says why")
    for place, name in enumerate(alike, start=3):
        for rank, numbers in enumerate(of_rank):
            if numbers[place] != of_rank[0][place]:
                raise ValueError(f"Context: `{name}` must be the same on every process; on {rank} it is not that of 0")
    return [numbers[1:3] for numbers in of_rank], gathered(sent, group.size())._replace(returned=0)


def _number(value: object) -> int:
    """63 bits of a checksum, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "big") >> 1
