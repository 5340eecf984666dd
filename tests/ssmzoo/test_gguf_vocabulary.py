"""Tokenizers in GGUF files: expressed by llama.cpp's names, or refused with the reason."""

from __future__ import annotations

import base64
import itertools
import json
import random
import unicodedata

import pytest
from gguf_tokenizers import MAP, PRE, TEXT, UNIGRAMS, pieces, trained, unigram, wordpiece

from ssmzoo.checkpoints.gguf.charsmap import charsmap, normalized
from ssmzoo.checkpoints.gguf.vocabulary import alphabet, vocabulary_keys

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library")

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
    r"its `type` is 'WordLevel'": changes(model={"type": "WordLevel", "vocab": {"a": 0}}),
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
    with pytest.raises(ValueError, match=f"tokenizer.json must be a tokenizer .* it is none .*({said})"):
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


def texts(rng, n):
    """Texts of words, white space and characters that are normalised or unknown."""
    words = [*TEXT.split(), " ", "  ", "\n", "\t", "\u3000", "é", "e\u0301", "模", "\U0001f600", "\ufb01n", "\u2026"]
    made = [" ".join(rng.choice([*words, "ÄÖ", "a-b"]) for _ in range(rng.randrange(8))) for _ in range(n)]
    return [text + rng.choice(["", " ", "\n"]) for text in made]


def by_sums(keys, text):
    """The ids of a text as llama.cpp finds them for Unigram vocabularies: the largest sum of scores."""
    data = keys.get("tokenizer.ggml.precompiled_charsmap")
    text = text if data is None else normalized(data, text)
    if keys["tokenizer.ggml.remove_extra_whitespaces"]:
        text = "".join(" " + word for word in text.split(" ") if word)
    text = text.replace(" ", "\u2581")
    given = zip(*(keys[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")), strict=True)
    scores = {token: (i, score) for i, (token, score, kind) in enumerate(given) if kind in (1, 5)}
    least = min(scores[token][1] for token in scores if not token.startswith("[PAD"))
    best = [(0.0, [])] + [(-float("inf"), [])] * len(text)
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            unknown = (keys["tokenizer.ggml.unknown_token_id"], least - 10) if end == start + 1 else None
            if (found := scores.get(text[start:end], unknown)) is not None:
                total = best[start][0] + found[1]
                if total > best[end][0]:
                    best[end] = total, [*best[start][1], found[0]]
    ids, unknown = best[-1][1], keys["tokenizer.ggml.unknown_token_id"]
    return [id for i, id in enumerate(ids) if i == 0 or not id == ids[i - 1] == unknown]


@pytest.mark.parametrize("kind", UNIGRAMS)
def test_a_unigram_tokenizer(tmp_path, kind):
    words = unigram(tmp_path / "tokenizer.json", kind)
    size = words.get_vocab_size() + 2
    keys = vocabulary_keys(tmp_path / "tokenizer.json", size)
    assert keys["tokenizer.ggml.model"] == "t5"
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 2]
    assert keys["tokenizer.ggml.token_type"][-3:] == [4, 5, 5]
    marked = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("padding", "eos", "unknown")]
    assert marked == [0, 1, 2]
    assert ("tokenizer.ggml.precompiled_charsmap" in keys) == (kind != "never")
    for text in ["", " ", *texts(random.Random(0), 100)]:
        assert by_sums(keys, text) == words.encode(text, add_special_tokens=False).ids, repr(text)


def by_longest(keys, text):
    """The ids of a text as llama.cpp finds them for BERT's vocabularies: the longest token at each place of a word."""
    names = {token: i for i, token in enumerate(keys["tokenizer.ggml.tokens"])}
    if keys["tokenizer.ggml.normalizer.strip_accents"]:
        text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c)[0] != "M")
    if keys["tokenizer.ggml.normalizer.lowercase"]:
        text = "".join(c.lower() for c in text)
    alone = (c for c in text if unicodedata.category(c)[0] == "P" or c in "$+<=>^`|~" or 0x4E00 <= ord(c) <= 0x9FFF)
    for c in set(alone):
        text = text.replace(c, f" {c} ")
    ids = []
    for word in text.split():
        left, found = "\u2581" + word, []
        while left:
            end = next((end for end in range(len(left), 0, -1) if left[:end] in names), 0)
            found.append(names[left[:end]] if end else None)
            left = left[end:] if end else ""
        ids += [keys["tokenizer.ggml.unknown_token_id"]] if None in found else found
    return ids


@pytest.mark.parametrize("options", [{}, {"lowercase": False}, {"lowercase": False, "strip_accents": True}])
def test_a_wordpiece_tokenizer(tmp_path, options):
    words = wordpiece(tmp_path / "tokenizer.json", **options)
    keys = vocabulary_keys(tmp_path / "tokenizer.json", words.get_vocab_size() + 1)
    assert keys["tokenizer.ggml.model"] == "bert"
    assert keys["tokenizer.ggml.token_type"][:6] == [3, 2, 3, 3, 3, 1]
    marked = [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("padding", "unknown", "bos", "seperator", "mask")]
    assert marked == [0, 1, 2, 3, 4]
    tokens = {words.id_to_token(i): token for i, token in enumerate(keys["tokenizer.ggml.tokens"][:-1])}
    assert all(tokens[t] == (t[2:] if t.startswith("##") else "\u2581" + t) for t in tokens if not t.startswith("["))
    for text in texts(random.Random(0), 100):
        assert by_longest(keys, text) == words.encode(text, add_special_tokens=False).ids, repr(text)


