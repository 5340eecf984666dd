"""Tokenizers in GGUF files: expressed by llama.cpp's names, or refused with the reason."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from gguf_tokenizers import PRE, TEXT, pieces, trained

from ssmzoo.checkpoints.gguf.vocabulary import alphabet, vocabulary_keys

SIZE = 304


@pytest.mark.parametrize("pre", PRE)
def test_a_tokenizers_file(tmp_path, pre):
    words = trained(tmp_path / "tokenizer.json", pre)
    keys = vocabulary_keys(tmp_path / "tokenizer.json", SIZE)
    assert keys["tokenizer.ggml.pre"] == pre
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == SIZE
    assert all(tokens[i] == token for token, i in words.get_vocab().items())
    assert [types[words.token_to_id(token)] for token in ("<|endoftext|>", "<tool>", "a")] == [3, 4, 1]
    assert tokens[-1] == "[PAD303]"
    assert types[-1] == 5
    assert keys["tokenizer.ggml.eos_token_id"] == words.token_to_id("<|endoftext|>")
    # The merges, applied by hand, give the ids that the library gives.
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(keys["tokenizer.ggml.merges"])}
    letters = [alphabet()[byte] for byte in b" remembers"]
    while pairs := [pair for pair in zip(letters, letters[1:], strict=False) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        i = next(i for i in range(len(letters)) if tuple(letters[i : i + 2]) == best)
        letters[i : i + 2] = ["".join(best)]
    ids = words.encode(TEXT).ids
    found = [tokens.index(letter) for letter in letters]
    assert any(ids[i : i + len(found)] == found for i in range(len(ids)))


def test_bytes_and_none():
    keys = vocabulary_keys("bytes", 256)
    assert [keys["tokenizer.ggml.tokens"][byte] for byte in (0, 10, 32, 65, 127, 161, 255)] == list("ĀĊĠAġ¡ÿ")
    assert len(set(keys["tokenizer.ggml.tokens"])) == 256
    assert vocabulary_keys(None, 256) == {"tokenizer.ggml.model": "no_vocab"}


def changes(**changes):
    return lambda given: given | changes


def changes_in_place(**changes):
    return lambda given: given.update(changes)


REFUSED = {
    r"no BPE \(": changes(model={"type": "Unigram", "vocab": [["a", 0.0]]}),
    "rules that llama.cpp has no name for": lambda given: (
        given | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, given["pre_tokenizer"]]}}
    ),
    "it does not work on bytes": changes(pre_tokenizer={"type": "Whitespace"}),
    "it puts a space before text": lambda given: (
        given | {"pre_tokenizer": given["pre_tokenizer"] | {"add_prefix_space": True}}
    ),
    "not every byte has a token": lambda given: given | {"model": given["model"] | {"byte_fallback": True}},
    "it drops merges at random": lambda given: given | {"model": given["model"] | {"dropout": 0.1}},
    "it normalises text other than by NFC": changes(normalizer={"type": "Lowercase"}),
    "token ids up to 900; the model has 304": changes(added_tokens=[{"id": 900, "content": "<x>", "special": True}]),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_has_no_expression(tmp_path, said):
    path = tmp_path / "tokenizer.json"
    trained(path, "gpt-2")
    path.write_text(json.dumps(REFUSED[said](json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=said.replace("no BPE", "be a BPE tokenizer .* it is none")) as error:
        vocabulary_keys(path, SIZE)
    assert str(path) in str(error.value)


DAMAGED = {
    "cannot be interpreted as an integer": lambda given: given["model"]["vocab"].update(a="x"),
    "an id is negative": lambda given: given["added_tokens"][0].update(id=-1),
    "two ids have the same token": lambda given: given["added_tokens"][0].update(content="a"),
    "two tokens have the same id": lambda given: given["model"]["vocab"].update(a=given["model"]["vocab"]["b"]),
    "a merge is not of two tokens": lambda given: given["model"]["merges"].append("abc"),
    "UnicodeEncodeError": lambda given: given["added_tokens"][0].update(content="\ud800"),
    "'pretokenizers'": changes_in_place(pre_tokenizer={"type": "Sequence"}),
    "TypeError": changes_in_place(normalizer="NFC"),
}


@pytest.mark.parametrize("said", DAMAGED)
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_damaged_file(tmp_path, kind, said):
    path = tmp_path / "tokenizer.json"
    if kind == "bytes":
        trained(path, "gpt-2")
    else:
        pieces(path)
    given = json.loads(path.read_text())
    DAMAGED[said](given)
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"tokenizer.json must be a BPE tokenizer .* it is none .*({said})"):
        vocabulary_keys(path, 4096)


def test_a_file_of_nothing_but_brackets(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="it is none .RecursionError"):
        vocabulary_keys(path, SIZE)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        vocabulary_keys(tmp_path / "tokenizer.json", SIZE)


def by_scores(keys, text):
    """The ids of a text as llama.cpp finds them for SentencePiece's vocabularies: the best union first."""
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = list((" " * keys["tokenizer.ggml.add_space_prefix"] + text).replace(" ", "\u2581"))
    while unions := [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]:
        i = -max(unions)[1]
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    found = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return list(itertools.chain(*found))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_tokenizer_of_sentencepieces(tmp_path, prefix):
    words = pieces(tmp_path / "tokenizer.json", prefix)
    size = words.get_vocab_size() + 1
    keys = vocabulary_keys(tmp_path / "tokenizer.json", size)
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    assert keys["tokenizer.ggml.token_type"][-2:] == [1, 5]
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos")] == [0, 1, 2]
    assert "tokenizer.ggml.merges" not in keys
    rng = random.Random(0)
    for _ in range(60):
        text = "".join(rng.choice([*TEXT.split(), " ", "\n", "é", "模", "\U0001f600"]) for _ in range(8))
        assert by_scores(keys, text) == words.encode(text).ids, text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given["model"]["merges"].pop(3), "make a token, and are no merge"),
        (lambda given: given["model"]["merges"].append(given["model"]["merges"][0]), "do not follow one another"),
        (lambda given: given.update(normalizer={"type": "NFKC"}), "prepares text in another way"),
        (lambda given: given["model"].update(ignore_merges=True), "takes words that are tokens whole"),
    ],
)
def test_pieces_that_scores_cannot_merge(tmp_path, change, said):
    path = tmp_path / "tokenizer.json"
    size = pieces(path).get_vocab_size()
    given = json.loads(path.read_text())
    change(given)
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"cannot be expressed in a GGUF file: .*{said}"):
        vocabulary_keys(path, size)
