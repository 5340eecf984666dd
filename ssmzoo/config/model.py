"""The typed config of a model, its YAML, and overrides."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from ssmkernels.core.names import unknown
from ssmzoo.config.checks import check
from ssmzoo.config.entries import merge, named_options, names, reachable
from ssmzoo.mixer import Mixer
from ssmzoo.options import check_range, convert, options_of
from ssmzoo.plain import check_plain
from ssmzoo.quantized import schemes_of
from ssmzoo.registry import mixer_class

Placement = Literal["pre", "post", "sum", "sandwich", "stream"]


@dataclasses.dataclass
class ModelConfig:
    """Everything that makes up one :class:`~ssmzoo.SequenceModel`. It names mixers, never code.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        pattern: the order of mixers, repeated down the layers: names of entries of ``mixers``, or of registered mixers.
        mixers: options by entry. An entry may name its ``kind`` (the entry's own name otherwise), and may be
            ``shared: true``: one set of weights at each of its places. ``feed`` names an entry of ``feeds``, and
            ``norm_placement`` takes the place of the model's in its layers.
        feeds: options by name of the blocks that feed several layers from the embeddings: see :mod:`ssmzoo.feed`.
        mlp: options of the channel mixer after each mixer; its ``kind`` is one of :data:`ssmzoo.mlp.MLPS`.
        mlp_pattern: instead, an order of channel mixers, repeated down the layers: entries of ``mlps``, or kinds.
        mlps: options of those channel mixers by entry, of which ``kind`` is the entry's own name if it is not given.
        vocab_size: number of token ids; None for real-valued features in and out.
        pad_vocab_size_multiple: the embedding's rows are rounded up to a multiple of it.
        d_input: width of real-valued input features, which replace token ids where it is set.
        output: what comes out: "tokens" (a logit for each id and step), "classes" (a logit for each class and
            sequence) or "features" (d_output numbers a step). If None: "classes" where n_classes is set, else "tokens"
            where vocab_size is, else "features".
        n_classes: number of classes.
        pooling: which steps the classes are read from: the "mean" of all, the "last", or, where all mixers look both
            ways, the "first", as BERT reads them from its token [CLS].
        d_output: width of output features; d_input if None.
        tie_embeddings: the token logits use the embedding's weights.
        head_activation: a linear map of the residual stream and this activation stand before the head's own map, as in
            BERT's head of masked tokens ("gelu") and its pooler ("tanh"); None for neither.
        head_norm: and after those a norm.
        head_bias: a bias on the token logits, which starts at 0; other heads always have one.
        norm: "rms", "centred_rms" (its weight is 1 + w) or "layer", around each mixer and MLP and at the end.
        learned_positions: rows of a table of learned vectors, one for each position, that are added to the embeddings
            (GPT-2, BERT). A sequence can then have no more tokens than that. None for no such table.
        token_types: rows of a table of learned vectors that are added to the embeddings by the ``token_types`` of a
            call, as BERT tells two sentences apart; 0 for no such table.
        embedding_norm: a norm of the embeddings as well, before the first layer.
        embedding_dropout: on the embeddings, after all that.
        norm_placement: "pre": x + f(norm(x)); "post": x + norm(f(x)), as in OLMo 2 (arXiv 2501.00656); "sandwich":
            x + norm(f(norm(x))), as in Gemma 2 (arXiv 2408.00118); "sum": norm(x + f(x)), the post-norm of the first
            Transformer (arXiv 1706.03762) and BERT, with no norm after the last layer; or "stream": u + f(u) with
            u = norm(x), as in MiniMax-Text-01 (arXiv 2501.08313).
        norm_eps: added to the mean square, or the variance.
        embedding_multiplier: of the embeddings, or of the projected features; "sqrt" is √d_model rounded to bfloat16,
            as in Gemma.
        residual_multiplier: of what each mixer and MLP adds to the residual stream.
        skip_multiplier: of the residual stream itself in each such sum, as in DeepNorm (arXiv 2203.00555).
        logit_multiplier: of the token logits.
        logit_softcap: bounds the token logits smoothly to ± logit_softcap, after their multiplier; 0 for none.
        residual_in_fp32: keep the residual stream in float32 whatever the weights are.
        dropout: on what each mixer and MLP adds to the residual stream.
        bidirectional: every mixer looks both ways; each must be able to.
        description: one line for lists.
        train: defaults of ``ssmzoo train`` for this model.
        quantization: which maps' weights are kept in 8 or 4 bits: patterns of their names → ``bits`` and
            ``group_size``; the first that fits counts (:func:`ssmzoo.quantize`).
        source: where the weights came from, ``name@commit`` of the Hugging Face hub; "" for others.
    """

    d_model: int
    n_layers: int
    pattern: list[str]
    mixers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    feeds: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    mlp: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "none"})
    mlp_pattern: list[str] = dataclasses.field(default_factory=list)
    mlps: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    vocab_size: int | None = None
    pad_vocab_size_multiple: int = 1
    d_input: int | None = None
    output: Literal["tokens", "classes", "features"] | None = None
    n_classes: int | None = None
    pooling: Literal["mean", "last", "first"] = "mean"
    d_output: int | None = None
    tie_embeddings: bool = True
    head_activation: Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"] | None = None
    head_norm: bool = False
    head_bias: bool = False
    norm: Literal["rms", "centred_rms", "layer"] = "rms"
    learned_positions: int | None = None
    token_types: int = 0
    embedding_norm: bool = False
    embedding_dropout: float = 0.0
    norm_placement: Placement = "pre"
    norm_eps: float = 1e-5
    embedding_multiplier: float | Literal["sqrt"] = 1.0
    residual_multiplier: float = 1.0
    skip_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_softcap: float = 0.0
    residual_in_fp32: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    description: str = ""
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    quantization: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where, value = f"config key `{field.name}`", getattr(self, field.name)
            check_plain(value, where)
            setattr(self, field.name, check_range(where, field.name, convert(where, value, hints[field.name])))
        self.pattern, self.mixers = names("pattern", self.pattern), named_options("mixers", self.mixers)
        self.feeds = named_options("feeds", self.feeds)
        self.mlp_pattern, self.mlps = names("mlp_pattern", self.mlp_pattern), named_options("mlps", self.mlps)
        self.quantization = schemes_of(self.quantization) if self.quantization else {}
        if self.output is None:
            self.output = "classes" if self.n_classes else "tokens" if self.vocab_size else "features"
        if self.output == "features" and self.d_output is None:
            self.d_output = self.d_input
        check(self)

    def feed_of_layer(self, layer: int) -> str | None:
        """The name of the block that feeds a layer, if one does."""
        return self.mixers.get(self.entry_of_layer(layer), {}).get("feed")

    def norm_placement_of_layer(self, layer: int) -> str:
        """Where a layer's norms stand, as ``norm_placement`` says it."""
        entry = self.entry_of_layer(layer)
        given = self.mixers.get(entry, {}).get("norm_placement", self.norm_placement)
        return convert(f"config key `mixers.{entry:.80}.norm_placement`", given, Placement)

    def entries_used(self) -> set[str]:
        """Names that the pattern, and the parallel entries in it, refer to; looks each mixer up."""
        used = reachable(self.pattern, self.mixers)
        for entry in sorted(used):
            self.mixer_class(entry)
        return used

    def entry_of_layer(self, layer: int) -> str:
        """The pattern's name at a layer."""
        return self.pattern[layer % len(self.pattern)]

    def mixer_class(self, entry: str) -> type[Mixer]:
        """The class of an entry of ``mixers``, or of a registered mixer's name."""
        kind = self.mixers.get(entry, {}).get("kind", entry)
        return mixer_class(convert(f"config key `mixers.{entry:.80}.kind`", kind, str))

    def mixer_options(self, entry: str) -> dict[str, Any]:
        """``kind`` and the options that an entry's mixer is built with; named branches are spelled out."""
        options = {k: v for k, v in self.mixers.get(entry, {}).items() if k not in ("shared", "feed", "norm_placement")}
        options.setdefault("kind", entry)
        branches = options.get("branches")
        if isinstance(branches, Sequence) and not isinstance(branches, str):
            options["branches"] = {name: self.mixer_options(name) for name in branches}
        elif self.bidirectional and options["kind"] != "parallel":
            if self.mixer_class(entry).one_token:
                return options
            if "bidirectional" not in options_of(self.mixer_class(entry)):
                raise ValueError(f"config: `bidirectional` is set, but mixer {options['kind']!r} can only look back")
            options["bidirectional"] = True
        return options

    def mlp_of_layer(self, layer: int) -> dict[str, Any]:
        """``kind`` and the options of the channel mixer at a layer."""
        if not self.mlp_pattern:
            return {"kind": "none", **self.mlp}
        name = self.mlp_pattern[layer % len(self.mlp_pattern)]
        return {"kind": name, **self.mlps.get(name, {})}

    @property
    def n_residuals(self) -> int:
        """How many maps of the model write into its residual stream."""
        return self.n_layers + sum(self.mlp_of_layer(i)["kind"] != "none" for i in range(self.n_layers))

    @property
    def embedding_scale(self) -> float:
        """``embedding_multiplier`` as a number."""
        if self.embedding_multiplier == "sqrt":
            return torch.tensor(self.d_model**0.5, dtype=torch.bfloat16, device="cpu").item()
        return self.embedding_multiplier

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: ``vocab_size`` rounded up to ``pad_vocab_size_multiple``."""
        multiple = self.pad_vocab_size_multiple
        return -(-(self.vocab_size or 0) // multiple) * multiple

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is at its default."""
        default = {f.name: _default(f) for f in dataclasses.fields(self)}
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if value != default[name]}

    def to_yaml(self) -> str:
        """Itself as YAML."""
        from ssmzoo.yaml_text import dump_yaml  # only here: it takes a third of the time that importing ssmzoo takes

        return dump_yaml(self.to_dict())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config") -> ModelConfig:
        """A config from plain data.

        Raises:
            ValueError, TypeError: an unknown or missing key, or a value that does not fit, by name.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(unknown(f"key of {where}", key, known))
        for key in ("d_model", "n_layers", "pattern"):
            if key not in values:
                raise ValueError(f"{where}: the key `{key}` is missing")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> ModelConfig:
        """A config from a YAML file.

        Raises:
            FileNotFoundError, ValueError, TypeError: no such file, no YAML mapping in it, or keys that do not fit.
        """
        from ssmzoo.yaml_text import read_mapping

        return cls.from_dict(read_mapping(Path(path)), str(path))

    def override(self, overrides: Mapping[str, Any]) -> ModelConfig:
        """A new config with some values changed: nested (``mixers={"mamba": {"d_state": 8}}``) or dotted
        (``{"mixers.mamba.d_state": 8}``). Dictionaries merge, all else is replaced."""
        values = dataclasses.asdict(self)
        if "output" not in overrides and {"n_classes", "d_output", "vocab_size"} & set(overrides):
            values["output"] = None  # to be derived again
        if "d_input" in overrides and self.d_output == self.d_input:
            values["d_output"] = None  # likewise
        for key, value in overrides.items():
            merge(values, key.split("."), value)
        if "pattern" in overrides:  # entries that only the old pattern used go with it
            asked = {*(overrides.get("mixers") or {})}
            asked |= {key.split(".")[1] for key in overrides if key.startswith("mixers.")}
            kept = reachable(values["pattern"], values["mixers"]) | asked
            values["mixers"] = {name: options for name, options in values["mixers"].items() if name in kept}
            feeds = {options.get("feed") for options in values["mixers"].values()}
            values["feeds"] = {name: options for name, options in values["feeds"].items() if name in feeds}
        if "mlp_pattern" in overrides:  # likewise
            values["mlps"] = {
                name: options for name, options in values["mlps"].items() if name in values["mlp_pattern"]
            }
        return ModelConfig.from_dict(values)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
