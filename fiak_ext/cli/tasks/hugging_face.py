"""Models of Hugging Face transformers."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fiak_ext
from fiak_ext import recipes
from fiak_ext.cli.errors import CommandError, first_line, require
from fiak_ext.cli.tasks.base import Data, Task
from fiak_ext.cli.tasks.images import ImageClassifier

__all__ = ["load_hugging_face"]


class HuggingFaceTask(Task):
    """A model of Hugging Face transformers, and what makes its inputs: a tokenizer or an image processor."""

    def __init__(self, path: str, config: Any, processor: Any) -> None:
        transformers = require("transformers", "hf:")
        self.config = config
        self.processor = processor
        with _hugging_face_errors(path):
            model_class = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
            pruned = getattr(config, "fiak", None) is not None
            self.model = fiak_ext.from_pretrained(path) if pruned else model_class.from_pretrained(path)
        self.model.eval()

    def dense(self) -> nn.Module:
        config = copy.deepcopy(self.config)
        config._attn_implementation = "sdpa"
        model: nn.Module = type(self.model)(config)
        return model.eval()

    def save(self, model: nn.Module, folder: Path) -> None:
        pretrained: Any = model
        pretrained.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class TextTask(HuggingFaceTask):
    """A model of texts without labels; fine-tuning brings it back to what the dense model does.

    Attributes:
        extra: what the model is told beside a batch.
    """

    extra: Mapping[str, Any] = {}
    has_labels = False

    def example(self, batch_size: int, num_tokens: int | None) -> dict[str, Any]:
        if num_tokens is None:
            raise CommandError("--num-tokens is required for a text model")
        ids = torch.full((batch_size, num_tokens), 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.extra}

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CommandError(f"--data: {path} must be a text file in UTF-8 ({error.reason})") from error
        except OSError as error:
            raise CommandError(f"--data: {path} must be a text file ({error.strerror})") from error
        try:
            parts = recipes.text_batches(
                self.processor,
                lines,
                options.num_tokens,
                fill=options.texts == "fill",
                calibration=options.calibration,
                tuning=max(options.batch_size * options.fine_tune_steps, options.batch_size),
                batch_size=options.batch_size,
                seed=options.seed,
            )
        except ValueError as error:
            raise CommandError(f"--data: {path}: {first_line(error)}") from error
        found = (parts.calibration, parts.tuning, parts.evaluation)
        return Data(*([{**batch, **self.extra} for batch in batches] for batches in found))


class TextEncoder(TextTask):
    """Embeds texts."""

    measure = "mean cosine to the dense model's embeddings"

    def __init__(self, path: str, config: Any, processor: Any) -> None:
        super().__init__(path, config, processor)
        self._targets: Tensor | None = None  # the dense model's embeddings of the texts for evaluation
        with torch.no_grad():
            output = self.model(**self.example(1, 4))
        if getattr(output, "last_hidden_state", None) is None:
            raise CommandError(
                f"--model: hf:{path} must be a text encoder with an output last_hidden_state, a classifier or a causal "
                f"language model (got {type(self.model).__name__})"
            )

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return recipes.embeddings(model, batch)

    def loss(self, dense: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
        return recipes.cosine_loss(dense)

    def score(self, model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> float:
        if self._targets is None:
            self._targets = recipes.embed(dense, batches)
        return 1.0 if model is dense else recipes.mean_cosine(recipes.embed(model, batches), self._targets)


class TextPredictor(TextTask):
    """Predicts the class of each text, or the token that follows each."""

    measure = "mean KL divergence from the dense model's predictions, in nats"

    def __init__(self, path: str, config: Any, processor: Any) -> None:
        super().__init__(path, config, processor)
        pretrained: Any = self.model
        if pretrained.can_generate():
            self.extra = {"use_cache": False}
        elif config.num_labels < 2:
            raise CommandError(f"--model: hf:{path} must tell at least two classes apart (got {config.num_labels})")

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return recipes.predictions(model, batch)

    def loss(self, dense: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
        return recipes.divergence_loss(dense)

    def score(self, model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> float:
        return recipes.mean_divergence(model, dense, batches)


class HuggingFaceImageClassifier(HuggingFaceTask, ImageClassifier):
    """An image classifier of Hugging Face transformers, and an ImageFolder for it."""

    def __init__(self, path: str, config: Any, processor: Any) -> None:
        super().__init__(path, config, processor)
        size = config.image_size
        self.image_shape = (config.num_channels, *((size, size) if isinstance(size, int) else size))

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        def transform(picture: Any) -> Tensor:
            pixels: Tensor = self.processor(picture, return_tensors="pt")["pixel_values"][0]
            return pixels

        return self.image_folder(path, transform, options)


# What the names of architectures end with, where they say what a model is for; the others are taken for text encoders.
_ENDINGS: Mapping[str, type[HuggingFaceTask]] = {
    "ForImageClassification": HuggingFaceImageClassifier,
    "ForSequenceClassification": TextPredictor,
    "ForCausalLM": TextPredictor,
    "LMHeadModel": TextPredictor,
}


def load_hugging_face(path: str) -> Task:
    """The model in a folder, or of a name on the hub.

    Raises:
        CommandError: none that transformers can load, or none of a kind that the commands take.
    """
    transformers = require("transformers", "hf:")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with _hugging_face_errors(path):
        config = transformers.AutoConfig.from_pretrained(path)
        name = (config.architectures or [""])[0]
        task = next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), TextEncoder)
        images = task is HuggingFaceImageClassifier
        processor = (transformers.AutoImageProcessor if images else transformers.AutoTokenizer).from_pretrained(path)
    return task(path, config, processor)


@contextmanager
def _hugging_face_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"--model: hf:{path} must be a model of transformers ({first_line(error)})") from error
