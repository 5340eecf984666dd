"""GGUF files: what is written is what llama.cpp's names mean, reads back to the same model, or is refused by name."""

from __future__ import annotations

import random
import struct

import pytest
import torch
from gguf_bytes import taken_apart
from gguf_models import ARCHITECTURES, MODELS, TWIN_MIXERS, random_model, rescale, save_twin

import ssmzoo
from ssmzoo.checkpoints.gguf.architectures import TWINS, architectures
from ssmzoo.checkpoints.gguf.types import FILE_TYPES

gguf = pytest.importorskip("gguf", reason="needs the gguf package")

IDS = torch.arange(1, 30)[None]


def read(path):
    """A file as the gguf package reads it: keys, and tensors in float32 by name."""
    reader = gguf.GGUFReader(path)
    keys = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}
    return keys, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path, name):
    """The same logits from what is read; and the same file from that again."""
    model = random_model(name)
    ssmzoo.save(model, tmp_path / "model.gguf", "gguf")
    assert read(tmp_path / "model.gguf")[0]["general.architecture"] == ARCHITECTURES.get(name, name)
    again = ssmzoo.build(tmp_path / "model.gguf").eval()
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-4, atol=1e-4)
    ssmzoo.save(again, tmp_path / "again.gguf", "gguf")
    (keys, tensors, types), (keys2, tensors2, types2) = (read(tmp_path / f"{x}.gguf") for x in ("model", "again"))
    assert keys == keys2
    assert types == types2
    for tensor, found in tensors.items():
        torch.testing.assert_close(tensors2[tensor], found, rtol=1e-6, atol=1e-7)


def test_every_architecture_is_here():
    written = {ARCHITECTURES.get(name, name) for name in MODELS}
    assert written | set(TWINS) == {found.ARCHITECTURE for found in architectures()}


@torch.no_grad()
def test_a_twin_is_read(tmp_path, monkeypatch):
    """Qwen3.5 with experts: the model is Qwen3-Next's, in another order of value heads."""
    model = random_model("qwen3-next", mixers=MODELS["qwen3-next"]["mixers"] | TWIN_MIXERS)
    save_twin(model, tmp_path / "model.gguf", monkeypatch)
    keys, tensors, _ = read(tmp_path / "model.gguf")
    assert keys["general.architecture"] == "qwen35moe"
    assert keys["qwen35moe.rope.dimension_sections"] == [2, 1, 1, 0]
    ours = model.state_dict()["layers.0.mixer.b_proj.weight"]
    assert torch.equal(tensors["blk.0.ssm_beta.weight"], ours[[0, 3, 1, 4, 2, 5]])
    torch.testing.assert_close(ssmzoo.build(tmp_path / "model.gguf").eval()(IDS), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_a_residual_stream_that_is_halved(tmp_path, every):
    """RWKV-6 as converters write it for 16 bits: what layers add is halved with it, and is read as it was."""
    model = random_model("rwkv6", n_layers=5)
    ssmzoo.save(model, tmp_path / "model.gguf", "gguf")
    rescale(tmp_path / "model.gguf", every)
    halved = read(tmp_path / "model.gguf")[1]["blk.4.time_mix_output.weight"]
    assert torch.equal(halved * 2 ** (4 // every), model.state_dict()["layers.4.mixer.o_proj.weight"])
    again = ssmzoo.build(tmp_path / "model.gguf").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(again[name], weight), name


@torch.no_grad()
@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "first")])
def test_a_bert_that_embeds(tmp_path, number, pooling):
    """A file without a classifier gives each sequence a vector: the mean of all tokens, or the first one's."""
    model, path = random_model("bert"), tmp_path / "model.gguf"
    ssmzoo.save(model, path, "gguf")
    file = taken_apart(path.read_bytes())
    file.tensors = [tensor for tensor in file.tensors if not tensor.name.startswith(b"cls.")]
    file.keys = [key for key in file.keys if key[0] not in (b"bert.pooling_type", b"bert.classifier.output_labels")]
    file.keys.append((b"bert.pooling_type", 4, struct.pack("<I", number)))
    path.write_bytes(file.bytes())
    hidden = []
    model.layers[-1].register_forward_hook(lambda _, args, out: hidden.append(out))
    model(IDS)
    stream = hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]
    again = ssmzoo.build(path).eval()
    assert again.config.pooling == pooling
    torch.testing.assert_close(again(IDS), stream.mean(1) if pooling == "mean" else stream[:, 0])
    for changes, said in (
        ({"bert.pooling_type": (4, struct.pack("<I", 3))}, r"must be 1 \(mean\) or 2 \(first token\); got 3"),
        ({"bert.attention.causal": (7, b"\x01")}, "`attention.causal` must be false; got True"),
    ):
        changed = file.copy()
        kept = [key for key in file.keys if key[0].decode() not in changes]
        changed.keys = kept + [(name.encode(), *value) for name, value in changes.items()]
        path.write_bytes(changed.bytes())
        with pytest.raises(ValueError, match=said):
            ssmzoo.build(path)


