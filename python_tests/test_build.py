"""What the build decides: torch, its folder, the architectures of the CUDA kernels; what wheels and the sdist hold."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
from packaging.version import Version

from fiak_ext import build_info
from tools import test_torch
from tools.wheel import label, label_metadata

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


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, and the distribution that pyproject.toml describes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    names = runpy.run_path("setup.py")
    distribution = setuptools.Distribution()
    distribution.parse_config_files()
    return {**names, "distribution": distribution}


def test_without_torch_the_build_names_the_commands(
    monkeypatch: pytest.MonkeyPatch, setup_script: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    command = setup_script["CheckedMetadata"](setup_script["distribution"])
    with pytest.raises(SystemExit, match=r"without --no-build-isolation") as stopped:
        command.run()
    assert re.search(r" -m pip install 'torch\S+' .*\n .* -m pip install --no-build-isolation \.", str(stopped.value))


@pytest.mark.parametrize("version", ["1.13.0", "2.7.1", "2.16.0", "2.16.0a0+git123", "3.8.0"])
def test_a_torch_outside_the_range_is_refused(
    version: str, monkeypatch: pytest.MonkeyPatch, setup_script: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
    with pytest.raises(SystemExit, match=rf"must be torch\S+ \(got {re.escape(version)}\)"):
        setup_script["installed_torch"](setup_script["distribution"])


@pytest.mark.parametrize("version", ["2.8.0", "2.11.0+cu130", "2.15.3"])
def test_a_build_folder_belongs_to_one_python_and_torch(
    version: str, monkeypatch: pytest.MonkeyPatch, setup_script: dict[str, Any]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setenv("CMAKE_ARGS", "-DFIAK_CUDA=off")
    build = setup_script["CMakeBuild"](setup_script["distribution"])
    build.inplace = True
    build.run()
    folder = str(ROOT / "build" / f"cpython-{sys.version_info[0]}{sys.version_info[1]}-torch-{version}")
    assert [command[0] for command in commands] == ["cmake"] * 3
    assert all(folder in command for command in commands)
    assert commands[0].index("-U") < commands[0].index("-DFIAK_CUDA=off")  # options of earlier builds go first


def test_kernels_that_are_not_there(tmp_path: Path) -> None:
    command = ["cmake", "-S", str(ROOT), "-B", str(tmp_path / "build"), f"-DFIAK_KERNELS={tmp_path}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert f"FIAK_KERNELS must be a build folder that holds libfiak_kernels.a (got {tmp_path})" in " ".join(
        run.stderr.split()
    )


@pytest.mark.parametrize(
    ("torch_version", "cuda", "expected"),
    [
        ("2.14.1+cu130", "13.0", "pt214cu130"),
        ("2.14.1+cu130", None, "pt214cpu"),
        ("2.13.0+cpu", None, "pt213cpu"),
        ("2.8.0", "12.8", "pt28cu128"),
    ],
)
def test_label_of_a_wheel(torch_version: str, cuda: str | None, expected: str) -> None:
    assert label(torch_version, cuda) == expected
    assert str(Version(f"0.1.0+{expected}")) == f"0.1.0+{expected}"


def test_a_wheel_depends_on_the_torch_that_it_was_built_with() -> None:
    text = "Name: fiak-ext\nVersion: 0.1.0\nRequires-Dist: torch<2.16,>=2.8\nRequires-Dist: numpy\n\nVersion\n"
    labelled = label_metadata(text, "pt213cpu", "2.13.0+cpu")
    assert labelled == text.replace("0.1.0", "0.1.0+pt213cpu").replace("torch<2.16,>=2.8", "torch==2.13.0")
    with pytest.raises(ValueError, match=r"text must hold one line of the form .*torch.* \(got 0\)"):
        label_metadata("Version: 0.1.0\n", "pt213cpu", "2.13.0+cpu")


def test_the_sdist_holds_what_the_build_reads(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = [ROOT / name for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")]
    for folder, pattern in (("cmake", "*"), ("csrc/kernels", "**/*.*"), ("csrc/torch", "*"), ("fiak_ext", "**/*.py*")):
        sources += [path for path in (ROOT / folder).glob(pattern) if "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in sources} - names == set()
    assert [name for name in names if name.endswith((".so", ".pyc"))] == []


def test_results_of_other_versions_of_torch(tmp_path: Path) -> None:
    report, table = tmp_path / "report.xml", tmp_path / "versions.md"
    case = '<testcase classname="python_tests.test_x.Class" time="1.5">'
    report.write_text(
        f"<testsuites><testsuite>{case}</testcase>{case}<failure/></testcase>{case}<error/></testcase>"
        f'{case}<skipped/></testcase><testcase classname="" name="python_tests.test_y" time="0.5"><error/></testcase>'
        "</testsuite></testsuites>"
    )
    outcomes, seconds = test_torch.count(report)
    assert outcomes == {"passed": 1, "failed": 3, "skipped": 1}
    assert seconds == {"test_x": 6.0, "test_y": 0.5}

    row = {**dict.fromkeys(test_torch.COLUMNS, "1"), "torch": "2.13.0+cpu"}
    test_torch.write_row(table, row)
    test_torch.write_row(table, {**row, "torch": "2.8.0"})
    test_torch.write_row(table, {**row, "passed": "7"})  # takes the place of the first
    lines = [line.split(" | ") for line in table.read_text().splitlines() if line.startswith("| 2.")]
    assert [(cells[0], cells[5]) for cells in lines] == [("| 2.8.0", "1"), ("| 2.13.0+cpu", "7")]
