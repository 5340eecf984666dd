"""flash_attn's layers, where the package has them."""
