"""Generation, where the package has it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmkernels.core.validate import check_options, check_shapes

__all__ = ["GenerationMixin", "InferenceParams", "decode", "sample"]


@dataclass
class InferenceParams:
    """What layers remember from one call to the next, and how far a sequence has come.

    Attributes:
        max_seqlen, max_batch_size: room of caches that grow with the length.
        seqlen_offset: tokens that were seen already; the caller counts them up after each call.
        batch_size_offset: the first row of attention's caches that is in use.
        key_value_memory_dict: the states of each layer by its number; layers that are missing allocate theirs.
        lengths_per_sample: tokens of each sequence ``(b)`` in attention's caches, where they differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Back to the start of sequences; states stay, as the first call writes them anew."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()


class Generated(NamedTuple):
    """What :func:`decode` gives."""

    sequences: Tensor  # (b, l), the prompt included
    scores: tuple[Tensor, ...] | None  # the logits (b, vocab_size) of each new token


def sample(logits: Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0) -> Tensor:
    """A token ``(b)`` for each row of logits ``(b, vocab_size)``.

    Args:
        top_k: of the so many likeliest tokens alone; 0 for all, 1 for the likeliest one.
        top_p: of the fewest likeliest tokens whose probabilities reach it; 0 for all.
        min_p: of tokens whose probability is at least this part of the likeliest one's, where ``top_k`` is 0.
        temperature: divides the logits.
    """
    check_options("sample", "number", top_p=top_p, min_p=min_p, temperature=temperature)
    if not 0 <= top_p <= 1 or not 0 <= min_p <= 1 or temperature <= 0:
        raise ValueError(
            f"sample: `top_p` and `min_p` must be in [0, 1], and `temperature` above 0; got {top_p}, {min_p} and "
            f"{temperature}"
        )
    if top_k == 1:
        return logits.argmax(dim=-1)
    ordered, ids = logits.sort(dim=-1, descending=True)
    if top_k:
        ordered, ids = ordered[:, :top_k], ids[:, :top_k]
    ordered = ordered.float() / temperature
    probabilities = ordered.softmax(dim=-1)
    if not top_k and min_p:
        ordered = ordered.masked_fill(probabilities < min_p * probabilities[:, :1], -torch.inf)
    if top_p:
        ordered = ordered.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= top_p, -torch.inf)
    return ids.gather(1, torch.multinomial(ordered.softmax(dim=-1), 1))[:, 0]


@torch.no_grad()
def decode(
    input_ids: Tensor,
    model: Any,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = False,
    streamer: Any = None,
) -> Generated:
    """Continues prompts of one length.

    Args:
        input_ids: ``(b, l)``.
        model: takes ids, ``inference_params`` and ``num_last_tokens``, and gives ``logits``.
        max_length: of the sequences, prompts included.
        top_k, top_p, min_p, temperature: as :func:`sample`.
        repetition_penalty: divides positive logits of tokens that were there, and multiplies negative ones.
        eos_token_id: ends generation once every sequence has it as its last token.
        teacher_outputs: ``(b, l')``: tokens that are taken instead of sampled ones, up to their length.
        vocab_size: tokens that may come; all of the model's if None.
        cg: has no effect, as nothing is captured in a graph.
        enable_timing: whether to print the time.
        output_scores: whether to return logits.
        streamer: its ``put`` is given the prompts and each token, and its ``end`` called.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or shape, by name.
    """
    check_shapes(
        "decode", {"input_ids": (input_ids, "b l"), "teacher_outputs": (teacher_outputs, "b m")}, ("input_ids",)
    )
    check_options("decode", "int", max_length=max_length, top_k=top_k)
    check_options("decode", "number", repetition_penalty=repetition_penalty)
    started = time.perf_counter()
    params = InferenceParams(max_seqlen=max_length, max_batch_size=len(input_ids))
    sequences, new, scores = input_ids, input_ids, []
    if streamer is not None:
        streamer.put(input_ids.cpu())
    while sequences.shape[1] < max_length:
        logits = model(new, inference_params=params, num_last_tokens=1).logits[:, -1, :vocab_size]
        if output_scores:
            scores.append(logits.clone())
        params.seqlen_offset += new.shape[1]
        if repetition_penalty != 1.0:
            there = logits.gather(1, sequences)
            there = torch.where(there < 0, there * repetition_penalty, there / repetition_penalty)
            logits = logits.scatter(1, sequences, there)
        if teacher_outputs is not None and params.seqlen_offset < teacher_outputs.shape[1]:
            new = teacher_outputs[:, params.seqlen_offset, None]
        else:
            new = sample(logits, top_k, top_p, min_p, temperature)[:, None]
        sequences = torch.cat([sequences, new], dim=1)
        if streamer is not None:
            streamer.put(new.cpu())
        if eos_token_id is not None and bool((new == eos_token_id).all()):
            break
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"Prompt and new tokens: {1000 * (time.perf_counter() - started):.0f} ms")
    return Generated(sequences, tuple(scores))


class GenerationMixin:
    """For models that :func:`decode` can call."""

    def generate(
        self,
        input_ids: Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs: Any,
    ) -> Tensor | Generated:
        """As :func:`decode`: the sequences ``(b, l)``, or with ``return_dict_in_generate`` all that it gives."""
        how: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
        found = decode(input_ids, self, max_length, **how, output_scores=output_scores, **kwargs)
        if not return_dict_in_generate:
            return found.sequences
        return found if output_scores else found._replace(scores=None)
