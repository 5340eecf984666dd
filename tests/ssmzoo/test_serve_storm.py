"""Thousands of random requests to a server with memory for a tenth of them.

``SSMZOO_REQUESTS=10000 python -m pytest -s tests/ssmzoo/test_serve_storm.py`` sends more.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time

import pytest

pytest.importorskip("fastapi", reason="needs fastapi")

from request_storm import Storm
from served import served, small_model

import ssmzoo
from ssmzoo.serve import Limits

COUNT = int(os.environ.get("SSMZOO_REQUESTS", "100"))
CLIENTS = 40


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_random_requests():
    model = small_model()
    one = ssmzoo.Engine(model, page_size=4, chunk=8)._memory.full(50)  # bytes of the longest request
    limits, sizes = Limits(body=20_000, tokens=100, waiting=24, body_seconds=600), []
    with served(model, memory=CLIENTS // 10 * one, max_batch=16, limits=limits, draft="lookup") as (address, service):
        storm = Storm(model, address, max(40, COUNT // 25))
        begun = time.monotonic()
        asyncio.run(storm.run(COUNT, CLIENTS, lambda: sizes.append(resident())))
        end, engine = time.monotonic() + 300, service.worker.engine
        while (service.live or engine.active or engine.waiting) and time.monotonic() < end:
            time.sleep(0.01)
        assert not storm.wrong, "\n".join(storm.wrong[:5])
        assert (service.live, engine.active, engine.waiting) == (0, 0, 0)
        assert not service.worker._events
        assert not service.worker._requests
        engine.forget()
        engine.step()
        gc.collect()
        pools = [cache.pages.pool for cache in engine._memory.caches]
        assert engine.nbytes == 0
        assert all(pool.in_use == 0 for pool in pools)
        print(
            f"\n{COUNT} requests in {time.monotonic() - begun:.0f} s: {dict(storm.outcomes)}, {engine.swaps} swaps, ",
            end="",
        )
        print(f"{engine.kept} of {engine.proposed} drafted tokens kept")
    assert engine.swaps > 0
    assert engine.proposed > 0
    assert storm.outcomes["200"] > COUNT // 3
    assert min(storm.outcomes[each] for each in ("400", "left")) > 0
    if len(sizes) >= 40:  # once everything has run a few times
        early, late = (sorted(part)[len(part) // 2] for part in (sizes[10:20], sizes[-10:]))
        print(f"resident memory: {early / 2**20:.1f} MiB, then {late / 2**20:.1f} MiB")
        assert late < early + 16 * 2**20