def test_the_tensors_of_a_hybrid(tmp_path):
    model = random_model("jamba")
    ssmzoo.save(model, tmp_path / "model.gguf", "gguf")
    keys, tensors, _ = read(tmp_path / "model.gguf")
    ours = model.state_dict()
    assert keys["jamba.attention.head_count_kv"] == [0, 2, 0, 0]
    assert keys["jamba.expert_count"] == 4
    assert torch.equal(tensors["token_embd.weight"], ours["embedding.weight"])
    assert torch.equal(tensors["output.weight"], ours["lm_head.weight"])
    torch.testing.assert_close(tensors["blk.0.ssm_a"], -ours["layers.0.mixer.A_log"].exp())
    assert torch.equal(tensors["blk.0.ssm_conv1d.weight"], ours["layers.0.mixer.conv1d.weight"][:, 0])
    assert torch.equal(tensors["blk.1.attn_k.weight"], ours["layers.1.mixer.k_proj.weight"])
    experts = ours["layers.1.mlp.experts.fc1.weight"]
    assert torch.equal(tensors["blk.1.ffn_gate_exps.weight"], experts[:, :96])
    assert torch.equal(tensors["blk.1.ffn_up_exps.weight"], experts[:, 96:])
    assert torch.equal(tensors["blk.2.ffn_up.weight"], ours["layers.2.mlp.fc1.weight"][96:])


def test_rotary_channels_lie_in_pairs(tmp_path):
    """Of Llama: channels i and i + 8 of a head of 16, which positions turn together, are 2 i and 2 i + 1 there."""
    model = random_model("llama")
    ssmzoo.save(model, tmp_path / "model.gguf", "gguf")
    keys, tensors, _ = read(tmp_path / "model.gguf")
    ours = model.state_dict()["layers.0.mixer.k_proj.weight"]
    found = tensors["blk.0.attn_k.weight"]
    assert torch.equal(found[16:32:2], ours[16:24])
    assert torch.equal(found[17:32:2], ours[24:32])
    assert keys["llama.rope.scaling.factor"] == 2.0
    assert keys["llama.rope.freq_base"] == 5e3


def test_norms_that_add_one_and_multipliers(tmp_path):
    qwen, falcon = random_model("qwen3-next"), random_model("falcon-h1")
    ssmzoo.save(qwen, tmp_path / "qwen.gguf", "gguf")
    ssmzoo.save(falcon, tmp_path / "falcon.gguf", "gguf")
    tensors, ours = read(tmp_path / "qwen.gguf")[1], qwen.state_dict()
    torch.testing.assert_close(tensors["blk.1.attn_q_norm.weight"], 1 + ours["layers.1.mixer.q_norm.weight"])
    assert torch.equal(tensors["blk.0.ssm_norm.weight"], ours["layers.0.mixer.o_norm.weight"])
    tensors, ours = read(tmp_path / "falcon.gguf")[1], falcon.state_dict()
    torch.testing.assert_close(tensors["token_embd.weight"], 1.9 * ours["embedding.weight"])
    torch.testing.assert_close(tensors["output.weight"], 0.7 * ours["embedding.weight"])
    torch.testing.assert_close(tensors["blk.0.ffn_gate.weight"], 1.5 * ours["layers.0.mlp.fc1.weight"][:96])
    rows = tensors["blk.0.ssm_in.weight"] / ours["layers.0.mixer.branches.mamba2.in_proj.weight"]
    expected = torch.tensor([0.7, 1.2, 0.8, 1.3, 0.9]).repeat_interleave(torch.tensor([96, 96, 32, 32, 6])) * 1.2
    torch.testing.assert_close(rows, expected[:, None].expand_as(rows), rtol=1e-4, atol=1e-4)


# What rounding may change, of the largest number of a block of 32: half a step; a whole one at the end of those kinds
# that have one more number below zero than above.
STEPS = {"f32": 0.0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 0.5 / 127, "q4_0": 1 / 8, "q5_0": 1 / 16}
STEPS |= {"q4_1": 1 / 15, "q5_1": 1 / 31}


