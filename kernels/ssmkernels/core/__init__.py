"""What every op is built from: declaration and dispatch, validation, autograd, packing, and support for kernels."""
