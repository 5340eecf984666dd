"""Training data: which files, how they are split, and batches that depend on their key alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssmzoo.train import data as data_module
from ssmzoo.train.checks import check_size
from ssmzoo.train.data import (
    MANY,
    Tokens,
    batch,
    fixed_batches,
    load_ids,
    load_text,
    standard_library,
    text_files,
)
from ssmzoo.train.vocabulary import Bytes, Tokenizer, cut, decode


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def text_of(tokens: Tokens) -> str:
    return bytes(tokens.window(0, len(tokens))).decode()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A small byte-pair tokenizer, in a file."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["the cat sat on the mat, the cat said\n"] * 20, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(path))
    return path


def test_folders_are_searched_for_text(tmp_path):
    write(
        tmp_path,
        b_txt="two",
        a__deep__c_md="one",
        _hidden="no",
        pic_png=b"\x89PNG\0\0",
        old_txt="é".encode("latin1"),
    )
    write(tmp_path, __pycache____x_py="no", empty_txt="")
    names = [str(path.relative_to(tmp_path)) for path in text_files([tmp_path])]
    assert names == ["a/deep/c.md", "b.txt"]
    assert text_files([tmp_path / "b.txt", tmp_path / "a"])[0].name == "b.txt"


def test_the_standard_library_is_there():
    files = standard_library()
    assert len(files) > MANY
    assert all(path.suffix == ".py" for path in files)
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in files)


def test_the_end_of_each_of_a_few_files_is_held_out(tmp_path):
    write(tmp_path, a_txt="a1\n" * 50, b_txt="b2\n" * 50)
    data = load_text([tmp_path], Bytes(), 0.1)
    assert text_of(data.train) == "a1\n" * 45 + "b2\n" * 45
    assert text_of(data.validation) == "a1\n" * 5 + "b2\n" * 5
    assert data.unit == "byte"
    assert data.bits(np.log(2)) == pytest.approx(1)


def test_whole_files_are_held_out_of_many_and_always_the_same(tmp_path):
    write(tmp_path, **{f"f{i:02d}_txt": f"<{i:02d}>" * 10 for i in range(40)})
    data = load_text([tmp_path], Bytes(), 0.1)
    assert len(data.validation) == 4 * 40
    pieces = [text_of(data.validation)[i : i + 40] for i in range(0, 160, 40)]
    assert all(piece == piece[:4] * 10 and piece[:4] not in text_of(data.train) for piece in pieces)
    again = load_text([tmp_path], Bytes(), 0.1)
    assert again.train.fingerprint() == data.train.fingerprint()
    assert text_of(again.validation) == text_of(data.validation)
    write(tmp_path, f01_txt="changed" * 10)
    assert load_text([tmp_path], Bytes(), 0.1).train.fingerprint() != data.train.fingerprint()


def test_files_mapped_from_disk_read_the_same(tmp_path, monkeypatch):
    write(tmp_path, a_txt="0123456789" * 9, b_txt="abc", c_txt="xyz" * 20)
    whole = load_text([tmp_path], Bytes(), 0.2)
    monkeypatch.setattr(data_module, "MAPPED", 50)
    mapped = load_text([tmp_path], Bytes(), 0.2)
    assert any(isinstance(array, data_module.Stored) for array in mapped.train._arrays)
    assert sorted(text_of(mapped.train)) == sorted(text_of(whole.train))
    assert sorted(text_of(mapped.validation)) == sorted(text_of(whole.validation))


def test_windows_reach_over_several_arrays():
    whole = np.arange(100, dtype=np.uint8)
    tokens = Tokens([whole[:10], whole[:0], whole[10:11], whole[11:60], whole[60:]])
    assert len(tokens) == 100
    for start in range(100):
        for length in (1, 2, 13, 60):
            if start + length <= 100:
                assert np.array_equal(tokens.window(start, length), whole[start : start + length])


def test_batches_depend_on_their_key_alone():
    tokens = Tokens([np.arange(50, dtype=np.uint8)])
    first = batch(tokens, 64, 8, (0, 3, 1))
    assert first.shape == (64, 9)
    assert first.dtype == torch.int64
    assert torch.equal(first, batch(tokens, 64, 8, (0, 3, 1)))
    assert not torch.equal(first, batch(tokens, 64, 8, (0, 4, 1)))
    assert torch.equal(first.diff(), torch.ones(64, 8, dtype=torch.int64))  # windows, whole
    starts = batch(tokens, 2000, 8, (1,))[:, 0]
    assert starts.unique().tolist() == list(range(42))  # all places, to the last


def test_validation_batches_lie_evenly_and_never_change():
    tokens = Tokens([np.arange(200, dtype=np.uint8)])
    batches = list(fixed_batches(tokens, 2, 3, 10))
    assert [len(b) for b in batches] == [3, 3]
    assert torch.cat(batches)[:, 0].tolist() == [0, 37, 75, 113, 151, 189]
    few = list(fixed_batches(Tokens([np.arange(25, dtype=np.uint8)]), 2, 8, 10))
    assert torch.cat(few)[:, 0].tolist() == [0, 14]


def test_ids(tmp_path):
    data = load_ids(torch.arange(100), 0.25)
    assert (len(data.train), len(data.validation), data.unit) == (75, 25, "token")
    assert load_ids(np.arange(100, dtype=np.uint16), 0.25).train.fingerprint() == data.train.fingerprint()
    with pytest.raises(ValueError, match=r"integers of shape \(n\); got float32 \(3,\)"):
        load_ids(np.zeros(3, np.float32), 0.1)
    with pytest.raises(ValueError, match="must hold token ids from 0 on; got -1"):
        load_ids(torch.tensor([1, -1]), 0.1)


def test_a_tokenizer(tmp_path, tokenizer):
    text = "the cat sat on the mat, the café said 猫\n" * 40
    write(tmp_path, a_txt=text)
    vocabulary = Tokenizer(tokenizer)
    data = load_text([tmp_path / "a.txt"], vocabulary, 0.5)
    ids = data.train.window(0, len(data.train))
    assert ids.dtype == np.uint16
    assert (
        decode(vocabulary, ids.tolist()) + decode(vocabulary, data.validation.window(0, len(data.validation)).tolist())
        == text
    )
    assert data.tokens_per_byte == len(data.validation) / (len(text.encode()) / 2)
    assert data.tokens_per_byte < 0.7
    assert decode(vocabulary, vocabulary.encode("the cat")) == "the cat"


def test_long_text_is_encoded_in_pieces(tokenizer):
    vocabulary = Tokenizer(tokenizer)
    text = np.frombuffer(("the cat sat on the mat\n" * 300).encode(), np.uint8)
    whole = vocabulary.encode_bytes(text)
    vocabulary.PIECE, vocabulary.PIECES = 50, 3
    assert np.array_equal(vocabulary.encode_bytes(text), whole)


def test_bytes_split_inside_a_character_are_decoded_once_whole():
    step = Bytes().decoder()
    assert [step(byte) for byte in "a猫".encode()] == ["a", "", "", "猫"]
    assert decode(Bytes(), [0xFF, 0x61]) == "\ufffda"


def test_cuts_fall_at_line_ends_or_between_characters():
    lines = np.frombuffer(b"one\ntwo\nthree", np.uint8)
    assert [cut(lines, at) for at in (0, 1, 4, 5, 8, 20)] == [0, 4, 4, 8, 8, 13]
    one_line = np.frombuffer("猫猫猫".encode(), np.uint8)
    assert [cut(one_line, at) for at in (1, 3, 4, 8)] == [3, 3, 6, 9]


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="the data folder .* holds no text files; name a folder or files that do"):
        text_files([tmp_path])
    write(tmp_path, only_bin=b"\0\1\2")
    with pytest.raises(ValueError, match="holds no text files"):
        text_files([tmp_path])


def test_files_that_do_not_serve(tmp_path, monkeypatch):
    write(tmp_path, x_bin=b"\0\1", latin_txt="é".encode("latin1"), empty_txt="")
    with pytest.raises(FileNotFoundError, match="no data file or folder .*nowhere"):
        text_files([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"x\.bin is not UTF-8 text; convert it first"):
        text_files([tmp_path / "x.bin"])
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        text_files([tmp_path / "latin.txt"])
    with pytest.raises(ValueError, match=r"the data file .*empty\.txt is empty"):
        text_files([tmp_path / "empty.txt"])

    def closed(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(tmp_path), "open", closed)
    with pytest.raises(ValueError, match=r"latin\.txt cannot be read: Permission denied"):
        text_files([tmp_path / "latin.txt"])


def test_text_that_goes_bad_later_on(tmp_path, tokenizer):
    write(tmp_path, a_txt=b"good\n" * 20_000 + b"\xff\n")
    with pytest.raises(ValueError, match="`data` must be UTF-8 text throughout"):
        load_text([tmp_path / "a.txt"], Tokenizer(tokenizer), 0.1)


def test_too_little_text(tmp_path):
    write(tmp_path, a_txt="x" * 100)
    data = load_text([tmp_path], Bytes(), 0.05)
    with pytest.raises(ValueError, match="the training data has 95 tokens, and one sequence takes 257: give more"):
        check_size(data, 256)
    with pytest.raises(
        ValueError, match="the validation data has 5 tokens, and one sequence takes 17: .*--set length=2"
    ):
        check_size(data, 16)


def test_tokenizer_files_that_do_not_serve(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers", reason="needs tokenizers")
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        Tokenizer(tmp_path / "none.json")
    write(tmp_path, x_json="{}")
    with pytest.raises(ValueError, match=r"x\.json is no tokenizer file"):
        Tokenizer(tmp_path / "x.json")
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"pip install 'ssmzoo\[train\]'"):
        Tokenizer(tmp_path / "x.json")


def test_a_tokenizer_whose_ids_have_gaps(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
    words = {"a": 0, "b": 1, "c": 2, "[UNK]": 3, "far": 300}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "gaps.json"
    made.save(str(path))
    vocabulary = Tokenizer(path)
    assert vocabulary.size == 301
    ids = vocabulary.encode_bytes(np.frombuffer(b"a far b", np.uint8))
    assert ids.tolist() == [0, 300, 1]
    assert ids.dtype == np.uint16
    step = vocabulary.decoder()
    for token in (0, 150, 300, 1):  # a model may draw ids that stand for nothing
        assert isinstance(step(token), str)
