"""What the package has beside its layers; these themselves are in ``ssmzoo``."""
