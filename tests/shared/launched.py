"""``ssmzoo`` as one of the processes that torchrun starts, with what it tells them; forks.py runs it.

Usage: launched.py RANK RANKS PORT ARGUMENTS...
"""

import os
import sys

rank, ranks, port, *arguments = sys.argv[1:]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks)
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
sys.argv[:] = ["ssmzoo", *arguments]

from ssmzoo.cli import main  # noqa: E402 (as the command comes upon its environment)

main()
