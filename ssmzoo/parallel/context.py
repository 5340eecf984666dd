"""A model that is called with one part of its sequences on each process, and gives that part of the outputs.

Every token's output is the same as in one process. A process's gradients of the weights are its part of their sum over
all processes: what its own part of the loss has given them, and what the losses of other parts have sent back to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ssmkernels.core.crossing import crossing
from ssmkernels.core.validate import check_choice, check_cu_seqlens
from ssmzoo.mixer import Mixer
from ssmzoo.model import SequenceModel
from ssmzoo.parallel.agreement import agree
from ssmzoo.parallel.cut import Cut
from ssmzoo.parallel.gradients import GradientSums, Once
from ssmzoo.parallel.line import Line
from ssmzoo.parallel.parts import Parts
from ssmzoo.parallel.plan import WAYS
from ssmzoo.parallel.steps import Step, Traffic
from ssmzoo.state import State


def context(
    model: SequenceModel | Mixer,
    mesh: DeviceMesh | dist.ProcessGroup,
    *,
    reduce_gradients: bool = False,
    reference: bool = False,
    how: Literal["window", "heads", "ring", "balanced"] | None = None,
) -> Context:
    """The model, or one mixer, for sequences that are cut over the processes of a mesh dimension.

    Args:
        model: with the same weights on every process; it stays usable by itself.
        mesh: one dimension of a DeviceMesh, or a process group, of any backend. Ranks are in the order of the parts.
        reduce_gradients: each backward pass adds up the weights' gradients over the processes. Leave it out where DDP
            or FSDP does so over a mesh that includes this dimension.
        reference: every mixer hands its state on from process to process or, without a state, sees whole sequences,
            where it has a faster way too.
        how: the way of attention over the cuts, see docs/parallel.md: ``"window"``, ``"heads"``, ``"ring"`` or
            ``"balanced"``. If None, that which sends less, for each call.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a mesh of several dimensions; another ``how``.
    """
    check_choice("context", "how", how, WAYS, optional=True)
    if not isinstance(model, SequenceModel | Mixer):
        raise TypeError(f"context: `model` must be a SequenceModel or a Mixer; got {type(model).__name__}")
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(f"context: `mesh` must be one dimension of a mesh, as mesh['context']; got {mesh.ndim}")
        mesh = mesh.get_group()
    if not isinstance(mesh, dist.ProcessGroup):
        raise TypeError(f"context: `mesh` must be a DeviceMesh or a process group; got {type(mesh).__name__}")
    return Context(model, mesh, reduce_gradients, reference, how)


class Context(nn.Module):
    """What :func:`context` gives. Its weights are the model's own."""

    def __init__(
        self,
        model: SequenceModel | Mixer,
        group: dist.ProcessGroup,
        reduce_gradients: bool,
        reference: bool,
        how: str | None,
    ):
        super().__init__()
        self.model, self.group, self.reference, self.how = model, group, reference, how
        self.sums = GradientSums(model, group) if reduce_gradients else None

    def initial_state(self, batch_size: int, max_length: int | None = None) -> State:
        """The model's state before the first token, for every process alike."""
        return self.model.initial_state(batch_size, max_length)

    def forward(
        self,
        inputs: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        token_types: Tensor | None = None,
    ) -> Any:
        """As the model's own call, on this process's part of the sequences. Every process has to call it.

        Args:
            inputs: ``(b, l, …)``, this part; l may differ from process to process, and be 0.
            state: before the first part, on every process alike. What comes back is the state after the last part.
            cu_seqlens: int32 ``(s + 1)``, borders of packed sequences in all parts together; the same on every process.
            last_only: as :meth:`ssmzoo.SequenceModel.forward`; each sequence's last token in all parts.
            token_types: likewise, of this part.

        Returns:
            Outputs of this part. ``last_only`` outputs and class logits are whole on every process: a loss of them is
            to be computed alike on each, and counts once. With a state, the state after the last token too.

        Raises:
            TypeError, ValueError: as the model; parts that do not fit each other.
        """
        return self._call(inputs, state, cu_seqlens, last_only, token_types, {})[0]

    @torch.no_grad()
    def explain(
        self,
        inputs: Tensor,
        state: Any = None,
        *,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
        token_types: Tensor | None = None,
    ) -> list[Step]:
        """How such a call crosses the cuts, step by step, on this process. Runs it, on a copy of the state."""
        state = None if state is None else state.clone()
        names = {module: name for name, module in self.model.named_modules() if isinstance(module, Mixer)}
        return self._call(inputs, state, cu_seqlens, last_only, token_types, names)[1]

    def _call(
        self,
        inputs: Tensor,
        state: Any,
        cu_seqlens: Tensor | None,
        last_only: bool,
        token_types: Tensor | None,
        names: Mapping[Mixer, str],
    ) -> tuple[Any, list[Step]]:
        """The outputs, and how the call has crossed the cuts; ``names`` are the mixers' paths, to tell that by."""
        modes = {"state is None": state is None, "token_types is None": token_types is None}
        cut, compared = self._cut(inputs, state, cu_seqlens, token_types, {"last_only": bool(last_only), **modes})
        line = Line(self.group)
        b, l = inputs.shape[:2]
        given: dict[str, Any] = {"cu_seqlens": cut.cu_seqlens}
        if isinstance(self.model, SequenceModel):
            types = None if token_types is None else token_types.reshape(1, b * l)
            given |= {"last_only": last_only, "token_types": types}
        elif last_only or token_types is not None:
            raise ValueError("Context: `last_only` and `token_types` must be left out for a mixer alone")
        parts = Parts(cut, line, state is not None, self.reference, self.how, names)
        parts.note("call", "processes compare what they call", compared)
        with crossing(parts):
            found = self.model(inputs.reshape(1, b * l, *inputs.shape[2:]), state, **given)
        out, after = found if state is not None else (found, None)
        if self._whole(last_only):
            out = Once.apply(out, line.ranks)
        else:
            out = out.view(b, l, *out.shape[2:])
        out = line.close(out, None if self.sums is None else self.sums.begin)
        return out if state is None else (out, after), parts.steps

    def _whole(self, last_only: bool) -> bool:
        """Whether outputs are a row a sequence."""
        return isinstance(self.model, SequenceModel) and (last_only or self.model.config.output == "classes")

    def _cut(
        self, inputs: Tensor, state: Any, cu_seqlens: Tensor | None, token_types: Any, modes: Mapping[str, object]
    ) -> tuple[Cut, Traffic]:
        """What the parts on all processes make together; ``modes`` must be the same on all, by their names.

        And what it takes to find out.
        """
        rank, weight = self.group.rank(), next(self.model.parameters(), torch.empty(0))
        borders, error = None, None
        try:
            self._check(inputs)
            if cu_seqlens is not None:
                check_cu_seqlens("Context", cu_seqlens, inputs, values=False)
                borders = cu_seqlens.tolist()
            self._check_beside(inputs, state, token_types, len(inputs) if borders is None else len(borders) - 1)
        except (TypeError, ValueError) as found:
            error = found
        alike = {
            "cu_seqlens": borders,
            **modes,
            "reference": self.reference,
            "how": self.how,
            "torch.is_grad_enabled()": torch.is_grad_enabled(),
            "model.dtype": weight.dtype,
            "inputs.dtype": getattr(inputs, "dtype", None) if isinstance(self.model, Mixer) else None,
        }
        shape = (0, 0) if error is not None else (inputs.shape[0], inputs.shape[1])
        device = inputs.device if isinstance(inputs, Tensor) else weight.device
        shapes, compared = agree(self.group, shape, alike, error, device)
        batches, lengths = map(list, zip(*shapes, strict=True))
        if len(set(batches)) > 1:
            raise ValueError(f"Context: `inputs` must have as many sequences on every process; got {batches}")
        if borders is None:
            return Cut.of_batch(rank, lengths, batches[0], inputs.device), compared
        if borders[0] != 0 or borders != sorted(borders) or borders[-1] != sum(lengths):
            raise ValueError(
                f"Context: `cu_seqlens` must rise from 0 to {sum(lengths)}, the tokens of all parts together "
                f"({' + '.join(map(str, lengths))}); got {borders}"
            )
        return Cut.of_packed(rank, lengths, borders, inputs.device), compared

    def _check(self, inputs: object) -> None:
        """Inputs have the dimensions that are cut, and are such as the model takes."""
        least = 2 if isinstance(self.model, SequenceModel) else 3
        if not isinstance(inputs, Tensor) or inputs.ndim < least:
            got = tuple(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
            raise TypeError(f"Context: `inputs` must be a tensor (b, l, …) of at least {least} dimensions; got {got}")
        if isinstance(self.model, SequenceModel):
            self.model.check_call(inputs)
        elif inputs.shape[-1] != self.model.d_model:
            shape = tuple(inputs.shape)
            raise ValueError(
                f"Context: `inputs` must be (b, l, d_model) with d_model={self.model.d_model}; got {shape}"
            )

    @staticmethod
    def _check_beside(inputs: Tensor, state: Any, token_types: Any, sequences: int) -> None:
        """What comes with the inputs fits them: elsewhere nobody would hear that it does not."""
        if state is not None and not isinstance(state, State):
            raise TypeError(f"Context: `state` must come from initial_state() or a call; got {type(state).__name__}")
        if state is not None and state.n_sequences != sequences:
            raise ValueError(
                f"Context: `state` must have {sequences} sequences, as many as `inputs`; got {state.n_sequences}"
            )
        if token_types is not None and (not isinstance(token_types, Tensor) or token_types.shape != inputs.shape[:2]):
            got = tuple(token_types.shape) if isinstance(token_types, Tensor) else type(token_types).__name__
            raise ValueError(f"Context: `token_types` must be a tensor {tuple(inputs.shape[:2])}; got {got}")
