"""What a run shows of its model: how it goes on from held-out text, or what it fills in."""

from __future__ import annotations

import numpy as np
import torch
from rich.text import Text

from ssmzoo.generate.loop import evaluating
from ssmzoo.model import SequenceModel
from ssmzoo.screen import printable
from ssmzoo.train.data import Data
from ssmzoo.train.masked import MaskedData
from ssmzoo.train.vocabulary import Vocabulary, decode


def continued(
    model: SequenceModel, data: Data, vocabulary: Vocabulary, prompt_bytes: int, new_bytes: int, seed: int
) -> tuple[str, Text, str]:
    """A few lines from the middle of the held-out text, and the model's continuation of them.

    Returns:
        What it is, the text as it is shown, and the plain text.
    """
    tokens_per_byte = data.tokens_per_byte or 1.0
    most = model.config.learned_positions or 2**31
    ids = _middle(data, min(round(prompt_bytes * tokens_per_byte), most // 2))
    prompt = decode(vocabulary, ids)
    lines = prompt[prompt.find("\n") + 1 : prompt.rfind("\n") + 1]
    if lines.strip():
        prompt, ids = lines, vocabulary.encode(lines)
    count = min(round(new_bytes * tokens_per_byte), most - len(ids))
    new = model.generate([ids], count, temperature=0.8, seed=seed)
    text = decode(vocabulary, new[0][len(ids) :])
    shown = Text.assemble((printable(prompt), "bold"), printable(text), "\n")
    return "A sample, which continues the held-out text in bold:", shown, prompt + text


@torch.no_grad()
def filled(
    model: SequenceModel, data: MaskedData, vocabulary: Vocabulary, size: int, seed: int
) -> tuple[str, Text, str]:
    """Held-out text in which the model has filled in masked tokens; returns as :func:`continued`."""
    count = round(size * (data.text.tokens_per_byte or 1.0))
    ids = torch.tensor([_middle(data.text, min(count, model.config.learned_positions or count))])
    chosen = data.masking.choose((1, ids.shape[1]), np.random.default_rng(seed))
    with evaluating(model):
        logits = model(torch.where(chosen, data.masking.mask_id, ids).to(model.device))
    found = torch.where(chosen, logits[..., : vocabulary.size].argmax(-1).cpu(), ids)
    step, parts = vocabulary.decoder(), []
    for token, new in zip(found[0].tolist(), chosen[0].tolist(), strict=True):
        parts.append((step(token), "bold" if new else ""))
    right, total = int((found == ids)[chosen].sum()), int(chosen.sum())
    what = f"Held-out text, in which the model filled in the {total} masked tokens in bold, {right} of them rightly:"
    shown = Text.assemble(*((printable(text), style) for text, style in parts), "\n")
    return what, shown, "".join(text for text, _ in parts)


def _middle(data: Data, count: int) -> list[int]:
    """So many ids from the middle of the held-out text."""
    tokens = data.validation
    length = min(max(1, count), len(tokens))
    return tokens.window((len(tokens) - length) // 2, length).tolist()
