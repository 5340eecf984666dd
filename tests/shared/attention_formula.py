"""Attention as its formula says: of one query, over one key after another."""

import torch


def attend_to(q, keys, values, seen, position, *, scale=None, softcap=0.0, slope=None, sink=None):
    """What a query at ``position`` gets of one head's ``seen`` keys: outputs and log-sum-exp, 0 where it sees none."""
    logits, weighted = [], [values[j] for j in seen]
    for j in seen:
        s = q.dot(keys[j]) * (len(q) ** -0.5 if scale is None else scale)
        s = softcap * torch.tanh(s / softcap) if softcap else s
        logits.append(s if slope is None else s - slope * abs(position - j))
    if sink is not None:
        logits.append(sink)
        weighted.append(values.new_zeros(values.shape[1]))
    if not logits:
        return values.new_zeros(values.shape[1]), q.new_zeros(())
    logits = torch.stack(logits)
    return logits.softmax(0) @ torch.stack(weighted), logits.exp().sum().log()
