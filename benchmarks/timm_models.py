"""timm's DeiT-tiny and Swin-tiny in images a second, before and after: as timm has them, converted, pruned, compacted.

    python -m benchmarks.timm_models                                        both models, 1 and 2 threads: ten minutes
    python -m benchmarks.timm_models --model swin_tiny_patch4_window7_224 --threads 1 --rounds 5

Weights are random, in float32. 70% of the pairs are pruned: the patterns of DeiT are those of a trained vision
transformer (benchmarks/masks), all recorded heads in turn; Swin is calibrated on random images and ranked by mean
posterior attention, which leaves patterns without structure. Contestants take turns, in rounds. Printed are the median
speed and, with quartiles, how many times faster than timm's model, and than timm's model with packed linear layers.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.cases import Case, load_mask, recorded_heads
from benchmarks.models import PRUNED, RECORDED, speeds
from benchmarks.report import models_tables, to_json
from fiak_ext import PriorAttention, SparsePattern, calibrate, compact, convert, pack_linears, prune
from fiak_ext.demo.table import environment

__all__ = ["MODELS", "build", "compare", "main"]

MODELS = ("deit_tiny_patch16_224", "swin_tiny_patch4_window7_224")
_BASELINES = ("timm", "timm, packed linears")
_SECONDS = 120.0  # for all rounds of one model and number of threads
_CALIBRATION = 4  # images


def build(name: str, **sizes: Any) -> dict[str, nn.Module]:
    """The contestants by name, with the same random weights, in evaluation mode, without gradients.

    Args:
        name: of a model of timm that ``convert`` takes, on images of three channels.
        sizes: what ``timm.create_model`` is told beside the name.
    """
    torch.manual_seed(0)
    original = timm.create_model(name, **sizes).eval()
    pruned = convert(copy.deepcopy(original), kind="softmax")
    if isinstance(original, VisionTransformer):
        _set_recorded(pruned)
    else:
        calibrate(pruned, [_images(original, _CALIBRATION)])
        prune(pruned, PRUNED, importance="posterior")
    after = f"{PRUNED:.0%} pruned"
    models = {
        "timm": original,
        "converted": convert(copy.deepcopy(original)),
        after: pruned,
        f"{after}, compacted": compact(copy.deepcopy(pruned)),
        "timm, packed linears": pack_linears(copy.deepcopy(original)),
        f"{after}, packed linears": pack_linears(copy.deepcopy(pruned)),
    }
    return {contestant: model.requires_grad_(False) for contestant, model in models.items()}


def _set_recorded(model: nn.Module) -> None:
    mask = load_mask(RECORDED, PRUNED)
    attentions = [module for module in model.modules() if isinstance(module, PriorAttention)]
    for layer, attention in enumerate(attentions):
        heads, tokens = attention.num_heads, attention.num_keys
        case = Case("", 1, heads, heads, tokens, tokens, 1, 1, is_causal=False, recorded="")
        attention.set_pattern(SparsePattern.from_mask(recorded_heads(mask, case, layer)))


def _images(model: Any, batch: int) -> Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size)


def compare(names: Sequence[str], *, batch: int, rounds: int, **sizes: Any) -> Iterator[dict[str, Any]]:
    """Times all contestants of each model with torch's current number of threads.

    Args:
        names, sizes: as for :func:`build`.
        batch: images at a time.
        rounds: interleaved forward passes of each, fewer where they take too long.

    Yields:
        Rows as :func:`benchmarks.models.compare` yields them, without ``shares``.
    """
    for name in names:
        models = build(name, **sizes)
        measured = speeds(models, _images(models["timm"], batch), rounds, _BASELINES, _SECONDS)
        for contestant, speed in measured.items():
            yield {
                "model": name,
                "contestant": contestant,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "modes": {"eager": speed},
            }


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 (got {number})")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see ``--help``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.timm_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, metavar="NAME", help="(default: both)")
    parser.add_argument(
        "--threads", nargs="+", type=_at_least_one, default=[1, 2], metavar="N", help="torch's threads (default 1 2)"
    )
    parser.add_argument(
        "--batch", type=_at_least_one, default=16, metavar="N", help="images at a time (default %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=_at_least_one, default=15, metavar="N", help="at most so many (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for count in options.threads:
            torch.set_num_threads(count)
            rows += compare(options.model, batch=options.batch, rounds=options.rounds)
    finally:
        torch.set_num_threads(before)
    print("\n\n".join(models_tables(rows)))
    if options.json is not None:
        options.json.write_text(to_json({"machine": environment(), "models": rows}))


if __name__ == "__main__":
    main()
