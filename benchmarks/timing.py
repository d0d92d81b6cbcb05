"""Interleaved timing: every figure is a ratio of two calls of the same round, because absolute speed drifts.

Before each timed call a matrix product overwrites the caches, as the rest of a model would: a hot loop flatters sparse
kernels.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

__all__ = ["Timed", "evict_caches", "quartiles", "ratios", "timed", "times_of_rounds"]

Timed = Callable[[], dict[str, float]]
"""Runs once and returns seconds by what was timed, for example ``{"forward": 0.001}``."""

_TOKENS, _WEIGHT = torch.full((768, 192), 1e-3), torch.full((192, 1536), 1e-3)


def evict_caches() -> None:
    """A matrix product that reads and writes 6.5 MB, about the one of a model's layer."""
    _TOKENS @ _WEIGHT


def timed(call: Callable[[], object]) -> tuple[float, object]:
    """Seconds of a call after :func:`evict_caches`, and its result."""
    evict_caches()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def times_of_rounds(
    calls: Mapping[str, Timed], *, rounds: int, seconds: float, slow: Sequence[str] = (), slow_rounds: int = 3
) -> dict[str, list[dict[str, float]]]:
    """Times every call once a round, in the same order.

    Args:
        calls: by name; call each before, so that plans, scratch memory and compiled code are there.
        rounds: at most so many, and at least 3 whatever ``seconds`` says (fewer only where ``rounds`` is less).
        seconds: about how long all rounds may take, those of ``slow`` not counted.
        slow: names that take part in the first ``slow_rounds`` rounds only.
        slow_rounds: see ``slow``.

    Returns:
        By name, what each round's call returned.
    """
    results: dict[str, list[dict[str, float]]] = {name: [] for name in calls}
    spent = 0.0
    for index in range(rounds):
        if index >= 3 and spent > seconds:
            break
        for name, call in calls.items():
            if name not in slow or index < slow_rounds:
                start = time.perf_counter()
                results[name].append(call())
                spent += 0.0 if name in slow else time.perf_counter() - start
    return results


def ratios(times: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """How many times faster than the baseline, for the rounds that both took part in."""
    return [slower / faster for faster, slower in zip(times, baseline, strict=False)]


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median, third quartile; of a single value three times this value."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
