"""``ssmzoo info``: what a model is made of and what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ssmzoo.commands._output import console, count, flops, options_text, size, table
from ssmzoo.commands._settings import parse_settings, settings_option
from ssmzoo.screen import printable

if TYPE_CHECKING:
    from ssmzoo import ModelConfig, SequenceModel

CONTEXTS = [1024 * 4**i for i in range(6)]  # 1k to 1M


def command(
    name: Annotated[
        str,
        typer.Argument(
            help="A model's name (see `ssmzoo list`), a YAML file, or the folder of a trained or published model."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        settings_option("Change a config key first, such as d_model=512 or mixers.mamba.d_state=32."),
    ] = None,
) -> None:
    """Show a model's layers and parameters, and what a token costs as the context grows.

    Nothing is downloaded and no weights are created, so this is fast for large models too.
    """
    from ssmzoo import build
    from ssmzoo.pretrained import architecture

    config = architecture(name).override(parse_settings(settings or []))
    model = build(config, device="meta")
    out = console()
    heading = Text(printable(name), "bold")
    out.print(heading.append(f": {printable(config.description)}", "not bold") if config.description else heading)
    out.print(_sizes(config, model) + "\n")
    numbers = ("of them", "parameters", "share")
    out.print(table("Parameters", ("part", "layers", *numbers), _parts(model), numbers))
    costs = ("context", "FLOPs per token", "state")
    out.print(table("As the context grows", costs, _costs(model), numbers=costs))
    out.print(
        "FLOPs per token of a forward pass, averaged over that many tokens: two per weight of every linear map,\n"
        "plus the mixing. State: what one sequence of that many tokens keeps between calls, in float32.",
        style="dim",
    )


def _sizes(config: ModelConfig, model: SequenceModel) -> str:
    comes_in = _counted(config.d_input, "feature") if config.d_input else f"token ids below {config.vocab_size}"
    goes_out = {
        "tokens": f"{config.padded_vocab_size} logits a token",
        "classes": f"{config.n_classes} class logits a sequence",
        "features": f"{_counted(config.d_output or 0, 'feature')} a token",
    }[config.output or "tokens"]
    if config.quantization:
        kept = {id(t): t.nbytes for t in model.state_dict(keep_vars=True).values()}
        taken = f"{size(sum(kept.values()))}, quantised"
    else:
        taken = f"{size(4 * model.num_parameters())} in float32"
    return (
        f"{count(model.num_parameters())} parameters ({taken}), {config.n_layers} layers, "
        f"d_model {config.d_model}; {comes_in} in, {goes_out} out"
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _parts(model: SequenceModel) -> list[list[str]]:
    """Rows of part, layers, how many, parameters, share. Weights used at several places count once."""
    config, blocks = model.config, model.blocks
    parts: dict[str, tuple[list[int], list]] = {}
    for i, block in enumerate(blocks):
        entry = config.entry_of_layer(i)
        kind = config.mixer_options(entry)["kind"]
        options = options_text(
            {k: v for k, v in config.mixers.get(entry, {}).items() if k not in ("kind", "branches", "feed")}
        )
        label = f"{entry} ({kind})" if entry != kind else entry
        layers, modules = parts.setdefault(f"{label}: {options}" if options else label, ([], []))
        layers.append(i)
        modules.append(block.mixer)
    for i, block in enumerate(blocks):
        if block.mlp is not None:
            layers, modules = parts.setdefault(f"{config.mlp_of_layer(i)['kind']} MLP", ([], []))
            layers.append(i)
            modules.append(block.mlp)
    for i, block in enumerate(blocks):
        if block.feed is not None:
            layers, modules = parts.setdefault(f"fed by {config.feed_of_layer(i)}", ([], []))
            layers.append(i)
            modules.append(block.feed)
    ends = [norm for norm in (model.embedding_norm, model.norm_f) if norm is not None and list(norm.parameters())]
    norms = [*(norm for block in blocks for norm in block.norms), *ends]
    tables = [model.embedding, model.position_embedding, model.token_type_embedding]
    seen: set[int] = set()
    embedding = ("embedding", "", 1, _weights([table for table in tables if table is not None], seen))
    inner = [
        (name, _ranges(layers), len(modules), _weights(modules, seen)) for name, (layers, modules) in parts.items()
    ]
    last = ("norms", "", len(norms), _weights(norms, seen))
    outputs = [part for part in (model.head_transform, model.lm_head) if part is not None]
    head = ("head, tied to the embedding" if model.tied else "head", "", 1, _weights(outputs, seen))
    total = model.num_parameters()
    rows = [
        [name, layers, str(many), f"{weights:,}", f"{weights / total:.1%}"]
        for name, layers, many, weights in (embedding, *inner, last, head)
    ]
    return [*rows, ["total", "", "", f"{total:,}", ""]]


def _weights(modules: Iterable, seen: set[int]) -> int:
    """Parameters of the modules, quantised or not, without those in ``seen``; adds them to it."""
    from ssmzoo.quantized import QuantizedMap

    sizes: dict[int, int] = {}
    for part in (part for module in modules for part in module.modules()):
        sizes |= {id(p): p.numel() for p in part.parameters(recurse=False)}
        if isinstance(part, QuantizedMap):
            sizes[id(part.weight_q)] = part.inputs * part.outputs
    fresh = {key: number for key, number in sizes.items() if key not in seen}
    seen.update(fresh)
    return sum(fresh.values())


def _ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 4, 5, 6] → "0-2, 4-6"."""
    spans: list[list[int]] = []
    for i in layers:
        if spans and i == spans[-1][1] + 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _costs(model: SequenceModel) -> list[list[str]]:
    """Rows of context, FLOPs, state."""
    stateful = all(block.mixer.has_state and block.mixer.causal for block in model.blocks)
    rows = []
    for context in CONTEXTS:
        state = size(model.initial_state(1, max_length=context).nbytes) if stateful else "none"
        rows.append([_binary(context), flops(model.flops_per_token(context)), state])
    return rows


def _binary(number: int) -> str:
    return f"{number // 1024**2}M" if number >= 1024**2 else f"{number // 1024}k"
