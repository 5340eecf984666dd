"""Mixers and models against the clock: beside their matrix products alone, and beside other people's."""
