"""What must hold between the values of a :class:`~ssmzoo.ModelConfig`."""

from __future__ import annotations

from typing import Any

from ssmkernels.core.names import unknown
from ssmzoo.config.entries import check_nesting
from ssmzoo.feed import SharedBlock
from ssmzoo.mlp import MLPS, check_mlp
from ssmzoo.options import check_options, convert
from ssmzoo.plain import short

MAX_LAYERS = 10_000
MAX_SIZE = 2**31 - 1  # of any width or count


def check(config: Any) -> None:
    """Raises ValueError for values that do not go together, by the names of their keys."""
    for name in (
        "d_model",
        "n_layers",
        "vocab_size",
        "pad_vocab_size_multiple",
        "d_input",
        "n_classes",
        "d_output",
        "learned_positions",
    ):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"config key `{name}` must be at least 1; got {short(value)}")
        most = MAX_LAYERS if name == "n_layers" else MAX_SIZE
        if value is not None and value > most:
            raise ValueError(f"config key `{name}` must be at most {most}; got {short(value)}")
    if not config.pattern:
        raise ValueError("config key `pattern` must name at least one mixer; got an empty list")
    for name in ("dropout", "embedding_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"config key `{name}` must be in [0, 1); got {getattr(config, name)}")
    if not 0 <= config.token_types <= MAX_SIZE:
        raise ValueError(f"config key `token_types` must be from 0 to {MAX_SIZE}; got {short(config.token_types)}")
    if config.vocab_size is None and config.d_input is None:
        raise ValueError(
            "config: set `vocab_size` for token ids in, or `d_input` for real-valued features in; got neither"
        )
    needed = {"tokens": "vocab_size", "classes": "n_classes", "features": "d_output"}[config.output or ""]
    if getattr(config, needed) is None:
        raise ValueError(f"config: `output: {config.output}` needs `{needed}`; it is not set")
    if config.output != "tokens" and (config.logit_multiplier != 1 or config.logit_softcap):
        name = "logit_softcap" if config.logit_multiplier == 1 else "logit_multiplier"
        raise ValueError(f"config: `{name}` has no meaning with `output: {config.output}`: it is of token logits")
    if config.head_norm and config.head_activation is None:
        raise ValueError("config: `head_norm` stands after the map of `head_activation`, which is not set")
    if config.head_bias and config.output != "tokens":
        raise ValueError(f"config: `head_bias` is of token logits; with `output: {config.output}` there always is one")
    if config.pooling == "first" and not config.bidirectional:
        raise ValueError(
            "config: `pooling: first` needs `bidirectional`: looking back, a first token sees itself alone"
        )
    _check_mlps(config)
    _check_feeds(config)
    for i in range(config.n_layers):
        config.norm_placement_of_layer(i)
    check_nesting(config.pattern, config.mixers)
    used = config.entries_used()
    for entry in config.mixers:
        if entry not in used:
            raise ValueError(
                f"config: `mixers.{entry:.80}` is used nowhere in `pattern` {short(config.pattern)}; "
                + (f"did you mean one of {short(sorted(used))}?" if used else "")
            )


def _check_mlps(config: Any) -> None:
    check_mlp("mlp", config.mlp)
    if config.mlp_pattern and config.mlp.get("kind", "none") != "none":
        raise ValueError("config: give `mlp`, one for all layers, or `mlp_pattern`; got both")
    for name in config.mlps:
        if name not in config.mlp_pattern:
            raise ValueError(f"config: `mlps.{name:.80}` is not in `mlp_pattern` {short(config.mlp_pattern)}")
    for name in config.mlp_pattern:
        check_mlp(f"mlps.{name:.80}", {"kind": name, **config.mlps.get(name, {})})
    for kind in {config.mlp_of_layer(i)["kind"] for i in range(config.n_layers)} if config.bidirectional else ():
        if not MLPS[kind].one_token:
            raise ValueError(f"config: `bidirectional` is set, but channel mixer {kind!r} looks back, and only back")


def _check_feeds(config: Any) -> None:
    for name, options in config.feeds.items():
        config.feeds[name] = check_options(f"config key `feeds.{name:.80}`", SharedBlock, options)
    wanted = {config.feed_of_layer(i) for i in range(config.n_layers)}
    for entry, options in config.mixers.items():
        feed = convert(f"config key `mixers.{entry:.80}.feed`", options.get("feed"), str | None)
        if feed is not None and feed not in config.feeds:
            raise ValueError(unknown(f"`feed` of mixers.{entry:.80}", feed, config.feeds))
    for name in config.feeds:
        if name not in wanted:
            raise ValueError(f"config: `feeds.{name:.80}` feeds no layer; give a mixer of them `feed: {name:.80}`")
    if config.bidirectional and config.feeds:
        raise ValueError("config: `feeds` excludes `bidirectional`: their attention only looks back")