@pytest.mark.parametrize("kind", FILE_TYPES)
def test_numbers_in_fewer_bits(tmp_path, kind):
    model = random_model("mamba")
    ssmzoo.save(model, tmp_path / "model.gguf", "gguf", dtype=kind)
    keys, tensors, types = read(tmp_path / "model.gguf")
    ours = model.state_dict()
    assert keys["general.file_type"] == FILE_TYPES[kind]
    assert types["blk.0.ssm_in.weight"].lower() == kind
    assert types["token_embd.weight"].lower() == ("q8_0" if kind[:2] in ("q4", "q5") else kind)
    assert types["blk.0.ssm_dt.weight"].lower() == ("f16" if kind[0] == "q" else kind)  # rows of 4 are no blocks
    assert {types[f"blk.0.{x}"] for x in ("ssm_a", "ssm_d", "ssm_conv1d.weight", "attn_norm.weight")} == {"F32"}
    expected = ours["layers.0.mixer.in_proj.weight"].view(-1, 32)
    off = (tensors["blk.0.ssm_in.weight"].view(-1, 32) - expected).abs().amax(1)
    assert (off <= (STEPS[kind] + 2**-9 * (kind[0] == "q")) * expected.abs().amax(1)).all()
    again = ssmzoo.build(tmp_path / "model.gguf")
    torch.testing.assert_close(
        again.state_dict()["layers.0.mixer.in_proj.weight"].float(), tensors["blk.0.ssm_in.weight"]
    )


def test_a_folder_or_a_file_and_the_models_own_numbers(tmp_path):
    model = random_model("mamba").to(torch.bfloat16)
    ssmzoo.save(model, tmp_path / "folder", "gguf")
    types = read(tmp_path / "folder" / "model.gguf")[2]
    assert types["token_embd.weight"] == "BF16"
    assert types["blk.0.ssm_a"] == "F32"
    assert ssmzoo.build(tmp_path / "folder" / "model.gguf").state_dict()["embedding.weight"].dtype == torch.bfloat16


