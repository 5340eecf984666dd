"""How prompts are read: in chunks, side by side, and no beginning twice."""

from __future__ import annotations

from collections.abc import Sequence

from ssmzoo.engine.prefixes import Prefixes
from ssmzoo.engine.request import Job


class Prompts:
    """Who reads how much of which prompt.

    Args:
        prefixes: snapshots of states.
        chunk: most tokens that all read in a step.
        share: whether snapshots are kept and used.
    """

    def __init__(self, prefixes: Prefixes, chunk: int, share: bool):
        self.prefixes, self.page_size, self.chunk, self.share = prefixes, prefixes.page_size, chunk, share

    def take_shared(self, reading: Sequence[Job]) -> None:
        """Lets requests go on from the longest snapshot that fits their prompts."""
        for job in reading if self.share else ():
            found = self.prefixes.longest(job.borders, job.position, len(job.request.prompt))
            if found is not None:
                job.request.shared += found.position - job.position
                job.state, job.position = found.state.clone(), found.position

    def parts(self, reading: Sequence[Job]) -> list[tuple[Job, int]]:
        """Who reads how much: as much each, and what some leave of that goes to the earliest.

        Of those that read the same up to the next snapshot, only the first does.
        """
        leaders: dict[bytes | int, Job] = {}
        for job in reading:
            cut = self._cut(job)
            same = self.share and cut % self.page_size == 0 and cut > job.position
            leaders.setdefault(job.borders[cut // self.page_size - 1] if same else job.order, job)
        wanted = {job: self._cut(job) - job.position for job in leaders.values()}
        left, counts = self.chunk, dict.fromkeys(wanted, 0)
        for most in (max(self.page_size, left // max(1, len(wanted))), self.chunk):
            for job, want in wanted.items():
                more = min(most, left, want - counts[job])
                counts[job] += more
                left -= more
        return [(job, count) for job, count in counts.items() if count]

    def _cut(self, job: Job) -> int:
        """Where the next stretch of a prompt ends at the latest: at a snapshot, or its end."""
        length, size = len(job.request.prompt), self.page_size
        ends = [length, (job.position // self.chunk + 1) * self.chunk]
        if self.share:
            ends.append((length - 1) // size * size)
        return min(end for end in ends if end > job.position)

    def border(self, job: Job) -> bytes | None:
        """The digest of what a request has read, if that is where a snapshot belongs."""
        size, position = self.page_size, job.position
        last = (len(job.request.prompt) - 1) // size * size
        if not self.share or position % size or (position % self.chunk and position != last):
            return None
        return job.borders[position // size - 1]
