"""Speed of the ops against their peers in PyTorch, and of whole models, on the cases of cases.csv.

Every figure is a ratio of two calls of the same round, the median over all rounds with its quartiles, because absolute
speed drifts. Before each call a matrix product overwrites the caches, as the rest of a model would. All contestants get
the same operands and allocate their own results.

    python -m benchmarks.compare --results zen4.json                       all, about 25 minutes
    python -m benchmarks.compare --section attention --case deit_tiny_paper --dtype float32 --threads 1

Sections: attention (csr_attention and prior_attention against SDPA dense, with a boolean mask and with a float bias,
FlexAttention, eager exp * prior and torch.sparse; forward, backward and both), scaling (with threads), density (0 to
100%), planning (csr_plan in forward calls), linear (compact_linear against F.linear), overhead (of a call), memory
(peak of forward and backward with a prior), models (whole DeiT-tiny).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.attention import DENSITY_CASES, Effort, by_density, compare, linear, overhead, planning, scaling
from benchmarks.cases import load_cases
from benchmarks.memory import peak_memory
from benchmarks.report import make_tables, to_json
from fiak_ext.demo.table import environment

__all__ = ["main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SECTIONS = ("attention", "scaling", "density", "planning", "linear", "overhead", "memory", "models")
_QUICK = Effort(rounds=3, seconds=0, slow_peers=False, mask_kinds=())


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    cases = {case.name: case for case in load_cases()}
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", nargs="+", choices=_SECTIONS, default=_SECTIONS)
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases), help="rows of benchmarks/cases.csv")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="torch's threads (default 1 2)")
    parser.add_argument("--quick", action="store_true", help="3 rounds, uniform masks, no slow peers, no compilation")
    parser.add_argument("--results", type=Path, metavar="FILE", help="write the figures here (.json), and .md and .png")
    options = parser.parse_args(arguments)
    if min(options.threads) < 1:
        parser.error(f"--threads must be at least 1 (got {min(options.threads)})")
    if options.results is not None:
        if options.results.suffix != ".json":
            parser.error(f"--results must be a .json file (got {options.results})")
        options.results.parent.mkdir(parents=True, exist_ok=True)

    effort = _QUICK if options.quick else Effort()
    machine = environment()
    del machine["system"], machine["threads"]
    report: dict[str, Any] = {"machine": {**machine, "date": date.today().isoformat()}}
    before = torch.get_num_threads()

    def save() -> None:
        if options.results is not None:
            options.results.write_text(to_json(report))
            make_tables(options.results)

    def collect(section: str, results: Iterable[dict[str, Any]], line: Callable[[dict[str, Any]], str]) -> None:
        for result in results:
            print(line(result), flush=True)
            if result.get("ratios") != {}:  # a peer's own time is printed alone
                report.setdefault(section, []).append(result)

    try:
        for name in options.case if set(_SECTIONS[:5]) & set(options.section) else ():
            print(cases[name], flush=True)
            for dtype in map(_DTYPES.__getitem__, options.dtype):
                if "attention" in options.section:
                    collect("attention", compare(cases[name], dtype, options.threads, effort), _line)
                if "scaling" in options.section and len(options.threads) > 1:
                    collect("scaling", scaling(cases[name], dtype, options.threads, effort), _line)
                if "density" in options.section and name in DENSITY_CASES:
                    torch.set_num_threads(options.threads[0])
                    collect("density", by_density(cases[name], dtype, effort), _line)
                if "linear" in options.section and not cases[name].is_decoding:
                    for count in options.threads:
                        torch.set_num_threads(count)
                        collect("linear", linear(cases[name], dtype, effort), json.dumps)
            if "planning" in options.section and not cases[name].is_decoding:
                for count in options.threads:
                    torch.set_num_threads(count)
                    collect("planning", planning(cases[name], effort), json.dumps)
        if "overhead" in options.section:
            torch.set_num_threads(options.threads[0])
            collect("overhead", overhead(), json.dumps)
        if "memory" in options.section:
            collect("memory", peak_memory(options.threads[0]), json.dumps)
        if "models" in options.section:
            for count in options.threads:
                torch.set_num_threads(count)
                compiled = not options.quick and count == options.threads[0]
                collect("models", models.compare(rounds=effort.rounds, compiled=compiled), json.dumps)
    finally:
        torch.set_num_threads(before)
        save()  # also what an interrupted run has found


def _line(result: dict[str, Any]) -> str:
    """A result of one case, on one line."""
    what = result.get("contestant") or f"density {result['density']:.0%}"
    text = f"  {result['dtype']:8} {result['threads']} {result.get('direction', 'forward'):16} {what:31}"
    if "left_out" in result:
        return f"{text} left out: {result['left_out']}"
    if "milliseconds" in result:
        text += f" {result['milliseconds']:9.3f} ms"
    ratios = result["ratios"] if "ratios" in result else {f"{result['contestant']}, fewer threads": result["ratio"]}
    return text + "".join(
        f"   {median:5.2f}x {name} [{low:.2f}-{high:.2f}]" for name, (low, median, high) in ratios.items()
    )


if __name__ == "__main__":
    main()
