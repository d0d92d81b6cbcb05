"""Measures and fits what ``csr_attention``'s kernels on the CPU cost, by which csrc/kernels/cpu/choose picks them.

``python -m benchmarks.cost_model --json avx512.json`` times all kernels, forced by ``FIAK_CSR_KERNEL``, over the case
table's uniform masks and writes what it finds. Run it for each of ``--dtype float32``, ``--dtype bfloat16`` (where
there is AMX also with ``FIAK_CPU_ISA=avx512_bf16``) and ``FIAK_CPU_ISA=avx2``, and with ``--backward`` for the
backward pass. ``--fit avx512.json ...`` finds the rates, in nanoseconds, for which the library's counts
(``fiak_ext._C.csr_counts``) predict these times best, without decoding, which has a kernel of its own; it prints them,
and how far the model is off, and with ``--write`` puts them into rates.h. While measuring it prints how the choice
compares with the best of the kernels and with dense SDPA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import Case, load_cases
from benchmarks.report import to_json
from benchmarks.timing import timed
from fiak_ext import _C, SparsePattern, which_kernel

DENSITIES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
# By whether backward.
KERNELS = {False: ("entries", "entries_sliced", "dense"), True: ("entries", "dense")}
RATES = Path(__file__).parents[1] / "csrc/kernels/cpu/choose/rates.h"
# A part of rates.h: a line that says which rates these are and where they are from, and they.
PART = re.compile(r"(// (\w+), (forward|backward), (entries|dense): )(.*)(\n[ {]*)([\w.+-]+(?:, [\w.+-]+)*)")
HELD = ("packed_vector", "number")  # not fitted; see rates.h


def uniform_masks(case: Case) -> list[tuple[float, Tensor]]:
    """Masks ``[heads, queries, keys]`` that keep each eligible pair with every probability of DENSITIES."""
    random = torch.rand(case.query_heads, case.queries, case.keys, generator=torch.Generator().manual_seed(0))
    if case.is_causal:
        random.masked_fill_(torch.ones(case.queries, case.keys, dtype=torch.bool).triu(1), 2.0)
    return [(density, random < density) for density in DENSITIES]


def measure(case: Case, dtype: torch.dtype, rounds: int, backward: bool) -> list[dict[str, Any]]:
    """Median seconds of the kernels, their choice and dense SDPA, interleaved, on one thread."""
    kernels, cpu = KERNELS[backward], _C.cpu_capabilities()
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
        header = _C.read_plan(pattern.plan[: _C.PLAN_HEADER_BYTES].numpy().tobytes())
        start, size, number = header["sections"]["tiles"]
        results.append(
            {
                "case": case.name,
                "backward": backward,
                "dtype": str(dtype).removeprefix("torch."),
                "isa": which_kernel("csr_attention", dtype).split("/")[1],
                **{name: cpu[name] for name in ("machine_isa", "model")},
                "density": density,
                "nnz": header["nnz"],
                "tiles": int(pattern.plan[start : start + size * number].view(torch.int64).sum()),
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


def counts(case: Case, result: dict[str, Any], family: str) -> tuple[str, dict[str, float]]:
    """Which rates of rates.h are those of a call of a kernel family, and what it counts of each."""
    return _C.csr_counts(
        family=family,
        batch=case.batch,
        heads=case.query_heads,
        **{name: getattr(case, name) for name in ("queries", "keys", "head_dim", "value_dim")},
        **{name: result[name] for name in ("backward", "isa", "machine_isa", "dtype", "nnz", "tiles")},
    )


def fit(results: list[dict[str, Any]], text: str) -> str:
    """The text of rates.h with those rates fitted that there are results of; prints these."""
    cases = {case.name: case for case in load_cases()}
    # The clock drifts: SDPA, which takes the same time for all densities of a case, tells by how much.
    sdpa: dict[tuple[Any, ...], list[float]] = {}
    for r in results:
        sdpa.setdefault(_call(r), []).append(r["sdpa"])
    runs: dict[tuple[str, str, str], list[tuple[dict[str, Any], str, dict[str, float]]]] = {}
    for r in results:
        case, drift = cases[r["case"]], r["sdpa"] / statistics.median(sdpa[_call(r)])
        if not r["nnz"] or case.is_decoding or not 0.8 < drift < 1.25:
            continue
        families = KERNELS[r["backward"]]
        steady = r | {family: r[family] / drift * 1e9 for family in families}
        dense_rates, _ = counts(case, r, "dense")
        for family in families:
            rates, counted = counts(case, r, family)
            # Dense needs bits; and rows of bfloat16 that are packed as float32 do not measure what float32 costs.
            if rates == dense_rates and (family != "dense" or r["tiles"]):
                part = rates, "backward" if r["backward"] else "forward", family.removesuffix("_split")
                runs.setdefault(part, []).append((steady, family, counted))

    def replace(match: re.Match[str]) -> str:
        head, *part, source, between, numbers = match.groups()
        if part_runs := runs.get((part[0], part[1], part[2])):
            print(head.strip("/: "))
            source, numbers = _fit_part(part_runs, numbers.split(", "))
        return head + source + between + numbers

    return PART.sub(replace, text)


def _call(result: dict[str, Any]) -> tuple[Any, ...]:
    """What SDPA's time depends on."""
    return tuple(result[name] for name in ("model", "isa", "dtype", "backward", "case"))


