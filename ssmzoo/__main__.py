"""``python -m ssmzoo`` is the command ``ssmzoo``."""

from ssmzoo.cli import main

main()
