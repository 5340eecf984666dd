"""Tokenizer files of the `tokenizers` library, read and checked without it."""

from __future__ import annotations

import dataclasses
import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = "BPE, Unigram or WordPiece"


@dataclasses.dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer of BPE, Unigram or WordPiece.

    Attributes:
        model: what the file says of it.
        kind: which of them.
        tokens: the token of each id; no two are the same, and each can be written in UTF-8.
        added: the ids of tokens that were added to the vocabulary → whether they are special.
        late: those of them that are looked for in a text once it is normalised.
        merges: two tokens each, the first of them first; none but for BPE.
        scores: of each id in the vocabulary; none but for Unigram.
        normalizers: the steps that prepare a text.
        pre_tokenizers: the steps that cut it.
    """

    model: Mapping[str, Any]
    kind: str
    tokens: dict[int, str]
    added: dict[int, bool]
    late: list[int]
    merges: list[tuple[str, str]]
    scores: dict[int, float]
    normalizers: list[dict[str, Any]]
    pre_tokenizers: list[dict[str, Any]]


def read_tokenizer(path: Path) -> TokenizerFile:
    """The tokenizer of a JSON file.

    Raises:
        FileNotFoundError, ValueError: no such file, or it is no tokenizer of these kinds.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer file {path}")
    try:
        return _read(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} must be a tokenizer of the tokenizers library for a GGUF file, {KINDS}; it is none "
            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]:.80})"
        ) from None


def _read(given: Any) -> TokenizerFile:
    model, listed = given["model"], given.get("added_tokens") or []
    kind = model.get("type") or "BPE"
    added = {operator.index(a["id"]): a for a in listed}
    scores: dict[int, float] = {}
    if kind == "Unigram":
        scores = {i: float(score) for i, (_, score) in enumerate(model["vocab"])}
        tokens = {i: token for i, (token, _) in enumerate(model["vocab"])}
    else:
        tokens = {operator.index(i): token for token, i in model["vocab"].items()}
    shared = len(tokens) < len(model["vocab"])
    tokens |= {i: a["content"] for i, a in added.items()}
    pairs = model["merges"] if kind == "BPE" else []
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
    for token in [*tokens.values(), *(part for pair in merges for part in pair)]:
        token.encode()
    wrong = {
        f"its `type` is {kind!r:.40}": kind not in ("BPE", "Unigram", "WordPiece"),
        "a score is no finite number": not all(map(math.isfinite, scores.values())),
        "an id is negative": min(tokens, default=0) < 0,
        "two tokens have the same id": shared,
        "two ids have the same token": len(set(tokens.values())) < len(tokens),
        "a merge is not of two tokens": any(len(pair) != 2 or " " in pair[0] + pair[1] for pair in merges),
    }
    if (said := next((reason for reason, yes in wrong.items() if yes), None)) is not None:
        raise ValueError(f"in `model`, {said}")
    special = {i: bool(a.get("special")) for i, a in added.items()}
    late = [i for i, a in added.items() if a.get("normalized", not a.get("special"))]
    steps = (_steps(given.get(k)) for k in ("normalizer", "pre_tokenizer"))
    return TokenizerFile(model, kind, tokens, special, late, merges, scores, *steps)


def _steps(given: Any) -> list[dict[str, Any]]:
    """Steps that follow one another: none, one, or a sequence."""
    if given is None:
        return []
    kind = given["type"]
    found = given["normalizers" if "normalizers" in given else "pretokenizers"] if kind == "Sequence" else [given]
    return [{"type": step["type"], **step} for step in found]
