"""Our functions under the names, signatures and layouts of other packages: code written for them changes one import.

``ssmkernels.compat.mamba_ssm`` stands for mamba_ssm; ``causal_conv1d``, ``flash_attn`` and ``fla`` likewise. None needs
the package that it stands for. :func:`install` lets ``import mamba_ssm`` find ours where the package is missing.
"""

from ssmkernels.compat.installing import Installed, install

__all__ = ["Installed", "install"]
