"""Loads the compiled library, or says why it cannot be loaded and which command mends that."""

import importlib
import sys
from pathlib import Path

import torch

__all__ = ["load_library"]


def _remedy() -> str:
    source = Path(__file__).parent.parent
    if not (source / "CMakeLists.txt").exists():
        return f"{sys.executable} -m pip install --no-build-isolation --no-deps --force-reinstall SOURCE_FOLDER_OF_FIAK"
    if Path(sys.prefix) == source / ".venv":
        return f"make -C {source} build"
    return f"{sys.executable} -m pip install --no-build-isolation --no-deps --editable {source}"


def load_library() -> None:
    """Registers ``torch.ops.fiak``.

    Raises:
        ImportError: the library is missing, was built for another Python or another torch, or does not load; the
            message ends with the command that mends it.
    """
    try:
        info = importlib.import_module("fiak_ext._C").build_info()
    except ImportError as error:
        raise ImportError(
            f"fiak_ext: the compiled library is missing or was built for another Python ({error}). "
            f"Build it: {_remedy()}"
        ) from error
    if info["torch"] != str(torch.__version__):
        raise ImportError(
            f"fiak_ext: the compiled library was built for torch {info['torch']}, and torch {torch.__version__} is "
            f"installed. Build it again: {_remedy()}"
        )
    try:
        torch.ops.load_library(Path(__file__).with_name("libfiak.so"))
    except OSError as error:
        raise ImportError(
            f"fiak_ext: the compiled library does not load ({error.__cause__ or error}). Build it again: {_remedy()}"
        ) from error
