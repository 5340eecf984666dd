"""Models whose weights are kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmkernels.core.names import unknown
from ssmzoo.calibrating import METHODS, calibrated
from ssmzoo.model import SequenceModel
from ssmzoo.quantized import maps_to_quantize, quantize_maps, scheme_for, schemes_of


def quantize(
    model: SequenceModel,
    scheme: str | Mapping[str, Any],
    *,
    calibrate: Tensor | None = None,
    method: str = "gptq",
    group_size: int | None = None,
    activations: str | None = None,
) -> SequenceModel:
    """Keeps the weights of a model's linear maps and embedding in few bits, in place.

    Each map becomes a :class:`~ssmzoo.quantized.QuantizedLinear`. What the papers keep in float32, convolutions, norms
    and the stacked weights of experts stay as they are.

    Args:
        model: what :func:`ssmzoo.build` gave, or a published model.
        scheme: "int8"; "int4", with embedding and head in smaller groups; or patterns of the maps' names → "int8",
            "int4" or ``{"bits": 4, "group_size": 128}``, of which the first that fits a name counts. Maps that none
            fits stay.
        calibrate: token ids ``(b, l)`` such as the model will see. The layers' maps in 4 bits are then rounded by
            ``method``, one layer after another, each with the inputs that the layers before it give once they are
            quantised. Without it every weight is rounded to the nearest.
        method: "gptq" (Frantar et al. 2022, arXiv 2210.17323): input after input is rounded, and those after it take
            over its error. "awq" (Lin et al. 2023, arXiv 2306.00978): weights of large inputs are multiplied by a
            scale, and then rounded to the nearest. Scales are powers of two, and the norm or map before divides by
            them where that changes nothing else; elsewhere the map does, and its scheme says so by ``input_scale``.
        group_size: inputs that share a scale in 4 bits, a multiple of 32; the scheme's own if None: 64, and 32 for
            embedding and head.
        activations: "int8" rounds what maps in 4 bits are given to 8 bits, group by group, which is faster on a CPU
            (:func:`ssmkernels.quantized_linear`); "float" takes it as it is. The scheme's own if None, which is "int8"
            of "int4".

    Returns:
        The same model; its ``config`` has the scheme under ``quantization``.

    Raises:
        TypeError: ``model`` is no SequenceModel, or ``calibrate`` no tensor of ids.
        ValueError: an unknown scheme or method, "awq" without ``calibrate``, a pattern that fits no map, a model that
            is quantised already or whose weights are on the meta device or not finite, or a head that shares its
            embedding's weights under another scheme; or ``calibrate`` gives a map inputs that are not finite. The model
            then stays as it was.
    """
    if not isinstance(model, SequenceModel):
        raise TypeError(f"quantize: `model` must be a SequenceModel; got {type(model).__name__}")
    if model.config.quantization:
        raise ValueError("quantize: `model` must not be quantised already; load the weights that it was made from")
    schemes = schemes_of(scheme, group_size, activations)
    places = list(maps_to_quantize(model, schemes))
    for pattern in schemes:
        if pattern not in ("embedding", "lm_head") and not list(maps_to_quantize(model, {pattern: schemes[pattern]})):
            raise ValueError(f"quantize: the pattern {pattern!r:.80} in `scheme` fits no map of the model")
    if model.tied and scheme_for("embedding", schemes) != scheme_for("lm_head", schemes):
        raise ValueError("quantize: `scheme` must be the same for embedding and lm_head, which share their weights")
    if any(place.map.weight.is_meta for place in places):
        raise ValueError("quantize: `model` must have weights; they are on the meta device")
    for place in places:
        if not place.map.weight.isfinite().all():
            raise ValueError(f"quantize: `model` must have finite weights; some of {place.name} are not")
    if method not in METHODS:
        raise ValueError(unknown("method of quantisation", method, METHODS))
    if method != "gptq" and calibrate is None:
        raise ValueError(f"quantize: `method`={method!r} goes with `calibrate`, the tokens to calibrate on; got None")
    tokens = None if calibrate is None else _checked(model, calibrate)
    try:
        if tokens is None:
            quantize_maps(model, schemes)
        else:
            schemes = calibrated(model, schemes, tokens, method)
    except BaseException:  # the model is again what it was
        for place in places:
            setattr(place.parent, place.name.rpartition(".")[2], place.map)
        raise
    model.config.quantization = schemes
    return model


def _checked(model: SequenceModel, calibrate: Tensor) -> Tensor:
    if not isinstance(calibrate, Tensor) or calibrate.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"quantize: `calibrate` must be a tensor of token ids, int64 or int32; got {calibrate!r:.80}")
    if model.config.d_input is not None:
        raise ValueError("quantize: `calibrate` must be None, as the model takes features and no tokens")
    if calibrate.ndim != 2 or calibrate.numel() == 0:
        raise ValueError(f"quantize: `calibrate` must have shape (b, l); got {tuple(calibrate.shape)}")
    return calibrate
