"""Writes the README's tables anew, each by the command in its marker; ``--check`` only looks."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"(<!-- ssmzoo (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def printed(match: re.Match[str]) -> str:
    """A table between its markers, as its command prints it now."""
    command = [sys.executable, "-m", "ssmzoo", *match[2].split()]
    return match[1] + subprocess.run(command, capture_output=True, text=True, check=True).stdout + match[3]


def main() -> None:
    text = README.read_text()
    fresh, tables = TABLE.subn(printed, text)
    if "--check" not in sys.argv:
        README.write_text(fresh)
    elif fresh != text:
        sys.exit("the README's tables are out of date: make readme")
    print(f"{tables} tables")


if __name__ == "__main__":
    main()
