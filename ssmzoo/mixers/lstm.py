"""PyTorch's LSTM as a mixer: a baseline."""

from torch import nn

from ssmzoo.mixers._rnn import RNNMixer
from ssmzoo.registry import register_mixer


@register_mixer("lstm")
class LSTM(RNNMixer):
    """PyTorch's LSTM, a baseline: a nonlinear recurrence, one step after another.

    Its options are those of :class:`~ssmzoo.mixers._rnn.RNNMixer`.
    """

    network = nn.LSTM
