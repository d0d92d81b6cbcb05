"""Builds the compiled library with CMake, which alone knows sources, flags and options.

``CMAKE_ARGS`` in the environment is passed on, for example ``CMAKE_ARGS=-DFIAK_CUDA=off``. The library belongs to the
torch that it is built with, so that is the one of the environment to install into, never one that pip installs for the
build alone.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

SOURCE = Path(__file__).resolve().parent


def release(version: str) -> list[int]:
    """Major and minor."""
    return [int(part) for part in version.split(".")[:2]]


def installed_torch(distribution: Distribution) -> str:
    """The version of the torch to build with, which must be one that the package is made for."""
    (wanted,) = (name for name in distribution.install_requires if name.startswith("torch"))
    remedy = (
        f"Run:\n  {sys.executable} -m pip install '{wanted}' 'setuptools>=77' cmake ninja pybind11\n"
        f"  {sys.executable} -m pip install --no-build-isolation ."
    )
    try:
        import torch
    except ImportError:
        raise SystemExit(
            "fiak-ext is compiled for the torch that is installed, and none can be imported here: there is none, or "
            f"pip builds in isolation from it, as it does without --no-build-isolation. {remedy}"
        ) from None
    bounds = {sign: release(version) for sign, version in re.findall(r"(>=|<)([\d.]+)", wanted)}
    if not bounds[">="] <= release(torch.__version__) < bounds["<"]:
        raise SystemExit(f"fiak-ext: the installed torch must be {wanted} (got {torch.__version__}). {remedy}")
    return str(torch.__version__)


class CheckedMetadata(dist_info):
    """Stops a build without torch before pip downloads all that the package depends on."""

    def run(self) -> None:
        installed_torch(self.distribution)
        super().run()


class CMakeBuild(build_ext):
    """Builds the CMake target ``python`` and installs it beside the package's Python files."""

    def run(self) -> None:
        prefix = SOURCE if self.inplace else Path(self.build_lib).resolve()
        torch = installed_torch(self.distribution)
        build = SOURCE / "build" / f"{sys.implementation.cache_tag}-torch-{torch}"
        # cmake and ninja may come from the environment of this interpreter without that being activated.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        # No option stays that only an earlier build was given.
        configure = ["-S", str(SOURCE), "-B", str(build), "-G", "Ninja", "-U", "FIAK_*"]
        configure.append(f"-DPython_EXECUTABLE={sys.executable}")
        for arguments in (
            configure + shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ["--build", str(build), "--target", "python"],
            ["--install", str(build), "--component", "python", "--prefix", str(prefix)],
        ):
            subprocess.run(["cmake", *arguments], check=True, env={**os.environ, "PATH": path})

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


# The extension without sources tells setuptools that the wheel is for this platform and Python.
setup(
    ext_modules=[Extension("fiak_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "dist_info": CheckedMetadata},
)
