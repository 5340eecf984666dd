"""Our models as transformers' own: saved, loaded, continued, trained and evaluated by its tools."""

from __future__ import annotations

import json

import pytest
import torch

import ssmzoo

transformers = pytest.importorskip("transformers", reason="needs transformers")

import ssmzoo.integrations.transformers as bridge  # noqa: E402  (needs transformers)

ARCHITECTURES = {
    "hybrid": {"pattern": ["mamba", "attention"], "mixers": {"attention": {"head_dim": 8}}},
    "shared": {
        "pattern": ["gru", "global"],
        "mixers": {"global": {"kind": "attention", "head_dim": 8, "shared": True}},
    },
    "experts": {
        "pattern": ["mamba2"],
        "mixers": {"mamba2": {"headdim": 8, "multipliers": [1.5, 2.0, 3.0, 0.5, 1.2]}},
        "mlp": {"kind": "moe", "n_experts": 4},
        "tie_embeddings": False,
    },
    "defaults": {"pattern": ["mamba", "gru"]},
    "delta": {"pattern": ["gated_deltanet", "mlstm"], "mixers": {"mlstm": {"n_heads": 2}}},
}
ARCHITECTURES["delta"]["mixers"]["gated_deltanet"] = {"n_heads": 1, "head_dim": 8}
SIZES = {"d_model": 16, "n_layers": 4, "vocab_size": 30, "pad_vocab_size_multiple": 8}
IDS = torch.tensor([[3, 8, 2, 9, 4, 7, 1, 5], [6, 1, 1, 7, 2, 12, 29, 3]])
MASK = torch.ones_like(IDS).index_put((torch.tensor([0, 0, 0]), torch.tensor([0, 1, 2])), torch.tensor(0))
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def made(name="hybrid", **changes):
    torch.manual_seed(0)
    config = bridge.SsmzooConfig(SIZES | ARCHITECTURES[name] | changes, pad_token_id=0)
    return bridge.SsmzooForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saved_and_loaded(tmp_path, name):
    model = made(name)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is bridge.SsmzooForCausalLM
    assert again.config.architecture == model.config.architecture
    expected = model(IDS).logits
    assert expected.shape == (2, 8, 30)  # without the rows that pad the vocabulary
    assert torch.equal(again(IDS).logits, expected)
    assert again.model.tied == model.model.tied
    assert again.num_parameters() == model.num_parameters() == model.model.num_parameters()
    assert torch.equal(ssmzoo.build(tmp_path).eval()(IDS)[..., :30], expected)
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {n for n, p in made(name).bfloat16().named_parameters() if p.dtype == torch.float32}


def test_what_we_save_is_what_it_loads(tmp_path):
    model = made("shared")
    ssmzoo.save(model.model, tmp_path, "transformers", model_type="ssmzoo")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_model_without_options_is_saved(tmp_path):
    model = made("defaults")
    ssmzoo.save(model.model, tmp_path, "transformers", model_type="ssmzoo")
    with torch.no_grad():
        assert torch.equal(ssmzoo.build(tmp_path).eval()(IDS), model.model(IDS))


def test_a_weight_that_no_file_holds(tmp_path):
    from safetensors.torch import load_file, save_file

    made().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.1.mixer.q_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"does not hold the weight `model\.layers\.1\.mixer\.q_proj\.weight`"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate_is_ours(name, beams):
    """Left padding included."""
    model = made(name)
    found = model.generate(IDS, attention_mask=MASK, max_new_tokens=7, num_beams=beams, **GREEDY)
    expected = model.model.generate(IDS, 7, temperature=0, num_beams=beams, mask=MASK.bool())
    assert torch.equal(found[:, -7:], expected[:, -7:])


@torch.no_grad()
def test_a_cache_continues(tmp_path):
    model = made()
    whole = model(IDS)
    assert whole.past_key_values.get_seq_length() == 8
    first = model(IDS[:, :5], use_cache=True)
    then = model(IDS[:, 5:], past_key_values=first.past_key_values, logits_to_keep=1)
    torch.testing.assert_close(then.logits, whole.logits[:, -1:], atol=1e-5, rtol=1e-4)
    assert then.past_key_values.get_seq_length() == 8
    several = model.generate(IDS[:1], max_new_tokens=4, num_return_sequences=3, do_sample=True, pad_token_id=0)
    assert several.shape == (3, 12)
    cache = model(IDS[:, :5], use_cache=True).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2]))
    torch.testing.assert_close(
        model(IDS[1:, 5:], past_key_values=cache).logits, whole.logits[1:, 5:], atol=1e-5, rtol=1e-4
    )
    places = torch.tensor([6, 2])
    assert torch.equal(model(IDS, logits_to_keep=places).logits, whole.logits[:, places])
    assert model(IDS, use_cache=False).past_key_values is None
    assert model(IDS, return_dict=False, use_cache=False)[0].shape == (2, 8, 30)


