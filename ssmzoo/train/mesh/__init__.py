"""Training over a mesh of processes: copies, shards of the weights, parts of the sequences, shares of the layers."""

from ssmzoo.train.mesh.engine import Engine
from ssmzoo.train.mesh.trainer import MeshTrainer

__all__ = ["Engine", "MeshTrainer"]
