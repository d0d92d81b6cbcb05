"""What nvcc made of the CUDA kernels: no spills, no more registers than committed, the instructions that were meant."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Iterator

import pytest

from benchmarks import cuda_resources
from fiak_ext import build_info

# Which instructions a kernel must have: the part of its name -> SASS.
TENSOR_CORES = (r"\bHMMA\.16816\.F32", r"\bLDSM\.16\.M", r"\bLDGSTS\.E\.BYPASS\.128")
MEANT = {
    r"compact_(rows|expand)_u128": (r"\bLDG\.E\.128", r"\bSTG\.E\.128"),
    r"compact_linear_(forward|grad_input|grad_weight)_b?f16": TENSOR_CORES,
    r"compact_linear_(forward|grad_input|grad_weight)_f32": (r"\bFFMA\b", r"\bLDGSTS\.E\.BYPASS\.128"),
    r"(prior|csr_tiles)_(forward|grad_query|grad_key|grad_value|grad_prior)_b?f16_": TENSOR_CORES,
    r"csr_entries_(forward|grad_query|grad_key|grad_value|grad_prior)_": (r"\bLDG\.E\.128",),
}


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    if build_info()["cuda"] is None:
        pytest.skip("built without CUDA kernels")
    program = cuda_resources.find_cuobjdump()
    if program is None:
        pytest.skip("cuobjdump is neither in PATH nor in Triton's wheel")
    return program


@pytest.fixture(scope="module")
def report(cuobjdump: str) -> dict:
    if not cuda_resources.KERNELS.exists():
        pytest.skip("fiak_cuda_kernels is not built: cmake --build build/release")
    return cuda_resources.measure(cuda_resources.LIBRARY, cuda_resources.KERNELS, cuobjdump)


def test_nothing_is_worse_than_committed(report: dict) -> None:
    assert report["architectures"]
    assert cuda_resources.regressions(report, json.loads(cuda_resources.RESULTS.read_text())) == []


def test_the_committed_table_has_every_architecture_and_no_spills() -> None:
    committed = json.loads(cuda_resources.RESULTS.read_text())
    assert cuda_resources.markdown(committed) == cuda_resources.RESULTS.with_suffix(".md").read_text()
    assert list(committed["architectures"]) == list(cuda_resources.LIMITS)
    for architecture, kernels in committed["architectures"].items():
        assert [name for name, kernel in kernels.items() if kernel["local"] > 0] == [], architecture
        assert [name for name, kernel in kernels.items() if kernel["warps"] == 0] == [], architecture
        assert set(kernels) == set(committed["architectures"]["sm_80"]), architecture


def _functions(sass: str) -> Iterator[tuple[str, str]]:
    parts = re.split(r"^\s*Function : (\w+)$", sass, flags=re.MULTILINE)
    return zip(parts[1::2], parts[2::2], strict=True)


def test_instructions_that_were_meant_are_there(cuobjdump: str, report: dict) -> None:
    architecture = next(iter(report["architectures"]))
    command = [cuobjdump, "-sass", "-arch", architecture, str(cuda_resources.LIBRARY)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    checked = 0
    for name, code in _functions(sass):
        for pattern, instructions in MEANT.items():
            if name.startswith("fiak_") and re.search(pattern, name):
                checked += 1
                missing = [x for x in instructions if not re.search(x, code)]
                assert not missing, f"{name} on {architecture} lacks {missing}"
    assert checked >= 11 + 54 + 90


def _entries(ptx: str) -> dict[str, dict[str, int]]:
    """What kernels PTX has: threads of a block, and the bytes of the one parameter."""
    entry = r"\.entry (\w+)\(\s*\.param \.align 8 \.b8 \w+\[(\d+)\]\s*\)\s*\.maxntid (\d+), 1, 1"
    return {name: {"threads": int(threads), "parameters": int(size)} for name, size, threads in re.findall(entry, ptx)}


def test_kernels_can_be_launched_from_their_ptx(cuobjdump: str) -> None:
    if not cuda_resources.KERNELS.exists():
        pytest.skip("fiak_cuda_kernels is not built: cmake --build build/release")
    if "virtual" not in build_info()["cuda_architectures"]:
        pytest.skip("built without PTX")
    launched = cuda_resources.launched_kernels()
    command = [cuobjdump, "--dump-ptx", str(cuda_resources.LIBRARY)]
    ptx = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(re.findall(r"\.entry ", ptx)) == len(launched)
    assert _entries(ptx) == {
        name: {"threads": kernel["threads"], "parameters": kernel["parameters"]} for name, kernel in launched.items()
    }


def test_regressions_are_named(report: dict) -> None:
    architecture = next(iter(report["architectures"]))
    name, other = list(report["architectures"][architecture])[:2]
    worse = copy.deepcopy(report)
    kernel = worse["architectures"][architecture][name]
    kernel.update(registers=kernel["registers"] + 1, warps=kernel["warps"] - 1, local=8)
    where = f"{name} on {architecture}"
    registers, warps = kernel["registers"], kernel["warps"]
    assert cuda_resources.regressions(worse, report) == [
        f"{where}: 8 bytes of local memory",
        f"{where}: {registers} registers, {registers - 1} before",
        f"{where}: {warps} warps resident, {warps + 1} before",
    ]
    assert cuda_resources.regressions(worse, {**report, "nvcc": "0"}) == [f"{where}: 8 bytes of local memory"]
    less = copy.deepcopy(report)
    del less["architectures"][architecture][other]
    assert cuda_resources.regressions(report, less) == [f"{other} on {architecture}: not in the committed table"]


def test_kernels_that_are_not_listed_are_refused() -> None:
    usage = {"sm_80": {"fiak_a": {"registers": 32, "local": 0, "static_shared": 0}}}
    with pytest.raises(ValueError, match="listed kernels of sm_80 differ: fiak_a, fiak_b"):
        cuda_resources.resources(usage, {"fiak_b": {"threads": 32, "dynamic_shared": 0}})


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 128, 32, 0, 16),  # by warps: 64
        ("sm_80", 32, 32, 0, 32),  # by blocks
        ("sm_80", 128, 255, 0, 2),  # by registers: 2 warps of 8192 fit a scheduler's 16384
        ("sm_80", 128, 100, 0, 4),  # 104 registers are taken: 4 warps a scheduler
        ("sm_80", 128, 32, 40960, 4),  # 164 KiB / (40 + 1) KiB
        ("sm_90", 128, 32, 40960, 5),
        ("sm_120", 256, 32, 101376, 1),  # 99 KiB, all that a block may have
    ],
)
def test_resident_blocks(architecture: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert cuda_resources.LIMITS[architecture].resident_blocks(threads, registers, shared) == blocks
