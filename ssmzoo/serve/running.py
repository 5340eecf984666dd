"""A server's life: a socket, requests, and an orderly end."""

from __future__ import annotations

import asyncio
import math
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ssmzoo.serve.app import Service
from ssmzoo.serve.connections import impatient


class Server(uvicorn.Server):
    """uvicorn's, which ends well at SIGTERM and SIGINT: what is under way has a time to end in, nothing else begins.

    Args:
        app: what it runs.
        service: of the app.
        grace: seconds for requests that are under way.
    """

    def __init__(self, app: FastAPI, service: Service, grace: float):
        backstop = math.ceil(grace) + 5  # for connections that nobody reads from
        super().__init__(
            uvicorn.Config(
                app,
                http=impatient(service.limits.idle_seconds),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=backstop,
            )
        )
        self.service, self.grace = service, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the end, a second one does not wait for it."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        stopped = RuntimeError(f"the server has stopped, and the request took longer than {self.grace:g} seconds more")
        cut = asyncio.get_running_loop().call_later(self.grace, self.service.worker.cut, stopped)
        await super().shutdown(sockets)
        cut.cancel()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: nobody can listen there, as where another program does.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, UnicodeError) as error:
        told = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host!r:.200}, port {port}: {told}") from None


def run(app: FastAPI, service: Service, place: socket.socket, grace: float) -> None:
    """Serves until SIGTERM or SIGINT, and then ends within ``grace`` seconds and the time of a step.

    Args:
        app: of :func:`ssmzoo.serve.create_app`.
        service: of the app.
        place: what :func:`listen` gave; it is closed at the end.
        grace: seconds for requests that are under way.
    """
    Server(app, service, grace).run(sockets=[place])
