"""A tokenizer as keys of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmzoo.checkpoints.gguf import sentencepiece, unigram, wordpiece
from ssmzoo.checkpoints.gguf.tokenizer_file import TokenizerFile, read_tokenizer

# Kinds of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is cut into words, and whether words that are tokens are taken whole → llama.cpp's name of both.
CUTS = {
    (GPT2, False): "gpt-2",
    (f"{WORDS}\\p{{N}}{REST}", False): "qwen2",
    (f"{WORDS}\\p{{N}}{{1,3}}{REST}", True): "llama-bpe",
    (f"{WORDS}\\p{{N}}{{1,3}}{REST}", False): "dbrx",
}
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")
BEGINNINGS = ("<s>", "<bos>", "<|startoftext|>")
ENDINGS = {"eos": ENDS, "padding": ("<pad>", "[PAD]")}

BYTES = "bytes"  # instead of a file's path

# Two bytes that no text in UTF-8 has beside each other: llama.cpp asks for a merge, and bytes have none.
NEVER = bytes([0xC0, 0xC0])


def vocabulary_keys(tokenizer: Path | str | None, size: int) -> dict[str, Any]:
    """The keys under ``tokenizer.``.

    Args:
        tokenizer: a JSON file of the `tokenizers` library; "bytes"; or None for no vocabulary.
        size: how many token ids the model has.

    Raises:
        FileNotFoundError, ValueError: no such file, it is no tokenizer, or GGUF cannot express it.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    if str(tokenizer) == BYTES:
        if size < 256:
            raise ValueError(f"save: `tokenizer` {BYTES!r} needs 256 token ids; the model has {size}")
        letters = alphabet()
        merge = " ".join(letters[byte] for byte in NEVER)
        return _keys("gpt-2", _filled(dict(enumerate(letters)), size), {}, [merge], end=0)
    return _of_file(Path(tokenizer), size)


def alphabet() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2's): the byte's own, if it can be seen."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


def _of_file(path: Path, size: int) -> dict[str, Any]:
    given = read_tokenizer(path)
    if max(given.tokens, default=-1) >= size:
        raise ValueError(f"{path} has token ids up to {max(given.tokens)}; the model has {size}")
    kinds = {i: CONTROL if special else USER_DEFINED for i, special in given.added.items()}
    if given.kind == "Unigram":
        return _unigram(given, path, kinds, size)
    if given.kind == "WordPiece":
        return _wordpiece(given, path, kinds, size)
    if given.model.get("byte_fallback"):
        return _sentencepiece(given, path, kinds, size)
    pre = _cut(given, path)
    return _keys(
        pre, _filled(given.tokens, size), kinds, [" ".join(pair) for pair in given.merges], _first(given, ENDS)
    )


def _first(given: TokenizerFile, some: Sequence[str], otherwise: int | None = None) -> int | None:
    """The id of the first of some tokens that there is, or another one."""
    names = {token: i for i, token in given.tokens.items()}
    return next((names[token] for token in some if token in names), otherwise)


def _sentencepiece(given: TokenizerFile, path: Path, kinds: dict[int, int], size: int) -> dict[str, Any]:
    model, tokens = given.model, given.tokens
    unknown = _first(given, [str(model.get("unk_token"))])
    kinds |= {} if unknown is None else {unknown: UNKNOWN}
    kinds |= {i: BYTE for i, token in tokens.items() if sentencepiece.BYTE.fullmatch(token)}
    text = [i for i in tokens if i not in kinds]
    found = sentencepiece.scores([tokens[i] for i in text], given.merges)
    prefix = sentencepiece.space_prefix(given)
    wrong = {
        "it drops merges at random": bool(model.get("dropout")),
        "it takes words that are tokens whole": bool(model.get("ignore_merges")),
        "not every byte has a token": sentencepiece.lacks_bytes(list(tokens.values())),
        "it prepares text in another way than by a space before it": prefix is None,
        str(found): isinstance(found, str),
    }
    if (said := next((reason for reason, yes in wrong.items() if yes), None)) is not None or isinstance(found, str):
        raise _refusal(path, f"{said} (SentencePiece's kind)")
    marked = {"bos": _first(given, BEGINNINGS), "eos": _first(given, ENDS), "unknown": unknown}
    return {
        **_keys("default", _filled(tokens, size), kinds, None, None),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": _scores(dict(zip(text, found, strict=True)), size),
        "tokenizer.ggml.add_space_prefix": prefix,
        **_ids(marked),
    }


