"""Errors as OpenAI's API gives them: an object with one clear line."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from ssmzoo.plain import short

EXPECTED = {  # of fields whose bounds do not tell it
    "prompt": "must be a text, a list of texts, a list of token ids, or a list of such lists; none empty but a text",
    "stop": "must be a text of 1 to 256 characters, or a list of at most 16 of them",
    "logit_bias": "must be an object of at most 1024 token ids, each with a number from -100 to 100",
    "content": "must be a text, or a list of parts of the type 'text'",
}
KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets no answer.

    Args:
        status: of HTTP, 4xx or 5xx.
        message: one line that says what was expected and what came.
        param: the field that is at fault.
        code: a short name of the error for programs.
        headers: further ones of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = " ".join(str(self).split())
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @classmethod
    def of_validation(cls, error: ValidationError) -> Refused:
        """The first thing that is wrong with a body."""
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        if not place:
            return cls(400, f"the body must be a JSON object of the request: {message}")
        several = next((name for name in first["loc"] if name in EXPECTED), None)
        if several is not None and first["type"] != "missing":
            return cls(400, f"`{several}` {EXPECTED[str(several)]}; got {short(first['input'])}", str(several))
        if first["type"] == "extra_forbidden":
            return cls(400, f"`{place[:80]}` is not supported by this server", place[:80])
        shown = "" if first["type"] == "missing" else f"; got {short(first['input'])}"
        return cls(400, f"`{place[:80]}`: {message}{shown}", place[:80])

    def response(self) -> Response:
        return JSONResponse(self.body, self.status, self.headers)


def answer_errors(app: FastAPI) -> None:
    """Makes an app answer whatever goes wrong with an error object, and keep tracebacks to its log."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error.response()

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        told = f"{request.method} {short(request.url.path)}: {error.detail}"
        return Refused(error.status_code, told, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return Refused(500, f"the server failed with {type(error).__name__}; its log says more").response()