@torch.no_grad()
def test_packed_rows_are_apart():
    model = made()
    apart = [model(IDS[:1, :3], use_cache=False).logits, model(IDS[:1, 3:], use_cache=False).logits]
    expected = torch.cat(apart, dim=1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    for given in ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, 3, 8])}):
        found = model(IDS[:1], use_cache=False, **given).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    rows = model(IDS, use_cache=False, position_ids=torch.cat([positions, torch.arange(8)[None]])).logits
    torch.testing.assert_close(rows[:1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows[1:], model(IDS[1:], use_cache=False).logits, atol=1e-5, rtol=1e-4)


def test_the_flattening_collator():
    model = made()
    rows = [{"input_ids": IDS[0, :3].tolist()}, {"input_ids": IDS[1].tolist()}]
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    losses = [model(ids, labels=ids).loss * (ids.numel() - 1) for ids in (IDS[:1, :3], IDS[1:])]
    torch.testing.assert_close(model(**batch).loss, sum(losses) / 9)


@torch.no_grad()
def test_losses(tmp_path):
    model = made()
    labels = IDS.masked_fill(MASK == 0, -100)
    logits = model(IDS, attention_mask=MASK).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 30), labels[:, 1:].flatten())
    torch.testing.assert_close(model(IDS, attention_mask=MASK, labels=labels).loss, expected)
    model.save_pretrained(tmp_path)
    classes = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    found = classes(IDS, attention_mask=MASK, labels=torch.tensor([1, 2]))
    assert found.logits.shape == (2, 3)
    torch.testing.assert_close(found.loss, torch.nn.functional.cross_entropy(found.logits, torch.tensor([1, 2])))
    torch.testing.assert_close(found.logits[0], classes(IDS[:1, 3:]).logits[0], atol=1e-5, rtol=1e-4)
    assert torch.equal(classes.model.embedding.weight, model.model.embedding.weight)
    classes.save_pretrained(tmp_path / "classes")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classes")
    assert torch.equal(again(IDS, attention_mask=MASK).logits, found.logits)


def test_what_is_refused():
    model = made()
    with pytest.raises(ValueError, match="`input_ids` must be given, and `inputs_embeds` cannot be"):
        model(inputs_embeds=torch.zeros(1, 2, 16))
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"`{name}` must be False"):
            model(IDS, **{name: True})
    with pytest.raises(NotImplementedError, match="`resize_token_embeddings` is not possible"):
        model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(IDS[:1], assistant_model=made(), max_new_tokens=3, **GREEDY)
    with pytest.raises(NotImplementedError, match="Assisted decoding needs it"):
        model(IDS, use_cache=True).past_key_values.crop(-1)
    with pytest.raises(
        ValueError, match="`config` must be of a model from tokens to tokens; .* from tokens to classes"
    ):
        bridge.SsmzooForCausalLM(bridge.SsmzooConfig(SIZES | ARCHITECTURES["hybrid"] | {"n_classes": 2}))
    with pytest.raises(ValueError, match="this one goes from features to tokens"):
        bridge.SsmzooForCausalLM(bridge.SsmzooConfig(SIZES | ARCHITECTURES["hybrid"] | {"d_input": 2}))
    with pytest.raises(ValueError, match=r"SsmzooForCausalLM: `input_ids` must have shape \(b l\)"):
        model(IDS[0])
    with pytest.raises(TypeError, match="SsmzooConfig: `architecture` must be a dict; got int"):
        bridge.SsmzooConfig(5)
    with pytest.raises(ValueError, match=r"unknown key of SsmzooConfig: `architecture`: 'd_modl'"):
        bridge.SsmzooConfig({"d_modl": 3})


@torch.no_grad()
def test_the_model_without_its_head():
    """As trainers call it that compute logits in pieces; with what the config says of them."""
    model = made(pad_vocab_size_multiple=1, logit_multiplier=0.5, logit_softcap=3.0)
    positions = torch.cat([torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), torch.arange(8)[None]])
    for given in ({}, {"attention_mask": MASK}, {"position_ids": positions}):
        hidden = model.base_model(input_ids=IDS, use_cache=False, **given).last_hidden_state
        logits = model.get_output_embeddings()(hidden) * model.config.logit_scale
        cap, kept = model.config.final_logit_softcapping, given.get("attention_mask", torch.ones_like(IDS)).bool()
        expected = model(IDS, use_cache=False, **given).logits
        torch.testing.assert_close((cap * torch.tanh(logits / cap))[kept], expected[kept])
    assert model.base_model.embedding is model.model.embedding
    with pytest.raises(ValueError, match="`vocab_size` must be a multiple of `pad_vocab_size_multiple`, 8"):
        made().base_model(input_ids=IDS)


