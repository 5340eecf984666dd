"""Tokenizers of the kinds that GGUF files have names for, learnt from a short text."""

import pytest

from ssmzoo.checkpoints.gguf.charsmap import WHITESPACE, charsmap
from ssmzoo.checkpoints.gguf.vocabulary import CUTS

tokenizers = pytest.importorskip("tokenizers", reason="needs the tokenizers library")

TEXT = (
    "The state of the model is what it remembers: 1234 numbers; don't you think?\n\n  Naïve résumés cost 3,50 €. 模型"
)
PRE = {name: pattern for (pattern, _), name in CUTS.items()}


def trained(path, pre):
    """Writes a byte-level BPE of 300 token ids, with a special token and one that is none."""
    cut, words = (
        tokenizers.pre_tokenizers,
        tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=pre == "llama-bpe")),
    )
    if pre == "gpt-2":
        words.pre_tokenizer = cut.ByteLevel(add_prefix_space=False)
    else:
        split = cut.Split(tokenizers.Regex(PRE[pre]), "isolated")
        words.pre_tokenizer = cut.Sequence([split, cut.ByteLevel(add_prefix_space=False, use_regex=False)])
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=cut.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([TEXT] * 4, trainer)
    words.add_tokens(["<tool>"])
    words.save(str(path))
    return words


def pieces(path, prefix=True):
    """Writes a tokenizer as those that come from SentencePiece's BPE models: scored tokens, and all merges of each."""
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=260, show_progress=False)
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE())
    learnt.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    learnt.train_from_iterator([TEXT] * 4, trainer)
    by_age = sorted(learnt.get_vocab(), key=learnt.get_vocab().__getitem__)
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *by_age]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [(t[:i], t[i:]) for t in by_age for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    words = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [tokenizers.normalizers.Prepend("\u2581")] * prefix + [tokenizers.normalizers.Replace(" ", "\u2581")]
    words.normalizer = tokenizers.normalizers.Sequence(steps)
    words.add_special_tokens(special)
    words.save(str(path))
    return words


# What a map of characters replaces, as SentencePiece's do: white space, ligatures, full-width letters, soft hyphens.
MAPPED = {"\ufb01": "fi", "\uff21": "A", "\u00ad": "", "\u2026": "...", "e\u0301": "é"}
MAP = charsmap(dict.fromkeys(WHITESPACE, " ") | MAPPED)
UNIGRAMS = ("t5", "t5 with a map", "strip", "never")


def unigram(path, kind):
    """Writes a Unigram tokenizer of about 100 tokens, which prepares texts in one of the ways of UNIGRAMS."""
    cut, normalize = tokenizers.pre_tokenizers, tokenizers.normalizers
    words = tokenizers.Tokenizer(tokenizers.models.Unigram())
    metaspace = cut.Metaspace(prepend_scheme="never" if kind == "never" else "always", split=kind != "never")
    words.pre_tokenizer = cut.Sequence([cut.WhitespaceSplit(), metaspace]) if "t5" in kind else metaspace
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=110,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=["\u2581"],
        show_progress=False,
    )
    words.train_from_iterator([TEXT.replace("模型", "")] * 4, trainer)
    words.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    mapped = normalize.Precompiled(MAP)
    if kind == "t5 with a map":
        words.normalizer = mapped
    elif kind == "strip":
        replace = normalize.Replace(tokenizers.Regex(" {2,}"), "\u2581")
        words.normalizer = normalize.Sequence([mapped, normalize.Strip(left=False, right=True), replace])
    words.save(str(path))
    return words


def wordpiece(path, **options):
    """Writes a WordPiece tokenizer as BERT's; options are of its normalizer."""
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    words.normalizer = tokenizers.normalizers.BertNormalizer(**options)
    words.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.WordPieceTrainer(vocab_size=130, special_tokens=special, show_progress=False)
    words.train_from_iterator([TEXT] * 4, trainer)
    words.save(str(path))
    return words
