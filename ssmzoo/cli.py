"""The command line.

An error is one line on standard error and exit status 1; with ``SSMZOO_DEBUG=1`` it is a traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated

import typer

from ssmzoo.commands import (
    bench,
    convert,
    distill,
    env,
    export,
    generate,
    info,
    plan,
    quantize,
    serve,
    tokenize,
    train,
    verify,
)
from ssmzoo.commands import list as list_
from ssmzoo.files import too_long
from ssmzoo.screen import say

app = typer.Typer(
    name="ssmzoo",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list")(list_.command)
app.command("info")(info.command)
app.command("plan")(plan.command)
app.command("tokenize")(tokenize.command)
app.command("train")(train.command)
app.command("distill")(distill.command)
app.command("generate")(generate.command)
app.command("serve")(serve.command)
app.command("convert")(convert.command)
app.command("export")(export.command)
app.command("quantize")(quantize.command)
app.command("verify")(verify.command)
app.command("bench")(bench.command)
app.command("env")(env.command)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        print(f"ssmzoo {version('ssmzoo')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _ssmzoo(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sequence models for PyTorch: state-space models, attention, recurrent networks and their hybrids.

    Start with `ssmzoo list`, then `ssmzoo train mamba-hybrid-tiny`: it needs no data of yours and no GPU.
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Runs the command line and exits."""
    if sys.stdout is None:  # closed from the start, as by `ssmzoo ... >&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        status = app(prog_name="ssmzoo", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `ssmzoo list | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if os.environ.get("SSMZOO_DEBUG", "0") not in ("", "0"):
            raise
        say(f"error: {_message(error)}", sys.stderr)
        status = 1
    sys.exit(status)


def _message(error: Exception) -> str:
    """One line: the message of an error meant for the user, and the kind of one that is not."""
    if hasattr(error, "format_message"):  # typer's own, about the command line
        context = getattr(error, "ctx", None)
        hint = f". Try: {context.command_path} --help" if context is not None else ""
        said = " ".join(error.format_message().split())
        return said + hint.removeprefix(".") if said.endswith("?") else said.rstrip(".") + hint
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG and error.filename is not None:
        return too_long(error.filename)
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (SSMZOO_DEBUG=1 shows where)"
