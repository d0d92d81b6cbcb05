"""Checkpoints of converted Hugging Face models.

A folder that ``save_pretrained`` has written is refused by transformers' own ``from_pretrained``, in any process: its
configuration asks for a fusion of modules (``fusion_config``) that transformers does not know, whose name says what to
call instead. Unknown weights alone would not do: transformers would leave them out and give the dense model.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from fiak_ext.conversion import convert, convert_with
from fiak_ext.nn import PriorAttention
from fiak_ext.nn.state import SAVED_STATE

__all__ = ["from_pretrained", "refuse_loading"]

_REFUSAL = "fiak: load this checkpoint with fiak_ext.from_pretrained"


def refuse_loading(config: PreTrainedConfig, arguments: Mapping[str, Any]) -> None:
    """Writes into a configuration how its model was converted, and what makes transformers refuse its checkpoint.

    Args:
        config: of a converted model, and of no other.
        arguments: of ``convert``.
    """
    config.fiak = dict(arguments)
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), _REFUSAL: True}


def from_pretrained(folder: str | Path, variant: str | None = None) -> PreTrainedModel:
    """See :func:`fiak_ext.from_pretrained`."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"from_pretrained: folder must hold a config.json (got {str(folder)!r})")
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    arguments = getattr(config, "fiak", None)
    names = {name for name, p in inspect.signature(convert).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if not isinstance(arguments, dict) or set(arguments) != names:
        raise ValueError(
            f"from_pretrained: config.json must hold 'fiak' with {', '.join(sorted(names))}, as converted models save "
            f"it (got {arguments!r})"
        )
    if _REFUSAL in (fusions := getattr(config, "fusion_config", None) or {}):
        config.fusion_config = {name: options for name, options in fusions.items() if name != _REFUSAL}
    architecture = (config.architectures or ["none"])[0]
    found = getattr(transformers, architecture, None)
    model_class: Any = found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
    if model_class is None:
        raise ValueError(f"from_pretrained: architectures must name a model of transformers (got {architecture!r})")
    files = _weight_files(folder, variant)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report what belongs to the priors as unexpected
    try:
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            variant=variant,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
    unknown = [name for name in report["unexpected_keys"] if ".prior_attention." not in name]
    if unknown or report["missing_keys"]:
        raise ValueError(
            f"from_pretrained: weights must be those of {architecture} (got none for "
            f"{sorted(report['missing_keys'])}, and {sorted(unknown)} in addition)"
        )
    convert_with(_without_prior, model, **arguments)
    _load_priors(model, files)
    return model


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The safetensors files that transformers loads the weights from, by the same rule."""
    middle = "" if variant is None else f".{variant}"
    if Path(middle).name != middle:
        raise ValueError(f"from_pretrained: variant must be a part of the name of files (got {variant!r})")
    single, index = folder / f"model{middle}.safetensors", folder / f"model.safetensors.index{middle}.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"from_pretrained: folder must hold {single.name} or {index.name} (got {str(folder)!r})")
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise ValueError(f"from_pretrained: {index.name} must name files of its folder (got {outside})")
    return [folder / name for name in names]


def _without_prior(*, num_queries: int, **arguments: Any) -> PriorAttention:
    """Attention whose prior, if it has one, comes from a file: nothing is allocated before its size is known there."""
    attention = PriorAttention(num_queries=1, **arguments)
    attention.num_queries = attention.num_keys = num_queries
    attention.prior = None
    return attention


def _load_priors(model: PreTrainedModel, files: Sequence[Path]) -> None:
    attentions = {name: module for name, module in model.named_modules() if isinstance(module, PriorAttention)}
    own = [f"{name}.{suffix}" for name in attentions for suffix in ("prior", *SAVED_STATE)]
    # transformers saves some models by other names than their modules have now.
    saved = revert_weight_conversion(model, {name: torch.tensor(place) for place, name in enumerate(own)})
    name_in_model = {name: own[int(place)] for name, place in saved.items()}
    found: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unknown: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():
                if name in name_in_model:
                    found[name] = file
                    shapes[name_in_model[name]] = tuple(content.get_slice(name).get_shape())
                elif ".prior_attention." in name:
                    unknown.append(name)
    for name, attention in attentions.items():
        _expect_sizes(name, attention, shapes)
        if f"{name}.prior" in shapes:
            attention._restore_prior()
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as content:
            tensors |= {name_in_model[name]: content.get_tensor(name) for name, place in found.items() if place == file}
    unknown += model.load_state_dict(tensors, strict=False).unexpected_keys
    if unknown:
        raise ValueError(
            f"from_pretrained: priors must be those of the model's attention (got {sorted(unknown)} in addition)"
        )
    missing = [
        f"{name}.prior"
        for name, attention in attentions.items()
        if attention.prior is None and attention.kind != "softmax" and not attention.is_pruned
    ]
    if missing:
        raise ValueError(f"from_pretrained: priors must be there for all attention (got none for {missing})")


def _expect_sizes(name: str, attention: PriorAttention, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the sizes in the files with those of the configuration, before anything of these sizes is made."""
    rows = attention.groups * attention.num_queries
    prior, crow = shapes.get(f"{name}.prior"), shapes.get(f"{name}.pattern_crow_indices")
    if prior is not None:
        queries = attention.num_queries if attention.kind == "fiak" else 1
        expected = (attention.groups, attention.num_heads, queries, attention.num_keys)
        if attention.kind == "softmax" or prior != expected:
            raise ValueError(
                "from_pretrained: sizes must be those of config.json, "
                f"{'none' if attention.kind == 'softmax' else expected} for {name}.prior (got {prior})"
            )
    if crow is not None and crow not in ((rows + 1,), (attention.num_heads * rows + 1,)):
        raise ValueError(
            f"from_pretrained: sizes must be those of config.json (got {name}.pattern: SparsePattern: crow_indices "
            f"must have {attention.num_heads * rows + 1} elements, got shape {crow})"
        )
