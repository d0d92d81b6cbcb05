"""The share of a GPU's roofline that the CUDA kernels can reach at most, from what they were counted to do; no GPU.

``python -m benchmarks.cuda_roofline`` runs the kernels' device code on the CPU (the tests CudaCounts of
build/release/fiak_tests, float16), scales what one batch element and head took to the paper's sizes, and writes
benchmarks/results/cuda_roofline.json and .md.

Counted: products on tensor cores, with all that tiles add to the sizes, and bytes of rows that are copied to shared
memory (cp.async) or loaded into registers (by entries). Derived: bytes of device memory, each operand once, as if the
L2 cache held what is read again; one exponential for each pair that is kept; the operations of csr_attention's kernels
by entries, which run in float32 without tensor cores, for all columns that their lanes have. The floor of a kernel is
the longer of its operands' bytes and its operations without padding, at the documented rates; the prediction is the
longest of the bytes, the operations, the exponentials and, by entries, the loads, as if the L1 caches held all rows and
everything overlapped perfectly. Indices, statistics and what is stored are not counted. Nothing here is a measurement,
and mma.sync, which the kernels use, is known not to reach the documented rate of tensor cores from the H100 on.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import to_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cuda_roofline.json"
TESTS = ROOT / "build" / "release" / "fiak_tests"
OPERATIONS_OF_PRODUCT = 2 * 16 * 8 * 16


@dataclass(frozen=True)
class Gpu:
    """Documented rates a second: NVIDIA's data sheets, operations in dense float16 on tensor cores and in float32
    without; a clock and multiprocessor: 16 exponentials, 128 bytes from the L1 cache."""

    bytes: float
    operations: float
    float32_operations: float
    clocks: float  # of all multiprocessors

    @property
    def exponentials(self) -> float:
        return 16 * self.clocks

    @property
    def loaded_bytes(self) -> float:
        return 128 * self.clocks


GPUS = {
    "A100 SXM 80 GB": Gpu(2.039e12, 312e12, 19.5e12, 108 * 1.41e9),
    "H100 SXM": Gpu(3.35e12, 989e12, 67e12, 132 * 1.83e9),
    "B200": Gpu(8.0e12, 2250e12, 75e12, 148 * 1.85e9),
}

# batch and heads that stand for a counted size
PAPER = {
    ("prior_attention", 48): (256, 4),  # DeiT-tiny, as the paper has it
    ("prior_attention", 64): (256, 3),  # DeiT-tiny of timm
    ("csr_attention", 48): (256, 4),  # the paper's, with the masks of a trained model that benchmarks/masks holds
    ("compact_linear", 192): (256, 3),  # 70% of its keys pruned
    ("compact_linear", 768): (256, 12),  # DeiT-base
}


@dataclass(frozen=True)
class Least:
    """What a kernel cannot do without."""

    bytes: float
    operations: float
    exponentials: float = 0


def parse(output: str) -> list[dict[str, Any]]:
    """The counts that the tests print."""
    return [json.loads(line) for line in re.findall(r"^COUNTS (.*)$", output, flags=re.MULTILINE)]


def least(row: Mapping[str, Any], batch: int, heads: int) -> Least:
    """Of a kernel, for so many elements and heads.

    Raises:
        ValueError: a kernel that this does not know.
    """
    kernel = row["kernel"]

    def known(names: Mapping[str, Any]) -> Any:
        for name, value in names.items():
            if name in kernel:
                return value
        raise ValueError(f"cuda_roofline: {kernel} has no formula")

    if row["op"] != "compact_linear":
        n, m, d = row["queries"], row["keys"], row["head_dim"]
        pairs = batch * heads * row.get("nnz", n * m)
        statistics = 4 * batch * heads * n
        # The prior; or a bit for each pair; or the rows' ends and an index for each pair that is kept
        if "entries" in kernel:
            prior = heads * (8 * n + 2 * row["nnz"])
        else:
            prior = heads * n * ((m + 63) // 64 * 8 if "nnz" in row else 4 * m)
        # Operands of n or m rows that are read or written, float32 numbers of a row, copies of the prior, products
        by_queries, by_keys, of_rows, priors, products = known(
            {
                "delta": (2, 0, 1, 0, 0),
                "grad_query": (3, 2, 2, 1, 3),
                "grad_key": (2, 3, 2, 1, 3),
                "grad_value": (2, 2, 1, 1, 2),
                "grad_prior": (2, 2, 2, 2, 2),
                "forward": (2, 2, 1, 1, 2),
            }
        )
        moved = 2 * batch * heads * d * (by_queries * n + by_keys * m) + of_rows * statistics + priors * prior
        return Least(moved, 2 * pairs * d * products, pairs if products else 0)
    rows, kept, features, d = row["rows"], row["kept"], row["in_features"], row["head_dim"]
    tokens, weight, grad = batch * rows * features, heads * d * features, batch * heads * kept * d
    read = batch * min(rows, heads * kept) * features
    operations = 2 * grad * features
    return known(
        {
            "forward": Least(2 * (read + weight + grad), operations),
            "grad_input": Least(2 * (grad + weight + tokens), operations),
            "grad_weight": Least(2 * (grad + read + weight), operations),
            "grad_bias": Least(2 * grad, 0),
        }
    )


def predict(row: Mapping[str, Any]) -> dict[str, Any]:
    """Executed against least, and by GPU the floor in microseconds and the share of it that is predicted."""
    size = row["in_features"] if row["op"] == "compact_linear" else row["head_dim"]
    batch, heads = PAPER[row["op"], size]
    needs = least(row, batch, heads)
    copies = batch * heads // (row["batch"] * row["heads"])  # of what was counted
    by_entries = "entries" in row["kernel"]
    if by_entries:
        lanes = int(row["kernel"].rsplit("_d", 1)[1].partition("_")[0])
        executed = needs.operations * lanes / row["head_dim"]
    else:
        executed = copies * row["products"] * OPERATIONS_OF_PRODUCT
    result = {**row, "batch": batch, "heads": heads, "least_bytes": needs.bytes, "least_operations": needs.operations}
    result.update({name: copies * row[name] for name in ("copied_bytes", "loaded_bytes")}, operations=executed, gpus={})
    del result["products"], result["blocks"]
    for name, gpu in GPUS.items():
        operations = gpu.float32_operations if by_entries else gpu.operations
        floor = max(needs.bytes / gpu.bytes, needs.operations / operations)
        times = {
            "bytes": needs.bytes / gpu.bytes,
            "operations": executed / operations,
            "exponentials": needs.exponentials / gpu.exponentials,
            "loads": result["loaded_bytes"] / gpu.loaded_bytes,
        }
        bound = max(times, key=lambda unit: times[unit])
        result["gpus"][name] = {"floor_us": 1e6 * floor, "share": floor / times[bound], "bound_by": bound}
    return result


def markdown(rows: list[dict[str, Any]]) -> str:
    """A row for each kernel and size."""
    lines = [
        "# What the CUDA kernels can reach at most",
        "",
        "Made by `python -m benchmarks.cuda_roofline` without a GPU: predictions, not measurements; its docstring says "
        "what is counted, what is derived and what is assumed. float16. For each GPU the floor in microseconds, the "
        "share of it that a perfect overlap of what is executed would reach, and what that is bound by.",
        "",
        "| kernel | sizes | operations, of the least | copied or loaded rows, of the least bytes | "
        + " | ".join(GPUS)
        + " |",
        "|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for row in rows:
        if row["op"] != "compact_linear":
            sizes = f"B{row['batch']} H{row['heads']} N{row['queries']} D{row['head_dim']}"
            if "nnz" in row:
                sizes += f", {100 * row['nnz'] / (row['queries'] * row['keys']):.0f}% kept"
        else:
            sizes = f"B{row['batch']} H{row['heads']} M{row['rows']} K{row['kept']} Dx{row['in_features']}"
        more = f"{row['operations'] / row['least_operations']:.2f}" if row["least_operations"] else "-"
        cells = [
            f"`{row['kernel']}`",
            sizes,
            more,
            f"{(row['copied_bytes'] + row['loaded_bytes']) / row['least_bytes']:.2f}",
        ]
        cells += [
            f"{gpu['floor_us']:.1f}, {100 * gpu['share']:.0f}%, {gpu['bound_by']}" for gpu in row["gpus"].values()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    command = [str(TESTS), "--gtest_filter=CudaCounts.*"]
    rows = [predict(row) for row in parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)]
    RESULTS.write_text(to_json(rows))
    RESULTS.with_suffix(".md").write_text(markdown(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
