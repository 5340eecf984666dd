"""``--logit-bias``: what is added to logits, on the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from ssmzoo.plain import short

ID = re.compile(r"0|[1-9][0-9]{0,18}")  # one text for each, as in the bodies of ``ssmzoo serve``
MOST = 2**20  # characters of one option
FORMS = 'ID=NUMBER or a JSON object such as {"50256": -100}'


def parse_biases(options: Sequence[str]) -> dict[int, float] | None:
    """["7=2.5", '{"9": -100}'] → numbers by id; None without any. Their bounds are ``generate``'s to check.

    Raises:
        ValueError: an entry in neither form, an id that is none or comes twice, or a value that is no number.
    """
    found: dict[int, float] = {}
    for option in options:
        for text, value in _pairs(option):
            if not ID.fullmatch(text):
                raise ValueError(f"--logit-bias takes {FORMS}, with ids from 0 on; got the id {short(text)}")
            if int(text) in found:
                raise ValueError(f"--logit-bias must give each id one number; got {text} twice")
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise ValueError(f"--logit-bias {text}: `value` must be a number from -100 to 100; got {short(value)}")
            found[int(text)] = value
    return found or None


def _pairs(option: str) -> list[tuple[str, Any]]:
    """Ids as they were written, with their values: every one, also of an id that comes twice."""
    if not option.lstrip().startswith("{"):
        text, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--logit-bias takes {FORMS}; got {short(option)}")
        try:
            return [(text.strip(), float(value))]
        except ValueError:
            return [(text.strip(), value)]
    if len(option) > MOST:
        raise ValueError(f"--logit-bias takes at most {MOST} characters; got {len(option)}")
    try:
        return json.loads(option, object_pairs_hook=list)
    except (ValueError, RecursionError):
        raise ValueError(f"--logit-bias takes {FORMS}; got {short(option)}, which is no JSON") from None
