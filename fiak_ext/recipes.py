"""What pruning a trained model takes around it: inputs from texts, fine-tuning, and how near it stays to the original.

The command line and the benchmarks are made of these; they are plain enough to be copied into a loop of one's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext.models import param_groups

__all__ = [
    "TextBatches",
    "cosine_loss",
    "divergence_loss",
    "embed",
    "embeddings",
    "fine_tune",
    "mean_cosine",
    "mean_divergence",
    "predictions",
    "text_batches",
]

_WARM_UP = 0.1  # share of the steps
_HELD_OUT = 5  # the last fifth of the texts is for evaluation

Batch = Mapping[str, Tensor]


def embeddings(model: nn.Module, batch: Batch) -> Tensor:
    """The embedding of each text, ``[B, dim]`` of length 1: the mean of its tokens' last hidden states.

    That is how the models of sentence-transformers pool whose name says "mean tokens", all-MiniLM among them.

    Args:
        model: of Hugging Face transformers, with an output ``last_hidden_state``.
        batch: ``input_ids`` and ``attention_mask``, int64 ``[B, n]``, as keyword arguments of the model.
    """
    hidden = model(**batch).last_hidden_state
    visible = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * visible).sum(1) / visible.sum(1).clamp(min=1), dim=-1)


def cosine_loss(teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss for :func:`fine_tune` that needs no labels: 1 - cosine of a text's embedding to the teacher's, its mean.

    Args:
        teacher: the model before pruning, which is run without gradients in the mode that it is in.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = embeddings(teacher, batch)
        return 1 - (embeddings(model, batch) * target).sum(-1).mean()

    return loss


@torch.no_grad()
def embed(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """The :func:`embeddings` of all texts, ``[n, dim]``; the model is left in evaluation mode."""
    model.eval()
    return torch.cat([embeddings(model, batch) for batch in batches])


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """The mean over all texts of the cosine of two models' :func:`embed`, both ``[n, dim]``."""
    return float((first.double() * second.double()).sum(-1).mean())


def predictions(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of what a model predicts, ``[n, classes]``: for each text, or for each token that is no padding.

    Args:
        model: of Hugging Face transformers, with an output ``logits``, ``[B, classes]`` (a classifier) or ``[B, tokens,
            classes]`` (a language model).
        batch: ``input_ids`` and ``attention_mask``, int64 ``[B, tokens]``, and what else the model is to be told, as
            keyword arguments of the model.
    """
    logits: Tensor = model(**batch).logits
    return logits if logits.dim() == 2 else logits[batch["attention_mask"].bool()]


def divergence_loss(teacher: nn.Module) -> Callable[[nn.Module, Batch], Tensor]:
    """A loss for :func:`fine_tune` that needs no labels: the mean KL divergence from the teacher's :func:`predictions`.

    Args:
        teacher: the model before pruning, which is run without gradients in the mode that it is in.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = predictions(teacher, batch).float().log_softmax(-1)
        own = predictions(model, batch).float().log_softmax(-1)
        return F.kl_div(own, target, log_target=True, reduction="batchmean")

    return loss


@torch.no_grad()
def mean_divergence(model: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> float:
    """The mean KL divergence, in nats, of a model's :func:`predictions` from the teacher's; both in evaluation mode."""
    model.eval()
    teacher.eval()
    total, count = 0.0, 0
    for batch in batches:
        target = predictions(teacher, batch).float().log_softmax(-1)
        own = predictions(model, batch).float().log_softmax(-1)
        total += float(F.kl_div(own, target, log_target=True, reduction="sum"))
        count += len(own)
    return total / count


def fine_tune(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.0,
    on_step: Callable[[float], None] | None = None,
) -> None:
    """Trains with AdamW; the learning rate rises over the first tenth of the steps and falls to 0 along a cosine.

    Dropout is off (evaluation mode, in which the model is left): a few steps back to what a trained model computed are
    not there to regularise it.

    Args:
        model: trained in place.
        batches: run through again where there are fewer than ``steps``.
        loss: called as ``loss(model, batch)``.
        steps, lr, weight_decay: as usual; priors, where there are any, have a learning rate of their own
            (:func:`~fiak_ext.param_groups`).
        on_step: called with the loss after each step.

    Raises:
        ValueError: no batches.
    """
    warm_up = max(1, round(_WARM_UP * steps))
    optimizer = torch.optim.AdamW(param_groups(model, lr, weight_decay=weight_decay))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / max(steps, 1)))
    )
    model.eval()
    for batch in _first(batches, steps):
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        scheduler.step()
        if on_step is not None:
            on_step(value.item())


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    kept = list(batches)
    if not kept:
        raise ValueError("fine_tune: batches must hold at least one batch (got none)")
    for index in range(count):
        yield kept[index % len(kept)]


