"""What the build decides: the architectures of the CUDA kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fiak_ext import build_info

ROOT = Path(__file__).resolve().parent.parent


def _program(folder: Path, name: str, text: str, status: int = 0) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\nprintf '{text}'\nexit {status}\n")
    path.chmod(0o755)
    return path


def _architectures(folder: Path, requested: str, listed: str | None, status: int = 0) -> str:
    """The choice, where nvcc knows sm_80, 90 and 120 and nvidia-smi, if it is there, prints ``listed``."""
    nvcc = _program(folder, "nvcc", "sm_80\\nsm_90\\nsm_120\\n")
    nvidia_smi = "" if listed is None else str(_program(folder, "nvidia-smi", listed, status))
    script = folder / "script.cmake"
    script.write_text(
        f"cmake_minimum_required(VERSION 3.24)\ninclude({ROOT}/cmake/cuda_architectures.cmake)\n"
        f'fiak_cuda_architectures(chosen "{requested}" "{nvcc}" "{nvidia_smi}")\nmessage("[${{chosen}}]")\n'
    )
    run = subprocess.run(["cmake", "-P", str(script)], capture_output=True, text=True)
    return run.stderr.strip().splitlines()[-1].strip("[]") if run.returncode == 0 else run.stderr


@pytest.mark.parametrize(
    ("requested", "listed", "chosen"),
    [
        ("", None, "80-real;80-virtual"),
        ("", "9.0\\n9.0\\n12.0\\n", "90-real;120-real"),
        ("", "7.5\\n", "80-real;80-virtual"),  # too old
        ("", "7.5\\n8.0\\n", "80-real"),
        ("", "13.0\\n", "80-virtual"),  # newer than nvcc
        ("", "N/A\\n", "80-real;80-virtual"),
        ("all", "9.0\\n", "80-real;86-real;89-real;90-real;100-real;120-real;80-virtual"),
        ("80-real;90", "12.0\\n", "80-real;90"),
    ],
)
def test_cuda_architectures(tmp_path: Path, requested: str, listed: str | None, chosen: str) -> None:
    assert _architectures(tmp_path, requested, listed) == chosen


def test_a_driver_that_does_not_answer_counts_as_no_gpu(tmp_path: Path) -> None:
    assert _architectures(tmp_path, "", "couldnt communicate with the driver 9.0", status=9) == "80-real;80-virtual"


@pytest.mark.parametrize("requested", ["75", "90;sm_80", "native"])
def test_malformed_cuda_architectures(tmp_path: Path, requested: str) -> None:
    error = _architectures(tmp_path, requested, None)
    assert "FIAK_CUDA_ARCHS must be empty, all, or architectures from 80 on" in error
    assert requested in error


def test_build_info_names_the_architectures() -> None:
    info = build_info()
    if info["cuda"] is None:
        assert "cuda_architectures" not in info
    else:
        assert all(name.split("-")[0].isdigit() for name in info["cuda_architectures"].split())
        assert info["cuda_architectures"]
