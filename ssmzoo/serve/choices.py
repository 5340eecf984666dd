"""One answer: from the engine's tokens to text, as far as it is certain."""

from __future__ import annotations

from typing import NamedTuple

from ssmzoo.engine import Request
from ssmzoo.generate import StopStrings
from ssmzoo.train.vocabulary import Vocabulary, decode


class Told(NamedTuple):
    """A token with its log-probability, the likely ones with theirs, and where its text begins in the answer."""

    token: str
    logprob: float
    top: list[tuple[str, float]]
    offset: int


class Choice:
    """An answer that grows.

    Args:
        index: its number among those of one HTTP request.
        request: the engine's.
        vocabulary: of the model.
        ends: ids that end an answer and are no text of it.
        stops: texts that end it, and are no part of it.

    Attributes:
        finish: ``"stop"`` or ``"length"`` once all text was given; None before.
    """

    def __init__(self, index: int, request: Request, vocabulary: Vocabulary, ends: list[int], stops: list[str]):
        self.index, self.request = index, request
        self.finish: str | None = None
        self._vocabulary, self._ends = vocabulary, ends
        self._step, self._stops = vocabulary.decoder(), StopStrings(stops)
        self._read = self._given = self._decoded = 0  # tokens; characters that were given, and that there are
        self._told: list[Told] = []

    def news(self) -> tuple[str, list[Told]]:
        """The text that has come and the tokens that begin in it; sets :attr:`finish` with the last of it.

        Raises:
            Exception: what ended the request in the engine.
        """
        request, text = self.request, ""
        over = request.finish  # before the tokens: all of them are there once it is set
        while self._read < len(request.tokens) and not self._stops.stopped:
            token = request.tokens[self._read]
            if token not in self._ends:
                piece = self._step(token)
                if request.logprobs:
                    self._tell(token)
                self._decoded += len(piece)
                text += self._stops.add(piece)
            self._read += 1
        if self._stops.stopped:
            request.cancel()
            self.finish = "stop"
        elif over == "error" and request.error is not None:
            raise request.error
        elif over is not None:
            text += self._stops.rest()
            self.finish = "length" if over == "length" else "stop"
        self._given += len(text)
        whole = self.finish is not None and not self._stops.stopped
        count = sum(told.offset < self._given or whole for told in self._told)
        told, self._told = self._told[:count], self._told[count:]
        if self._stops.stopped:
            self._told = []
        return text, told

    def _tell(self, token: int) -> None:
        noted = self.request.logprobs[self._read]
        top = [(self._name(id), logprob) for id, logprob in noted.top]
        self._told.append(Told(self._name(token), noted.logprob, top, self._decoded))

    def _name(self, token: int) -> str:
        """The token's text; its number where that is no whole character."""
        text = decode(self._vocabulary, [token])
        return text if text and "\ufffd" not in text else f"token_id:{token}"
