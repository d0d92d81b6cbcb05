"""Plain training and evaluation, as for any other classifier."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext.models import param_groups

__all__ = ["accuracy", "num_steps", "train"]

_WARM_UP = 0.1  # share of the steps


def num_steps(num_images: int, epochs: int, batch_size: int) -> int:
    """The number of optimizer steps that :func:`train` takes."""
    return epochs * math.ceil(num_images / batch_size)


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
    on_step: Callable[[float], None],
) -> None:
    """Trains with AdamW; the learning rate rises over the first tenth of the steps and falls to 0 along a cosine.

    The priors have a parameter group of their own (:func:`fiak_ext.param_groups`), and need nothing else.

    Args:
        model: a classifier, trained in place and left in training mode.
        images, labels: float ``[n, channels, height, width]`` and int64 ``[n]``.
        epochs, batch_size, lr, weight_decay: as usual.
        seed: of the order of the images.
        on_step: called with the loss after each step.
    """
    steps = num_steps(len(images), epochs, batch_size)
    warm_up = max(1, round(_WARM_UP * steps))
    optimizer = torch.optim.AdamW(param_groups(model, lr, weight_decay=weight_decay))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(batch_size):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            on_step(loss.item())


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The percentage of the images that the model classifies correctly; leaves the model in evaluation mode."""
    model.eval()
    batches = zip(images.split(500), labels.split(500), strict=True)
    correct = sum(int((model(batch).argmax(1) == answers).sum()) for batch, answers in batches)
    return 100 * correct / len(images)
