"""``ssmzoo.plan``: training runs on paper, for any number of processors."""

from ssmzoo.planning.devices import DEVICES, Device
from ssmzoo.planning.estimate import Estimate
from ssmzoo.planning.mesh import Mesh
from ssmzoo.planning.planner import Plan, plan

__all__ = ["DEVICES", "Device", "Estimate", "Mesh", "Plan", "plan"]
