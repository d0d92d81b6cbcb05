"""Tests the package with another torch than the development version: what ``make test-torch`` runs.

A virtual environment in ``build/test-torch`` gets that torch and what the tests need; the package is compiled for it,
with kernels that are already compiled, and installed. The tests run on the installed package, away from the sources.
With ``--wheel`` that wheel is installed instead, and the tests find no program but those of the environment, so no
compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent

# Ops, whose tests need no compiler; modules, what they keep, what is done with them; models of other libraries.
OPS = "ops prior_attention csr_attention csr_plan compact compaction pattern"
TESTS = (
    f"{OPS} packing modules state models flops compile pruning calibration "
    "convert convert_examples convert_saving convert_timm convert_training convert_transformers"
)

HEAD = """Written by `make test-torch RESULTS=benchmarks/results/versions.md`, a row for each run: versions of torch,
Python, transformers, timm and nvcc, and how many tests passed. Other versions are not tested.

"""
COLUMNS = ("torch", "Python", "transformers", "timm", "CUDA kernels", "passed", "failed", "skipped", "tests")

INSTALLED = """
import importlib.metadata, json, platform, torch, fiak_ext
info = fiak_ext.build_info()
print(json.dumps({
    "torch": torch.__version__, "Python": platform.python_version(), "CUDA kernels": info["cuda"] or "no",
    "transformers": importlib.metadata.version("transformers"), "timm": importlib.metadata.version("timm"),
    "fiak_ext": fiak_ext.__file__}))
"""

# PyPI's torchvision is compiled for PyPI's torch, with CUDA: beside a CPU build of torch its library does not load, and
# what is written in Python, all that timm takes of it, is not imported for want of these ops' schemas.
TORCHVISION = """import torch
for _name in {names}:
    torch.library.define(_name, "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
"""


def install(python: Path, libraries: list[str], package: list[str], cmake: str) -> None:
    """The libraries, what runs the tests, and the package, which is what pip takes to install it."""
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    libraries = [*libraries, "torchvision", "safetensors", "numpy", "pytest", "pytest-xdist"]
    subprocess.run([*pip, "--quiet", *libraries], check=True)
    for stale in SOURCE.glob("build/lib.*"):
        shutil.rmtree(stale)
    subprocess.run(
        [*pip, "--force-reinstall", "--no-deps", *package], check=True, env={**os.environ, "CMAKE_ARGS": cmake}
    )
    imported = subprocess.run([python, "-c", "import torchvision"], capture_output=True, text=True)
    if re.search(r"operator torchvision::\w+ does not exist", imported.stderr):
        (package_folder,) = python.parent.parent.glob("lib/python*/site-packages/torchvision")
        names = re.findall(
            r'register_fake\("(torchvision::\w+)"\)', (package_folder / "_meta_registrations.py").read_text()
        )
        extension = package_folder / "extension.py"
        extension.write_text(TORCHVISION.format(names=names) + extension.read_text())


def copy_tests(folder: Path) -> None:
    """What the tests read, where no ``fiak_ext`` is that could be taken for the installed one."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("python_tests", "benchmarks"):
        shutil.copytree(SOURCE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(SOURCE / name, folder)


def count(report: Path) -> tuple[Counter[str], dict[str, float]]:
    """How many tests passed, failed and were skipped, and the seconds of each file."""
    outcomes, seconds = Counter[str](), defaultdict[str, float](float)
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        outcomes[next((outcome[child.tag] for child in case if child.tag in outcome), "passed")] += 1
        name = case.attrib["classname"] or case.attrib["name"]  # the latter where a file cannot be imported
        seconds[name.split(".")[1]] += float(case.attrib["time"])
    return outcomes, seconds


def write_row(path: Path, row: dict[str, str]) -> None:
    """Puts a row into the table, in the place of the one of the same versions and tests."""
    outcome = ("passed", "failed", "skipped")
    rows = []
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.startswith("| ")][1:]
        rows = [dict(zip(COLUMNS, line.strip("| ").split(" | "), strict=True)) for line in lines]
    rows = [old for old in rows if any(old[name] != row[name] for name in COLUMNS if name not in outcome)]
    rows.append(row)
    rows.sort(key=lambda row: [[int(n) for n in re.findall(r"\d+", row[name])] for name in COLUMNS[:4]])
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, *([row[c] for c in COLUMNS] for row in rows))]
    lines.insert(1, "|---" * len(COLUMNS) + "|")
    path.write_text(HEAD + "\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="its version")
    parser.add_argument("--transformers", default="", help="its version; the newest for this torch if not given")
    parser.add_argument("--timm", default="", help="its version; the newest for this torch if not given")
    installed_from = parser.add_mutually_exclusive_group(required=True)
    installed_from.add_argument("--kernels", type=Path, help="build folder with the compiled kernels")
    installed_from.add_argument("--wheel", type=Path, help="what is installed; then only ops are tested by default")
    parser.add_argument("--tests", help="names of test files, without test_ and .py")
    parser.add_argument("--jobs", default="1", help="processes that run tests")
    parser.add_argument("--results", type=Path, help="file with the table that gets a row")
    options = parser.parse_args()

    folder = SOURCE / "build" / "test-torch" / (options.torch + ("-wheel" if options.wheel else ""))
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "venv" / "bin" / "python"
    versions = {"torch": options.torch, "transformers": options.transformers, "timm": options.timm}
    libraries = [f"{name}=={version}" if version else name for name, version in versions.items()]
    cmake, environment = os.environ.get("CMAKE_ARGS", ""), dict(os.environ)
    if options.wheel:
        libraries.append(str(options.wheel))  # so that pip checks that it fits this torch
        package, environment = [str(options.wheel)], {"PATH": str(python.parent)}
    else:
        libraries += ["setuptools>=77", "cmake>=3.24", "ninja", "pybind11>=3.0"]
        package = ["--no-build-isolation", "--quiet", str(SOURCE)]
        cmake = f"-DFIAK_KERNELS={options.kernels.resolve()} {cmake}"
    install(python, libraries, package, cmake)
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait leave the cores to the other processes
    tests = folder / "tests"
    copy_tests(tests)
    command = [python, "-c", INSTALLED]
    installed = subprocess.run(command, cwd=tests, env=environment, check=True, capture_output=True, text=True)
    row: dict[str, str] = json.loads(installed.stdout)
    if not Path(row["fiak_ext"]).is_relative_to(folder / "venv"):
        raise SystemExit(f"the tests would run on {row['fiak_ext']}, not on the installed package")
    print("testing", ", ".join(f"{name} {row[name]}" for name in COLUMNS[:5]), flush=True)

    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    names = options.tests or (OPS if options.wheel else TESTS)
    files = [f"python_tests/test_{name}.py" for name in names.split()]
    arguments = ["-q", f"--numprocesses={options.jobs}", f"--junitxml={report}", *files]
    status = subprocess.run([python, "-m", "pytest", *arguments], cwd=tests, env=environment).returncode
    outcomes, seconds = count(report)
    row.update({name: str(outcomes[name]) for name in ("passed", "failed", "skipped")})
    row["tests"] = {TESTS: "all", OPS: "ops"}.get(names, names)
    print(
        "seconds", ", ".join(f"{name} {took:.0f}" for name, took in sorted(seconds.items(), key=lambda pair: -pair[1]))
    )
    print(", ".join(f"{name} {row[name]}" for name in COLUMNS))
    if options.results is not None:
        write_row(options.results, row)
    return status


if __name__ == "__main__":
    sys.exit(main())
