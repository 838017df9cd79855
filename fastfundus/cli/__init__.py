"""The command line: one group, with one module per command. Heavy packages are imported only when a command runs.

Results go to stdout, progress and notes to stderr. Exit codes: 0 for success, 1 for failure or incomplete results, and
2 for wrong usage.
"""

from __future__ import annotations

import errno
import signal
import sys
import threading
from typing import Any

import click

from fastfundus import __version__
from fastfundus.cli.audit import audit
from fastfundus.cli.bench import bench
from fastfundus.cli.build_engine import build_engine
from fastfundus.cli.cache import cache
from fastfundus.cli.console import printable
from fastfundus.cli.convert import convert
from fastfundus.cli.demo import demo
from fastfundus.cli.doctor import doctor
from fastfundus.cli.evaluate import evaluate
from fastfundus.cli.explain import explain
from fastfundus.cli.export_triton import export_triton
from fastfundus.cli.prepare import prepare
from fastfundus.cli.screen import screen
from fastfundus.cli.serve import serve
from fastfundus.cli.sign import sign
from fastfundus.cli.study import study
from fastfundus.cli.synthesize import synthesize
from fastfundus.cli.train import train
from fastfundus.errors import FastFundusError

__all__ = ["main"]


class _Group(click.Group):
    """Reports FastFundus errors on one line with exit code 1; a traceback indicates a bug."""

    def invoke(self, ctx: click.Context) -> Any:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # Ends like any other exit, so that temporary files are removed. Some commands set handlers of their own.
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            if type(error) is not click.ClickException:
                raise
            raise click.ClickException(printable(error.message)) from error
        except FastFundusError as error:
            raise click.ClickException(printable(str(error))) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            # Without a path, it is the terminal, or whatever stands in for it.
            text = f"{error.filename or 'standard output'}: {error.strerror or error}; check the path, its permissions "
            text += "and the free space"
            raise click.ClickException(printable(text)) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        # In order of use, not alphabetically.
        return list(self.commands)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="fastfundus")
def main() -> None:
    """Prepare retinal photographs, train models on them, and screen photos with inference engines.

    For research use only: not a medical device.
    """


def _keep_examples(command: click.Command) -> None:
    """Insert the control character that makes click keep line breaks; the raw docstrings only spell it out."""
    command.help = (command.help or "").replace("\\b\n", "\b\n")
    for part in getattr(command, "commands", {}).values():
        _keep_examples(part)


for command in (
    demo,
    prepare,
    cache,
    train,
    convert,
    evaluate,
    explain,
    study,
    build_engine,
    sign,
    screen,
    audit,
    serve,
    export_triton,
    bench,
    doctor,
    synthesize,
):
    main.add_command(command)
_keep_examples(main)
