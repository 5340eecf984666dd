"""The routes: OpenAI's, and those for whoever runs the server."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import time
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ssmzoo.plain import short
from ssmzoo.serve.answers import Answers, Gone
from ssmzoo.serve.bodies import Chat, Completion
from ssmzoo.serve.choices import Choice
from ssmzoo.serve.errors import Refused, answer_errors
from ssmzoo.serve.limits import Limits
from ssmzoo.serve.metrics import Counting, Metrics
from ssmzoo.serve.prompts import CONFIG, GENERATION, Prompter
from ssmzoo.serve.worker import Worker

B = TypeVar("B", Completion, Chat)
RETRY = 1  # seconds after which a client may try again


class Service:
    """What the routes share.

    Args:
        worker: which is not started yet.
        prompter: of the model.
        name: of the model, as clients call it.
        limits: what they may ask for.

    Raises:
        ValueError: an id that ends an answer is none of the model's.

    Attributes:
        live: answers that have begun and not ended.
        draining: whether no further ones begin.
    """

    def __init__(self, worker: Worker, prompter: Prompter, name: str, limits: Limits):
        size = worker.engine.vocab
        if wrong := [id for id in prompter.ends if not 0 <= id < size]:
            raise ValueError(
                f"Service: the `ends` of `prompter` must be from 0 to {size - 1}, the model's vocabulary; got "
                f"{wrong[0]}, from {GENERATION}, {CONFIG} or the caller"
            )
        self.worker, self.prompter, self.name, self.limits = worker, prompter, name, limits
        self.metrics = Metrics()
        self.live, self.draining = 0, False
        self.started = int(time.time())

    async def body(self, request: Request, kind: type[B]) -> B:
        """The checked body of a request.

        Raises:
            Refused: another type of content, too long, too slow, or not what ``kind`` says.
        """
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the header Content-Type must be application/json")
        limit, seconds = self.limits.body, self.limits.body_seconds
        too_long = Refused(413, f"the body must be at most {limit} bytes", headers={"Connection": "close"})
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > limit:
            raise too_long
        data = bytearray()

        async def read() -> None:
            async for chunk in request.stream():
                data.extend(chunk)
                if len(data) > limit:
                    raise too_long

        try:
            await asyncio.wait_for(read(), seconds)
        except ClientDisconnect:
            raise Refused(400, "the connection was closed before the whole body came") from None
        except (TimeoutError, asyncio.TimeoutError):
            raise Refused(408, f"the body must arrive within {seconds:g} seconds") from None
        try:
            body = kind.model_validate_json(bytes(data))
        except ValidationError as error:
            raise Refused.of_validation(error) from None
        if body.model != self.name:
            told = f"`model` must be {short(self.name)}, the one that is served; got {short(body.model)}"
            raise Refused(404, told, "model", "model_not_found")
        if (count := body.count or 0) > self.limits.tokens:
            raise Refused(400, f"`max_tokens` must be at most {self.limits.tokens}; got {short(count)}", "max_tokens")
        return body

    def admit(self, count: int) -> None:
        """Counts answers that begin.

        Raises:
            Refused: the server stops, or has as many as it can take; or nobody could ever take so many.
        """
        room, most = self.worker.engine.max_batch + self.limits.waiting, self.limits.choices
        if count > min(most, room):
            raise Refused(400, f"`n` and the prompts make {count} answers; at most {min(most, room)} go together", "n")
        if self.draining:
            raise Refused(503, "the server is stopping", headers={"Connection": "close"})
        if self.live + count > room:
            told = f"the server has {self.live} answers under way, and takes {room}; try again later"
            raise Refused(429, told, headers={"Retry-After": str(RETRY)})
        self.live += count

    def submit(self, body: Completion | Chat) -> tuple[list[list[int]], list[Any]]:
        """The ids of each prompt, and the engine's requests."""
        if isinstance(body, Chat):
            prompts = [self.prompter.of_messages([message.plain() for message in body.messages])]
        else:
            prompts = [self.prompter.of_text(prompt) for prompt in body.prompts]
        made = []
        try:
            for prompt in prompts:
                for i in range(body.n):
                    made.append(
                        self.worker.submit(
                            prompt,
                            max_tokens=body.count or self._room(len(prompt)),
                            **body.sampling,
                            seed=None if body.seed is None else body.seed + i,
                            stop=self.prompter.ends or None,
                            logprobs=body.top,
                        )
                    )
        except (ValueError, TypeError) as error:
            for request in made:
                request.cancel()
            told = str(error).removeprefix("Engine.submit: ")
            raise Refused(400, told.replace("`prompt_ids`", "`prompt`")) from None
        return prompts, made

    def _room(self, read: int) -> int:
        """New tokens for a client that names no number: as many as there may be after so many of a prompt."""
        positions = self.worker.engine.model.config.learned_positions
        return self.limits.tokens if positions is None else max(1, min(self.limits.tokens, positions - read))

    async def answer(self, request: Request, kind: type[B]) -> Response:
        """The response to one request."""
        begun, body = time.monotonic(), await self.body(request, kind)
        count = body.n * (len(body.prompts) if isinstance(body, Completion) else 1)
        self.admit(count)
        try:
            prompts, requests = await run_in_threadpool(self.submit, body)
        except BaseException:
            self.live -= count
            raise
        ends, vocabulary = self.prompter.ends, self.prompter.vocabulary
        choices = [Choice(i, each, vocabulary, ends, body.stops) for i, each in enumerate(requests)]
        answers = Answers(body, self.worker, prompts, choices)

        def close() -> None:
            answers.close()
            self.live -= count
            self.metrics.tokens["prompt"] += sum(map(len, prompts))
            self.metrics.tokens["shared"] += sum(each.shared for each in requests)
            self.metrics.tokens["generated"] += sum(len(each.tokens) for each in requests)
            if answers.first_token is not None:
                self.metrics.first_token.note(answers.first_token - begun)
            self.metrics.duration.note(time.monotonic() - begun)

        return Answering(answers, close)