def _fit_part(runs: list[tuple[dict[str, Any], str, dict[str, float]]], numbers: list[str]) -> tuple[str, str]:
    """Where the rates are from, and the numbers, with those replaced that the runs count.

    Least squares of the relative error, without negative rates; what decides, similar times, counts most.
    """
    names = list(runs[0][2])
    pair = names.index("pair")
    names = names[pair:] if runs[0][1] == "dense" else names[:pair]
    times = torch.tensor([r[family] for r, family, _ in runs]).double()
    scaled = torch.tensor([[counted[name] for name in names] for _, _, counted in runs]).double() / times[:, None]
    ratios = [min(r[name] for name in KERNELS[r["backward"]][:-1]) / r["dense"] for r, _, _ in runs]
    weights = torch.tensor([1.0 if abs(ratio - 1) < 0.5 else 0.2 for ratio in ratios]).double()[:, None]
    rates = torch.tensor([float(number) for number in numbers]).double()
    fitted = [i for i, name in enumerate(names) if name not in HELD and scaled[:, i].any()]
    rates[fitted] = 0
    rest, kept = 1 - scaled @ rates, list(fitted)
    while True:
        solution = torch.linalg.lstsq(scaled[:, kept] * weights, rest[:, None] * weights).solution[:, 0]
        if solution.min() >= 0:
            break
        kept.pop(int(solution.argmin()))
    rates[kept] = solution
    numbers = [f"{float(rates[i]):.4g}" if i in fitted else number for i, number in enumerate(numbers)]
    print(" ", ", ".join(f"{name} {number}" for name, number in zip(names, numbers, strict=True)))
    predicted = scaled @ rates
    errors = (predicted - 1).abs()
    print(f"  off by {errors.median():.1%} (median), {errors.max():.1%} (most)")
    for case, family in dict.fromkeys((r["case"], family) for r, family, _ in runs):
        of_case = [x for (r, f, _), x in zip(runs, predicted.tolist(), strict=True) if (r["case"], f) == (case, family)]
        print(f"  {case:16} {family:13} model / time", " ".join(f"{x:.2f}" for x in of_case))
    others = [name for i, name in enumerate(names) if i not in fitted and name not in HELD and rates[i]]
    source = f"one core of {' and '.join(dict.fromkeys(r['model'] for r, _, _ in runs))}"
    return source + (f", but for {' and '.join(others)}" if others else ""), ", ".join(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="of the table; all unless named")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--backward", action="store_true", help="the backward pass instead of the forward pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the measurements; added to what is there")
    parser.add_argument("--fit", type=Path, nargs="+", help="measurements to fit")
    parser.add_argument("--write", action="store_true", help="what --fit finds into rates.h")
    arguments = parser.parse_args()
    if arguments.fit:
        text = fit([result for path in arguments.fit for result in json.loads(path.read_text())], RATES.read_text())
        if arguments.write:
            RATES.write_text(text)
        return
    torch.set_num_threads(1)
    results = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else []
    for case in load_cases():
        if not arguments.cases or case.name in arguments.cases:
            results += measure(case, getattr(torch, arguments.dtype), arguments.rounds, arguments.backward)
            if arguments.json:
                arguments.json.write_text(to_json(results))


if __name__ == "__main__":
    main()
