"""mamba_ssm's helpers, where the package has them."""
