"""mamba_ssm's functions, where the package has them."""
