"""What the user can put right, as one line."""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["CommandError", "first_line", "require"]


class CommandError(Exception):
    """What the user can put right; the message is one line."""


def require(name: str, user: str) -> Any:
    """The module of a name, which ``user`` needs.

    Raises:
        CommandError: a package that is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise CommandError(f"{user} needs {package}: pip install {package}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
