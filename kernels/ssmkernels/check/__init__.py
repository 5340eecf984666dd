"""The proof: any implementation of an op against its float64 reference, and in every way that it can be called."""