def test_packing_in_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    texts = ["the cat sat", "a dog", "on the mat and the log", "hello world"]
    model = made(pad_vocab_size_multiple=1)
    rows, settings = [], {"packing": True, "max_length": 64, "per_device_train_batch_size": 1, "max_steps": 1}
    settings |= {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path / "run"), save_strategy="no", **settings),
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer(tmp_path / "words"),
    )
    model.register_forward_pre_hook(lambda _, args, given: rows.append(given), with_kwargs=True)
    before = made(pad_vocab_size_multiple=1).train()
    trainer.train()
    ids, borders = rows[0]["input_ids"], rows[0]["cu_seq_lens_q"].tolist()
    assert len(borders) == 5
    parts = [ids[:, a:b] for a, b in zip(borders[:-1], borders[1:], strict=True)]
    losses = [before(part, labels=part).loss.item() * (part.numel() - 1) for part in parts]
    expected = sum(losses) / sum(part.numel() - 1 for part in parts)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["hybrid", "shared", "experts", "residual"])
def test_gradient_checkpointing(name, reentrant):
    """The same gradients, dropout included, with every layer computed twice."""
    changes = {"pattern": ["rwkv7"], "mixers": {"rwkv7": {"head_dim": 8}}} if name == "residual" else {}
    kept, again = (made("hybrid" if changes else name, dropout=0.2, **changes).train() for _ in range(2))
    enable = getattr(again, "activation_checkpointing_enable", again.gradient_checkpointing_enable)  # before 5.19
    enable({"use_reentrant": reentrant})
    calls = []
    for block in again.model.layers:
        block.norm.register_forward_hook(lambda *_: calls.append(1))
    for model in (kept, again):
        torch.manual_seed(1)
        model(IDS, labels=IDS).loss.backward()
    assert len(calls) == 8 - (
        name == "residual"
    )  # the first layer, whose values the others take, is not computed again
    for (place, parameter), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), place
    getattr(again, "activation_checkpointing_disable", again.gradient_checkpointing_disable)()
    calls.clear()
    again(IDS, labels=IDS).loss.backward()
    again.eval()(IDS)
    assert len(calls) == 8


def tokenizer(folder):
    """A letter a token, made here."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(["<pad>", *"abcdefghijklmnopqrstuvwxyz ."])}
    made = Tokenizer(models.WordLevel(letters, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token=".")
    found.save_pretrained(folder)
    return found


def test_pipeline(tmp_path):
    made().save_pretrained(tmp_path)
    tokenizer(tmp_path)
    writer = transformers.pipeline("text-generation", model=str(tmp_path), device="cpu")
    both = writer(["abc", "hello world"], max_new_tokens=5, do_sample=False, batch_size=2, return_full_text=False)
    alone = writer("abc", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert both[0] == alone
    assert len(both) == 2


def trained(folder, steps, **options):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 30, (12, 9), generator=torch.Generator())]
    settings = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )
    trainer = transformers.Trainer(made().train(), settings, train_dataset=rows)
    trainer.train(**options)
    return trainer


def test_trainer_with_resume(tmp_path):
    whole = trained(tmp_path / "whole", 20)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row] + [
        whole.evaluate(whole.train_dataset)["eval_loss"]
    ]
    assert losses[-1] < 3  # from log 30 = 3.4
    trained(tmp_path / "parts", 10)
    parts = trained(tmp_path / "parts", 20, resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-10"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, parts.model.get_parameter(name)), name


@pytest.mark.slow
def test_lm_eval(tmp_path):
    evaluator = pytest.importorskip("lm_eval", reason="needs lm-eval")
    tasks = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval")
    made().save_pretrained(tmp_path / "model")
    tokenizer(tmp_path / "model")
    rows = [{"text": "abc", "choices": ["d", "zz"], "answer": i % 2} for i in range(3)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(
        f"""
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.json"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    found = evaluator.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'model'},device=cpu",
        tasks=["letters"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path)),
        batch_size=2,
    )
    ids = [[1, 2, 3, 4], [1, 2, 3, 26, 26]]
    with torch.no_grad():
        scores = [made()(torch.tensor([row])).logits.log_softmax(-1)[0] for row in ids]
    likely = [
        sum(float(score[i, row[i + 1]]) for i in range(2, len(row) - 1)) for score, row in zip(scores, ids, strict=True)
    ]
    expected = [likely[row["answer"]] == max(likely) for row in rows]
    assert found["results"]["letters"]["acc,none"] == pytest.approx(sum(expected) / 3)


def test_adapters_are_saved_and_loaded(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    model = made("hybrid", pattern=["mamba", "mamba2"], mixers={"mamba2": {"headdim": 8}})
    model.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=2, target_modules=["in_proj", "x_proj", "dt_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, lora)
    for name, parameter in wrapped.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
    ids = IDS[:1]
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=1.0)
    before = float(wrapped(ids, labels=ids).loss)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(ids, labels=ids).loss.backward()
        optimizer.step()
    wrapped.eval()
    with torch.no_grad():
        assert float(wrapped(ids, labels=ids).loss) < before
        wrapped.save_pretrained(tmp_path / "adapter")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, wrapped(ids).logits)
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        found = wrapped.generate(input_ids=ids, **options)
        assert torch.equal(again.merge_and_unload().generate(ids, **options), found)
