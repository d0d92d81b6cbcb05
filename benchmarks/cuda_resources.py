"""Registers, spills, shared memory and occupancy of every CUDA kernel, from what the compiler made; needs no GPU.

``python -m benchmarks.cuda_resources`` writes benchmarks/results/cuda_resources.json and .md for the architectures that
the library is compiled for, which should be FIAK_CUDA_ARCHS=all. ``--check`` compares with them those that the library
has: a kernel that spills, or that takes more registers or leaves fewer warps to a multiprocessor than it did, is an
error. Registers come from the library by cuobjdump, which CUDA toolkits and Triton's wheel have; threads and dynamic
shared memory from build/release/fiak_cuda_kernels, which prints the list that launches the kernels.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import to_json
from fiak_ext import build_info

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cuda_resources.json"
LIBRARY = ROOT / "fiak_ext" / "libfiak.so"
KERNELS = ROOT / "build" / "release" / "fiak_cuda_kernels"


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".

    All have 65536 registers, given to warps in units of 256, a quarter of them to each of four schedulers. Shared
    memory comes in units of 128 bytes; every block takes 1 KiB for the system.
    """

    warps: int
    blocks: int
    shared_kib: int

    def resident_blocks(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = -(-threads // 32)
        registers_of_warp = -(-registers * 32 // 256) * 256
        shared = -(-(shared_bytes + 1024) // 128) * 128
        by_registers = 65536 // 4 // max(registers_of_warp, 256) * 4 // warps
        return min(self.warps // warps, self.blocks, by_registers, self.shared_kib * 1024 // shared)


LIMITS = {
    "sm_80": Limits(warps=64, blocks=32, shared_kib=164),
    "sm_86": Limits(warps=48, blocks=16, shared_kib=100),
    "sm_89": Limits(warps=48, blocks=24, shared_kib=100),
    "sm_90": Limits(warps=64, blocks=32, shared_kib=228),
    "sm_100": Limits(warps=64, blocks=32, shared_kib=228),
    "sm_120": Limits(warps=48, blocks=24, shared_kib=100),
}


def find_cuobjdump() -> str | None:
    """The toolkit's, or that in Triton's wheel."""
    triton = find_spec("triton")
    folder = [] if triton is None or triton.origin is None else [Path(triton.origin).parent / "backends/nvidia/bin"]
    for place in (None, "/usr/local/cuda/bin", *folder):
        if program := shutil.which("cuobjdump", path=None if place is None else str(place)):
            return program
    return None


def launched_kernels(program: Path = KERNELS) -> dict[str, dict[str, int]]:
    """Name -> threads of a block, and bytes of dynamic shared memory and of parameters."""
    kernels = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        name, *numbers = line.split()
        kernels[name] = dict(zip(("threads", "dynamic_shared", "parameters"), map(int, numbers), strict=True))
    return kernels


def parse_usage(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """cuobjdump's --dump-resource-usage as architecture -> kernel -> registers, local and static_shared (bytes)."""
    architectures: dict[str, dict[str, dict[str, int]]] = {}
    architecture = name = ""
    for line in text.splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            usage = {"registers": registers, "local": stack + local, "static_shared": shared}
            architectures.setdefault(architecture, {})[name] = usage
    return architectures


def number_of(architecture: str) -> int:
    """90 of sm_90."""
    return int(re.sub(r"\D", "", architecture))


def resources(
    usage: Mapping[str, Mapping[str, Mapping[str, int]]], launched: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, dict[str, int]]]:
    """Architecture -> kernel -> threads of a block, registers, bytes of shared and local memory, resident warps.

    Raises:
        ValueError: a kernel that is compiled but not listed, or listed but not compiled.
    """
    table: dict[str, dict[str, dict[str, int]]] = {}
    for architecture in sorted(usage, key=number_of):
        kernels = usage[architecture]
        if unknown := {name for name in kernels if name.startswith("fiak_")} ^ set(launched):
            raise ValueError(f"compiled and listed kernels of {architecture} differ: {', '.join(sorted(unknown))}")
        for name in sorted(launched):
            threads, registers = launched[name]["threads"], kernels[name]["registers"]
            shared = kernels[name]["static_shared"] + launched[name]["dynamic_shared"]
            # From sm_90 on, the 1 KiB that every block takes for the system is counted as static where a kernel uses
            # shared memory at all; resident_blocks adds it.
            if number_of(architecture) >= 90 and kernels[name]["static_shared"] >= 1024:
                shared -= 1024
            kernel = {"threads": threads, "shared": shared, "registers": registers, "local": kernels[name]["local"]}
            if architecture in LIMITS:
                kernel["warps"] = LIMITS[architecture].resident_blocks(threads, registers, shared) * -(-threads // 32)
            table.setdefault(architecture, {})[name] = kernel
    return table


def regressions(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """What is worse, in words. Another compiler's registers are not compared, but spills and launches that fail are."""
    found = []
    for architecture, kernels in now["architectures"].items():
        committed = before["architectures"].get(architecture)
        for name, kernel in kernels.items():
            where = f"{name} on {architecture}"
            if kernel["local"] > 0:
                found.append(f"{where}: {kernel['local']} bytes of local memory")
            if kernel.get("warps") == 0:
                found.append(f"{where}: no block fits a multiprocessor")
            if committed is None:
                continue  # an architecture that is built for one's own GPU
            if name not in committed:
                found.append(f"{where}: not in the committed table")
            elif now["nvcc"] == before["nvcc"]:
                old = committed[name]
                if kernel["registers"] > old["registers"]:
                    found.append(f"{where}: {kernel['registers']} registers, {old['registers']} before")
                if kernel.get("warps", 0) < old.get("warps", 0):
                    found.append(f"{where}: {kernel['warps']} warps resident, {old['warps']} before")
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """A table for each number, kernels by architectures."""
    architectures = report["architectures"]
    launched = next(iter(architectures.values()))
    spilling = [
        f"`{name}` on {architecture} ({kernel['local']} bytes)"
        for architecture, kernels in architectures.items()
        for name, kernel in kernels.items()
        if kernel["local"] > 0
    ]
    lines = [
        "# What the CUDA kernels take of a multiprocessor",
        "",
        f"Made by `python -m benchmarks.cuda_resources` from nvcc {report['nvcc']}'s output, without a GPU; the same "
        "figures are in cuda_resources.json. "
        f"Kernels that use local memory, that is, spill: {', '.join(spilling) or 'none'}. For each architecture: "
        "registers of a thread, and the share of the multiprocessor's warps that fit at a time.",
        "",
        "| kernel | threads | shared memory, bytes | " + " | ".join(architectures) + " |",
        "|---|---|---|" + "---|" * len(architectures),
    ]
    for name, kernel in launched.items():
        row = [f"`{name}`", str(kernel["threads"]), str(kernel["shared"])]
        for architecture, kernels in architectures.items():
            limits = LIMITS.get(architecture)
            share = f", {100 * kernels[name]['warps'] / limits.warps:.0f}%" if limits is not None else ""
            row.append(f"{kernels[name]['registers']}{share}")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def measure(library: Path, kernels: Path, cuobjdump: str) -> dict[str, Any]:
    """The report of a library."""
    command = [cuobjdump, "--dump-resource-usage", str(library)]
    usage = parse_usage(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {"nvcc": build_info()["cuda"], "architectures": resources(usage, launched_kernels(kernels))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed table; write nothing")
    parser.add_argument("--library", type=Path, default=LIBRARY, help="the library or archive with the kernels")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="the program that lists them")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("cuobjdump is neither in PATH nor in Triton's wheel")
    report = measure(arguments.library, arguments.kernels, cuobjdump)
    if not report["architectures"]:
        sys.exit(f"{arguments.library} holds no compiled kernels")
    if arguments.check:
        if found := regressions(report, json.loads(RESULTS.read_text())):
            sys.exit("\n".join(found))
        return
    RESULTS.write_text(to_json(report))
    RESULTS.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
