"""Mixers, one file each. A file is imported when its mixer is first built; the registry finds it by its name."""
