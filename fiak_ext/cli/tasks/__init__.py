"""Models by name, a file for each kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import torch

from fiak_ext.cli.errors import CommandError, first_line
from fiak_ext.cli.tasks.base import Task
from fiak_ext.cli.tasks.hugging_face import load_hugging_face
from fiak_ext.cli.tasks.images import DESCRIPTION, DescribedClassifier
from fiak_ext.cli.tasks.own import OwnClassifier
from fiak_ext.cli.tasks.timm import TimmClassifier

__all__ = ["Task", "load"]


def load(spec: str, *, pretrained: bool = True) -> Task:
    """The model that ``--model`` names.

    Args:
        spec: ``hf:PATH``, ``timm:NAME``, a checkpoint of ``fiak demo`` or a folder of ``fiak prune``.
        pretrained: whether ``timm:NAME`` has its pretrained weights; random ones otherwise.

    Raises:
        CommandError: a name of another form, or a model that cannot be loaded.
    """
    library, _, name = spec.partition(":")
    if library == "hf" and name:
        return load_hugging_face(name)
    if library == "timm" and name:
        return TimmClassifier(name, pretrained=pretrained)
    path = Path(spec)
    if (path / DESCRIPTION).is_file():
        return _load_saved(path)
    if (path / "config.json").is_file():
        return load_hugging_face(spec)
    if not path.is_file():
        raise CommandError(
            f"--model must be hf:PATH, timm:NAME, a checkpoint of fiak demo or a folder of fiak prune (got {spec!r})"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CommandError(f"--model: {path} must be a checkpoint of fiak demo ({first_line(error)})") from error
    if not isinstance(checkpoint, dict) or not {"arguments", "state_dict"} <= set(checkpoint):
        raise CommandError(f"--model: {path} must be a checkpoint of fiak demo (got other contents)")
    return OwnClassifier(checkpoint["arguments"], checkpoint["state_dict"], path)


def _load_saved(folder: Path) -> Task:
    try:
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--model: {folder / DESCRIPTION} must be JSON ({first_line(error)})") from error
    task: DescribedClassifier
    if isinstance(description, dict) and isinstance(description.get("timm"), str):
        task = TimmClassifier(description["timm"], pretrained=False)
    elif isinstance(description, dict) and isinstance(description.get("VisionTransformer"), dict):
        task = OwnClassifier(description["VisionTransformer"], None, folder / DESCRIPTION)
    else:
        raise CommandError(
            f"--model: {folder / DESCRIPTION} must name a model as fiak prune does (got {description!r})"
        )
    task.load(folder)
    return task
