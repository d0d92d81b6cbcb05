"""What converted attention of Hugging Face transformers has in common: its interface, its masks, its forward pass.

Conversion sets the attention implementation ``"fiak"``, which is registered with transformers' attention interface and
its mask interface. The mask that models pass on to their attention is then an int64 tensor ``[B, 1, 1, 2 | 3]``: the
number of visible keys, the position of the first query (not 0 with cached keys), and, if any element is padded on the
left, the place of its first visible key. The configuration says to the library's code which implementation and which
mask to take, so converted attention refuses any other name in it, whatever has put it there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from fiak_ext import ops
from fiak_ext.conversion import ConvertedAttention, Padding, expect, roll
from fiak_ext.integrations.transformers.saving import refuse_loading

__all__ = ["HuggingFaceAttention"]

_NAME = "fiak"

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
    if not isinstance(module, HuggingFaceAttention):
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
        key, value = ops.compact_kv(key, value, attention.kept(key.size(2)))
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


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _refuse_weights(module: nn.Module, args: tuple[Any, ...], arguments: Mapping[str, Any]) -> None:
    """Called before models and their attention: no weights can be given away."""
    if arguments.get("output_attentions", getattr(module.config, "output_attentions", None)):
        raise ValueError("fiak: output_attentions must be False, as sparse attention keeps no weights (got True)")


class HuggingFaceAttention(ConvertedAttention):
    """The library's own forward pass, which calls ``_attention``, or, once compacted, one of this class."""

    config: Any
    _cache_name: str

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # transformers 5.24 renamed the argument, and warns where it gets the old name.
        names = inspect.signature(super().forward).parameters  # the library's
        cls._cache_name = "cache" if "cache" in names else "past_key_values"

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
                    refuse_loading(own, arguments)
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
            arguments[self._cache_name] = cache
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
