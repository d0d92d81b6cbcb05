"""Models of our own, as ``fiak demo`` saves them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fiak_ext
from fiak_ext.cli.errors import CommandError, first_line
from fiak_ext.cli.tasks.base import Data
from fiak_ext.cli.tasks.images import DescribedClassifier
from fiak_ext.demo.data import DataError, load_images

__all__ = ["OwnClassifier"]


class OwnClassifier(DescribedClassifier):
    """A :class:`~fiak_ext.VisionTransformer` that the demo saved, and images as the demo takes them."""

    def __init__(self, arguments: Mapping[str, Any], state: Mapping[str, Tensor] | None, place: Path) -> None:
        try:
            self.arguments = dict(arguments)
            self.model = fiak_ext.VisionTransformer(**arguments).eval()
            if state is not None:
                self.model.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CommandError(f"--model: {place} must be a checkpoint of fiak demo ({first_line(error)})") from error
        self.image_shape = (arguments["in_channels"], arguments["image_size"], arguments["image_size"])

    def dense(self) -> nn.Module:
        return fiak_ext.VisionTransformer(**{**self.arguments, "kind": "softmax"}).eval()

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        try:
            images = load_images(path)
        except (DataError, OSError) as error:
            raise CommandError(first_line(error)) from error
        if (images.channels, len(images.classes)) != (self.image_shape[0], self.arguments["num_classes"]):
            raise CommandError(
                f"--data: {path} must hold images of {self.image_shape[0]} channels in {self.arguments['num_classes']} "
                f"classes, as the model's (got {images.channels} and {len(images.classes)})"
            )
        train = list(zip(images.train_images, images.train_labels.tolist(), strict=True))
        test = list(zip(images.test_images, images.test_labels.tolist(), strict=True))
        return self.split(train, test, options)

    def description(self) -> dict[str, Any]:
        return {"VisionTransformer": self.arguments}