KIMI = MODELS["kimi-linear"]
MASKED = {"output": "tokens", "n_classes": None, "pooling": "mean", "head_activation": "gelu"}
MASKED |= {"head_norm": True, "head_bias": True}
REFUSED = [
    ("mamba", {"pattern": ["mamba", "gla"]}, r"`layers\.1\.mixer\.kind` is 'gla'"),
    ("mamba", {"mixers": {"mamba": {"expand": 3}}}, r"`layers\.0\.mixer\.expand` is 3\.0, and would come back as 2\.0"),
    ("mamba", {"mixers": {"mamba": {"conv_bias": False}}}, r"`layers\.0\.mixer\.conv_bias` is False"),
    ("mamba2", {"mixers": {"mamba2": {"dt_limit": [0.0, 1.0]}}}, r"`layers\.0\.mixer\.dt_limit` is"),
    ("rwkv7", {"norm_eps": 1e-3}, r"`layers\.0\.mixer\.norm_eps`"),
    ("rwkv6", {"mlp": {"kind": "rwkv7"}}, r"RWKV-6 \(rwkv6\): `layers\.0\.mlp\.kind` is 'rwkv7'"),
    ("rwkv6", {"mixers": {"rwkv6": {"n_heads": 2, "expand_k": 1.0}}}, r"`layers\.0\.mixer\.norm_eps` is 1e-05"),
    (
        "kimi-linear",
        {"mixers": KIMI["mixers"] | {"mla": KIMI["mixers"]["mla"] | {"q_lora_rank": 24}}},
        "q_lora_rank` is",
    ),
    ("gpt2", {"mlp": {"kind": "gelu"}}, r"`layers\.0\.mlp\.kind` is 'gelu'"),
    ("bert", {"mlp": {"kind": "relu2"}}, r"`layers\.0\.mlp\.kind` is 'relu2'"),
    (
        "bert",
        MASKED,
        r"BERT \(bert\): llama.cpp has no head for masked tokens; a BERT whose `output` is 'classes' has a place",
    ),
    ("qwen3", {"mixers": {"attention": {"head_dim": 32, "qk_norm": True, "window": 5}}}, r"`layers\.0\.mixer\.window`"),
    (
        "llama",
        {
            "mixers": {
                "attention": {
                    "head_dim": 16,
                    "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8},
                }
            }
        },
        "`rope_scaling` of kind 'dynamic' has no keys; linear scaling has",
    ),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_models_without_a_place(tmp_path, name, changes, said):
    model = ssmzoo.build(MODELS[name] | changes)
    with pytest.raises(ValueError, match=f"no place in llama.cpp's .*{said}"):
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf")
    assert not (tmp_path / "model.gguf").exists()


def test_refused_arguments(tmp_path):
    model = random_model("mamba")
    with pytest.raises(ValueError, match="unknown `dtype` of a GGUF file: 'q8_1'. Did you mean 'q8_0'"):
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf", dtype="q8_1")
    with pytest.raises(TypeError, match="`dtype` must be a floating-point torch.dtype"):
        ssmzoo.save(model, tmp_path / "model", dtype="q8_0")
    with pytest.raises(ValueError, match="`tokenizer` goes with the format 'gguf'; got 'ssmzoo'"):
        ssmzoo.save(model, tmp_path / "model", tokenizer="bytes")
    with pytest.raises(ValueError, match="`tokenizer` 'bytes' needs 256 token ids; the model has 96"):
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf", tokenizer="bytes")
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.out_proj.weight")[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"f16 cannot hold blk\.1\.ssm_out\.weight, whose numbers go up to 1e\+06"):
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf", dtype="f16")
    ssmzoo.quantize(model, "int8")
    with pytest.raises(ValueError, match="must have weights that are not quantised"):
        ssmzoo.save(model, tmp_path / "model.gguf", "gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A small file, as bytes."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    ssmzoo.save(random_model("lfm2"), path, "gguf", dtype="q8_0")
    return path.read_bytes()


def changed(data, place, value):
    return data[:place] + value + data[place + len(value) :]


def after(data, text, skip=0):
    return data.index(text) + len(text) + skip


HUGE = struct.pack("<Q", 2**62)
LIES = {
    "no GGUF": lambda data: b"GGML" + data[4:],
    "of version 99": lambda data: changed(data, 4, struct.pack("<I", 99)),
    "ends within its header": lambda data: data[:500],
    "ends before the numbers of": lambda data: data[:-1000],
    "is no GGUF file.* ends within its header": lambda data: changed(data, 8, HUGE),  # so many tensors
    "damaged: it ends within": lambda data: changed(data, 24, HUGE),  # so long a key
    "unknown kind 77": lambda data: changed(data, after(data, b"lfm2.block_count"), struct.pack("<I", 77)),
    "`lfm2.block_count` must be at most": lambda data: changed(
        data, after(data, b"lfm2.block_count", 4), struct.pack("<I", 2**31)
    ),
    "unknown `general.architecture`: 'lfm9'": lambda data: data.replace(b"lfm2", b"lfm9", 2),
    "the key lfm2.shortconv.l_cache is missing": lambda data: data.replace(b"lfm2.shortconv.l", b"lfm2.shortcunv.l"),
    "`lfm2.feed_forward_length` must be a whole number from 0 on; got nan": lambda data: changed(
        data, after(data, b"lfm2.feed_forward_length"), struct.pack("<II", 6, 0x7FC00000)
    ),
    r"do not fit|heads": lambda data: changed(data, after(data, b"lfm2.attention.head_count", 4), struct.pack("<I", 7)),
    "has two keys 'a'": lambda data: data[:16] + struct.pack("<Q", 2) + 2 * (struct.pack("<Q", 1) + b"a" + bytes(5)),
    "begin within those of another tensor": lambda data: changed(
        data, after(data, b"blk.0.attn_norm.weight", 16), data[after(data, b"blk.1.attn_norm.weight", 16) :][:8]
    ),
    "cannot be of|axes|ends before": lambda data: changed(
        data, after(data, b"blk.0.attn_norm.weight", 4), struct.pack("<Q", 2**61)
    ),
}


@pytest.mark.parametrize("said", LIES)
def test_headers_that_lie(tmp_path, file, said):
    path = tmp_path / "model.gguf"
    path.write_bytes(LIES[said](file))
    with pytest.raises(ValueError, match=said) as error:
        ssmzoo.build(path)
    assert "model.gguf" in str(error.value)


def test_damage_anywhere_in_the_header(tmp_path, file):
    """A byte in the header changes: what is read is a model, or the file is refused by name."""
    path, generator = tmp_path / "model.gguf", random.Random(0)
    end = after(file, b"token_embd_norm.weight")
    for _ in range(60):
        place = generator.randrange(end)
        path.write_bytes(changed(file, place, bytes([generator.randrange(256)])))
        try:
            assert isinstance(ssmzoo.build(path), ssmzoo.SequenceModel)
        except ValueError as error:
            assert "model.gguf" in str(error)  # noqa: PT017


def test_missing_files_and_tensors(tmp_path, file):
    with pytest.raises(FileNotFoundError, match=r"no weights: .*none\.gguf is missing"):
        ssmzoo.pretrained.load(tmp_path / "none.gguf")
    (tmp_path / "model.gguf").write_bytes(file.replace(b"blk.1.attn_q_norm.weight", b"blk.1.attn_x_norm.weight"))
    with pytest.raises(ValueError, match=r"weights that are none of llama\.cpp's LFM2: blk\.1\.attn_x_norm\.weight"):
        ssmzoo.build(tmp_path / "model.gguf")
