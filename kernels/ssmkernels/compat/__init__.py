"""Our functions under the names, signatures and layouts of other packages: code written for them changes one import.

``ssmkernels.compat.mamba_ssm`` stands for mamba_ssm, ``ssmkernels.compat.causal_conv1d`` for causal_conv1d. Neither
needs the package that it stands for.
"""
