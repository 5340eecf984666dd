"""SentencePiece's BPE vocabularies, as the `tokenizers` library keeps them, in a GGUF file's terms.

llama.cpp merges the two neighbours whose union has the highest score, the left ones first. A tokenizer has merges in
an order instead. Both do the same where the merges of one token follow one another, and every way to make a token out
of two is among them: as they are where the merges were made from SentencePiece's own scores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ssmzoo.checkpoints.gguf.tokenizer_file import TokenizerFile

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def space_prefix(given: TokenizerFile) -> bool | None:
    """Whether a tokenizer puts a space before a text; None where it prepares texts in a way that llama.cpp has not."""
    steps, cuts = given.normalizers, given.pre_tokenizers
    if not steps and len(cuts) == 1:
        cut = cuts[0]
        whole = cut["type"] == "Metaspace" and cut.get("replacement") == SPACE and cut.get("split") is False
        return False if whole and cut.get("prepend_scheme") == "never" else None
    if cuts:
        return None
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    return False if steps == [replace] else None


def scores(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> list[float] | str:
    """The score of each token, or why merges by scores would not do the same as these.

    Args:
        tokens: of the vocabulary, those that stand for text.
        merges: two tokens each, the first of them first.
    """
    order: dict[str, int] = {}
    last = None
    for left, right in merges:
        made = left + right
        if made != last and made in order:
            return f"the merges that make {made!r:.40} do not follow one another"
        order.setdefault(made, len(order))
        last = made
    known, given = set(tokens), set(merges)
    for token in tokens:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair not in given and pair[0] in known and pair[1] in known:
                return f"{pair[0]!r:.40} and {pair[1]!r:.40} make a token, and are no merge"
    return [-float(order.get(token, len(order))) for token in tokens]


def lacks_bytes(tokens: Sequence[str]) -> bool:
    """Whether a byte has no token, so that some texts have none."""
    return sum(BYTE.fullmatch(token) is not None for token in set(tokens)) < 256
