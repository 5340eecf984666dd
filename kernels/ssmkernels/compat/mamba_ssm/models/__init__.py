"""mamba_ssm's models, where the package has them."""
