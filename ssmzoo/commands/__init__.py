"""The subcommands of ``ssmzoo``, one file each; every file defines ``command``, a function that typer reads."""
