"""What a command needs to know of a model, whatever its kind."""

from __future__ import annotations

import argparse
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fiak_ext
from fiak_ext.nn import PriorAttention

__all__ = ["Data", "Task"]


@dataclass
class Data:
    """Batches as ``Task.forward`` takes them; none is in two parts."""

    calibration: list[Any]
    tuning: list[Any]
    evaluation: list[Any]


class Task(ABC):
    """A model that a command got by name, and what it is for.

    Attributes:
        model: as it was loaded, in evaluation mode: dense, or pruned already.
        measure: what :meth:`score` measures.
        has_labels: whether batches of data have labels.
    """

    model: nn.Module
    measure: str
    has_labels: bool

    @abstractmethod
    def dense(self) -> nn.Module:
        """The architecture with dense attention of its own library, in evaluation mode: a baseline for speed."""

    def convert(self, num_tokens: int | None) -> nn.Module:
        """A copy of the model with :class:`~fiak_ext.PriorAttention`."""
        if any(isinstance(module, PriorAttention) for module in self.model.modules()):
            return copy.deepcopy(self.model)
        return fiak_ext.convert(copy.deepcopy(self.model), num_tokens=num_tokens, kind="softmax")

    @abstractmethod
    def example(self, batch_size: int, num_tokens: int | None) -> Any:
        """Inputs of the longest kind, of no meaning."""

    @abstractmethod
    def data(self, path: Path, options: argparse.Namespace) -> Data:
        """Batches of what lies at a path, as the options of ``fiak prune`` ask for them.

        Raises:
            CommandError: a path that does not hold what the model takes.
        """

    @abstractmethod
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """What the loss and the score look at."""

    @abstractmethod
    def loss(self, dense: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
        """For fine-tuning."""

    @abstractmethod
    def score(self, model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> float:
        """How good a model is, as :attr:`measure` says, on batches."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes a model, and what it takes to load it, into a folder."""
