"""Builds the compiled library with CMake, which alone knows sources, flags and options.

``CMAKE_ARGS`` in the environment is passed on, for example ``CMAKE_ARGS=-DFIAK_CUDA=off``.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCE = Path(__file__).resolve().parent
BUILD = SOURCE / "build" / "release"


class CMakeBuild(build_ext):
    """Builds the CMake target ``python`` and installs it beside the package's Python files."""

    def run(self) -> None:
        prefix = SOURCE if self.inplace else Path(self.build_lib).resolve()
        # cmake and ninja may come from the environment of this interpreter without that being activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        configure = ["-S", str(SOURCE), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        for arguments in (
            configure + shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ["--build", str(BUILD), "--target", "python"],
            ["--install", str(BUILD), "--component", "python", "--prefix", str(prefix)],
        ):
            subprocess.run(["cmake", *arguments], check=True, env={**os.environ, "PATH": path})

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension without sources tells setuptools that the wheel is for this platform and Python.
setup(ext_modules=[Extension("fiak_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
