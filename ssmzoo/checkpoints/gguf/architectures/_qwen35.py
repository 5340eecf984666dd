"""What both kinds of Qwen3.5 have beyond Qwen3-Next: value heads in another order, and rotary positions in sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ssmzoo.checkpoints.gguf.architectures import _qwen
from ssmzoo.checkpoints.gguf.keys import Table
from ssmzoo.checkpoints.gguf.rules import OURS, block
from ssmzoo.checkpoints.renaming import Rule

MAPS = {"ssm_beta": "b_proj", "ssm_alpha": "a_proj"}


def keys_of(given: Mapping[str, Any], *tables: Table) -> dict[str, Any]:
    found = _qwen.keys_of(given, *tables)
    # Time, height and width take turns with the frequencies; all three are a text token's position.
    turned = found["rope.dimension_count"] // 2
    return found | {"rope.dimension_sections": [(turned + 2 - axis) // 3 for axis in range(3)] + [0]}


def rules_of(given: Mapping[str, Any]) -> list[Rule]:
    order = _qwen.ValueHeads(given["linear_num_key_heads"], given["linear_num_value_heads"])
    return [
        *((rf"{block()}{name}\.weight", order.reordered(f"{OURS}mixer.{ours}.weight")) for name, ours in MAPS.items()),
        *_qwen.rules_of(given, order),
    ]
