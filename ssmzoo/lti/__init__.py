"""Linear time-invariant systems: what S4 and S4D share."""
