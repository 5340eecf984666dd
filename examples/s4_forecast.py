"""Carbon dioxide over Mauna Loa eight years ahead: S4 trained by convolution, then run on by recurrence.

    python examples/s4_forecast.py --picture forecast.png

statsmodels brings the series. Four models see 1958 to 1993, learn to tell each month's change from noisy ones before,
and go on from their own answers through the state; their mean counts. All settings were chosen on earlier years.
"""

import argparse

import matplotlib.pyplot as plt
import torch
from statsmodels.datasets import co2

import ssmzoo
from ssmzoo.train import TrainConfig
from ssmzoo.train.optimizer import build_optimizer, lr_factor, set_lr

MODEL = {"d_model": 32, "n_layers": 2, "pattern": ["s4"], "mixers": {"s4": {"d_state": 32, "dropout": 0.1}}}
AHEAD = 96  # months


def forecast(x: torch.Tensor, config: TrainConfig) -> torch.Tensor:
    """A series (1, l, 1) of mean 0 and variance 1 → how it might go on (AHEAD)."""
    torch.manual_seed(config.seed)
    model = ssmzoo.build({**MODEL, "d_input": 1, "norm": "layer"})
    optimizer = build_optimizer(model, config)
    for step in range(config.steps):
        set_lr(optimizer, lr_factor(step + 1, config))
        y = model(x[:, :-1] + 0.5 * torch.randn(4, x.shape[1] - 1, 1))
        (y - x[:, 1:])[:, 24:].square().mean().backward()  # after two years to warm up
        optimizer.step()
        optimizer.zero_grad()
    with torch.inference_mode():
        answers = [model.eval()(x, model.initial_state(1), last_only=True)]
        while len(answers) < AHEAD:
            answers.append(model(*answers[-1]))
    return torch.cat([y.flatten() for y, _ in answers])


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--picture", default="forecast.png")
parser.add_argument("--steps", type=int, default=300)
options = parser.parse_args()
plt.savefig(options.picture)  # a name or folder that does not do is told before the work
series = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
past, truth = torch.tensor(series.to_numpy()).float().split([len(series) - AHEAD, AHEAD])
change = past.diff()
x = ((change - change.mean()) / change.std())[None, :, None]
mean = torch.stack([forecast(x, TrainConfig(steps=options.steps, lr=2e-3, seed=seed)) for seed in range(4)]).mean(0)
told = {"S4": past[-1] + (mean * change.std() + change.mean()).cumsum(0), "last month": past[-1].expand(AHEAD)}
told["last year"] = past[-12:].repeat(AHEAD // 12)
told["last year and growth"] = told["last year"] + (torch.arange(AHEAD) // 12 + 1) * (past[-1] - past[-121]) / 10
plt.plot(series[-240:], color="black", label="measured, ppm")
for name, values in told.items():
    print(error := f"{name}: {(values - truth).abs().mean():.2f} ppm off")
    plt.plot(series.index[-AHEAD:], values, label=error)
plt.legend()
plt.savefig(options.picture, dpi=120)
