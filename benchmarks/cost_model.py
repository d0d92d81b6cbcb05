"""Measures and fits the constants of csrc/kernels/cpu/choose/cost_model.cpp, which picks ``csr_attention``'s kernels.

``python -m benchmarks.cost_model --json avx512.json`` times all kernels, forced by ``FIAK_CSR_KERNEL``, over the case
table's uniform masks and writes what it finds. Run it for each of ``--dtype float32``, ``--dtype bfloat16`` (where
there is AMX also with ``FIAK_CPU_ISA=avx512_bf16``) and ``FIAK_CPU_ISA=avx2``, and with ``--backward`` for the
backward pass; ``--fit avx512.json`` prints the constants, in nanoseconds, and how far the model is off, without
decoding, which has a kernel of its own. While measuring it prints how the choice compares with the best of the kernels
and with dense SDPA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, scaled_dot_product_attention

from benchmarks.cases import Case, load_cases
from benchmarks.report import to_json
from benchmarks.timing import timed
from fiak_ext import SparsePattern, which_kernel

DENSITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
ENTRIES = (
    "entry, 1 element",
    "entry, 2 elements",
    "entry, 4 elements",
    "entry_vector",
    "far_vector",
    "run",
    "packed_vector",
)
DENSE = ("pair", "pair_multiply", "dense_row", "number")
ENTRIES_GRADS = tuple(name for name in ENTRIES if name != "far_vector")
# By whether backward; dense is last.
KERNELS = {False: ("entries", "entries_split", "dense"), True: ("entries", "dense")}
# Nanoseconds to copy a vector, or a number, of K and V, fitted once on a Zen 5 core and held since: the case table,
# where every key has many queries, hardly tells these costs from those of a row, and they decide where there are few.
COPIES = {
    "avx2": {"entries": 2.5, "dense": 0.43},
    "avx512": {"entries": 5.2, "dense": 0.41},
    "avx512_bf16": {"entries": 5.0, "dense": 0.21},
    "amx_bf16": {"entries": 5.0, "dense": 0.25},  # measured on a Xeon
}


def uniform_masks(case: Case) -> list[tuple[float, Tensor]]:
    """Masks ``[heads, queries, keys]`` that keep each eligible pair with every probability of DENSITIES."""
    random = torch.rand(case.query_heads, case.queries, case.keys, generator=torch.Generator().manual_seed(0))
    if case.is_causal:
        random.masked_fill_(torch.ones(case.queries, case.keys, dtype=torch.bool).triu(1), 2.0)
    return [(density, random < density) for density in DENSITIES]


def measure(case: Case, dtype: torch.dtype, rounds: int, backward: bool) -> list[dict[str, Any]]:
    """Median seconds of the kernels, their choice and dense SDPA, interleaved, on one thread."""
    kernels = KERNELS[backward]
    query, key, value = (
        torch.randn(case.batch, rows, heads, size).to(dtype).transpose(1, 2).requires_grad_(backward)
        for rows, heads, size in (
            (case.queries, case.query_heads, case.head_dim),
            (case.keys, case.key_heads, case.head_dim),
            (case.keys, case.key_heads, case.value_dim),
        )
    )
    results: list[dict[str, Any]] = []
    for density, mask in uniform_masks(case):
        pattern = SparsePattern.from_mask(mask)

        def seconds(call: Callable[[], Tensor]) -> float:
            if not backward:
                return timed(call)[0]
            output = call()
            grad_output = torch.ones_like(output)
            return timed(lambda: torch.autograd.grad(output, (query, key, value), grad_output))[0]

        def run(kernel: str, pattern: SparsePattern = pattern) -> float:
            os.environ["FIAK_CSR_KERNEL"] = kernel
            return seconds(lambda: pattern.attend(query, key, value))

        def sdpa() -> float:
            gqa = case.query_heads != case.key_heads
            return seconds(
                lambda: scaled_dot_product_attention(query, key, value, is_causal=case.is_causal, enable_gqa=gqa)
            )

        calls: dict[str, Callable[[], float]] = {name: partial(run, name) for name in (*kernels, "auto")}
        calls["sdpa"] = sdpa
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for index in range(rounds):
            for name in sorted(calls, reverse=index % 2 == 1):  # what comes before a call leaves the caches different
                times[name].append(calls[name]())
        del os.environ["FIAK_CSR_KERNEL"]
        rows = mask.numel() // mask.shape[-1]
        tiles = max_pool2d(mask[:, None].float(), (24, 16), ceil_mode=True)
        results.append(
            {
                "case": case.name,
                "backward": backward,
                "dtype": str(dtype).removeprefix("torch."),
                "isa": which_kernel("csr_attention", dtype).split("/")[1],
                "density": density,
                "nnz": int(mask.sum()),
                "tiles": int(tiles.sum()),
                # As plan_layout has it (csrc/kernels/plan/plan.h).
                "has_bits": rows * ((mask.shape[-1] + 63) // 64 * 8) <= 2 * (rows + int(mask.sum())),
                **{name: statistics.median(found) for name, found in times.items()},
            }
        )
        last = results[-1]
        off = statistics.median(auto / min(best) for *best, auto in zip(*list(times.values())[:-1], strict=True))
        speedup = statistics.median(s / a for a, s in zip(times["auto"], times["sdpa"], strict=True))
        print(
            f"{case.name:16} {last['dtype']:8} {last['isa']:11} {density:4.0%}",
            *(f"{name} {last[name] * 1e3:8.2f}" for name in calls),
            f"| auto / best {off:.2f}, SDPA / auto {speedup:.2f}",
            flush=True,
        )
    return results


def features(case: Case, result: dict[str, Any]) -> dict[str, list[float]]:
    """What a call of each kernel counts of ENTRIES or of DENSE, as csrc/kernels/cpu/choose/cost_model.cpp does."""
    avx2, pairs = result["isa"] == "avx2", result["isa"].endswith("bf16") and result["dtype"] == "bfloat16"
    lanes, in_vector = (8, 2) if avx2 else (16, 4)

    def vectors(size: int, elements: int) -> int:
        blocks = -(-size // (8 if pairs else 4))
        return -(-blocks * elements // in_vector)

    def padded(size: int) -> int:
        return -(-size // lanes) * lanes

    nnz, pairs_of_tiles = result["nnz"], result["tiles"] * 384
    elements = 2 if avx2 else 4
    widest = max(case.head_dim, case.value_dim)
    while elements > 1 and (
        case.batch < elements or min(case.keys, 200) * vectors(widest, elements) * lanes * 4 > 52 * 1024
    ):
        elements //= 2
    key_vectors, value_vectors = vectors(case.head_dim, elements), vectors(case.value_dim, elements)
    of_bundle = key_vectors + value_vectors
    packed_bytes = vectors(widest, elements) * lanes * 4  # of a row
    row_bytes = case.keys * packed_bytes
    rows, columns = case.query_heads * case.queries, case.query_heads * case.keys
    bundles = case.batch / elements
    used_bytes = row_bytes * min(1.0, pairs_of_tiles / (rows * case.keys))

    def entries(runs: int) -> list[float]:
        row_runs = rows * min(runs, nnz / rows)
        entries = nnz + row_runs * 1.5  # a run's last group of four is half full
        counts = [entries if elements == e else 0.0 for e in (1, 2, 4)]
        far = 1 - 40 * 1024 / used_bytes if runs == 1 and used_bytes > 40 * 1024 else 0.0
        counts += [entries * of_bundle, entries * of_bundle * far, row_runs, columns * of_bundle]
        return [bundles * x for x in counts]

    def entries_grads() -> list[float]:
        row_runs = rows * max(1, -(-row_bytes // (40 * 1024)))
        column_runs = columns * max(1, -(-case.queries * packed_bytes // (40 * 1024)))
        runs = min(row_runs, nnz) + min(column_runs, nnz)
        entries = nnz + runs * 0.75
        counts = [entries if elements == e else 0.0 for e in (1, 2, 4)]
        counts += [entries * (3 * key_vectors + 2 * value_vectors), runs, (rows + columns) * of_bundle]
        return [bundles * x for x in counts]

    def dense(numbers: int, copied: int) -> list[float]:
        return [case.batch * x for x in (pairs_of_tiles, pairs_of_tiles * numbers, rows, columns * copied)]

    if result["backward"]:
        products = case.head_dim + 2 * padded(case.head_dim) + case.value_dim + padded(case.value_dim)
        return {"entries": entries_grads(), "dense": dense(products, case.head_dim + case.value_dim)}
    numbers = case.head_dim + padded(case.value_dim)
    return {
        "entries": entries(1),
        "entries_split": entries(1 if row_bytes <= 64 * 1024 else -(-row_bytes // (40 * 1024))),
        "dense": dense(numbers, numbers),
    }


def fit(results: list[dict[str, Any]]) -> None:
    """Least squares of the relative error, without negative costs; what decides, similar times, counts most."""
    cases = {case.name: case for case in load_cases()}
    backward = results[0]["backward"]
    of_entries = KERNELS[backward][:-1]
    for kernels, names in ((of_entries, ENTRIES_GRADS if backward else ENTRIES), (("dense",), DENSE)):
        used = [r for r in results if r["nnz"] and (kernels != ("dense",) or r["has_bits"])]
        used = [r for r in used if not cases[r["case"]].is_decoding]
        # The clock drifts: SDPA, which takes the same time for all densities of a case, tells by how much.
        usual = {r["case"]: statistics.median(o["sdpa"] for o in results if o["case"] == r["case"]) for r in used}
        runs = [(r, kernel) for r in used if 0.8 < r["sdpa"] / usual[r["case"]] < 1.25 for kernel in kernels]
        counts = torch.tensor([features(cases[r["case"]], r)[kernel] for r, kernel in runs]).double()
        times = torch.tensor([r[kernel] * usual[r["case"]] / r["sdpa"] for r, kernel in runs]).double() * 1e9
        scaled = counts / times[:, None]
        ratios = torch.tensor([min(r[kernel] for kernel in of_entries) / r["dense"] for r, _ in runs]).double()
        weights = torch.where((ratios - 1).abs() < 0.5, 1.0, 0.2)[:, None].double()
        copies = names.index("number" if kernels == ("dense",) else "packed_vector")
        held = scaled[:, copies, None] * COPIES[used[0]["isa"]][kernels[0]]
        kept = [i for i in range(len(names)) if i != copies and scaled[:, i].any()]
        while True:
            solution = torch.linalg.lstsq(scaled[:, kept] * weights, (1 - held) * weights).solution[:, 0]
            if solution.min() >= 0:
                break
            kept.pop(int(solution.argmin()))
        print(" and ".join(kernels), {names[i]: round(float(x), 4) for i, x in zip(kept, solution, strict=True)})
        predicted = scaled[:, kept] @ solution + held[:, 0]
        errors = (predicted - 1).abs()
        print(f"  off by {errors.median():.1%} (median), {errors.max():.1%} (most)")
        for name in dict.fromkeys(r["case"] for r in used):
            for kernel in kernels:
                of_case = predicted[[i for i, (r, k) in enumerate(runs) if r["case"] == name and k == kernel]]
                print(f"  {name:16} {kernel:7} model / time", " ".join(f"{float(x):.2f}" for x in of_case))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="of the table; all unless named")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--backward", action="store_true", help="the backward pass instead of the forward pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the measurements; added to what is there")
    parser.add_argument(
        "--fit", type=Path, nargs="+", help="measurements to fit, of one dtype, instruction set and direction"
    )
    arguments = parser.parse_args()
    if arguments.fit:
        return fit([result for path in arguments.fit for result in json.loads(path.read_text())])
    torch.set_num_threads(1)
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for case in load_cases():
        if not arguments.cases or case.name in arguments.cases:
            results += measure(case, getattr(torch, arguments.dtype), arguments.rounds, arguments.backward)
            if arguments.json:
                arguments.json.write_text(to_json(results))
    return None


if __name__ == "__main__":
    main()
