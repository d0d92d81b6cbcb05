"""Models of timm."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from fiak_ext.cli.errors import CommandError, first_line, require
from fiak_ext.cli.tasks.base import Data
from fiak_ext.cli.tasks.images import DescribedClassifier

__all__ = ["TimmClassifier"]


class TimmClassifier(DescribedClassifier):
    """A model of timm, and an ImageFolder for it."""

    def __init__(self, name: str, *, pretrained: bool) -> None:
        timm = require("timm", "timm:")
        self.name = name
        try:
            self.model = timm.create_model(name, pretrained=pretrained).eval()
        except (RuntimeError, OSError, ValueError) as error:
            raise CommandError(
                f"--model: timm:{name} must be a model of timm, with weights that can be loaded unless "
                f"--random-weights is given ({first_line(error)})"
            ) from error
        self.image_shape = tuple(timm.data.resolve_data_config(model=self.model)["input_size"])

    def dense(self) -> nn.Module:
        timm = require("timm", "timm:")
        model: nn.Module = timm.create_model(self.name)
        return model.eval()

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        data = require("timm.data", "timm:")
        transform = data.create_transform(**data.resolve_data_config(model=self.model))
        return self.image_folder(path, transform, options)

    def description(self) -> dict[str, Any]:
        return {"timm": self.name}
