"""ssmzoo beside other libraries: one module for each, imported by whoever uses it."""
