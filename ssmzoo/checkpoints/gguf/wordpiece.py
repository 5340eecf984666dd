"""BERT's WordPiece vocabularies, as the `tokenizers` library keeps them, in a GGUF file's terms.

Both take the longest token at each place of a word, or the unknown token for the whole word. The library marks tokens
that go on within a word, by "##"; llama.cpp marks those that begin one, by "▁".
"""

from __future__ import annotations

from typing import Any

from ssmzoo.checkpoints.gguf.sentencepiece import SPACE
from ssmzoo.checkpoints.gguf.tokenizer_file import TokenizerFile

WITHIN = "##"
# llama.cpp's names of tokens → BERT's. It has ids for all of them where a file names none, which may be any tokens.
MARKED = {"bos": "[CLS]", "cls": "[CLS]", "seperator": "[SEP]", "padding": "[PAD]", "mask": "[MASK]"}
NEEDED = ("[CLS]", "[SEP]")


def pieces(given: TokenizerFile) -> dict[int, str] | str:
    """The tokens of a vocabulary, marked as llama.cpp marks them, or why it has no such tokenizer."""
    model, steps = given.model, given.normalizers
    names = {token: i for i, token in given.tokens.items()}
    kept = {*given.added, names.get(str(model.get("unk_token")), -1)}
    found = {i: token if i in kept else _marked(token) for i, token in given.tokens.items()}
    bert = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
    wrong = {
        "it prepares text in another way than BERT": len(steps) != 1 or not bert.items() <= steps[0].items(),
        "it cuts text into words in another way than BERT": given.pre_tokenizers != [{"type": "BertPreTokenizer"}],
        f"what goes on within a word is not marked by {WITHIN}": model.get("continuing_subword_prefix") != WITHIN,
        "it has no unknown token": model.get("unk_token") not in names,
        f"it lacks {' or '.join(NEEDED)}": any(token not in names for token in NEEDED),
        f"tokens with {SPACE} in them are taken for others": len(set(found.values())) < len(found)
        or any(i not in kept and token[:1] == SPACE == given.tokens[i][2:3] for i, token in found.items()),
    }
    return next((reason for reason, yes in wrong.items() if yes), found)


def _marked(token: str) -> str:
    return token.removeprefix(WITHIN) if token.startswith(WITHIN) else SPACE + token


def normalizer_keys(given: TokenizerFile) -> dict[str, Any]:
    """Of how texts are prepared."""
    lower, strip = given.normalizers[0].get("lowercase", True), given.normalizers[0].get("strip_accents")
    return {"lowercase": bool(lower), "strip_accents": bool(lower if strip is None else strip)}
