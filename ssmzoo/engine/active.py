"""Which requests have a state in memory: who begins, who is put away, and who comes back."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from typing import cast

from torch import nn

from ssmzoo.decoding import let_go
from ssmzoo.engine.memory import Memory
from ssmzoo.engine.prefixes import Prefixes
from ssmzoo.engine.request import Job
from ssmzoo.engine.swap import Store
from ssmzoo.state import State, closing


class Active:
    """The requests of an engine by where they stand.

    The oldest that waits is the next to begin, and the youngest the first to be put away; so the oldest of all always
    goes on.

    Args:
        memory: the budget.
        prefixes: snapshots, which are within it too and give way first.
        max_batch: most requests with a state.
        store: where states are put away.

    Attributes:
        reading: requests whose prompts are being read, each with a state of its own.
        writing: those that have read theirs, the rows of ``batch``.
        batch: their states.
        drafting: those whose drafted tokens are to be read, or that have more than one unread; each with its own state.
        swaps: how often a state was put away.
    """

    def __init__(self, memory: Memory, prefixes: Prefixes, max_batch: int, store: Store):
        self.memory, self.prefixes, self.max_batch, self.store = memory, prefixes, max_batch, store
        self.reading: list[Job] = []
        self.writing: list[Job] = []
        self.batch: State | None = None
        self.drafting: list[Job] = []
        self.swaps = self._spare = 0
        self._queue: list[tuple[int, Job]] = []  # without a state, or with one that is put away: a heap
        self._lock = threading.Lock()  # of the queue

    @property
    def waiting(self) -> int:
        """Requests that have no state in memory."""
        return len(self._queue)

    def __len__(self) -> int:
        return len(self.jobs)

    @property
    def jobs(self) -> list[Job]:
        """All that have a state."""
        return [*self.writing, *self.drafting, *self.reading]

    @property
    def nbytes(self) -> int:
        """Bytes of the budget in use."""
        return self.memory.pages + self.memory.rows(self.lengths())

    def lengths(self) -> list[int]:
        """Tokens of each state and snapshot, and none of each spare row."""
        return [job.position for job in self.jobs] + self.prefixes.lengths + [0] * self.spare

    def enqueue(self, job: Job) -> None:
        """A request that waits."""
        with self._lock:
            heapq.heappush(self._queue, (job.order, job))

    def leave(self) -> None:
        """Lets go of the states of requests that are done."""
        with self._lock:
            for _, job in self._queue:
                if job.request.done and job.swapped is not None:
                    job.swapped.drop()
            self._queue = [entry for entry in self._queue if not entry[1].request.done]
            heapq.heapify(self._queue)
        done = [job for job in self.jobs if job.request.done]
        for job in done:
            job.let_go()
        if done:
            self.let_go()
        self.reading = [job for job in self.reading if not job.request.done]
        self.drafting = [job for job in self.drafting if not job.request.done]
        staying = [i for i, job in enumerate(self.writing) if not job.request.done]
        if len(staying) < len(self.writing):
            self._keep(staying)

    def let_go(self) -> None:
        """Has the model forget which states it ran on: a state that nobody has any more is within no budget."""
        let_go(cast(nn.Module, self.memory.model))

    def _keep(self, rows: list[int]) -> None:
        """Of those that are writing these alone."""
        self.let_go()  # of the batch before
        held, batch = len(self.writing) + self.spare, self.batch
        few = 2 * len(rows) < held
        if not few:
            rows = closing(rows)
        self.writing = [self.writing[i] for i in rows]
        self.batch = None if not rows or batch is None else batch.select(rows) if few else batch.closed_up(rows)
        self._spare = 0 if few else held - len(rows)

    @property
    def spare(self) -> int:
        """Rows of the batch that nobody has: at most as many as somebody has."""
        return 0 if self.batch is None else self._spare

    def _compact(self) -> bool:
        """Gives back the memory of spare rows; whether there were any."""
        if not self.spare or self.batch is None:
            return False
        self.let_go()
        self.batch, self._spare = self.batch.select(range(len(self.writing))), 0
        return True

    def join(self, jobs: list[Job], states: Sequence[State] = ()) -> None:
        """Requests, to those that are writing, with ``states`` that hold theirs in turn, or if none with their own."""
        states = states or [job.state for job in jobs if job.state is not None]
        for job in jobs:
            job.state = None
        self.let_go()
        self.writing += jobs
        self.batch, self._spare = State.concatenate(states if self.batch is None else [self.batch, *states]), 0

    def make_room(self) -> None:
        """Drops snapshots, and puts away the states of the youngest requests, until the next tokens have room."""
        while self.next_need() > self.memory.limit:
            if self._compact() or self.prefixes.drop_oldest():
                continue
            jobs = self.jobs
            if len(jobs) <= 1:
                return  # one alone has room: submit has seen to it
            self._put_away(max(jobs, key=lambda job: job.order))

    def admit(self) -> None:
        """Begins, or takes up again, the oldest requests that wait, as long as there is room."""
        while len(self) < self.max_batch:
            with self._lock:
                if not self._queue:
                    break
                job = self._queue[0][1]
            if not self._has_room(job):
                break
            if job.swapped is None:
                job.state = self.memory.template.clone()
            else:
                try:
                    job.state, job.swapped = job.swapped.bring_back(self.memory.template), None
                except OSError as error:
                    job.fail(error)
            if job.request.done:
                pass
            elif not job.unread:
                self.reading.append(job)
            elif len(job.unread) > 1:
                self.drafting.append(job)
            else:
                self.join([job])
            with self._lock:  # an earlier one may have come meanwhile
                if self._queue[0][1] is job:
                    heapq.heappop(self._queue)
                else:
                    self._queue.remove((job.order, job))
                    heapq.heapify(self._queue)

    def take_out(self, job: Job) -> None:
        """Gives a request that is writing a state of its own, out of the batch."""
        if self.batch is not None:
            job.state = self.batch.select([self.writing.index(job)])
        self._keep([i for i, other in enumerate(self.writing) if other is not job])

    def _put_away(self, job: Job) -> None:
        if job in self.writing:
            self.take_out(job)
        state, job.state, job.proposal, job.draft = job.state, None, [], None
        assert state is not None
        self.let_go()
        try:
            job.swapped = self.store.put_away(state, job.order) if job.position else None
        except OSError as error:
            job.fail(error)
        else:
            self.swaps += 1
            self.enqueue(job)
        self.reading = [other for other in self.reading if other is not job]
        self.drafting = [other for other in self.drafting if other is not job]

    def fail(self, error: Exception) -> None:
        """Ends all that have a state."""
        for job in self.jobs:
            job.fail(error)

    def _has_room(self, job: Job) -> bool:
        """Whether a request can have a state beside the others, dropping snapshots where that helps.

        There has to be room for some further tokens of all: else a state would come and go at every other token.
        """
        ahead = 2 * self.memory.page_size
        new = self._new(job, ahead)
        while True:
            others = self.memory.rows(self.lengths())
            rows = self.memory.rows([*self.lengths(), job.position + new]) - others
            needed = self.next_need(ahead) + self.memory.all_pages(job.position, new) + rows
            if needed <= self.memory.limit:
                return True
            if not self._compact() and not self.prefixes.drop_oldest():
                return not len(self)

    def next_need(self, ahead: int = 1) -> int:
        """Bytes in use once each request that has a state has had its next tokens."""
        new = [(job.position, self._new(job, ahead)) for job in self.jobs]
        pages = sum(self.memory.new_pages(*each) for each in new)
        pages += len(self.drafting) * self.memory.one_page  # of a copy of the state, in place of one that both share
        lengths = [length + more for length, more in new] + self.prefixes.lengths
        rows = self.memory.rows(lengths + [0] * self.spare)
        return self.memory.pages + pages + rows

    def _new(self, job: Job, ahead: int) -> int:
        """Tokens that a request takes next: of its prompt, or at most ``ahead`` new ones, or those of a draft."""
        left = len(job.request.prompt) - job.position
        if left > 0:
            return min(self.memory.chunk, left)
        ahead = max(ahead, len(job.unread) + len(job.proposal))
        return min(ahead, len(job.request.prompt) + job.request.max_tokens - job.position)

    def snapshot(self, job: Job, digest: bytes) -> None:
        """Keeps a copy of a state for prompts that begin in the same way, if that takes nobody's room."""
        while True:
            rows = self.memory.rows([*self.lengths(), job.position])
            if self.memory.pages + rows <= self.memory.limit:
                break
            if not self._compact() and not self.prefixes.drop_oldest():
                return
        if job.state is not None:
            self.prefixes.add(digest, job.position, job.state)