@dataclass(frozen=True)
class TextBatches:
    """Batches of texts in three parts without a text in common.

    Attributes:
        calibration, tuning, evaluation: batches with ``input_ids`` and ``attention_mask``, int64 ``[B, n]``.
    """

    calibration: list[dict[str, Tensor]]
    tuning: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]

    def lengths(self) -> Tensor:
        """int64 ``[n]``: the number of tokens of each text for evaluation."""
        return torch.cat([batch["attention_mask"].sum(1) for batch in self.evaluation])


def text_batches(
    tokenizer: Any,
    lines: Sequence[str],
    num_tokens: int,
    *,
    fill: bool,
    calibration: int = 256,
    tuning: int = 512,
    evaluation: int = 256,
    batch_size: int = 16,
    seed: int = 0,
) -> TextBatches:
    """Texts for a model of Hugging Face transformers, always the same ones.

    The texts for evaluation come from the last fifth of the lines, all others from what is before it; each part is
    drawn evenly at random, and no text is in two parts.

    Args:
        tokenizer: of the model.
        lines: one text each, or running text; empty ones are left out.
        num_tokens: of the longest text, special tokens included.
        fill: True: the lines are running text, which is cut into texts of exactly ``num_tokens``. False: each line is a
            text, cut off behind ``num_tokens``; batches are padded at the end to their longest.
        calibration, tuning, evaluation: at most so many texts.
        batch_size: texts in a batch, fewer in the last of a part.
        seed: of the draws.

    Raises:
        ValueError: too few texts for one batch of each part, or no room for a token beside the special ones.
    """
    lines = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    last = len(lines) - len(lines) // _HELD_OUT
    generator = torch.Generator().manual_seed(seed)
    others, held_out = (
        _shuffled(_texts(tokenizer, part, num_tokens, fill), generator) for part in (lines[:last], lines[last:])
    )
    if len(others) < 2 * batch_size or len(held_out) < batch_size:
        raise ValueError(
            f"text_batches: lines must give {3 * batch_size} texts of {num_tokens} tokens or more, a third of them in "
            f"their last fifth (got {len(others)} and {len(held_out)})"
        )
    calibration = min(calibration, len(others) // 2)
    parts = (others[:calibration], others[calibration : calibration + tuning], held_out[:evaluation])
    return TextBatches(*([_padded(tokenizer, texts) for texts in _chunks(part, batch_size)] for part in parts))


def _texts(tokenizer: Any, lines: Sequence[str], num_tokens: int, fill: bool) -> list[list[int]]:
    if not lines:
        return []
    before, after = _special_tokens(tokenizer)
    room = num_tokens - len(before) - len(after)
    if room < 1:
        raise ValueError(f"text_batches: num_tokens must leave room beside the special tokens (got {num_tokens})")
    tokens = tokenizer(list(lines), add_special_tokens=False, verbose=False)["input_ids"]
    if fill:
        running = [token for line in tokens for token in line]
        tokens = [running[start : start + room] for start in range(0, len(running) - room + 1, room)]
    return [before + text[:room] + after for text in tokens]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _shuffled(texts: list[list[int]], generator: torch.Generator) -> list[list[int]]:
    return [texts[index] for index in torch.randperm(len(texts), generator=generator).tolist()]


def _chunks(texts: list[list[int]], size: int) -> list[list[list[int]]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _padded(tokenizer: Any, texts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, texts))
    padding = tokenizer.pad_token_id or 0
    ids = torch.tensor([text + [padding] * (longest - len(text)) for text in texts])
    visible = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": visible}
