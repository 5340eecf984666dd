"""Other people's implementations of an op, which ours are timed beside.

An op's folder may hold ``peers.py`` with ``PEERS``, name of the op → its peers, and ``SETTINGS``, name of the op → the
call that all of them can do. Packages are imported when a peer is called, and never before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssmkernels.check.spec import Case
from ssmkernels.core.binding import Binder
from ssmkernels.core.names import OPS

ABSENT = "not installed"


@dataclass(frozen=True)
class Package:
    """Where a peer comes from: the module to import, and what ``pip install`` calls it. PyTorch's own where empty."""

    module: str = ""
    install: str = ""
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def missing(self) -> str:
        """What to do where it is not installed; empty where it is."""
        if not self.module or importlib.util.find_spec(self.module) is not None:
            return ""
        return f"{ABSENT}: pip install {self.install or self.module}"


TORCH = Package()
TRANSFORMERS = Package("transformers")
MAMBAPY = Package("mambapy")
MAMBA_SSM = Package("mamba_ssm", "mamba-ssm", ("cuda",))
CAUSAL_CONV1D = Package("causal_conv1d", "causal-conv1d", ("cuda",))
FLA = Package("fla", "flash-linear-attention", ("cuda",))
FLASH_ATTN = Package("flash_attn", "flash-attn", ("cuda",))


@dataclass(frozen=True)
class Peer:
    """Another implementation of an op.

    Attributes:
        name: shown beside its time.
        package: where it comes from.
        function: takes and returns what the public function does, and raises NotImplementedError for what it cannot do.
        note: what differs from ours in the work or in how it is done.
        gradients: False where the package gives wrong gradients, or none, for results that the timed call leaves away:
            its gradients are then compared with ours at the timed size alone.
    """

    name: str
    package: Package
    function: Callable[..., Any]
    note: str = ""
    gradients: bool = True


@dataclass(frozen=True)
class Setting:
    """The call that is timed.

    Attributes:
        case: changes of the spec's ``bench`` case.
        further: changes of that, each for a call that is timed after it; left away where sizes are given.
        arguments: changes of the arguments that the case makes.
        backward: whether the backward pass is timed too, where there is one.
        long: the length up to which it is scaled.
        note: what these leave away.
    """

    case: Case = field(default_factory=dict)
    further: tuple[Case, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    backward: bool = True
    long: int = 65_536
    note: str = ""


# What recurrences and convolutions of all packages can do.
FROM_ZERO = Setting(
    case={"state": False}, arguments={"return_final_state": False}, note="from a zero state, output alone"
)


def peers_of(op: str, device: str) -> tuple[Peer, ...]:
    """The peers of an op on a kind of device, installed or not."""
    found = getattr(_module(op), "PEERS", {}).get(op, ())
    return tuple(peer for peer in found if device in peer.package.devices)


def setting_of(op: str) -> Setting:
    """How an op is called when it is timed."""
    return getattr(_module(op), "SETTINGS", {}).get(op, Setting())


def calls_like(op: str, takes: str = "") -> Callable[[Callable[[Any], Any]], Callable[..., Any]]:
    """Decorates ``peer(a)``, where ``a`` holds the public arguments of ``op`` by name: it is then called as the op is.

    Args:
        takes: optional arguments that the peer knows. A call in which another is not at its default raises
            NotImplementedError.
    """
    declared = OPS[op].declared
    bind = Binder(declared.signature)
    known = {*takes.split(), "implementation"}
    others = {name: default for name, default in bind.defaults.items() if name not in known}

    def decorate(peer: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(peer)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = bind(args, kwargs)
            for name, default in others.items():
                value = given[name]
                refuse(isinstance(value, Tensor) or value != default, f"`{name}`")
            return peer(types.SimpleNamespace(**given))

        call.__signature__ = declared.signature  # type: ignore[attr-defined]
        return call

    return decorate


def refuse(condition: object, what: str) -> None:
    """For peers: raises NotImplementedError, naming what they cannot do, if that is asked for."""
    if condition:
        raise NotImplementedError(f"it has no {what}")


def _module(op: str) -> Any:
    name = f"{OPS[op].package}.peers"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None
