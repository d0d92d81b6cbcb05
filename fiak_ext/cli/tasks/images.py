"""Classifiers of images."""

from __future__ import annotations

import argparse
import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext.cli.errors import CommandError, first_line, require
from fiak_ext.cli.tasks.base import Data, Task

__all__ = ["DESCRIPTION", "DescribedClassifier", "ImageClassifier"]

DESCRIPTION = "fiak.json"
_WEIGHTS = "model.safetensors"
_TEST_PART = 5  # where images are in one part, a fifth of them is for testing


class ImageClassifier(Task):
    """A classifier of labelled images; fine-tuning is ordinary training, by cross entropy."""

    measure = "accuracy on held-out images, percent"
    has_labels = True
    image_shape: tuple[int, int, int]

    def example(self, batch_size: int, num_tokens: int | None) -> Tensor:
        return torch.zeros(batch_size, *self.image_shape)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        output = model(batch[0] if isinstance(batch, (tuple, list)) else batch)
        output = getattr(output, "logits", output)
        assert isinstance(output, Tensor)
        return output

    def loss(self, dense: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
        return lambda model, batch: F.cross_entropy(self.forward(model, batch), batch[1])

    @torch.no_grad()
    def score(self, model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> float:
        model.eval()
        right = [(self.forward(model, batch).argmax(1) == batch[1]).double() for batch in batches]
        return 100 * float(torch.cat(right).mean())

    def image_folder(self, path: Path, transform: Callable[[Any], Tensor], options: argparse.Namespace) -> Data:
        """Batches of the pictures in DIR/train and DIR/test, or of DIR alone, in two parts."""
        data = require("timm.data", "an ImageFolder")
        train, test = path / "train", next((path / name for name in ("test", "val") if (path / name).is_dir()), path)
        folders = (train, test) if train.is_dir() else (path,)
        try:
            images: list[Any] = [data.ImageDataset(str(folder), transform=transform) for folder in folders]
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandError(f"--data: {path} must be an ImageFolder ({first_line(error)})") from error
        if len(images) == 1:
            order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(options.seed)).tolist()
            last = len(order) - len(order) // _TEST_PART
            images = [torch.utils.data.Subset(images[0], part) for part in (order[:last], order[last:])]
        return self.split(images[0], images[1], options)

    def split(
        self, train: Sequence[tuple[Tensor, int]], test: Sequence[tuple[Tensor, int]], options: argparse.Namespace
    ) -> Data:
        """Batches of images and labels, drawn from what is for training and for testing."""
        generator = torch.Generator().manual_seed(options.seed)

        def batches(items: Sequence[tuple[Tensor, int]], indices: list[int]) -> list[tuple[Tensor, Tensor]]:
            size = options.batch_size
            parts = [
                [items[index] for index in indices[start : start + size]] for start in range(0, len(indices), size)
            ]
            return [(torch.stack([x for x, _ in part]), torch.tensor([label for _, label in part])) for part in parts]

        order = torch.randperm(len(train), generator=generator).tolist()
        half = min(options.calibration, len(order) // 2)
        tuning = order[half : half + options.batch_size * options.fine_tune_steps]
        held_out = torch.randperm(len(test), generator=generator)[:1024].tolist()
        if half == 0 or not held_out:
            raise CommandError(f"--data must hold images to calibrate and to test (got {len(train)} and {len(test)})")
        return Data(batches(train, order[:half]), batches(train, tuning), batches(test, held_out))


class DescribedClassifier(ImageClassifier):
    """A classifier that is saved as its weights and a file that says how to build it again."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What it takes to build the model again, in plain JSON types."""

    def save(self, model: nn.Module, folder: Path) -> None:
        safetensors = require("safetensors.torch", "--out")
        safetensors.save_model(model, str(folder / _WEIGHTS))
        (folder / DESCRIPTION).write_text(json.dumps(self.description(), indent=1) + "\n")

    def load(self, folder: Path) -> None:
        """Takes the weights and patterns that :meth:`save` saved."""
        safetensors = require("safetensors.torch", "--model")
        try:
            self.model = self.convert(None)
            safetensors.load_model(self.model, str(folder / _WEIGHTS))
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(f"--model: {folder / _WEIGHTS} must fit {DESCRIPTION} ({first_line(error)})") from error
        self.model.eval()
