"""All answers of one HTTP request, and OpenAI's objects for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from ssmzoo.serve.bodies import Body, Chat
from ssmzoo.serve.choices import Choice, Told
from ssmzoo.serve.errors import Refused
from ssmzoo.serve.worker import Worker


class Gone(Exception):
    """The client has closed the connection."""


class Answers:
    """Follows the choices of a request until all have ended.

    Args:
        body: the request.
        worker: whose engine writes them.
        prompts: their ids.
        choices: ``n`` of them for each prompt.
    """

    def __init__(self, body: Body, worker: Worker, prompts: list[list[int]], choices: list[Choice]):
        self.body, self.worker, self.prompts, self.choices = body, worker, prompts, choices
        self.event, self.gone = asyncio.Event(), False
        self.chat = isinstance(body, Chat)
        self.first_token: float | None = None
        self.head: dict[str, Any] = {
            "id": ("chatcmpl-" if self.chat else "cmpl-") + uuid.uuid4().hex,
            "object": "chat.completion" if self.chat else "text_completion",
            "created": int(time.time()),
            "model": body.model,
        }

    def leave(self) -> None:
        """The client is gone: what it asked for ends."""
        self.gone = True
        self.event.set()

    def close(self) -> None:
        """Ends what has not ended."""
        for choice in self.choices:
            choice.request.cancel()
        self.worker.wake()

    async def news(self) -> AsyncGenerator[tuple[Choice, str, list[Told]], None]:
        """Each piece of text as it comes.

        Raises:
            Gone: the client has closed the connection.
            Refused: the engine could not go on.
        """
        with self.worker.telling(self.event):
            while True:
                self.event.clear()
                for choice in self.choices:
                    if choice.finish is None:
                        try:
                            text, told = choice.news()
                        except Exception as error:
                            raise Refused(503, f"the request was ended: {error!s:.300}") from error
                        if choice.request.tokens and self.first_token is None:
                            self.first_token = time.monotonic()
                        if text or told or choice.finish is not None:
                            yield choice, text, told
                if all(choice.finish is not None for choice in self.choices):
                    return
                if self.gone:
                    raise Gone
                await self.event.wait()

    async def whole(self) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        texts: dict[int, list[str]] = {choice.index: [] for choice in self.choices}
        tokens: dict[int, list[Told]] = {choice.index: [] for choice in self.choices}
        async with contextlib.aclosing(self.news()) as news:
            async for choice, text, told in news:
                texts[choice.index].append(text)
                tokens[choice.index] += told
        made = []
        for choice in self.choices:
            text = "".join(texts[choice.index])
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            made.append(self._choice(choice, content, tokens[choice.index]))
        return {**self.head, "choices": made, "usage": self.usage}

    async def events(self) -> AsyncGenerator[str, None]:
        """The events of a streamed answer; an error is the last one."""
        head = {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}
        options = self.body.stream_options
        wants_usage = options is not None and options.include_usage
        if wants_usage:
            head["usage"] = None
        try:
            for choice in self.choices if self.chat else ():
                yield _event({**head, "choices": [self._choice(choice, {"delta": {"role": "assistant"}}, [])]})
            async with contextlib.aclosing(self.news()) as news:
                async for choice, text, told in news:
                    content = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
                    yield _event({**head, "choices": [self._choice(choice, content, told)]})
            if wants_usage:
                yield _event({**head, "choices": [], "usage": self.usage})
            yield "data: [DONE]\n\n"
        except Refused as error:
            yield _event(error.body)
        except Gone:
            pass

    @property
    def usage(self) -> dict[str, Any]:
        """Counts of tokens; a prompt counts once, however many answers it has."""
        prompt = sum(map(len, self.prompts))
        completion = sum(len(choice.request.tokens) for choice in self.choices)
        firsts = self.choices[:: self.body.n]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(choice.request.shared for choice in firsts)},
        }

    def _choice(self, choice: Choice, content: dict[str, Any], told: list[Told]) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if told and self.chat:
            logprobs = {
                "content": [{**_one(t.token, t.logprob), "top_logprobs": [_one(*o) for o in t.top]} for t in told]
            }
        elif told:
            logprobs = {
                "tokens": [t.token for t in told],
                "token_logprobs": [t.logprob for t in told],
                "top_logprobs": [dict(reversed(t.top)) for t in told],
                "text_offset": [t.offset for t in told],
            }
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": choice.finish}


def _one(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
