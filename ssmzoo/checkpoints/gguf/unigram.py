"""Unigram vocabularies (SentencePiece, T5), as the `tokenizers` library keeps them, in a GGUF file's terms.

Both take, of all ways to cut a text into tokens, the one whose scores have the largest sum, and an unknown character
scores 10 less than the least token. The library cuts texts into words first; llama.cpp takes the text whole. That is
the same where no token reaches over the start of a word, which is marked by "▁".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from ssmzoo.checkpoints.gguf.charsmap import WHITESPACE, charsmap, normalized
from ssmzoo.checkpoints.gguf.sentencepiece import SPACE
from ssmzoo.checkpoints.gguf.tokenizer_file import TokenizerFile

LEAST = -1e6  # of ids without a token: llama.cpp looks for their names in texts, too
RUNS = {"type": "Replace", "pattern": {"Regex": " {2,}"}}


class Prepared(NamedTuple):
    """What llama.cpp does with a text before it cuts it.

    Attributes:
        prefix: whether it puts a space before the text.
        merged: whether it takes runs of spaces for one, and none at the ends.
        charsmap: of normalisation; None for none.
    """

    prefix: bool
    merged: bool
    charsmap: bytes | None


def prepared(given: TokenizerFile, text: Collection[int]) -> Prepared | str:
    """How a tokenizer prepares texts, or why llama.cpp has no such way.

    Args:
        given: the tokenizer.
        text: the ids of tokens that stand for text.
    """
    found = _prepared(given)
    if isinstance(found, str):
        return found
    model, scores = given.model, given.scores
    tokens = [given.tokens[i] for i in text]
    splits = given.pre_tokenizers[-1].get("split", True) or len(given.pre_tokenizers) > 1
    within = re.compile(f"[^{SPACE}]{SPACE}" if found.merged else f".{SPACE}")
    wrong = {
        "it falls back to bytes": bool(model.get("byte_fallback")),
        "it has no unknown token": not isinstance(model.get("unk_id"), int),
        "a special token scores less than all others": min(scores.values()) < min(scores.get(i, 0.0) for i in text)
        if text
        else True,
        "a space alone is no token": splits and SPACE not in tokens,
        "a token reaches over a space": splits and any(within.search(token) for token in tokens),
    }
    return next((reason for reason, yes in wrong.items() if yes), found)


def _prepared(given: TokenizerFile) -> Prepared | str:
    steps, cuts = list(given.normalizers), given.pre_tokenizers
    other = "it prepares text in a way that llama.cpp has not (Unigram)"
    data: bytes | None = None
    if steps and steps[0]["type"] == "Precompiled":
        decoded = _decoded(steps.pop(0))
        if isinstance(decoded, str):
            return decoded
        data = decoded
    spaces = data is not None and all(normalized(data, c) in ("", " ") for c in WHITESPACE if c not in "\x0b\x85")
    if not cuts or cuts[-1]["type"] != "Metaspace" or cuts[-1].get("replacement") != SPACE:
        return other
    kinds = [cut["type"] for cut in cuts]
    scheme = cuts[-1].get("prepend_scheme", "always" if cuts[-1].get("add_prefix_space", True) else "never")
    if kinds == ["Metaspace"] and scheme == "never" and not steps:
        return Prepared(False, False, data)
    if scheme != "always":
        return other
    if kinds == ["WhitespaceSplit", "Metaspace"] and not steps:
        if data is None:  # llama.cpp only knows the space itself
            return Prepared(True, True, charsmap(dict.fromkeys(WHITESPACE, " ")))
        return Prepared(True, True, data) if spaces else "it keeps line ends or other white space apart from spaces"
    ends = [step for step in steps if step["type"] == "Strip" and step.get("strip_right")]
    runs = [step for step in steps if step in ({**RUNS, "content": " "}, {**RUNS, "content": SPACE})]
    if kinds == ["Metaspace"] and ends and runs and steps == ends[:1] + runs[:1] and spaces:
        if given.late:  # a space before them is not at the end of a text then
            return f"the added token {given.tokens[given.late[0]]!r:.40} is looked for in normalised text"
        return Prepared(True, True, data)
    return other


def _decoded(step: dict[str, Any]) -> bytes | str | None:
    """The map of a step, None for an empty one, or what is wrong with it."""
    try:
        data = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
        if data:
            normalized(data, "".join(WHITESPACE))
    except (binascii.Error, TypeError, ValueError):
        return "its `precompiled_charsmap` is damaged"
    return data or None
