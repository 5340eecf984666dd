"""Formats on disk: published checkpoints, files of tensors, and checksums."""
