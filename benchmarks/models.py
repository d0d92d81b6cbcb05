"""Whole DeiT-tiny models in images a second, against SDPA and unfused attention, and where their time goes."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.cases import Case, load_mask, recorded_heads
from benchmarks.timing import quartiles, ratios, timed, times_of_rounds
from fiak_ext import PriorAttention, SparsePattern, VisionTransformer, pack_linears

__all__ = ["MODELS", "PRUNED", "RECORDED", "Sizes", "build", "compare", "shares", "speeds"]

PRUNED = 0.7
RECORDED = "vit_fashion_n197"  # masks of a trained model
_BASELINES = ("SDPA", "unfused FiAK", "SDPA, packed linears")
_SECONDS = 20.0  # for all rounds of one size and mode
_COMPILED = ("SDPA", "FiAK 70% pruned", "unfused FiAK", "SDPA, packed linears", "FiAK 70% pruned, packed linears")


@dataclass(frozen=True)
class Sizes:
    """A vision transformer of 1000 classes on images of three channels, and how many images it gets at a time."""

    batch: int
    image_size: int
    patch_size: int
    dim: int
    depth: int
    num_heads: int

    def model(self, kind: str) -> VisionTransformer:
        """With the same weights for every kind, in evaluation mode, without gradients."""
        torch.manual_seed(0)
        model = VisionTransformer(
            self.image_size, self.patch_size, 3, 1000, self.dim, self.depth, self.num_heads, kind=kind
        )
        return model.eval().requires_grad_(False)


MODELS = {
    "DeiT-tiny, 4 heads of 48 (the paper's)": Sizes(16, 224, 16, 192, 12, 4),
    "DeiT-tiny, 3 heads of 64 (timm's)": Sizes(16, 224, 16, 192, 12, 3),
}


class _Unfused(nn.Module):
    """Softmax attention in single operations."""

    is_compacted = False

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, kv_lens: None = None) -> Tensor:
        return torch.softmax(query @ key.transpose(2, 3) / math.sqrt(query.size(3)), 3) @ value


class _UnfusedPrior(nn.Module):
    """``exp(s) * prior``, normalised, in single operations; the prior is as it was when the module was made."""

    is_compacted = False

    def __init__(self, prior: Tensor) -> None:
        super().__init__()
        self.num_heads = prior.size(1)
        self.register_buffer("weight", prior)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, kv_lens: None = None) -> Tensor:
        weight = self.weight
        assert isinstance(weight, Tensor)
        return peers.eager(query, key, value, weight)


def build(sizes: Sizes) -> dict[str, VisionTransformer]:
    """The contestants by name: the same model with different attention, and both ends again with packed linears.

    The pruned model's patterns are those of a trained one (masks/README.md), all recorded heads in turn.
    """
    plain, pruned, unfused, unfused_prior, dense = (
        sizes.model(kind) for kind in ("softmax", "fiak", "softmax", "fiak", "fiak")
    )
    num_tokens, head_dim = plain.num_tokens, sizes.dim // sizes.num_heads
    case = Case(
        "", sizes.batch, sizes.num_heads, sizes.num_heads, num_tokens, num_tokens, head_dim, head_dim, False, ""
    )
    mask = load_mask(RECORDED, PRUNED)
    for layer in range(sizes.depth):
        _attention(pruned, layer).set_pattern(SparsePattern.from_mask(recorded_heads(mask, case, layer)))
        _block(unfused, layer).prior_attention = _Unfused(sizes.num_heads)
        _block(unfused_prior, layer).prior_attention = _UnfusedPrior(_attention(unfused_prior, layer).weight())
    csr = f"FiAK {PRUNED:.0%} pruned"
    return {
        "SDPA": plain,
        csr: pruned,
        "FiAK dense": dense,
        "unfused": unfused,
        "unfused FiAK": unfused_prior,
        "SDPA, packed linears": pack_linears(copy.deepcopy(plain)),
        f"{csr}, packed linears": pack_linears(copy.deepcopy(pruned)),
    }


def _block(model: VisionTransformer, layer: int) -> Any:
    return model.blocks[layer].attention


def _attention(model: VisionTransformer, layer: int) -> PriorAttention:
    attention = _block(model, layer).prior_attention
    assert isinstance(attention, PriorAttention)
    return attention


def _kind(module: nn.Module) -> str | None:
    """Which share a module's time belongs to; None for modules that are made of others."""
    if isinstance(module, PriorAttention | _Unfused | _UnfusedPrior):
        return "attention"
    if isinstance(module, nn.Linear):
        return "linears"
    return {nn.LayerNorm: "norm", nn.GELU: "GELU", nn.Conv2d: "patches"}.get(type(module))