def _unigram(given: TokenizerFile, path: Path, kinds: dict[int, int], size: int) -> dict[str, Any]:
    unknown = given.model.get("unk_id")
    kinds |= {unknown: UNKNOWN} if isinstance(unknown, int) else {}
    found = unigram.prepared(given, [i for i in given.tokens if i not in kinds])
    if isinstance(found, str):
        raise _refusal(path, found)
    # Where a file names none, llama.cpp takes the ids 0 and 1, which may be any tokens.
    marked = {"bos": _first(given, BEGINNINGS), "unknown": unknown}
    marked |= {name: _first(given, some, unknown) for name, some in ENDINGS.items()}
    return {
        **_keys("default", _filled(given.tokens, size), kinds, None, None),
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.scores": _scores(given.scores | dict.fromkeys(given.added, 0.0), size, unigram.LEAST),
        "tokenizer.ggml.add_space_prefix": found.prefix,
        "tokenizer.ggml.remove_extra_whitespaces": found.merged,
        **({} if found.charsmap is None else {"tokenizer.ggml.precompiled_charsmap": found.charsmap}),
        **_ids(marked),
    }


def _wordpiece(given: TokenizerFile, path: Path, kinds: dict[int, int], size: int) -> dict[str, Any]:
    found = wordpiece.pieces(given)
    if isinstance(found, str):
        raise _refusal(path, f"{found} (WordPiece)")
    unknown = _first(given, [str(given.model["unk_token"])])
    assert unknown is not None
    kinds[unknown] = UNKNOWN
    marked = {name: _first(given, [token], unknown) for name, token in wordpiece.MARKED.items()}
    return {
        **_keys("default", _filled(found, size), kinds, None, None),
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.add_bos_token": True,
        **{f"tokenizer.ggml.normalizer.{name}": yes for name, yes in wordpiece.normalizer_keys(given).items()},
        **_ids(marked | {"unknown": unknown}),
    }


def _ids(marked: Mapping[str, int | None]) -> dict[str, Any]:
    return {f"tokenizer.ggml.{name}_token_id": id for name, id in marked.items() if id is not None}


def _scores(found: Mapping[int, float], size: int, least: float = 0.0) -> list[float]:
    return [found.get(i, least) for i in range(size)]


def _refusal(path: Path, said: str) -> ValueError:
    return ValueError(
        f"{path} cannot be expressed in a GGUF file: {said}. Leave the tokenizer out (`--no-tokenizer`, "
        "tokenizer=None); a program can still give the model token ids"
    )


def _cut(given: TokenizerFile, path: Path) -> str:
    """llama.cpp's name of how a tokenizer cuts text into words.

    Raises:
        ValueError: it has none.
    """
    model, steps = given.model, given.pre_tokenizers
    wrong = {
        "it drops merges at random": bool(model.get("dropout")),
        "it marks the ends of words": bool(model.get("end_of_word_suffix") or model.get("continuing_subword_prefix")),
        "it normalises text other than by NFC": given.normalizers not in ([], [{"type": "NFC"}]),
    }
    pattern = GPT2 if steps and steps[-1].get("use_regex", True) else None
    if len(steps) == 2 and steps[0].get("type") == "Split" and pattern is None and not steps[0].get("invert"):
        patterns = (regex for regex, _ in CUTS if steps[0].get("pattern") == {"Regex": regex})
        pattern = next(patterns, None) if steps[0].get("behavior") == "Isolated" else None
    elif len(steps) != 1:
        pattern = None
    wrong["it does not work on bytes"] = not steps or steps[-1].get("type") != "ByteLevel"
    wrong["it puts a space before text"] = bool(steps) and bool(steps[-1].get("add_prefix_space"))
    name = CUTS.get((str(pattern), bool(model.get("ignore_merges"))))
    wrong["it cuts text into words by rules that llama.cpp has no name for"] = name is None
    said = next((reason for reason, yes in wrong.items() if yes), None)
    if said is not None or name is None:
        raise _refusal(path, str(said))
    return name


def _filled(tokens: Mapping[int, str], size: int) -> list[tuple[str, bool]]:
    """The token of each id, and whether there is one: ids without any have names that no text has."""
    return [(tokens[i], True) if i in tokens else (f"[PAD{i}]", False) for i in range(size)]


def _keys(
    pre: str, tokens: list[tuple[str, bool]], kinds: Mapping[int, int], merges: list[str] | None, end: int | None
) -> dict[str, Any]:
    types = [kinds.get(i, NORMAL) if used else UNUSED for i, (_, used) in enumerate(tokens)]
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [token for token, _ in tokens],
        "tokenizer.ggml.token_type": types,
        **({} if merges is None else {"tokenizer.ggml.merges": merges}),
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    return found if end is None else found | {f"tokenizer.ggml.{name}_token_id": end for name in ("bos", "eos")}
