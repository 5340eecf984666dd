"""Attention by a schedule of blocks in which early parts compute for late ones (DistFlashAttn: 2310.03294, section 3).

Tokens stay where they are. In each step of :mod:`ssmzoo.parallel.schedule` a process computes the blocks that are its
own to compute. Keys and values travel to a process that asks for them; where another helps it, its queries go there,
and outputs and log-sum-exps come back and are merged. What step t + 1 needs travels while step t is computed, and what
step t has found while step t + 1 is.

Backward likewise. To a process that helps go queries, the outputs' gradient and two numbers a head::

    d_s_ij = p_ij (d_out_i · v_j - D_i + d_lse_i),   D_i = out_i · d_out_i

lse_i, which p_ij needs, and d_lse_i - D_i, so that outputs themselves need not travel. The queries' gradient comes
back; gradients of keys and values go to where these are from.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from ssmzoo.parallel.blocks import Blocks, Options, gradients_of, merge_rows, merged, with_sinks
from ssmzoo.parallel.inputs import Gradients, Inputs, Results, Sums
from ssmzoo.parallel.layout import add_rows, count, take
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.schedule import Schedule, Task
from ssmzoo.parallel.transfers import To, transfer


@dataclasses.dataclass
class _Pass:
    """What one pass over the schedule sends, computes and collects.

    Attributes:
        asked: of the queries, ``(l …)`` each.
        both: keys and values side by side ``(l, channels)``.
        answered: what there is to know of queries once a task is done, by its dtype and shape ``(…)``.
        returned: likewise of keys.
        work: a task's answers, and what it returns, from its rows of ``asked`` and ``both``.
        collect: takes the answers of a task, at the process that asks.
        add: takes what a task returns, at the process that gives.
    """

    asked: list[Tensor]
    both: Tensor
    answered: list[Tensor]
    returned: list[Tensor]
    work: Callable[[Task, list[Tensor], Tensor], tuple[list[Tensor], list[Tensor]]]
    collect: Callable[[Task, list[Tensor]], None]
    add: Callable[[Task, list[Tensor]], None]


@dataclasses.dataclass
class Balanced:
    """One call.

    Args:
        line: to the other processes.
        options: of attention.
        steps: who computes what, the same on every process.
    """

    line: Line
    options: Options
    steps: Schedule

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Output ``(l h v)`` and log-sum-exp ``(h l)``, in the precision of sums."""
        q, (out, lse) = inputs.q, inputs.before_any_key()

        def work(task: Task, asked: list[Tensor], both: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            (rows,) = asked
            theirs = inputs._replace(q=rows)
            part, sums = theirs.before_any_key()
            merged(part, sums, Blocks(theirs, self.options), task.keys, both)
            return [part.to(q.dtype), sums.T.contiguous()], []

        def collect(task: Task, answers: list[Tensor]) -> None:
            part, sums = answers
            merge_rows(out, lse, task.queries, part, sums.T)

        answered = [q.new_empty(out.shape[1:]), lse.new_empty(len(lse))]
        self._run(_Pass([q], inputs.both, answered, [], work, collect, lambda *_: None))
        return with_sinks(out, lse, inputs.sinks)

    def backward(self, inputs: Inputs, results: Results) -> Gradients:
        sums = Sums.of(inputs)

        def work(task: Task, asked: list[Tensor], both: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            rows, d_rows, lse, beside = asked
            blocks = Blocks(inputs._replace(q=rows), self.options)
            nothing, found = (x.new_zeros(x.shape, dtype=sums.q.dtype) for x in (d_rows, rows))
            theirs = Results(nothing, lse.T, d_rows, beside.T)
            of_keys = gradients_of(blocks, task.keys, both, theirs, sums._replace(q=found))
            return [found], [of_keys]

        def collect(task: Task, answers: list[Tensor]) -> None:
            add_rows(sums.q, task.queries, answers[0])

        def add(task: Task, returned: list[Tensor]) -> None:
            add_rows(sums.both, task.keys.rows, returned[0])

        asked = [inputs.q, results.d_out, results.lse.T, -results.delta]
        answered, returned = ([x.new_empty(x.shape[1:])] for x in (sums.q, sums.both))
        self._run(_Pass(asked, inputs.both, answered, returned, work, collect, add))
        return sums.gradients(inputs)

    def _run(self, over: _Pass) -> None:
        """Every process starts the transfers of all steps in the same order, whether or not it takes part in one."""
        arriving, returning = self._lend(0, over), _nothing
        for t, tasks in enumerate(self.steps):
            came, arriving = arriving(), self._lend(t + 1, over)
            found: dict[int, list[Tensor]] = {}
            for place, task in enumerate(tasks):
                if task.at == self.line.rank:
                    found[place] = self._do(task, over, came.get(place))
            returning()
            returning = self._return(tasks, found, over)
        returning()

    def _do(self, task: Task, over: _Pass, came: list[Tensor] | None) -> list[Tensor]:
        """Computes a task and collects what is of here; gives what is of another process."""
        queries = came if came is not None and task.helped else [take(x, task.queries) for x in over.asked]
        keys = came[0] if came is not None and not task.helped else take(over.both, task.keys.rows)
        answers, returned = over.work(task, queries, keys)
        if not task.helped:
            over.collect(task, answers)
        if task.at == task.gives:
            over.add(task, returned)
        return answers if task.helped else returned

    def _lend(self, t: int, over: _Pass) -> Callable[[], dict[int, list[Tensor]]]:
        """Starts what travels to where it is computed; what has come, by the places of tasks in their step."""
        sends: list[To] = []
        comes: list[To] = []
        came: dict[int, list[Tensor]] = {}
        for place, task in enumerate(self.steps[t] if t < len(self.steps) else ()):
            if task.source is None:
                continue
            tensors, rows = (over.asked, task.queries) if task.helped else ([over.both], task.keys.rows)
            if task.source == self.line.rank:
                sends += [(take(x, rows).contiguous(), task.at) for x in tensors]
            elif task.at == self.line.rank:
                came[place] = [x.new_empty(count(rows), *x.shape[1:]) for x in tensors]
                comes += [(x, task.source) for x in came[place]]
        wait = transfer(self.line, sends, comes)

        def arrived() -> dict[int, list[Tensor]]:
            wait()
            return came

        return arrived

    def _return(self, tasks: tuple[Task, ...], found: dict[int, list[Tensor]], over: _Pass) -> Callable[[], None]:
        """Starts what travels back to where queries or keys are from; it is collected there."""
        sends: list[To] = []
        comes: list[To] = []
        collected: list[Callable[[], None]] = []
        for place, task in enumerate(tasks):
            if task.source is None:
                continue
            if task.at == self.line.rank:
                sends += [(x, task.source) for x in found[place]]
            elif task.source == self.line.rank:
                like, rows = (over.answered, task.queries) if task.helped else (over.returned, task.keys.rows)
                came = [x.new_empty(count(rows), *x.shape) for x in like]
                comes += [(x, task.at) for x in came]
                collected.append(_later(over.collect if task.helped else over.add, task, came))
        wait = transfer(self.line, sends, comes)

        def collect() -> None:
            wait()
            for each in collected:
                each()

        return collect


def _nothing() -> None:
    pass


def _later(take_in: Callable[[Task, list[Tensor]], None], task: Task, came: list[Tensor]) -> Callable[[], None]:
    return lambda: take_in(task, came)