def shares(model: nn.Module, images: Tensor, *, rounds: int = 5) -> dict[str, float]:
    """The share of a forward pass that attention (without projections), linear layers, ... take; they add up to 1."""
    spent: dict[str, float] = dict.fromkeys(("attention", "linears", "norm", "GELU", "patches"), 0.0)
    started: list[float] = []

    def start(*_: Any) -> None:
        started.append(time.perf_counter())

    def stop(kind: str, *_: Any) -> None:
        spent[kind] += time.perf_counter() - started.pop()

    hooks = []
    for module in model.modules():
        if (kind := _kind(module)) is not None:
            hooks.append(module.register_forward_pre_hook(start))
            hooks.append(module.register_forward_hook(partial(stop, kind)))
    with torch.no_grad():
        model(images)
        spent.update(dict.fromkeys(spent, 0.0))
        total = sum(timed(lambda: model(images))[0] for _ in range(rounds))
    for hook in hooks:
        hook.remove()
    parts = {kind: seconds / total for kind, seconds in spent.items()}
    return {**parts, "rest": 1 - sum(parts.values())}


def speeds(
    models: Mapping[str, Callable[[Tensor], Tensor]],
    images: Tensor,
    rounds: int,
    baselines: Sequence[str],
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """How fast models are on a batch of images, without gradients, in interleaved rounds.

    Args:
        models: by name.
        images: ``[batch, channels, rows, columns]``.
        rounds, seconds: see :func:`benchmarks.timing.times_of_rounds`.
        baselines: names to compare with.

    Returns:
        By name ``images_per_second`` (median) and ``ratios``: by baseline, how many times faster (quartiles).
    """

    def call(model: Callable[[Tensor], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            return {"forward": timed(partial(model, images))[0]}

    calls = {name: partial(call, model) for name, model in models.items()}
    for first in calls.values():
        first()
    results = times_of_rounds(calls, rounds=rounds, seconds=seconds)
    times = {name: [result["forward"] for result in of] for name, of in results.items()}
    return {
        name: {
            "images_per_second": images.size(0) / statistics.median(of),
            "ratios": {baseline: quartiles(ratios(of, times[baseline])) for baseline in baselines},
        }
        for name, of in times.items()
    }


def compare(*, rounds: int, compiled: bool) -> Iterator[dict[str, Any]]:
    """Times all of :data:`MODELS` in float32, without gradients, with torch's current number of threads.

    Args:
        rounds: interleaved forward passes of each.
        compiled: whether to time some of them by ``torch.compile`` as well; compiling takes about 13 s each.

    Yields:
        ``model``, ``contestant``, ``batch``, ``threads``; ``modes``: for ``"eager"`` and ``"compiled"``
        ``images_per_second`` (median) and ``ratios``, how many times faster than some baselines in the same mode
        (quartiles); ``shares`` of the eager pass.
    """
    for name, sizes in MODELS.items():
        models = build(sizes)
        images = torch.randn(sizes.batch, 3, sizes.image_size, sizes.image_size)
        modes = {"eager": speeds(models, images, rounds, _BASELINES, _SECONDS)}
        if compiled:
            torch.compiler.reset()
            functions = {key: torch.compile(models[key], fullgraph=True, dynamic=False) for key in _COMPILED}
            modes["compiled"] = speeds(functions, images, rounds, _BASELINES, _SECONDS)
        for contestant, model in models.items():
            yield {
                "model": name,
                "contestant": contestant,
                "batch": sizes.batch,
                "threads": torch.get_num_threads(),
                "modes": {mode: of[contestant] for mode, of in modes.items() if contestant in of},
                "shares": shares(model, images),
            }
