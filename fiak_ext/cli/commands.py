"""What ``fiak prune``, ``flops``, ``bench`` and ``demo`` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fiak_ext
from fiak_ext import recipes
from fiak_ext.cli.errors import CommandError, first_line, require
from fiak_ext.cli.tasks import Task, load
from fiak_ext.demo.data import load_images
from fiak_ext.demo.speed import compare
from fiak_ext.demo.table import environment
from fiak_ext.flops import ModelFlops, model_report
from fiak_ext.nn import PriorAttention

__all__ = ["bench", "demo", "flops", "prune"]


def prune(options: argparse.Namespace) -> None:
    """``fiak prune``."""
    tqdm = require("tqdm", "fiak prune").tqdm
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise CommandError(f"--out: {out} must not exist or be empty, unless --overwrite is given")
    if options.data is not None and not options.data.exists():
        raise CommandError(f"--data: {options.data} must exist")
    torch.manual_seed(options.seed)
    task = load(options.model, pretrained=not options.random_weights)
    example = task.example(1, options.num_tokens)  # refuses a missing --num-tokens at once
    if _is_pruned(task.model):
        raise CommandError(f"--model: {options.model} must not be pruned already")
    if options.importance == "gradient" and not task.has_labels:
        raise CommandError("--importance: gradient needs labels, which texts do not have; posterior needs none")
    data = task.data(options.data, options)
    dense = task.model
    with _library_errors():
        model = task.convert(options.num_tokens)
        dead = fiak_ext.find_dead_rows(model, data.calibration[0], forward=task.forward) if options.dead_rows else None
        if options.importance in ("posterior", "gradient"):
            loss = task.loss(dense)
            fiak_ext.calibrate(
                model,
                tqdm(data.calibration, desc="calibrating", unit="batch"),
                importance=options.importance,
                forward=task.forward if options.importance == "posterior" else loss,
            )
        report = fiak_ext.prune(
            model,
            options.amount,
            keys=options.keys,
            scope=options.scope,
            importance=options.importance,
            keep_diagonal=options.keep_diagonal,
            dead_rows=dead,
            target_flops=options.target_flops,
            example=None if options.target_flops is None else example,
        )
    scores = {"dense": task.score(dense, dense, data.evaluation), "pruned": task.score(model, dense, data.evaluation)}
    if options.fine_tune_steps:
        with tqdm(total=options.fine_tune_steps, desc="fine-tuning", unit="step") as bar:

            def on_step(loss: float) -> None:
                bar.set_postfix(loss=f"{loss:.4f}")
                bar.update()

            steps = options.fine_tune_steps
            recipes.fine_tune(model, data.tuning, task.loss(dense), steps=steps, lr=options.lr, on_step=on_step)
        scores["fine-tuned"] = task.score(model, dense, data.evaluation)
    counts = _count(model, example)
    quality = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
    text = f"{report}\n\n{task.measure}: {quality}\n\n{counts.table('torch')}\n"
    out.mkdir(parents=True, exist_ok=True)
    task.save(model, out)
    everything = {
        "environment": environment(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "measure": task.measure,
        "scores": scores,
        "pruning": report.to_dict(),
        "flops": counts.to_dict(),
    }
    (out / "report.json").write_text(json.dumps(everything, indent=1) + "\n")
    (out / "report.txt").write_text(text)
    print(f"{text}\n{out}: checkpoint, report.json, report.txt")


def flops(options: argparse.Namespace) -> None:
    """``fiak flops``."""
    task, model = _pruned(options)
    print(_count(model, task.example(options.batch_size, options.num_tokens)).table(options.convention))


def bench(options: argparse.Namespace) -> None:
    """``fiak bench``."""
    task, model = _pruned(options)
    dense = task.dense()
    example = task.example(options.batch_size, options.num_tokens)
    kwargs = example if isinstance(example, Mapping) else {}
    args = [] if isinstance(example, Mapping) else [example]
    speed = compare(lambda: dense(*args, **kwargs), lambda: model(*args, **kwargs), options.batch_size)
    print(
        f"{options.batch_size} inputs at a time, {torch.get_num_threads()} threads: {speed.images_per_second:,.1f} "
        f"inputs/s, {speed.ratio:.2f} times the dense model with scaled_dot_product_attention"
    )


def demo(options: argparse.Namespace) -> None:
    """``fiak demo``."""
    try:
        from fiak_ext.demo.experiment import Recipe, run  # needs packages that the other commands do not
    except ModuleNotFoundError as error:
        raise CommandError(
            f"{error.name} is missing; install it: {sys.executable} -m pip install {error.name}"
        ) from error
    images = load_images(options.data)
    print(images, flush=True)
    run(images, options.output, recipe=Recipe(patch_size=options.patch, epochs=options.epochs), seed=options.seed)


def _pruned(options: argparse.Namespace) -> tuple[Task, nn.Module]:
    """The model, pruned at random where it is dense and an amount is asked for."""
    task = load(options.model, pretrained=False)
    task.example(1, options.num_tokens)
    if _is_pruned(task.model):
        if options.amount is not None:
            raise CommandError(f"--amount must be left out, as {options.model} is pruned already")
        return task, task.model
    with _library_errors():
        model = task.convert(options.num_tokens).eval()
        if options.amount is not None:
            fiak_ext.prune(
                model, options.amount, importance="random", generator=torch.Generator().manual_seed(options.seed)
            )
    return task, model


def _is_pruned(model: nn.Module) -> bool:
    return any(module.is_pruned for module in model.modules() if isinstance(module, PriorAttention))


def _count(model: nn.Module, example: Any) -> ModelFlops:
    with _library_errors():
        return model_report(model, **example) if isinstance(example, Mapping) else model_report(model, example)


@contextmanager
def _library_errors() -> Iterator[None]:
    """What the library refuses, as an error of the user."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise CommandError(first_line(error)) from error
