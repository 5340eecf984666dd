"""Devices by name."""

from __future__ import annotations

import torch


def usable(device: torch.device | str, argument: str) -> torch.device:
    """The device of this name, after a small computation on it.

    Args:
        device: as PyTorch names it; ``"meta"`` too.
        argument: what an error calls it, such as ``--device``.

    Raises:
        ValueError: there is no such device, or it cannot be used.
    """
    try:
        place = torch.device(device)
        result = torch.zeros(1, device=place).add(1)
        if place.type != "meta":
            result.cpu()
    except Exception as error:  # PyTorch raises what the device's back end does
        raise ValueError(f"{argument}: {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
    return place
