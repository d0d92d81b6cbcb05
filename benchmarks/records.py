"""JSON lines that a kill at any moment leaves whole, and that the next run goes on from.

A stage of gpu.sh has one file of lines in its output folder, and a copy in the build folder where the output folder is
another, since that may be emptied between runs. A line with a ``key`` is a result; it counts for the library that it
was taken with, so that nothing is repeated until the library is another; but what failed is, last, by the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["LEFT", "RESTART", "Records", "library_id", "read_lines"]

LEFT, RESTART = 75, 76
"""Exit statuses of a process that works: the time is over; what follows needs a new process, since this one's CUDA
context is broken."""

_VARIABLE = "FIAK_RECORDS"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without lines that were cut off; none where there is no file."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            read = json.loads(line)
        except ValueError:
            continue
        if isinstance(read, dict):
            lines.append(read)
    return lines


def library_id(package: Path) -> str:
    """Says whether two runs had the same package, compiled library and Python; empty without a library."""
    library = package / "libfiak.so"
    if not library.exists():
        return ""
    digest = hashlib.sha256()
    for path in [library, *sorted(package.rglob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Records:
    """The lines of one stage, for the process that leads it and for the one that works.

    Args:
        paths: the files that each hold all lines.
        library: see :func:`library_id`.
        state: a folder for what need not be kept: which keys there are to do, and which one is being done.
        prefix: of all keys.
        begin, end: of the run, in seconds since the epoch.
    """

    def __init__(
        self, paths: Sequence[Path], library: str, state: Path, begin: float, end: float, prefix: str = ""
    ) -> None:
        self.paths, self.library, self.state, self.prefix = list(paths), library, state, prefix
        self.begin, self.end = begin, end

    @classmethod
    def of_environment(cls) -> Records:
        """What the leading process passed on with :meth:`environment`."""
        given = json.loads(os.environ[_VARIABLE])
        paths = [Path(path) for path in given.pop("paths")]
        return cls(paths=paths, state=Path(given.pop("state")), **given)

    def environment(self) -> dict[str, str]:
        given = {**vars(self), "paths": [str(path) for path in self.paths], "state": str(self.state)}
        return {_VARIABLE: json.dumps(given)}

    def open(self) -> None:
        """Makes all files whole and the same: each gets the lines that only another has."""
        merged = list(dict.fromkeys(json.dumps(line) for path in self.paths for line in read_lines(path)))
        text = "".join(line + "\n" for line in merged)
        for path in self.paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text(errors="replace") != text:
                part = path.with_suffix(".part")
                part.write_text(text)
                part.replace(path)

    def results(self) -> dict[str, dict[str, Any]]:
        """The results of this library by key, with the prefix; of several the last."""
        lines = read_lines(self.paths[0])
        return {line["key"]: line for line in lines if "key" in line and line.get("library") == self.library}

    def done(self) -> dict[str, dict[str, Any]]:
        """The results that need not be taken again: failures of earlier runs do."""
        return {
            key: line
            for key, line in self.results().items()
            if line.get("status") != "failed" or line["time"] >= self.begin
        }

    def is_over(self) -> bool:
        return time.time() > self.end

    def plan(self, keys: Iterable[str]) -> list[str]:
        """Tells the leading process which keys there are; returns those to do, those that have failed last."""
        keys = list(keys)
        (self.state / "planned").write_text(json.dumps([self.prefix + key for key in keys]))
        done, results = self.done(), self.results()
        wanted = [key for key in keys if self.prefix + key not in done]
        return sorted(wanted, key=lambda key: self.prefix + key in results)

    def start(self, key: str) -> None:
        """Tells the leading process what is being done, whose fault it is if the process dies or hangs."""
        current = self.state / "current"
        current.with_suffix(".part").write_text(self.prefix + key)
        current.with_suffix(".part").replace(current)

    def add(self, *results: dict[str, Any]) -> None:
        """Appends results, each with a ``key``, all at once."""
        about = {"library": self.library, "time": time.time()}
        self.append(*({**result, "key": self.prefix + result["key"], **about} for result in results))

    def append(self, *lines: dict[str, Any]) -> None:
        """Appends lines as they are."""
        text = "".join(json.dumps(line) + "\n" for line in lines).encode()
        for path in self.paths:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(descriptor, text)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
