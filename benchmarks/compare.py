"""Speed of the ops against ``scaled_dot_product_attention``: dense, with a boolean mask, with a float mask.

Every figure is a ratio of two calls of the same round, the median over all rounds with its quartiles, because absolute
speed drifts. Before each call a matrix product overwrites the caches, as the rest of a model would: a hot loop flatters
sparse kernels. All contestants get the same operands and allocate their own results.

    python -m benchmarks.compare --case deit_tiny_paper --dtype float32 --json compare.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import fiak_ext
from benchmarks.cases import PRUNED, Case, load_cases, random_mask
from fiak_ext import SparsePattern
from fiak_ext.demo.table import environment

__all__ = ["Contestant", "compare", "contestants", "main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DENSE, _FLOAT_MASK = "sdpa", "sdpa float mask"


@dataclass(frozen=True)
class Contestant:
    """One call to be timed, and the names of the contestants that it is compared with."""

    call: Callable[..., Tensor]  # of query, key, value and the parameters
    parameters: tuple[Tensor, ...] = ()  # get gradients too
    baselines: tuple[str, ...] = ()


def _bool_mask(pruned: float) -> str:
    return f"sdpa bool mask {pruned:.0%}"


def contestants(case: Case, dtype: torch.dtype) -> dict[str, Contestant]:
    """All that :func:`compare` times, by name. Each computes the output of its last baseline."""
    generator = torch.Generator().manual_seed(0)
    prior = torch.rand(1, case.query_heads, case.queries, case.keys, generator=generator) + 0.5
    log_prior = prior.log()
    if case.is_causal:
        log_prior.masked_fill_(torch.ones(case.queries, case.keys).triu(1).bool(), -torch.inf)
    prior_attention = partial(torch.ops.fiak.prior_attention, is_causal=case.is_causal)
    table = {
        _DENSE: Contestant(partial(scaled_dot_product_attention, is_causal=case.is_causal)),
        _FLOAT_MASK: Contestant(scaled_dot_product_attention, (log_prior.to(dtype),)),
        "prior_attention without prior": Contestant(prior_attention, (), (_DENSE,)),
        "prior_attention": Contestant(prior_attention, (prior,), (_DENSE, _FLOAT_MASK)),
    }
    for pruned in PRUNED:
        mask = random_mask(case, pruned, generator)
        table[_bool_mask(pruned)] = Contestant(partial(scaled_dot_product_attention, attn_mask=mask[None]))
        table[f"csr_attention {pruned:.0%}"] = Contestant(
            SparsePattern.from_mask(mask).attend, (), (_DENSE, _bool_mask(pruned))
        )
    return table


def _timed(function: Callable[[], object], evict: Callable[[], object]) -> float:
    evict()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(case: Case, dtype: torch.dtype, rounds: int) -> Iterator[dict[str, Any]]:
    """Times every contestant once a round, forward and then backward, and yields a result for each.

    A result has ``case``, ``dtype``, ``direction``, ``contestant``, ``milliseconds`` (median) and ``ratios``: for each
    baseline how many times faster the contestant is, as ``[first quartile, median, third quartile]``.
    """
    generator = torch.Generator().manual_seed(1)

    def operand(heads: int, rows: int, columns: int) -> Tensor:
        # As in a model: heads are a view of [batch, rows, heads * columns].
        x = torch.randn(case.batch, rows, heads, columns, generator=generator)
        return x.to(dtype).transpose(1, 2)

    query = operand(case.query_heads, case.queries, case.head_size)
    key = operand(case.key_heads, case.keys, case.head_size)
    value = operand(case.key_heads, case.keys, case.value_size)
    grad_output = operand(case.query_heads, case.queries, case.value_size)
    square = torch.randn(768, 768, generator=generator)

    def backward_of(contestant: Contestant) -> Callable[[], object]:
        inputs = [x.detach().requires_grad_() for x in (query, key, value, *contestant.parameters)]
        output = contestant.call(*inputs)
        return partial(torch.autograd.grad, output, inputs, grad_output, retain_graph=True)

    table = contestants(case, dtype)
    for direction in ("forward", "backward"):
        calls = {
            name: partial(contestant.call, query, key, value, *contestant.parameters)
            if direction == "forward"
            else backward_of(contestant)
            for name, contestant in table.items()
        }
        for call in calls.values():  # the first call makes plans and scratch memory
            call()
        times = [{name: _timed(call, lambda: square @ square) for name, call in calls.items()} for _ in range(rounds)]
        for name, contestant in table.items():
            yield {
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                "direction": direction,
                "contestant": name,
                "milliseconds": 1000 * statistics.median(time[name] for time in times),
                "ratios": {
                    baseline: statistics.quantiles((time[baseline] / time[name] for time in times), n=4)
                    for baseline in contestant.baselines
                },
            }


def _line(result: dict[str, Any]) -> str:
    ratios = "   ".join(
        f"{median:5.2f}x {baseline} [{low:.2f}-{high:.2f}]"
        for baseline, (low, median, high) in result["ratios"].items()
    )
    return f"  {result['direction']:8}  {result['contestant']:29}  {result['milliseconds']:9.3f} ms   {ratios}".rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    cases = {case.name: case for case in load_cases()}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases), help="rows of benchmarks/cases.csv")
    parser.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["float32"])
    parser.add_argument("--rounds", type=int, default=20, help="how often each contestant is timed (default 20)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results, machine and versions there")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles (got {options.rounds})")

    torch.set_num_threads(options.threads)
    machine = environment()
    print(json.dumps(machine))
    results = []
    for name in options.case:
        for dtype in options.dtype:
            kernel = fiak_ext.which_kernel("csr_attention", _DTYPES[dtype]).partition("/")[2]
            print(f"{cases[name]} {dtype}, {kernel} kernels, {options.threads} thread(s)")
            for result in compare(cases[name], _DTYPES[dtype], options.rounds):
                results.append(result)
                print(_line(result), flush=True)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"machine": machine, "rounds": options.rounds, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
