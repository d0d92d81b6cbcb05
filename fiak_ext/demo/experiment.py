"""The whole story: train three models, prune them by the three algorithms, fine-tune, measure, write it all down."""

from __future__ import annotations

import copy
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from fiak_ext import (
    PriorAttention,
    PruningReport,
    SparsePattern,
    VisionTransformer,
    compact,
    flops,
    prune,
    which_kernel,
)
from fiak_ext.demo.data import IMAGE_SIZE, Images
from fiak_ext.demo.plots import save_picture
from fiak_ext.demo.speed import attention_core, compare
from fiak_ext.demo.table import Row, environment, format_table
from fiak_ext.demo.training import accuracy, num_steps, train

__all__ = ["PRUNINGS", "Pruning", "Recipe", "run"]

_BAR = "{desc} {percentage:3.0f}%|{bar:24}| left {remaining}{postfix}"
_SPEED_BATCH = 64

Kind = Literal["softmax", "gmm", "fiak"]


@dataclass(frozen=True)
class Recipe:
    """A model small enough for two cores, and how it is trained; fine-tuning is short and gentle."""

    patch_size: int = 4
    dim: int = 64
    depth: int = 3
    num_heads: int = 4
    parameterization: Literal["logits", "clamp"] = "clamp"
    epochs: int = 12
    lr: float = 2e-3
    tuning_epochs: int = 2
    tuning_lr: float = 1.25e-4
    batch_size: int = 50
    weight_decay: float = 0.05


@dataclass(frozen=True)
class Pruning:
    """What :func:`fiak_ext.prune` is asked to do, and with which of the trained models."""

    name: str
    kind: Kind
    amount: float | None = None
    keys: float = 0.0
    importance: Literal["prior", "random"] = "prior"


PRUNINGS = (
    Pruning("pairs 50%", "fiak", amount=0.5),
    Pruning("pairs 60%", "fiak", amount=0.6),
    Pruning("pairs 70%", "fiak", amount=0.7),
    Pruning("mixed 70%, 15% keys", "fiak", amount=0.7, keys=0.15),
    Pruning("mixed 70%, 20% keys", "fiak", amount=0.7, keys=0.2),
    Pruning("GMM, 30% keys", "gmm", keys=0.3),
    Pruning("random 70%", "fiak", amount=0.7, importance="random"),
)
_DENSE: dict[Kind, str] = {"softmax": "softmax", "gmm": "GMM", "fiak": "FiAK"}
_NAME_WIDTH = max(len(pruning.name) for pruning in PRUNINGS)


