"""What a processor can do, by its vendor's data sheet; and how much of that programs reach."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ssmkernels.core.names import unknown
from ssmzoo.planning.counting import MATRIX, MEMORY, Work

GIGA, TERA = 1e9, 1e12

PRECISIONS = ("fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class Device:
    """A processor and what connects it to others. Rates are per second, of one processor.

    Attributes:
        name: of it.
        kind: "cuda", which runs our Triton kernels, or "cpu", which runs our native ones.
        memory: bytes.
        bandwidth: bytes read or written of its memory.
        matrix: precision → FLOPs of dense matrix products.
        vector: FLOPs of other float32 arithmetic.
        node: processors that ``link`` connects.
        link: bytes that it sends to others in its node while it receives as many.
        network: likewise to other nodes.
        latency: seconds that a message takes besides its bytes.
        call: seconds that each operator takes at least.
        overlaps: it computes while it communicates.
        source: where the numbers are from.
        reached: the share of the data sheet's numbers that programs reach, by what limits them; for ``matrix`` also of
            an op by its name.
        rates: phase and op → FLOPs of that op, where they are measured.
        links: what is sent, as :mod:`ssmzoo.planning.links` names it → ``link`` for it, where it is measured.
        waits: likewise → ``latency`` for it.
    """

    name: str
    kind: str
    memory: float
    bandwidth: float
    matrix: Mapping[str, float]
    vector: float
    node: int
    link: float
    network: float
    latency: float
    call: float
    overlaps: bool
    source: str
    reached: Mapping[str, float]
    rates: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    links: Mapping[str, float] = dataclasses.field(default_factory=dict)
    waits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def seconds(self, work: Mapping[Work, float], precision: str) -> dict[str, float]:
        """The time of operators, by their kind: each takes what its FLOPs or its bytes take, whichever is more.

        That is the roofline of Williams, Waterman and Patterson (doi 10.1145/1498765.1498785), for one operator after
        another.
        """
        found: dict[str, float] = {}
        bandwidth = self.bandwidth * self.reached["memory"]
        for item, number in work.items():
            one = max(item.bytes / bandwidth, item.flops / self._rate(item, precision)) + self.call
            found[item.kind] = found.get(item.kind, 0.0) + number * one
        return found

    def _rate(self, item: Work, precision: str) -> float:
        if (item.phase, item.kind) in self.rates:
            return self.rates[item.phase, item.kind]
        if item.kind in (MATRIX, *IN_PRODUCTS):
            return self.matrix[precision] * self.reached.get(item.kind, self.reached["matrix"])
        return self.vector * self.reached["vector"]

    def sending(self, name: str, span: int, sent: float, messages: float) -> float:
        """Seconds of what is sent to others of a group that reaches over so many neighbouring processors."""
        rate = self.links.get(name, self.link) if span <= self.node else self.network
        return sent / (rate * self.reached["link"]) + messages * self.waits.get(name, self.latency)


# Ops whose kernels are matrix products of chunks; others compute element by element.
IN_PRODUCTS = frozenset(
    {"attention", "selected_attention", "ssd", "linear_attention", "delta_rule", "generalized_delta_rule", "mlstm"}
    | {"mamba3_scan", "quantized_linear"}
)

# Large bfloat16 products of cuBLAS reach about 0.7 of the data sheet, and copies 0.85 of the bandwidth. Attention's
# share is that of FlashAttention-2's forward and backward pass on an H100 (arXiv 2407.08608, section 4.1: 0.35).
# Recurrences in chunks do about twice the FLOPs that their definition counts, in products of 64 to 128 rows.
GPU = {MATRIX: 0.7, "matrix": 0.15, "attention": 0.35, "vector": 0.3, "memory": 0.85, "link": 0.8, MEMORY: 1.0}


def _gpu(
    name: str,
    memory: float,
    bandwidth: float,
    bf16: float,
    fp32: float,
    link: float,
    network: float,
    source: str,
    node: int = 8,
) -> Device:
    """Units of the data sheets: GB, TB/s, dense TFLOPs, and GB/s in one direction."""
    return Device(
        name,
        "cuda",
        memory * GIGA,
        bandwidth * TERA,
        {"bf16": bf16 * TERA, "fp32": fp32 * TERA},
        fp32 * TERA,
        node,
        link * GIGA,
        network * GIGA,
        latency=10e-6,
        call=4e-6,
        overlaps=True,
        source=source,
        reached=GPU,
    )


NVIDIA = "https://www.nvidia.com/en-us/data-center/"

# Networks are those of the vendor's own eight-GPU systems: one adapter of 200 or 400 Gbit/s for each GPU.
DEVICES = {
    device.name: device
    for device in (
        _gpu("a100", 80, 2.039, 312, 19.5, 300, 25, NVIDIA + "a100/"),
        _gpu("h100", 80, 3.35, 989.4, 66.9, 450, 50, NVIDIA + "h100/"),
        _gpu("h200", 141, 4.8, 989.4, 66.9, 450, 50, NVIDIA + "h200/"),
        _gpu("b200", 180, 8.0, 2250, 75, 900, 50, NVIDIA + "dgx-b200/"),
        _gpu("l40s", 48, 0.864, 362, 91.6, 32, 25, NVIDIA + "l40s/"),
        _gpu(
            "mi300x",
            192,
            5.3,
            1307.4,
            163.4,
            448,
            50,
            "https://www.amd.com/en/products/accelerators/instinct/mi300.html",
        ),
    )
}

THIS = ("this", "cpu")  # measured here


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        ValueError: there is none of this name; says which there are and the nearest.
    """
    if name not in DEVICES:
        raise ValueError(unknown("--device", name, [*DEVICES, *THIS]))
    return DEVICES[name]
