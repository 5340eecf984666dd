"""How fast: our implementations of an op beside other people's, and beside what the machine can do.

    from ssmkernels.bench import Plan, bench_op, measure_limits

    limits = measure_limits("cpu", torch.float32)
    for rows in bench_op("selective_scan", Plan(torch.device("cpu"), torch.float32, limits)):
        print(*rows)

``ssmzoo bench`` does this for ops, mixers and models, with a table, a CSV file and a figure: see docs/bench.md.
"""

from ssmkernels.bench.contest import clock, differs, grow, hold, refusal, weigh
from ssmkernels.bench.limits import Limits, measure_limits
from ssmkernels.bench.measure import Timing, compete, exponent, peak_memory, schedule
from ssmkernels.bench.ops import bench_op
from ssmkernels.bench.peers import Package, Peer, Setting
from ssmkernels.bench.resident import Resident, resident_memory
from ssmkernels.bench.scaling import scale_op
from ssmkernels.bench.terms import BOTH, FORWARD, Contest, Contestant, Measurement, Plan

__all__ = [
    "BOTH",
    "FORWARD",
    "Contest",
    "Contestant",
    "Limits",
    "Measurement",
    "Package",
    "Peer",
    "Plan",
    "Resident",
    "Setting",
    "Timing",
    "bench_op",
    "clock",
    "compete",
    "differs",
    "exponent",
    "grow",
    "hold",
    "measure_limits",
    "peak_memory",
    "refusal",
    "resident_memory",
    "scale_op",
    "schedule",
    "weigh",
]
