"""Counters of a server in Prometheus's text format."""

from __future__ import annotations

import bisect
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ssmzoo.serve.worker import Worker

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics", "/health")

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Seconds, counted by bounds."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(BOUNDS) + 1), 0.0

    def note(self, seconds: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str) -> list[str]:
        below = [sum(self._counts[: i + 1]) for i in range(len(self._counts))]
        buckets = [f'{name}_bucket{{le="{le}"}} {n}' for le, n in zip((*BOUNDS, "+Inf"), below, strict=True)]
        return [*buckets, f"{name}_sum {self._sum:.6f}", f"{name}_count {below[-1]}"]


class Metrics:
    """What has happened since the start. All of it is noted in the server's event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()  # route and status, or "disconnect"
        self.tokens: Counter[str] = Counter()  # prompt, shared, generated
        self.first_token, self.duration = Histogram(), Histogram()

    def text(self, worker: Worker) -> str:
        """The page, with the engine's numbers."""
        gauges = worker.gauges
        requests = [
            f'ssmzoo_requests_total{{route="{route}",status="{status}"}} {count}'
            for (route, status), count in sorted(self.requests.items())
        ]
        groups = [
            ("requests_total", "counter", "HTTP requests by route and outcome.", requests),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", self.tokens["prompt"]),
            (
                "shared_tokens_total",
                "counter",
                "Of them, those whose state an earlier prompt left.",
                self.tokens["shared"],
            ),
            ("generated_tokens_total", "counter", "New tokens.", self.tokens["generated"]),
            ("proposed_tokens_total", "counter", "Tokens that the draft proposed.", gauges["proposed"]),
            ("kept_tokens_total", "counter", "Of them, those that were the next ones.", gauges["kept"]),
            ("swaps_total", "counter", "States that were put away to make room.", gauges["swaps"]),
            ("answers_active", "gauge", "Answers with a state in memory.", gauges["active"]),
            ("answers_waiting", "gauge", "Answers that wait for room.", gauges["waiting"]),
            ("state_bytes", "gauge", "Bytes of states in use.", gauges["bytes"]),
            ("state_bytes_limit", "gauge", "The budget for states in bytes.", gauges["memory"]),
            ("first_token_seconds", "histogram", "Time to the first token of an answer.", self.first_token),
            ("request_seconds", "histogram", "Time of a whole request that was answered.", self.duration),
        ]
        lines = []
        for name, kind, told, value in groups:
            name = f"ssmzoo_{name}"
            lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
            if isinstance(value, Histogram):
                lines += value.lines(name)
            else:
                lines += value if isinstance(value, list) else [f"{name} {value}"]
        return "\n".join(lines) + "\n"


class Counting:
    """Middleware that counts requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "disconnect"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            route = scope["path"] if scope["path"] in ROUTES else "other"
            self.metrics.requests[route, status] += 1
