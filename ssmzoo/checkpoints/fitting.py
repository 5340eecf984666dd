"""Whether a format can hold a model: what its config would say is read back and compared, option by option."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ssmzoo.checkpoints.description import Description, differences
from ssmzoo.checkpoints.families import Family
from ssmzoo.checkpoints.published import used
from ssmzoo.config import ModelConfig
from ssmzoo.model import SequenceModel

Reader = Callable[[Mapping[str, Any]], "dict[str, Any] | None"]

# How far a model is from a format, beyond the number of options that differ.
SOME = 10**6  # an option has a value that the format has no words for
MANY = 10**9  # not even the kinds of mixers are the same
UNREAD = MANY + 1  # what would be written cannot be read


def described(model: SequenceModel, where: str, outputs: Sequence[str] = ("tokens",)) -> Description:
    """What its config says.

    Raises:
        ValueError: it is no model from tokens to one of ``outputs``.
    """
    for name, wanted in (("d_input", (None,)), ("output", outputs)):
        value = getattr(model.config, name)
        if value not in wanted:
            raise ValueError(f"save: `model` has no place in {where}: `{name}` is {value!r}")
    return Description(model.config)


def family_reader(found: Family) -> Reader:
    return lambda given: used(found.config(given))


def refusal_of(
    description: Description, read: Reader, given: Mapping[str, Any], elsewhere: Sequence[str] = ()
) -> tuple[int, str] | None:
    """How many options a config would not bring back, and the first of them; None where it brings back the model.

    Args:
        description: of the model.
        read: from what the format's config holds to values of ours.
        given: what it holds.
        elsewhere: how keys of options end that the format need not bring back, as they are in the weights.
    """
    try:
        values = read(given)
        config = None if values is None else ModelConfig.from_dict(values)
    except (ValueError, TypeError, KeyError) as error:
        return UNREAD, str(error)
    kinds = [] if config is None else _kinds(config)
    if config is None or kinds != description.kinds:
        i = next((i for i, pair in enumerate(zip(kinds, description.kinds, strict=False)) if pair[0] != pair[1]), 0)
        return MANY - i, f"`layers.{i}.mixer.kind` is {description.kinds[i]!r}"
    try:
        found = [d for d in differences(description, Description(config)) if not d[0].endswith(tuple(elsewhere))]
    except (ValueError, TypeError, RuntimeError) as error:
        return UNREAD, str(error)
    if not found:
        return None
    key, ours, theirs = found[0]
    return len(found), f"`{key}` is {ours!r:.80}, and would come back as {theirs!r:.80}"


def _kinds(config: ModelConfig) -> list[str]:
    """The mixer of each layer by its registered name, without building any."""
    return [config.mixer_options(config.entry_of_layer(i))["kind"] for i in range(config.n_layers)]


def nearest(refusals: Sequence[tuple[int, str]]) -> str:
    """Of why several formats do not hold a model, what the nearest of them says."""
    return min(refusals, key=lambda pair: (pair[0], len(pair[1])))[1]
