"""Single tokens, where the package has them."""

from ssmkernels.compat.mamba_ssm import selective_state_update, selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]
