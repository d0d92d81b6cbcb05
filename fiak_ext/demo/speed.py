"""Speed against a dense baseline, as the ratio of interleaved runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fiak_ext.nn import PriorAttention

__all__ = ["Speed", "attention_core", "compare"]

_SECONDS = 1.0  # of measuring for each comparison
_LEAST_ROUNDS = 5
_EVICTED_BYTES = 8 << 20


@dataclass(frozen=True)
class Speed:
    """How fast something is.

    Attributes:
        images_per_second: the median over all rounds.
        ratio: to the baseline, the median of the rounds' ratios: other programs and changing clocks, which slow both
            down, matter less to it than to absolute speed.
    """

    images_per_second: float
    ratio: float


def compare(baseline: Callable[[], object], candidate: Callable[[], object], num_images: int) -> Speed:
    """The speed of ``candidate`` against that of ``baseline``, each of which handles ``num_images`` at a call.

    Both run in turn for a second. Before every run the second-level cache is overwritten, because in a model something
    else always runs in between: a hot loop flatters sparse kernels.
    """
    scratch = torch.empty(_EVICTED_BYTES // 4)

    def timed(function: Callable[[], object]) -> float:
        scratch.zero_()
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    with torch.inference_mode():
        timed(baseline), timed(candidate)  # the first call makes plans and scratch space
        rounds: list[tuple[float, float]] = []
        end = time.perf_counter() + _SECONDS
        while time.perf_counter() < end or len(rounds) < _LEAST_ROUNDS:
            rounds.append((timed(baseline), timed(candidate)))
    return Speed(
        images_per_second=num_images / statistics.median(own for _, own in rounds),
        ratio=statistics.median(dense / own for dense, own in rounds),
    )


def attention_core(model: nn.Module, images: Tensor) -> Callable[[], None]:
    """A function that repeats all attention of one forward pass, from queries, keys and values, without projections.

    It runs in inference mode. The model is left in evaluation mode.
    """
    calls: list[tuple[PriorAttention, tuple[Any, ...], Mapping[str, Any]]] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        assert isinstance(module, PriorAttention)
        calls.append((module, args, kwargs))

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, PriorAttention)
    ]
    with torch.inference_mode():
        model.eval()(images)
    for hook in hooks:
        hook.remove()

    @torch.inference_mode()
    def run() -> None:
        for module, args, kwargs in calls:
            module(*args, **kwargs)

    return run
