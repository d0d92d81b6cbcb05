"""The ops against their peers on one case: who takes part, forward and training, by density, and what leads to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.cases import PRUNED, Case, make_mask, recorded_pruned
from benchmarks.timing import Timed, quartiles, ratios, timed, times_of_rounds
from fiak_ext import SparsePattern

__all__ = [
    "DENSITIES",
    "DENSITY_CASES",
    "Contestant",
    "Effort",
    "by_density",
    "compare",
    "contestants",
    "linear",
    "overhead",
    "planning",
    "scaling",
]

DENSITIES = tuple(percent / 100 for percent in (0, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100))
DENSITY_CASES = ("deit_tiny_paper", "causal_lm_paper", "vit_785", "wide_heads_2048")

_SPARSE_LIMIT = 20_000_000  # entries of all batch elements; beyond, torch.sparse takes minutes and gigabytes
_SECONDS_LIMIT = 2.0  # slow peers that take longer for a call are left out


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: of interleaved calls, at most.
        seconds: for all rounds of one case, dtype, number of threads and direction, but 3 rounds in any case.
        slow_peers: whether FlexAttention, torch.sparse and eager attention take part.
        mask_kinds: beside uniform ones at all of :data:`~benchmarks.cases.PRUNED`, these at 70%.
    """

    rounds: int = 20
    seconds: float = 3.0
    slow_peers: bool = True
    mask_kinds: tuple[str, ...] = ("learned-like", "recorded")


@dataclass(frozen=True)
class Contestant:
    """One call to be timed.

    Attributes:
        call: of query, key, value and the parameters.
        parameters: get gradients too.
        baselines: names of the contestants that it is compared with.
        is_slow: takes part in fewer rounds.
        has_backward: whether it can train on CPU.
        compiles: at its first call.
        density: the share of all pairs that a recorded mask keeps; None for all others.
    """

    call: Callable[..., Tensor]
    parameters: tuple[Tensor, ...] = ()
    baselines: tuple[str, ...] = ()
    is_slow: bool = False
    has_backward: bool = True
    compiles: bool = False
    density: float | None = None


