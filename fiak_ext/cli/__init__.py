"""The command line, ``fiak`` or ``python -m fiak_ext``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fiak_ext.cli import commands
from fiak_ext.cli.errors import CommandError
from fiak_ext.cli.parser import build_parser
from fiak_ext.demo.data import DataError

__all__ = ["main"]

_COMMANDS = {"prune": commands.prune, "flops": commands.flops, "bench": commands.bench, "demo": commands.demo}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program; by default the process's own.

    Returns:
        The exit status: 0; 2 after an error, with one line on stderr; 130 when interrupted.

    Raises:
        SystemExit: after ``--help`` (0), or with a command line that is wrong (2).
    """
    options = build_parser().parse_args(arguments)
    try:
        _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print(f"fiak {options.command}: interrupted", file=sys.stderr)
        return 130
    except (CommandError, DataError, OSError) as error:  # all others are bugs, and have their traceback
        print(f"fiak {options.command}: {error}", file=sys.stderr)
        return 2
    return 0
