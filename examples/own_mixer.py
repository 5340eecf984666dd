"""A mixer of your own, trained in a hybrid with attention, then called token by token through its state."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssmzoo
from ssmkernels import selective_scan


@dataclass
class AverageState(ssmzoo.State):
    h: Tensor  # (s, d_model, 1), float32


@ssmzoo.register_mixer("average")
class Average(ssmzoo.Mixer):
    """Moving averages, one learned rate r a channel, with a gate: h_t = exp(-r) h_{t-1} + r x_t."""

    float32_parameters = ("log_rate",)

    def __init__(self, d_model: int, *, slowest: float = 0.01):
        super().__init__(d_model)
        self.in_proj = nn.Linear(d_model, 2 * d_model, bias=False)
        self.log_rate = nn.Parameter(torch.logspace(1, 0, d_model, base=slowest).log())  # from slowest to 1
        self.out_proj = nn.Linear(d_model, d_model, bias=False)

    def initial_state(self, batch_size, max_length=None):
        return AverageState(self.like(wide=True).new_zeros(batch_size, self.d_model, 1))

    def mix(self, x, state, cu_seqlens):
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (b l d_model) each
        rate, A = self.log_rate.exp().to(x.dtype).expand_as(x), -torch.ones_like(self.log_rate)[:, None]
        one, h = x.new_ones(*x.shape[:2], 1), None if state is None else state.h
        more = {"z": z, "initial_state": h, "return_final_state": True, "cu_seqlens": cu_seqlens}
        y, h = selective_scan(x, rate, A, one, one, **more)
        return self.out_proj(y), None if state is None else AverageState(h)


torch.manual_seed(0)
text = torch.tensor(list(Path(nn.__file__).with_name("functional.py").read_bytes()))
model = ssmzoo.build("transformer++-tiny", pattern=["average", "attention"])
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
for _ in range(30):
    ids = torch.stack([text[i : i + 129] for i in torch.randint(len(text) - 129, (8,)).tolist()])
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.2f} after 30 steps")

with torch.inference_mode():
    at_once, state = model(text[None, :32]), model.initial_state(1)
    for t in range(32):
        logits, state = model(text[None, t : t + 1], state)
    print(f"token by token and at once: {(logits[:, 0] - at_once[:, -1]).abs().max():.0e} apart")