def test_added_tokens_in_normalised_text(tmp_path):
    """What stands before such a token keeps its space in the library, and loses it in llama.cpp."""
    words = unigram(tmp_path / "tokenizer.json", "strip")
    words.add_tokens(["<late>"])
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the added token '<late>' is looked for in normalised text"):
        vocabulary_keys(tmp_path / "tokenizer.json", 999)


LETTERS_ALONE = base64.b64encode(charsmap({"a": "b"})).decode()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given["model"].update(byte_fallback=True), "it falls back to bytes"),
        (lambda given: given["model"].update(unk_id=None), "it has no unknown token"),
        (lambda given: given.update(normalizer={"type": "NFKC"}), "in a way that llama.cpp has not"),
        (lambda given: given.update(pre_tokenizer={"type": "Whitespace"}), "in a way that llama.cpp has not"),
        (lambda given: given["model"]["vocab"].append(["a\u2581b", -3.0]), "a token reaches over a space"),
        (lambda given: given["model"]["vocab"].__setitem__(0, ["<pad>", -99.0]), "a special token scores less"),
        (lambda given: given["model"]["vocab"].__setitem__(3, ["q", -2.0]), "a space alone is no token"),
        (
            lambda given: given.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            "`precompiled_charsmap` is damaged",
        ),
        (
            lambda given: given.update(
                normalizer={
                    "type": "Precompiled",
                    "precompiled_charsmap": LETTERS_ALONE,
                }
            ),
            "it keeps line ends or other white space",
        ),
    ],
)
def test_unigrams_that_llama_cpp_cuts_in_another_way(tmp_path, change, said):
    path = tmp_path / "tokenizer.json"
    unigram(path, "t5")
    given = json.loads(path.read_text())
    given["model"]["vocab"].sort(key=lambda entry: (entry[0][0] != "<", entry[0] != "\u2581"))  # the space alone is 3
    given["model"]["unk_id"] = [token for token, _ in given["model"]["vocab"]].index("<unk>")
    given["added_tokens"] = [
        {"id": i, "content": token, "special": True} for i, (token, _) in enumerate(given["model"]["vocab"][:3])
    ]
    path.write_text(json.dumps(given))
    assert vocabulary_keys(path, 999)["tokenizer.ggml.model"] == "t5"
    change(given)
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"tokenizer.json cannot be expressed in a GGUF file: .*{said}"):
        vocabulary_keys(path, 999)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.update(normalizer=None), "it prepares text in another way than BERT"),
        (lambda given: given["normalizer"].update(clean_text=False), "it prepares text in another way than BERT"),
        (lambda given: given.update(pre_tokenizer={"type": "Whitespace"}), "it cuts text into words in another way"),
        (lambda given: given["model"].update(continuing_subword_prefix="@@"), "is not marked by ##"),
        (lambda given: given["model"].update(unk_token="[none]"), "it has no unknown token"),
        (
            lambda given: given["model"]["vocab"].update({"\u2581a": 900, "##\u2581\u2581a": 901}),
            "are taken for others",
        ),
        (lambda given: given["model"]["vocab"].update({"##\u2581": 900}), "are taken for others"),
        (lambda given: given["added_tokens"][2].update(content="[BEGIN]"), r"it lacks \[CLS\] or \[SEP\]"),
    ],
)
def test_word_pieces_that_llama_cpp_cuts_in_another_way(tmp_path, change, said):
    path = tmp_path / "tokenizer.json"
    wordpiece(path)
    given = json.loads(path.read_text())
    change(given)
    path.write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"tokenizer.json cannot be expressed in a GGUF file: .*{said}"):
        vocabulary_keys(path, 999)


def test_maps_of_characters():
    """Ours is read as the tokenizers library reads it, and damaged ones are refused whatever their bytes."""
    mapped, rng = tokenizers.normalizers.Precompiled(MAP), random.Random(0)
    for text in ["", "a", *(text.replace("e\u0301", "é") for text in texts(rng, 100))]:
        assert normalized(MAP, text) == mapped.normalize_str(text), repr(text)
    assert normalized(charsmap({"ab": "c", "abab": "d"}), "ababab aab") == "dc ac"
    for _ in range(300):
        data = bytearray(MAP[: rng.choice([3, 4, 100, len(MAP) - 1, len(MAP)])])
        for _ in range(rng.choice([0, 1, 9])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            normalized(bytes(data), TEXT)
        except ValueError as error:
            assert "`precompiled_charsmap` must have" in str(error)  # noqa: PT017
