"""What words of a command line mean."""

from __future__ import annotations

import argparse
import re


def counted(word: str) -> int:
    """A number of things, for :mod:`argparse`.

    Raises:
        argparse.ArgumentTypeError: it is none from 1 to 999999999.
    """
    if re.fullmatch("[1-9][0-9]{0,8}", word) is None:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 999999999; got {word!r:.80}")
    return int(word)
