"""Random requests to a server: good, bad, cancelled and cut off, and what each of them must come to."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from ssmzoo import SequenceModel
from ssmzoo.train.vocabulary import Bytes, decode

HEAD = "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BROKEN = [
    b"{",
    b'{"model": "small", "prompt": "\xff"}',
    b"[" * 3000,
    b"null",
    b'{"model": "small", "prompt": 5}',
    b'{"model": "other", "prompt": "a"}',
    b'{"model": "small", "prompt": "a", "max_tokens": 1e9}',
    b'{"model": "small", "prompt": "a", "temperature": NaN}',
    b'{"model": "small", "prompt": [999]}',
    b'{"model": "small", "prompt": "a", "tools": []}',
    b'{"model": "small", "prompt": "' + b"a" * 30_000 + b'"}',
]


class Storm:
    """Sends requests and notes what came.

    Args:
        model: the one that is served, in float64.
        address: of the server.
        distinct: how many different requests there are; they come again and again.
        seed: of everything that is drawn.

    Attributes:
        outcomes: how many requests ended in which way.
        wrong: what should not have been.
    """

    def __init__(self, model: SequenceModel, address: str, distinct: int = 40, seed: int = 0):
        self.model, self.distinct, self.rng = model, distinct, random.Random(seed)
        self.host, self.port = address.removeprefix("http://").split(":")
        self.known: dict[int, tuple[dict[str, Any], str]] = {}
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, count: int, at_once: int = 40, each: Callable[[], object] | None = None) -> None:
        """Sends so many requests; ``each`` is called after every hundredth."""
        left = iter(range(1, count + 1))

        async def client() -> None:
            for number in left:
                await self._one(self.rng.random())
                if each is not None and number % 100 == 0:
                    each()

        await asyncio.gather(*(client() for _ in range(at_once)))

    async def _one(self, kind: float) -> None:
        body, expected = self._request()
        data = json.dumps(body).encode()
        if kind < 0.08:
            data = self.rng.choice(BROKEN)
        elif kind < 0.12:
            data = data[: self.rng.randrange(len(data))]
        leaves = None
        if 0.12 <= kind < 0.35:  # after so many bytes of the answer; or before the request is complete
            leaves = self.rng.choice([-1, 0, 1, 200, 600])
        try:
            status, answer = await self._exchange(data, leaves)
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            if len(data) <= 20_000:  # else the server need not read all of it
                self.wrong.append(f"{type(error).__name__} for {data[:200]!r}")
            status, answer = "cut", b""
        self.outcomes[status] += 1
        if status == "left" or status == "cut":
            return
        if kind < 0.12:
            fits = status in ("400", "404", "413") and "error" in json.loads(answer)
        elif status == "429":
            fits = json.loads(answer)["error"]["type"] == "rate_limit_error"
        else:
            fits = status == "200" and _text(answer, body["stream"]) == expected
        if not fits:
            self.wrong.append(f"{status} for {data[:300]!r}: {answer[:300]!r}; expected {expected!r}")

    def _request(self) -> tuple[dict[str, Any], str]:
        """A body, and the text that ``generate`` gives alone."""
        number = self.rng.randrange(self.distinct)
        if number not in self.known:
            rng = random.Random(number)
            prompt = "begins alike " * (number % 3 == 0) + "".join(rng.choices("abcdef", k=rng.randint(1, 25)))
            options = {"temperature": rng.choice([0, 0.9]), "seed": number, "top_p": rng.choice([None, 0.9])}
            options |= {"repetition_penalty": rng.choice([1.0, 1.2]), "frequency_penalty": rng.choice([0, 0.5])}
            count = rng.randint(1, 24)
            ids = self.model.generate([list(prompt.encode())], count, **options)[0][len(prompt) :]
            body = {"model": "small", "prompt": prompt, "max_tokens": count, "stream": rng.random() < 0.5, **options}
            self.known[number] = body, decode(Bytes(), ids)
        return self.known[number]

    async def _exchange(self, data: bytes, leaves: int | None) -> tuple[str, bytes]:
        """The status and the body of an answer; "left" where the client went."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = HEAD.format(method="POST", path="/v1/completions") + f"Content-Length: {len(data)}\r\n"
            whole = f"{head}Connection: close\r\n\r\n".encode() + data
            if leaves == -1:
                writer.write(whole[: self.rng.randrange(len(whole))])
                await writer.drain()
                return "left", b""
            writer.write(whole)
            await writer.drain()
            if leaves is not None:
                await reader.read(leaves)
                return "left", b""
            status = (await reader.readline()).split()[1].decode()
            chunked = False
            while (line := await reader.readline()) not in (b"\r\n", b""):
                chunked |= line.lower().startswith(b"transfer-encoding: chunked")
            if not chunked:
                return status, await reader.read()
            answer = b""
            while size := int(await reader.readline(), 16):
                answer += await reader.readexactly(size + 2)
            return status, answer
        finally:
            writer.close()


def _text(answer: bytes, streamed: bool) -> str:
    if not streamed:
        return json.loads(answer)["choices"][0]["text"]
    lines = [line.strip() for line in answer.split(b"\n") if line.startswith(b"data: {")]
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines)
