"""The subcommands of ``ssmzoo``, one file each: ``command`` in it is a function that typer reads."""
