"""Two ways to the same results, compared with all gradients; arguments may be tuples of tensors."""

import torch


def leaves(arguments):
    """The arguments as leaves that want gradients, and these in a list."""
    made = {
        name: tuple(x.clone().requires_grad_() for x in t) if isinstance(t, tuple) else t.clone().requires_grad_()
        for name, t in arguments.items()
    }
    return made, [x for t in made.values() for x in (t if isinstance(t, tuple) else (t,))]


def check_same_with_gradients(first, second, arguments, randn):
    """Both give the same tuple of results, and the same gradients, which come in through each of them."""
    (made, variables), (again, others) = leaves(arguments), leaves(arguments)
    found, wanted = first(**made), second(**again)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    incoming = [randn(*t.shape) for t in found]
    got = torch.autograd.grad(found, variables, incoming)
    torch.testing.assert_close(got, torch.autograd.grad(wanted, others, incoming), rtol=1e-8, atol=1e-10)
