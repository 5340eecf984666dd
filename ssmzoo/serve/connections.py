"""Connections that hold a place for nothing are closed."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol


def impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, with an end to waiting for clients.

    Args:
        seconds: after twice as long, at the latest, a connection is closed on which no request's head has come to its
            end, or whose client takes nothing of an answer.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._before: object = None
            self._timer = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            self._timer.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            unread = self.transport.get_write_buffer_size()
            now = (self.cycle, waits, unread)
            if now == self._before and (waits or unread):
                self.transport.abort()  # which tells the request, if there is one, that its client is gone
                return
            self._before = now
            self._timer = self.loop.call_later(seconds, self._look)

    return Impatient
