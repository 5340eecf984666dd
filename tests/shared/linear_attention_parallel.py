"""Linear attention as one masked product over all pairs of tokens, for tests in float64."""

import torch


def parallel(q, k, v, log_decay=None, *, bonus=None, scale=None, initial_state=None):
    """The whole sequence at once, as a matrix of l × l for each channel of the key, and no recurrence."""
    (b, l, h), heads = v.shape[:3], v.shape[2] // k.shape[2]
    q, k = (t.repeat_interleave(heads, dim=2) for t in (q, k))
    q = q * (k.shape[-1] ** -0.5 if scale is None else scale)
    g = torch.zeros_like(k) if log_decay is None else log_decay
    g = g.expand(b, l, h) if g.ndim < 4 else g
    g = g[..., None].expand(k.shape) if g.ndim == 3 else g
    late = 0 if bonus is None else 1  # a query sees the state before its own token's decay
    E = k.new_zeros(b, h, l, l, k.shape[-1])
    for i in range(l):
        for j in range(i + 1 - late):
            E[:, :, i, j] = torch.exp(g[:, j + 1 : i + 1 - late].sum(1))
        if bonus is not None:
            E[:, :, i, i] = bonus
    o = torch.einsum("bhijk,bihk,bjhk,bjhv->bihv", E, q, k, v)
    since = torch.stack([torch.exp(g[:, : i + 1 - late].sum(1)) for i in range(l)], dim=1)
    last = torch.stack([torch.exp(g[:, j + 1 :].sum(1)) for j in range(l)], dim=1)
    final = torch.einsum("bjhk,bjhk,bjhv->bhkv", last, k, v)
    if initial_state is not None:
        o = o + torch.einsum("bihk,bihk,bhkv->bihv", since, q, initial_state)
        final = final + torch.exp(g.sum(1))[..., None] * initial_state
    return o, final
