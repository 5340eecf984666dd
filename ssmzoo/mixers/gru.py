"""PyTorch's GRU as a mixer: a baseline."""

from torch import nn

from ssmzoo.mixers._rnn import RNNMixer
from ssmzoo.registry import register_mixer


@register_mixer("gru")
class GRU(RNNMixer):
    """PyTorch's GRU, a baseline: a nonlinear recurrence, one step after another.

    Args:
        d_model: width of input and output.
        d_hidden: width of the recurrent layers; d_model if None.
        n_rnn_layers: how many of them are stacked in this one mixer.
        bidirectional: runs in both directions; then it is not causal and has no state.
    """

    network = nn.GRU