def contestants(case: Case, dtype: torch.dtype, effort: Effort) -> tuple[dict[str, Contestant], dict[str, str]]:
    """All that :func:`compare` times, by name, and why others are left out.

    Peers with a mask get the uniform one with 70% pruned. What it keeps does not change the work of SDPA and of eager
    attention, so they are baselines of the other masks as well.
    """
    generator = torch.Generator().manual_seed(0)
    prior = torch.rand(1, case.query_heads, case.queries, case.keys, generator=generator) + 0.5
    log_prior = prior.log().masked_fill_(~case.eligible(), -torch.inf).to(dtype)
    op = partial(torch.ops.fiak.prior_attention, is_causal=case.is_causal)
    mask = make_mask("uniform", case, 0.7, generator)
    table = {
        "sdpa": Contestant(peers.sdpa(case)),
        "sdpa float bias": Contestant(peers.sdpa_float_bias(case), (log_prior,)),
        "sdpa bool mask": Contestant(peers.sdpa_bool_mask(case, mask)),
    }
    left_out = {}
    slow: tuple[str, ...] = ()
    if effort.slow_peers:
        masked_prior = prior.masked_fill(~mask, 0)
        table["eager exp * prior"] = Contestant(peers.eager, (masked_prior,), is_slow=True)
        table["flex"] = Contestant(peers.flex(case, mask), is_slow=True, has_backward=False, compiles=True)
        if dtype != torch.float32:
            left_out["torch.sparse"] = "sampled_addmm on CPU takes float32 and float64 only"
        elif case.batch * int(mask.sum()) > _SPARSE_LIMIT:
            left_out["torch.sparse"] = f"over {_SPARSE_LIMIT // 10**6} million entries"
        else:
            table["torch.sparse"] = Contestant(peers.torch_sparse(case, mask), is_slow=True)
        slow = ("eager exp * prior", "flex", "torch.sparse")
    table["prior_attention without prior"] = Contestant(op, (), ("sdpa",))
    table["prior_attention"] = Contestant(op, (prior,), ("sdpa", "sdpa float bias", *slow[:1]))
    masks = [("uniform", pruned) for pruned in PRUNED] + [
        (kind, 0.7) for kind in effort.mask_kinds if kind != "recorded" or 0.7 in recorded_pruned(case.recorded)
    ]
    for kind, pruned in masks:
        kept = mask if (kind, pruned) == ("uniform", 0.7) else make_mask(kind, case, pruned, generator)
        pattern = SparsePattern.from_mask(kept)
        table[f"csr_attention {kind} {pruned:.0%}"] = Contestant(
            pattern.attend,
            baselines=("sdpa", "sdpa bool mask", *(slow if kept is mask else ())),
            density=pattern.density if kind == "recorded" else None,
        )
    return table, left_out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _operands(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value and the output's gradient, with heads that are a view of [batch, rows, heads * columns]."""
    generator = torch.Generator().manual_seed(1)

    def operand(heads: int, rows: int, columns: int) -> Tensor:
        return torch.randn(case.batch, rows, heads, columns, generator=generator).to(dtype).transpose(1, 2)

    return (
        operand(case.query_heads, case.queries, case.head_dim),
        operand(case.key_heads, case.keys, case.head_dim),
        operand(case.key_heads, case.keys, case.value_dim),
        operand(case.query_heads, case.queries, case.value_dim),
    )


def _inference(contestant: Contestant, inputs: Sequence[Tensor]) -> Timed:
    def run() -> dict[str, float]:
        with torch.no_grad():
            return {"forward": timed(partial(contestant.call, *inputs, *contestant.parameters))[0]}

    return run


def _training(contestant: Contestant, inputs: Sequence[Tensor], grad_output: Tensor) -> Timed:
    leaves = [x.detach().requires_grad_() for x in (*inputs, *contestant.parameters)]

    def run() -> dict[str, float]:
        forward, output = timed(partial(contestant.call, *leaves))
        backward, _ = timed(partial(torch.autograd.grad, output, leaves, grad_output))
        return {"backward": backward, "forward+backward": forward + backward}

    return run


def compare(case: Case, dtype: torch.dtype, threads: Sequence[int], effort: Effort) -> Iterator[dict[str, Any]]:
    """Times every contestant, and yields a result for each, number of threads and direction.

    A result has ``case``, ``dtype``, ``threads``, ``direction`` (``"forward"`` without gradients, ``"backward"`` and
    ``"forward+backward"``), ``contestant``, of recorded masks ``density``, ``milliseconds`` (median) and ``ratios``:
    for each baseline how many times faster the contestant is, as ``[first quartile, median, third quartile]``. A peer
    that is left out has ``left_out``, the reason, instead of ``milliseconds``; slow peers take part with the first
    number of threads only.
    """
    *inputs, grad_output = _operands(case, dtype)
    table, left_out = contestants(case, dtype, effort)
    for index, count in enumerate(threads):
        torch.set_num_threads(count)
        common = {"case": case.name, "dtype": _name(dtype), "threads": count}
        for training in (False,) if case.is_decoding else (False, True):
            missing = dict(left_out) if index == 0 else {}
            calls = {}
            for name, contestant in table.items():
                if contestant.is_slow and index > 0:
                    continue
                if training and not contestant.has_backward:
                    missing[name] = "no backward on CPU"
                    continue
                run = _training(contestant, inputs, grad_output) if training else _inference(contestant, inputs)
                seconds = max(run().values())
                if contestant.compiles:
                    seconds = max(run().values())
                if contestant.is_slow and seconds > _SECONDS_LIMIT:
                    missing[name] = f"a call takes {seconds:.0f} s"
                    continue
                calls[name] = run
            slow = [name for name in calls if table[name].is_slow]
            rounds = times_of_rounds(calls, rounds=effort.rounds, seconds=effort.seconds, slow=slow)
            for direction in ("backward", "forward+backward") if training else ("forward",):
                times = {name: [result[direction] for result in results] for name, results in rounds.items()}
                for name in times:
                    contestant = table[name]
                    yield {
                        **common,
                        "direction": direction,
                        "contestant": name,
                        **({} if contestant.density is None else {"density": contestant.density}),
                        "milliseconds": 1000 * statistics.median(times[name]),
                        "ratios": {
                            baseline: quartiles(ratios(times[name], times[baseline]))
                            for baseline in contestant.baselines
                            if baseline in times
                        },
                    }
            for name, why in missing.items():
                direction = "forward+backward" if training else "forward"
                yield {**common, "direction": direction, "contestant": name, "left_out": why}


def overhead(calls: int = 2000) -> Iterator[dict[str, Any]]:
    """What a call costs where there is next to nothing to compute: B1 H1 N4 D8, float32, plan made, caches warm.

    Yields ``contestant`` and ``microseconds`` (quartiles of 15 loops of ``calls`` calls, interleaved).
    """
    case = Case("tiny", 1, 1, 1, 4, 4, 8, 8, is_causal=False, recorded="")
    query, key, value, _ = _operands(case, torch.float32)
    pattern = SparsePattern.from_mask(case.eligible()[None])
    dense = peers.sdpa(case)
    crow, col, plan = pattern.crow_indices, pattern.col_indices, pattern.plan
    table: dict[str, Callable[[], Tensor]] = {
        "csr_attention": lambda: torch.ops.fiak.csr_attention(query, key, value, crow, col, plan=plan),
        "SparsePattern.attend": lambda: pattern.attend(query, key, value),
        "prior_attention": lambda: torch.ops.fiak.prior_attention(query, key, value),
        "sdpa": lambda: dense(query, key, value),
    }

    def loop(call: Callable[[], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return {"forward": (time.perf_counter() - start) / calls}

    rounds = times_of_rounds({name: partial(loop, call) for name, call in table.items()}, rounds=15, seconds=60)
    for name, results in rounds.items():
        yield {"contestant": name, "microseconds": quartiles([1e6 * result["forward"] for result in results])}


def planning(case: Case, effort: Effort) -> Iterator[dict[str, Any]]:
    """What ``csr_plan`` costs, in forward calls of ``csr_attention`` with the plan at B=1, in float32.

    The indices are int32, as patterns keep them; the plan serves all dtypes and the backward too.

    Yields ``case``, ``threads``, ``pruned``, ``milliseconds`` (of the plan, median) and ``calls`` (quartiles).
    """
    case = replace(case, batch=1)
    *inputs, _ = _operands(case, torch.float32)
    for pruned in PRUNED:
        pattern = SparsePattern.from_mask(make_mask("uniform", case, pruned, torch.Generator().manual_seed(0)))
        indices = pattern.crow_indices, pattern.col_indices, pattern.num_queries, pattern.num_keys
        calls = {
            "plan": _inference(Contestant(partial(torch.ops.fiak.csr_plan, *indices)), ()),
            "forward": _inference(Contestant(pattern.attend), inputs),
        }
        for call in calls.values():
            call()
        rounds = times_of_rounds(calls, rounds=effort.rounds, seconds=effort.seconds / 3)
        times = {name: [result["forward"] for result in results] for name, results in rounds.items()}
        yield {
            "case": case.name,
            "threads": torch.get_num_threads(),
            "pruned": pruned,
            "milliseconds": 1000 * statistics.median(times["plan"]),
            "calls": quartiles(ratios(times["forward"], times["plan"])),
        }


def linear(case: Case, dtype: torch.dtype, effort: Effort) -> Iterator[dict[str, Any]]:
    """``compact_linear`` as the projection of keys and values, against ``F.linear`` with the same weight and bias.

    The input is ``[batch, keys, query_heads * head_dim]``. Every key head keeps its own random keys, as many as
    ``kept`` says; ``F.linear`` computes all, so that the ratio of times is also due to the work: ``per_flop`` is what
    is left when both are divided by the multiply-adds that they are asked for.

    Yields ``case``, ``dtype``, ``threads``, ``kept``, ``ratio`` and ``per_flop`` (quartiles).
    """
    generator = torch.Generator().manual_seed(4)
    heads, width = 2 * case.key_heads, case.query_heads * case.head_dim
    x = torch.randn(case.batch, case.keys, width, generator=generator).to(dtype)
    weight = torch.randn(heads * case.head_dim, width, generator=generator).to(dtype)
    bias = torch.randn(heads * case.head_dim, generator=generator).to(dtype)
    shares = (0.25, 0.5, 0.75, 1.0)

    def compacted(share: float) -> Contestant:
        order = torch.rand(case.key_heads, case.keys, generator=generator).argsort(1)
        keep = order[:, : round(share * case.keys)].sort(1).values.repeat(2, 1)
        return Contestant(lambda x: torch.ops.fiak.compact_linear(x, weight, bias, keep))

    table = {f"{share}": compacted(share) for share in shares}
    table["linear"] = Contestant(lambda x: torch.nn.functional.linear(x, weight, bias))
    calls = {name: _inference(contestant, [x]) for name, contestant in table.items()}
    for call in calls.values():
        call()
    rounds = times_of_rounds(calls, rounds=effort.rounds, seconds=effort.seconds / 2)
    times = {name: [result["forward"] for result in results] for name, results in rounds.items()}
    for share in shares:
        ratio = quartiles(ratios(times[f"{share}"], times["linear"]))
        kept = round(share * case.keys) / case.keys
        yield {
            "case": case.name,
            "dtype": _name(dtype),
            "threads": torch.get_num_threads(),
            "kept": share,
            "ratio": ratio,
            "per_flop": [value * kept for value in ratio],
        }


def scaling(case: Case, dtype: torch.dtype, threads: Sequence[int], effort: Effort) -> Iterator[dict[str, Any]]:
    """How many times faster the ops get with further numbers of threads than with the first, in interleaved calls.

    Yields ``case``, ``dtype``, ``threads``, ``direction``, ``contestant`` and ``ratio`` (quartiles).
    """
    *inputs, grad_output = _operands(case, dtype)
    generator = torch.Generator().manual_seed(3)
    pattern = SparsePattern.from_mask(make_mask("uniform", case, 0.7, generator))
    prior = torch.rand(1, case.query_heads, case.queries, case.keys, generator=generator) + 0.5
    table = {
        "csr_attention uniform 70%": Contestant(pattern.attend),
        "prior_attention": Contestant(partial(torch.ops.fiak.prior_attention, is_causal=case.is_causal), (prior,)),
    }

    def with_threads(count: int, run: Timed) -> dict[str, float]:
        torch.set_num_threads(count)
        return run()

    calls = {}
    for name, contestant in table.items():
        for training in (False,) if case.is_decoding else (False, True):
            run = _training(contestant, inputs, grad_output) if training else _inference(contestant, inputs)
            for count in threads:
                calls[f"{name}/{training}/{count}"] = partial(with_threads, count, run)
    for call in calls.values():
        call()
    rounds = times_of_rounds(calls, rounds=effort.rounds, seconds=effort.seconds / 2)
    for key, results in rounds.items():
        name, mode, number = key.split("/")
        if number == str(threads[0]):
            continue
        for direction in results[0]:
            times, first = (
                [result[direction] for result in rounds[f"{name}/{mode}/{which}"]] for which in (number, threads[0])
            )
            yield {
                "case": case.name,
                "dtype": _name(dtype),
                "threads": int(number),
                "direction": direction,
                "contestant": name,
                "ratio": quartiles(ratios(times, first)),
            }


def by_density(case: Case, dtype: torch.dtype, effort: Effort) -> Iterator[dict[str, Any]]:
    """The forward speed of csr_attention on uniform masks of all :data:`DENSITIES`, against SDPA dense and masked.

    Yields ``case``, ``dtype``, ``threads``, ``density`` (asked, of the eligible pairs) and ``ratios`` as
    :func:`compare`.
    """
    generator = torch.Generator().manual_seed(2)
    *inputs, _ = _operands(case, dtype)
    mask = make_mask("uniform", case, 0.5, generator)
    calls = {
        "sdpa": _inference(Contestant(peers.sdpa(case)), inputs),
        "sdpa bool mask": _inference(Contestant(peers.sdpa_bool_mask(case, mask)), inputs),
    }
    for density in DENSITIES:
        pattern = SparsePattern.from_mask(make_mask("uniform", case, 1 - density, generator))
        calls[f"{density}"] = _inference(Contestant(pattern.attend), inputs)
    for call in calls.values():
        call()
    rounds = times_of_rounds(calls, rounds=effort.rounds, seconds=effort.seconds)
    times = {name: [result["forward"] for result in results] for name, results in rounds.items()}
    for density in DENSITIES:
        yield {
            "case": case.name,
            "dtype": _name(dtype),
            "threads": torch.get_num_threads(),
            "density": density,
            "ratios": {
                baseline: quartiles(ratios(times[f"{density}"], times[baseline]))
                for baseline in ("sdpa", "sdpa bool mask")
            },
        }
