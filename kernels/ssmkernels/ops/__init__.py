"""The ops, one folder each: the reference, its fast implementations, their bindings and the spec that proves them."""