class Answering(Response):
    """Sends answers, whole or as events, and ends them when the client is gone."""

    def __init__(self, answers: Answers, close: Any):
        super().__init__()
        self.answers, self._close = answers, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = asyncio.create_task(self._watch(receive))
        try:
            if self.answers.body.stream:
                headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
                async with contextlib.aclosing(self.answers.events()) as events:
                    streamed = StreamingResponse(events, media_type="text/event-stream", headers=headers)
                    await streamed(scope, _never, send)
            else:
                await JSONResponse(await self.answers.whole())(scope, receive, send)
        except Refused as error:
            await error.response()(scope, receive, send)
        except (Gone, ClientDisconnect, OSError):
            pass
        finally:
            watch.cancel()
            self._close()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.answers.leave()


def _rebound(request: Request) -> bool:
    """Whether a connection within this machine names another host.

    A web page can have its own name resolved to this machine, and its scripts then reach the server; their requests
    bear that name.
    """
    try:
        inside = ipaddress.ip_address((request.scope.get("server") or ("",))[0]).is_loopback
    except ValueError:  # a socket of another kind
        return False
    name = request.url.hostname or ""
    if not inside or not request.headers.get("host") or name == "localhost" or name.endswith(".localhost"):
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return True
    return False


async def _never() -> Any:
    """A client that stays: :class:`Answering` watches the real one."""
    await asyncio.Event().wait()


def create_app(service: Service, api_key: str | None = None) -> FastAPI:
    """The application; its worker runs while it does.

    Args:
        service: what it serves.
        api_key: what clients have to send as ``Authorization: Bearer KEY``, but for ``/health``; None for nothing.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(service.worker.stop)

    def check_key(request: Request) -> None:
        if api_key is None and _rebound(request):
            told = "the header Host must be localhost or an address; a server with an API key takes any name"
            raise Refused(403, told)
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if api_key is not None and not (
            scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), api_key.encode())
        ):
            told = "the header Authorization must be `Bearer` and this server's API key"
            raise Refused(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    app = FastAPI(title="ssmzoo", openapi_url=None, lifespan=lifespan)
    app.add_middleware(Counting, metrics=service.metrics)
    answer_errors(app)
    guarded = [Depends(check_key)]

    @app.post("/v1/completions", dependencies=guarded)
    async def completions(request: Request) -> Response:
        return await service.answer(request, Completion)

    @app.post("/v1/chat/completions", dependencies=guarded)
    async def chat(request: Request) -> Response:
        return await service.answer(request, Chat)

    def described() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": service.started, "owned_by": "ssmzoo"}

    @app.get("/v1/models", dependencies=guarded)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise Refused(404, f"no model {short(name)}; there is {short(service.name)}", "model", "model_not_found")
        return described()

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(service.worker), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> dict[str, str]:
        if service.draining:
            raise Refused(503, "the server is stopping")
        return {"status": "ok"}

    return app
