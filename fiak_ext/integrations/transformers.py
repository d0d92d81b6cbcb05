"""Hugging Face transformers: the attention of BERT, ViT, GPT-2 and Llama and of models whose code is the same.

Conversion sets the attention implementation ``"fiak"``, which is registered with transformers' attention interface and
its mask interface. The mask that models pass on to their attention is then an int64 tensor ``[B, 1, 1, 2 | 3]``: the
number of visible keys, the position of the first query (not 0 with cached keys), and, if any element is padded on the
left, the place of its first visible key. The configuration says to the library's code which implementation and which
mask to take, so converted attention refuses any other name in it, whatever has put it there.

A folder that ``save_pretrained`` has written is refused by transformers' own ``from_pretrained``, in any process: its
configuration asks for a fusion of modules (``fusion_config``) that transformers does not know, whose name says what to
call instead. Unknown weights alone would not do: transformers would leave them out and give the dense model.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from fiak_ext.conversion import (
    ConvertedAttention,
    Padding,
    PatchGrid,
    convert,
    convert_with,
    expect,
    register_attention,
    roll,
)
from fiak_ext.nn import PriorAttention
from fiak_ext.nn.state import SAVED_STATE
from fiak_ext.projection import Weights, register_linear

__all__ = [
    "PriorBertSelfAttention",
    "PriorGPT2Attention",
    "PriorLlamaAttention",
    "PriorRobertaSelfAttention",
    "PriorViTAttention",
    "PriorViTEmbeddings",
    "from_pretrained",
]

_NAME = "fiak"
_REFUSAL = "fiak: load this checkpoint with fiak_ext.from_pretrained"

# Arguments of models that reach their attention and change nothing there.
_HARMLESS = {
    "num_items_in_batch",  # of the loss
    "output_hidden_states",  # which hooks around the layers collect
    "output_router_logits",
    "position_ids",  # which are in the position embeddings, and in the mask where they restart
    "return_dict",
    "use_cache",  # the cache itself says whether there is one
}


# ---------------------------------------------------------------------------------------------------------------------
# transformers' interfaces


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention implementation ``"fiak"``: ``[B, heads, n, D]`` to ``[B, n, heads, D]``, and no weights."""
    if not isinstance(module, _HuggingFaceAttention):
        raise ValueError(f"fiak: module must be one that convert put priors into (got {type(module).__name__})")
    module.refuse_unknown(kwargs)
    attention = module.prior_attention
    kv_lens = query_offsets = query_shifts = None
    if attention_mask is None:
        if attention.is_causal and key.size(2) != query.size(2):
            raise ValueError(f"fiak: attention_mask must say where {query.size(2)} queries of {key.size(2)} keys are")
    else:
        kv_lens, query_offsets, first = module.unpack(attention_mask)
        if first is not None:
            key, value = roll(key, first, 2), roll(value, first, 2)
            query_shifts = (first - query_offsets).clamp(min=0, max=query.size(2))
            query, query_offsets = roll(query, query_shifts, 2), (query_offsets - first).clamp(min=0)
        if not attention.is_causal or key.size(2) == query.size(2):
            query_offsets = None  # all positions from 0 on
    if attention.is_compacted:
        if kv_lens is None and not attention.is_causal:
            kv_lens = torch.full((key.size(0),), key.size(2), device=key.device)
        key, value = torch.ops.fiak.compact_kv(key, value, attention.kept(key.size(2)))
    output = attention(query, key, value, kv_lens=kv_lens, query_offsets=query_offsets)
    output = output if query_shifts is None else roll(output, -query_shifts, 2)
    return output.transpose(1, 2), None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of the attention implementation ``"fiak"``, in the form that this file begins with."""
    if kv_offset != 0:
        raise ValueError(f"fiak: cached keys must begin with the first token, not a sliding window's (got {kv_offset})")
    if mask_function is not causal_mask_function and mask_function is not bidirectional_mask_function:
        _expect_plain(mask_function, batch_size, q_length, kv_length, q_offset, device)
    if attention_mask is None:
        if isinstance(q_offset, int) and q_offset + q_length == kv_length and q_offset == 0:
            return None
        kv_lens, first = torch.full((batch_size,), kv_length, device=device), None
    else:
        visible = F.pad(attention_mask.bool(), (0, max(kv_length - attention_mask.size(-1), 0)))[:, :kv_length]
        padding = Padding(visible, "fiak: attention_mask")
        kv_lens, first = padding.kv_lens, padding.first
    columns = [kv_lens, torch.zeros_like(kv_lens) + q_offset] + ([] if first is None else [first])
    return torch.stack(columns, -1)[:, None, None]


def _expect_plain(
    mask_function: Callable[..., Tensor], batch: int, queries: int, keys: int, offset: int | Tensor, device: Any
) -> None:
    """Refuses sliding windows, packed sequences and other masks, unless they hide nothing at these sizes."""
    samples = torch.arange(batch, device=device)[:, None, None, None]
    rows = (torch.arange(queries, device=device) + offset)[None, None, :, None]
    columns = torch.arange(keys, device=device)[None, None, None]
    allowed = mask_function(samples, samples.new_zeros(()), rows, columns)
    causal = columns <= rows
    expect(
        (allowed == causal).all() | allowed.all(),
        "fiak: attention must be causal or over all tokens (got a sliding window, packed sequences or another mask)",
    )


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)
register_linear(Conv1D, lambda layer: Weights(layer.weight.t(), layer.bias))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


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


# ---------------------------------------------------------------------------------------------------------------------
# Attention classes


# transformers 5.24 renamed the argument, and warns where it gets the old name.
_CACHE = "cache" if "cache" in inspect.signature(LlamaAttention.forward).parameters else "past_key_values"


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
    """Called before models and their attention: no weights can be given away."""
    if arguments.get("output_attentions", getattr(module.config, "output_attentions", None)):
        raise ValueError("fiak: output_attentions must be False, as sparse attention keeps no weights (got True)")


class _HuggingFaceAttention(ConvertedAttention):
    """The library's own forward pass, which calls ``_attention``, or, once compacted, one of this class."""

    config: Any

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        # A configuration may be shared with models that are not converted.
        copies: dict[int, PreTrainedConfig] = {}
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PreTrainedConfig) and config._attn_implementation != _NAME:
                own = copies.setdefault(id(config), copy.deepcopy(config))
                own._attn_implementation = _NAME
                if isinstance(module, PreTrainedModel):
                    own.fiak = dict(arguments)
                    own.fusion_config = {**(getattr(config, "fusion_config", None) or {}), _REFUSAL: True}
                    # Some models do not pass the argument on to their attention.
                    module.register_forward_pre_hook(_refuse_weights, with_kwargs=True)
                module.config = own

    @property
    def model_dim(self) -> int:
        size: int = self.config.hidden_size
        return size

    def projects_all_keys(self, arguments: Mapping[str, Any]) -> bool:
        return any(arguments.get(name) is not None for name in ("cache", "past_key_values"))  # a cache takes all keys

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the library's; its second result, the weights, is None.

        Args:
            hidden_states: ``[B, n, dim]``.
            attention_mask: as this file begins with.
            position_embeddings: of Llama.
            cache, past_key_values: names of transformers 5.24 and before for the same: earlier keys and values.
            **kwargs: anything else must be None, or be known to change nothing here.

        Raises:
            ValueError: attention that would have to be another than at conversion.
        """
        self._expect_unchanged()
        self.refuse_unknown(kwargs)
        cache = past_key_values if cache is None else cache
        if self.prior_attention.is_compacted and cache is None:
            return self._compacted_forward(hidden_states, attention_mask, position_embeddings), None
        arguments: dict[str, Any] = {"attention_mask": attention_mask}
        if position_embeddings is not None:
            arguments["position_embeddings"] = position_embeddings
        if cache is not None:
            arguments[_CACHE] = cache
        output: tuple[Tensor, None] = super().forward(hidden_states, **arguments)
        return output

    def _expect_unchanged(self) -> None:
        name = self.config._attn_implementation
        if name != _NAME:
            raise ValueError(
                f"fiak: the attention implementation of a converted model must stay {_NAME!r} (got {name!r}; "
                f"set_attn_implementation({_NAME!r}) sets it back)"
            )
        known, attention = self.prior_arguments(self, ()), self.prior_attention
        if known["scale"] != attention.scale:
            raise ValueError(f"fiak: scaling must be {attention.scale}, as at conversion (got {known['scale']})")
        if self.training and known["dropout_p"] != attention.dropout_p:
            raise ValueError(
                f"fiak: dropout must be {attention.dropout_p}, as at conversion (got {known['dropout_p']})"
            )

    def refuse_unknown(self, arguments: Mapping[str, Any]) -> None:
        """Refuses arguments that ask for something that converted attention does not do.

        Raises:
            ValueError: an argument that is not None and not known to be harmless.
        """
        _refuse_weights(self, (), arguments)
        causal = self.prior_attention.is_causal
        for name, value in arguments.items():
            if name == "is_causal" and value is not None and bool(value) != causal:
                raise ValueError(f"fiak: is_causal must be {causal}, as at conversion (got {value})")
            if value is not None and name not in {*_HARMLESS, "is_causal", "output_attentions"}:
                raise ValueError(
                    f"fiak: {name} must be None, as converted attention does not use it (got {type(value).__name__})"
                )

    def unpack(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``kv_lens``, ``query_offsets`` and the places of the first visible keys of the mask ``"fiak"``.

        Raises:
            ValueError: another mask.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.int64 or mask.dim() != 4 or mask.size(-1) not in (2, 3):
            got = f"{mask.dtype}, shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"fiak: attention_mask must be [batch, keys], 1 where a token is visible (got {got})")
        kv_lens, query_offsets, *first = mask[:, 0, 0].unbind(-1)
        return kv_lens, query_offsets, first[0] if first else None

    def _compacted_forward(
        self, x: Tensor, attention_mask: Tensor | None, position_embeddings: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Projects the kept keys only. A cache takes all keys: with one, attention alone is compacted."""
        kv_lens = first = None
        if attention_mask is not None:
            kv_lens, _, first = self.unpack(attention_mask)
        if first is not None:
            x = roll(x, first, 1)
            if position_embeddings is not None:
                cosine, sine = (part.expand(x.size(0), -1, -1) for part in position_embeddings)
                position_embeddings = roll(cosine, first, 1), roll(sine, first, 1)
        query, key, value = self._project(x, position_embeddings)
        output = self.prior_attention(query, key, value, kv_lens=self.kept_lens(x, kv_lens)).transpose(1, 2).flatten(2)
        return self._output(output if first is None else roll(output, -first, 1))

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of all positions ``[B, heads, n, D]``, keys and values of the kept ones ``[B, key heads, K, D]``."""
        raise NotImplementedError

    def _output(self, x: Tensor) -> Tensor:
        """The output projection, where it belongs to the attention module."""
        return x

    def _queries(self, projected: Tensor) -> Tensor:
        return projected.unflatten(2, (self.prior_attention.num_heads, -1)).transpose(1, 2)


class _BertAttention(_HuggingFaceAttention):
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, (BertSelfAttention, RobertaSelfAttention))
        return {
            "num_heads": module.num_attention_heads,
            "is_causal": module.is_causal,
            "scale": module.scaling,
            "dropout_p": module.dropout.p,
        }

    @property
    def head_dim(self) -> int:
        size: int = self.attention_head_size  # type: ignore[assignment]
        return size

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        key = self.project_kept(x, self.key)
        return self._queries(self.query(x)), key, self.project_kept(x, self.value)


@register_attention(BertSelfAttention)
class PriorBertSelfAttention(_BertAttention, BertSelfAttention):
    """BERT (MiniLM and other sentence encoders included)."""


@register_attention(RobertaSelfAttention)
class PriorRobertaSelfAttention(_BertAttention, RobertaSelfAttention):
    """RoBERTa."""


@register_attention(ViTAttention)
class PriorViTAttention(_HuggingFaceAttention, ViTAttention):
    """ViT. Tokens are patches, so there are as many as the image has, each in its place."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, ViTAttention)
        sizes = [parent.embeddings.position_embeddings.size(1) for parent in parents if isinstance(parent, ViTModel)]
        return {
            "num_heads": module.num_attention_heads,
            "num_queries": sizes[0] if sizes else None,
            "is_causal": False,
            "scale": module.scaling,
            "dropout_p": module.attention_dropout,
        }

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().finish(model, arguments)
        for module in model.modules():
            if type(module) is ViTEmbeddings:
                embeddings: Any = module
                embeddings.__class__ = PriorViTEmbeddings
                embeddings.prior_grid = embeddings.grid_of(embeddings.image_size)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        tokens = self.prior_attention.num_queries
        if hidden_states.size(1) != tokens:
            raise ValueError(
                f"{type(self).__name__}: hidden_states must have {tokens} tokens, those of the image size that the "
                f"priors are for (got {hidden_states.size(1)}); resize_priors fits priors to another size"
            )
        return super().forward(hidden_states, *args, **kwargs)

    def unpack(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        kv_lens, query_offsets, first = super().unpack(mask)
        if first is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask must hide patches at the end only, if any")
        return kv_lens, query_offsets, first

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        key = self.project_kept(x, self.k_proj)
        return self._queries(self.q_proj(x)), key, self.project_kept(x, self.v_proj)

    def _output(self, x: Tensor) -> Tensor:
        output: Tensor = self.o_proj(x)
        return output


class PriorViTEmbeddings(PatchGrid, ViTEmbeddings):
    """ViT's embeddings, for images of the grid of patches that the priors are for."""

    patch_embeddings: Any

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of ``size``, height and width."""
        height, width = self.patch_embeddings.patch_size
        return size[0] // height, size[1] // width

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the library's.

        Raises:
            ValueError: images of another grid of patches.
        """
        self.expect_grid(self.grid_of(pixel_values.shape[-2:]))
        output: Tensor = super().forward(pixel_values, *args, **kwargs)
        return output


@register_attention(GPT2Attention)
class PriorGPT2Attention(_HuggingFaceAttention, GPT2Attention):
    """GPT-2."""

    c_attn: nn.Module
    c_proj: nn.Module
    resid_dropout: nn.Module

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, GPT2Attention)
        if module.is_cross_attention:
            raise ValueError("which is cross-attention")
        return {
            "num_heads": module.num_heads,
            "is_causal": module.is_causal,
            "scale": module.scaling,
            "dropout_p": module.attn_dropout.p,
        }

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.project_qkv(x, self.c_attn)

    def _output(self, x: Tensor) -> Tensor:
        output: Tensor = self.resid_dropout(self.c_proj(x.contiguous()))
        return output


@register_attention(LlamaAttention)
class PriorLlamaAttention(_HuggingFaceAttention, LlamaAttention):
    """Llama: grouped queries and rotary positions."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, LlamaAttention)
        return {
            "num_heads": module.config.num_attention_heads,
            "is_causal": module.is_causal,
            "scale": module.scaling,
            "dropout_p": module.attention_dropout,
        }

    @property
    def num_key_heads(self) -> int:
        heads: int = self.config.num_key_value_heads
        return heads

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        assert position_embeddings is not None
        query = self._queries(self.q_proj(x))
        key = self.project_kept(x, self.k_proj)
        value = self.project_kept(x, self.v_proj)
        cosine, sine = position_embeddings  # [1 | B, n, D]
        places = self.prior_attention.kept(x.size(1)).clamp(min=0)  # [key heads, K]; behind the last, anything will do
        query = query * cosine[:, None] + rotate_half(query) * sine[:, None]
        return query, key * cosine[:, places] + rotate_half(key) * sine[:, places], value

    def _output(self, x: Tensor) -> Tensor:
        output: Tensor = self.o_proj(x)
        return output
