"""Processes of one start of a job find each other, in a store where earlier starts have left their addresses."""

from __future__ import annotations

import hashlib
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PAUSE, LIMIT = 0.05, timedelta(minutes=10)
ROOM = "ssmzoo/meeting"


def meet() -> tuple[dist.Store, int, int]:
    """A store for the processes of this start alone, this one's rank, and how many there are.

    ``torchrun`` keeps one store for all its restarts, and a process may find in it where one of an earlier start was.
    Here each gives itself a new name. The first process proposes the list of names that it sees until all agree: those
    of earlier starts cannot, and a list of theirs has no place for a new name.

    Raises:
        TimeoutError: they have not all come.
    """
    store, rank, ranks = next(dist.rendezvous("env://", timeout=LIMIT))
    return dist.PrefixStore(key_of_start(store, rank, ranks), store), rank, ranks


def key_of_start(store: dist.Store, rank: int, ranks: int) -> str:
    """A word that the processes of this start have in common, and no earlier one had.

    Raises:
        TimeoutError: they have not all come.
    """
    name, end = uuid.uuid4().hex, time.monotonic() + LIMIT.total_seconds()
    store.set(f"{ROOM}/name/{rank}", name)
    while time.monotonic() < end:
        if rank == 0:
            store.set(f"{ROOM}/list", ",".join(_read(store, f"name/{r}") for r in range(ranks)))
        names = _read(store, "list")
        listed = names.split(",")
        if rank < len(listed) and listed[rank] == name:
            key = hashlib.blake2b(names.encode(), digest_size=16).hexdigest()
            store.set(f"{ROOM}/agrees/{rank}", key)
            if rank == 0 and all(_read(store, f"agrees/{r}") == key for r in range(ranks)):
                store.set(f"{ROOM}/begun/{key}", key)
            if _read(store, f"begun/{key}") == key:
                return key
        time.sleep(PAUSE)
    raise TimeoutError(f"process {rank} of {ranks} has waited {LIMIT} for the others, which have not all come")


def _read(store: dist.Store, name: str) -> str:
    """What is written under a name; nothing if there is nothing yet."""
    key = f"{ROOM}/{name}"
    return store.get(key).decode() if store.check([key]) else ""
