"""What ``fiak prune``, ``fiak flops`` and ``fiak bench`` do: models and data by name, and a folder with the result."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fiak_ext
from fiak_ext import recipes
from fiak_ext.demo.speed import compare
from fiak_ext.demo.table import environment
from fiak_ext.flops import model_report
from fiak_ext.nn import PriorAttention

__all__ = ["CommandError", "bench", "flops", "prune"]

_DESCRIPTION = "fiak.json"
_WEIGHTS = "model.safetensors"
_HELD_OUT = 5  # where images are in one part, a fifth of them is for testing


class CommandError(Exception):
    """What the user can put right; the message is one line."""


@dataclass
class Data:
    """Batches as ``Task.forward`` takes them; none is in two parts."""

    calibration: list[Any]
    tuning: list[Any]
    evaluation: list[Any]


class Task:
    """A model that a command got by name, and what it is for.

    Attributes:
        model: as it was loaded, in evaluation mode: dense, or pruned already.
        measure: what :meth:`score` measures.
    """

    model: nn.Module
    measure: str

    def dense(self) -> nn.Module:
        """The architecture with dense attention of its own library, in evaluation mode: a baseline for speed."""
        raise NotImplementedError

    def convert(self, num_tokens: int | None) -> nn.Module:
        """A copy of the model with :class:`~fiak_ext.PriorAttention`."""
        if any(isinstance(module, PriorAttention) for module in self.model.modules()):
            return copy.deepcopy(self.model)
        return fiak_ext.convert(copy.deepcopy(self.model), num_tokens=num_tokens, kind="softmax")

    def example(self, batch_size: int, num_tokens: int | None) -> Any:
        """Inputs of the longest kind, of no meaning."""
        raise NotImplementedError

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        raise NotImplementedError

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        """What the loss and the score look at."""
        raise NotImplementedError

    def loss(self, dense: nn.Module) -> Callable[[nn.Module, Any], Tensor]:
        """For fine-tuning."""
        raise NotImplementedError

    def score(self, model: nn.Module, dense: nn.Module, batches: Sequence[Any]) -> float:
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path) -> None:
        raise NotImplementedError


class HuggingFaceTask(Task):
    """A model of Hugging Face transformers, and what makes its inputs: a tokenizer or an image processor."""

    def __init__(self, path: str, config: Any, processor: Any) -> None:
        transformers = _import("transformers", "hf:")
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
            raise CommandError(f"--data: {path}: {_line(error)}") from error
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


class ImageClassifier(Task):
    """A classifier of labelled images; fine-tuning is ordinary training, by cross entropy."""

    measure = "accuracy on held-out images, percent"
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
        data = _import("timm.data", "an ImageFolder")
        train, test = path / "train", next((path / name for name in ("test", "val") if (path / name).is_dir()), path)
        folders = (train, test) if train.is_dir() else (path,)
        try:
            images: list[Any] = [data.ImageDataset(str(folder), transform=transform) for folder in folders]
        except (OSError, RuntimeError, ValueError) as error:
            raise CommandError(f"--data: {path} must be an ImageFolder ({_line(error)})") from error
        if len(images) == 1:
            order = torch.randperm(len(images[0]), generator=torch.Generator().manual_seed(options.seed)).tolist()
            last = len(order) - len(order) // _HELD_OUT
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

    def description(self) -> dict[str, Any]:
        """What it takes to build the model again, in plain JSON types."""
        raise NotImplementedError

    def save(self, model: nn.Module, folder: Path) -> None:
        safetensors = _import("safetensors.torch", "--out")
        safetensors.save_model(model, str(folder / _WEIGHTS))
        (folder / _DESCRIPTION).write_text(json.dumps(self.description(), indent=1) + "\n")

    def load(self, folder: Path) -> None:
        """Takes the weights and patterns that :meth:`save` saved."""
        safetensors = _import("safetensors.torch", "--model")
        try:
            self.model = self.convert(None)
            safetensors.load_model(self.model, str(folder / _WEIGHTS))
        except (OSError, ValueError, RuntimeError) as error:
            raise CommandError(f"--model: {folder / _WEIGHTS} must fit {_DESCRIPTION} ({_line(error)})") from error
        self.model.eval()


class HuggingFaceClassifier(HuggingFaceTask, ImageClassifier):
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


class TimmClassifier(ImageClassifier):
    """A model of timm, and an ImageFolder for it."""

    def __init__(self, name: str, *, pretrained: bool) -> None:
        timm = _import("timm", "timm:")
        self.name = name
        try:
            self.model = timm.create_model(name, pretrained=pretrained).eval()
        except (RuntimeError, OSError, ValueError) as error:
            raise CommandError(
                f"--model: timm:{name} must be a model of timm, with weights that can be loaded unless "
                f"--random-weights is given ({_line(error)})"
            ) from error
        self.image_shape = tuple(timm.data.resolve_data_config(model=self.model)["input_size"])

    def dense(self) -> nn.Module:
        timm = _import("timm", "timm:")
        model: nn.Module = timm.create_model(self.name)
        return model.eval()

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        data = _import("timm.data", "timm:")
        transform = data.create_transform(**data.resolve_data_config(model=self.model))
        return self.image_folder(path, transform, options)

    def description(self) -> dict[str, Any]:
        return {"timm": self.name}


class OwnClassifier(ImageClassifier):
    """A :class:`~fiak_ext.VisionTransformer` that the demo saved, and images as the demo takes them."""

    def __init__(self, arguments: Mapping[str, Any], state: Mapping[str, Tensor] | None, place: Path) -> None:
        try:
            self.arguments = dict(arguments)
            self.model = fiak_ext.VisionTransformer(**arguments).eval()
            if state is not None:
                self.model.load_state_dict(state)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CommandError(f"--model: {place} must be a checkpoint of fiak demo ({_line(error)})") from error
        self.image_shape = (arguments["in_channels"], arguments["image_size"], arguments["image_size"])

    def dense(self) -> nn.Module:
        return fiak_ext.VisionTransformer(**{**self.arguments, "kind": "softmax"}).eval()

    def data(self, path: Path, options: argparse.Namespace) -> Data:
        from fiak_ext.demo.data import DataError, load_images

        try:
            images = load_images(path)
        except (DataError, OSError) as error:
            raise CommandError(_line(error)) from error
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


# What the names of architectures end with, where they say what a model is for; the others are taken for text encoders.
_ENDINGS: Mapping[str, type[HuggingFaceTask]] = {
    "ForImageClassification": HuggingFaceClassifier,
    "ForSequenceClassification": TextPredictor,
    "ForCausalLM": TextPredictor,
    "LMHeadModel": TextPredictor,
}


def _load_hugging_face(path: str) -> Task:
    transformers = _import("transformers", "hf:")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    with _hugging_face_errors(path):
        config = transformers.AutoConfig.from_pretrained(path)
        name = (config.architectures or [""])[0]
        task = next((task for ending, task in _ENDINGS.items() if name.endswith(ending)), TextEncoder)
        images = task is HuggingFaceClassifier
        processor = (transformers.AutoImageProcessor if images else transformers.AutoTokenizer).from_pretrained(path)
    return task(path, config, processor)


@contextlib.contextmanager
def _hugging_face_errors(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise CommandError(f"--model: hf:{path} must be a model of transformers ({_line(error)})") from error


def _load(spec: str, *, pretrained: bool = True) -> Task:
    library, _, name = spec.partition(":")
    if library == "hf" and name:
        return _load_hugging_face(name)
    if library == "timm" and name:
        return TimmClassifier(name, pretrained=pretrained)
    path = Path(spec)
    if (path / _DESCRIPTION).is_file():
        return _load_saved(path)
    if (path / "config.json").is_file():
        return _load_hugging_face(spec)
    if not path.is_file():
        raise CommandError(
            f"--model must be hf:PATH, timm:NAME, a checkpoint of fiak demo or a folder of fiak prune (got {spec!r})"
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise CommandError(f"--model: {path} must be a checkpoint of fiak demo ({_line(error)})") from error
    if not isinstance(checkpoint, dict) or not {"arguments", "state_dict"} <= set(checkpoint):
        raise CommandError(f"--model: {path} must be a checkpoint of fiak demo (got other contents)")
    return OwnClassifier(checkpoint["arguments"], checkpoint["state_dict"], path)


def _load_saved(folder: Path) -> Task:
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"--model: {folder / _DESCRIPTION} must be JSON ({_line(error)})") from error
    task: ImageClassifier
    if isinstance(description, dict) and isinstance(description.get("timm"), str):
        task = TimmClassifier(description["timm"], pretrained=False)
    elif isinstance(description, dict) and isinstance(description.get("VisionTransformer"), dict):
        task = OwnClassifier(description["VisionTransformer"], None, folder / _DESCRIPTION)
    else:
        raise CommandError(
            f"--model: {folder / _DESCRIPTION} must name a model as fiak prune does (got {description!r})"
        )
    task.load(folder)
    return task


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def prune(options: argparse.Namespace) -> None:
    """``fiak prune``."""
    tqdm = _import("tqdm", "fiak prune").tqdm
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.overwrite:
        raise CommandError(f"--out: {out} must not exist or be empty, unless --overwrite is given")
    if options.data is not None and not options.data.exists():
        raise CommandError(f"--data: {options.data} must exist")
    torch.manual_seed(options.seed)
    task = _load(options.model, pretrained=not options.random_weights)
    example = task.example(1, options.num_tokens)  # refuses a missing --num-tokens at once
    if _is_pruned(task.model):
        raise CommandError(f"--model: {options.model} must not be pruned already")
    if options.importance == "gradient" and isinstance(task, TextTask):
        raise CommandError("--importance: gradient needs labels, which texts do not have; posterior needs none")
    data = task.data(options.data, options)
    dense = task.model
    with _errors():
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


def _pruned(options: argparse.Namespace) -> tuple[Task, nn.Module]:
    """The model, pruned at random where it is dense and an amount is asked for."""
    task = _load(options.model, pretrained=False)
    task.example(1, options.num_tokens)
    if _is_pruned(task.model):
        if options.amount is not None:
            raise CommandError(f"--amount must be left out, as {options.model} is pruned already")
        return task, task.model
    with _errors():
        model = task.convert(options.num_tokens).eval()
        if options.amount is not None:
            fiak_ext.prune(
                model, options.amount, importance="random", generator=torch.Generator().manual_seed(options.seed)
            )
    return task, model


def _is_pruned(model: nn.Module) -> bool:
    return any(module.is_pruned for module in model.modules() if isinstance(module, PriorAttention))


def _count(model: nn.Module, example: Any) -> fiak_ext.flops.ModelFlops:
    with _errors():
        return model_report(model, **example) if isinstance(example, Mapping) else model_report(model, example)


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What the library refuses, as the command's error."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise CommandError(_line(error)) from error


def _import(name: str, user: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        raise CommandError(f"{user} needs {package}: pip install {package}") from error


def _line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