def run(data: Images, output: Path, *, recipe: Recipe, seed: int = 0) -> list[Row]:
    """Runs the demo: prints its progress and the table, and fills the folder ``output``.

    The folder gets ``results.json``, a checkpoint (``.pt``) of each model and a picture (``.png``) of each model with
    priors; files of these names are overwritten. The same seed, versions and number of threads give the same
    accuracies and patterns.

    Returns:
        The rows of the table.

    Raises:
        OSError: ``output`` cannot be written.
    """
    start = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    with _deterministic(), _Experiment(data, output, recipe, seed) as experiment:
        dense = {kind: experiment.train_dense(kind) for kind in _DENSE}
        pruned = [experiment.prune(pruning, dense[pruning.kind]) for pruning in PRUNINGS]
    rows = _measure([*dense.values(), *pruned], data.test_images[:_SPEED_BATCH])
    seconds = time.perf_counter() - start
    results = {
        "data": {"name": data.name, "train": len(data.train_images), "test": len(data.test_images)},
        "recipe": asdict(recipe),
        "seed": seed,
        "speed_batch": _SPEED_BATCH,
        "seconds": seconds,
        "environment": environment(),
        "rows": [row.to_dict() for row in rows],
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{format_table(rows, batch=_SPEED_BATCH)}\n")
    print(f"{seconds:.0f} seconds; the table as JSON, checkpoints and pictures are in {output}/")
    return rows


@dataclass(frozen=True)
class _Trained:
    """A dense model; or a pruned one, fine-tuned and compacted."""

    name: str
    model: VisionTransformer
    accuracy: float
    accuracy_before: float | None = None
    report: PruningReport | None = None


class _Experiment(AbstractContextManager["_Experiment"]):
    """Trains model after model under one progress bar, and writes each down."""

    def __init__(self, data: Images, output: Path, recipe: Recipe, seed: int) -> None:
        self.data = data
        self.output = output
        self.recipe = recipe
        self.seed = seed
        epochs = len(_DENSE) * recipe.epochs + len(PRUNINGS) * recipe.tuning_epochs
        steps = num_steps(len(data.train_images), epochs, recipe.batch_size)
        self.bar = tqdm(total=steps, bar_format=_BAR, leave=False, disable=None)

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def train_dense(self, kind: Kind) -> _Trained:
        """A model of one kind; all start from the same weights."""
        torch.manual_seed(self.seed)
        model = VisionTransformer(**self._arguments(kind))
        name, recipe = _DENSE[kind], self.recipe
        self._train(model, name, epochs=recipe.epochs, lr=recipe.lr, seed=self.seed)
        percent = self._accuracy(model)
        self._save(kind, kind, model)
        if kind != "softmax":
            save_picture(self.output / f"{kind}.png", f"{name}: {percent:.1f}%", _priors(model))
        _say(f"trained  {name:<{_NAME_WIDTH}}  {percent:5.1f}%")
        return _Trained(name, model, percent)

    def prune(self, pruning: Pruning, dense: _Trained) -> _Trained:
        """A pruned copy of a dense model: fine-tuned, then freed of the projections it needs no more."""
        model, name, recipe = copy.deepcopy(dense.model), pruning.name, self.recipe
        priors = _priors(model)
        generator = torch.Generator().manual_seed(self.seed) if pruning.importance == "random" else None
        report = prune(model, pruning.amount, keys=pruning.keys, importance=pruning.importance, generator=generator)
        masks = [pattern.to_mask()[0] for pattern in _patterns(model)]
        before = self._accuracy(model)
        self._train(model, name, epochs=recipe.tuning_epochs, lr=recipe.tuning_lr, seed=self.seed + 1)
        compact(model)
        after = self._accuracy(model)
        stem = name.lower().replace("%", "").replace(",", "").replace(" ", "-")
        self._save(stem, pruning.kind, model)
        title = f"{dense.name}: {dense.accuracy:.1f}%; pruned, {name}: {before:.1f}%; fine-tuned: {after:.1f}%"
        save_picture(self.output / f"{stem}.png", title, priors, masks)
        _say(f"pruned   {name:<{_NAME_WIDTH}}  {before:5.1f}%, fine-tuned {after:5.1f}%")
        return _Trained(name, model, after, before, report)

    def _arguments(self, kind: Kind) -> dict[str, Any]:
        return {
            "image_size": IMAGE_SIZE,
            "patch_size": self.recipe.patch_size,
            "in_channels": self.data.channels,
            "num_classes": len(self.data.classes),
            "dim": self.recipe.dim,
            "depth": self.recipe.depth,
            "num_heads": self.recipe.num_heads,
            "parameterization": self.recipe.parameterization,
            "kind": kind,
        }

    def _train(self, model: VisionTransformer, name: str, *, epochs: int, lr: float, seed: int) -> None:
        mean = math.nan

        def on_step(loss: float) -> None:
            nonlocal mean
            mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
            self.bar.set_postfix_str(f"loss {mean:.3f}", refresh=False)
            self.bar.update()

        self.bar.set_description_str(f"{name:<{_NAME_WIDTH}}", refresh=False)
        images, labels = self.data.train_images, self.data.train_labels
        batch_size, weight_decay = self.recipe.batch_size, self.recipe.weight_decay
        train(
            model,
            images,
            labels,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            seed=seed,
            on_step=on_step,
        )

    def _accuracy(self, model: VisionTransformer) -> float:
        return accuracy(model, self.data.test_images, self.data.test_labels)

    def _save(self, stem: str, kind: Kind, model: VisionTransformer) -> None:
        """All that it takes to use the model: ``VisionTransformer(**arguments)`` loads ``state_dict``."""
        checkpoint = {
            "arguments": self._arguments(kind),
            "state_dict": model.state_dict(),
            "classes": list(self.data.classes),
            "mean": self.data.mean,
            "deviation": self.data.deviation,
        }
        torch.save(checkpoint, self.output / f"{stem}.pt")


def _say(text: str) -> None:
    """Prints a line at once, above the progress bar."""
    tqdm.write(text)
    sys.stdout.flush()


def _measure(trained: Sequence[_Trained], images: Tensor) -> list[Row]:
    """Counts operations and measures speed; the first model is the dense one that all are compared with."""
    return [_row(result, trained[0], images) for result in tqdm(trained, "measuring", leave=False, disable=None)]


def _row(result: _Trained, baseline: _Trained, images: Tensor) -> Row:
    model, patterns = result.model, _patterns(result.model)
    attention_speed = compare(attention_core(baseline.model, images), attention_core(model, images), len(images))
    model_speed = compare(partial(baseline.model, images), partial(model, images), len(images))
    if result is baseline:  # what was measured is how well measurements repeat
        attention_speed, model_speed = replace(attention_speed, ratio=1.0), replace(model_speed, ratio=1.0)
        kernel = "torch SDPA"
    else:
        kernel = which_kernel("csr_attention" if patterns else "prior_attention", images.dtype)
    return Row(
        name=result.name,
        accuracy_before=result.accuracy_before,
        accuracy=result.accuracy,
        flops=flops.model_report(model, images[:1]),
        pattern_bytes=sum(pattern.num_bytes for pattern in patterns),
        plan_bytes=sum(pattern.plan.nbytes for pattern in patterns),
        attention_speed=attention_speed,
        model_speed=model_speed,
        kernel=kernel,
        pruning=None if result.report is None else result.report.to_dict(),
    )


def _attentions(model: VisionTransformer) -> list[PriorAttention]:
    return [module for module in model.modules() if isinstance(module, PriorAttention)]


def _patterns(model: VisionTransformer) -> list[SparsePattern]:
    """Of each layer; none before pruning."""
    patterns = [attention.pattern for attention in _attentions(model)]
    return [pattern for pattern in patterns if pattern is not None]


def _priors(model: VisionTransformer) -> list[Tensor]:
    """What pruning ranks by, ``[num_heads, N, N]`` of each layer."""
    return [attention.importance()[0] for attention in _attentions(model)]


@contextmanager
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
