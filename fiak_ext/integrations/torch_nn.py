"""``torch.nn.MultiheadAttention``, and with it ``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fiak_ext.conversion import ConvertedAttention, Padding, expect, register_attention
from fiak_ext.projection import Weights

__all__ = ["PriorMultiheadAttention", "PriorTransformerDecoderLayer"]


@register_attention(nn.MultiheadAttention)
class PriorMultiheadAttention(ConvertedAttention, nn.MultiheadAttention):
    """Self-attention of ``torch.nn.MultiheadAttention`` with priors. Masks hide padding, or say that it is causal."""

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, nn.MultiheadAttention)
        if not module._qkv_same_embed_dim:
            raise ValueError(f"kdim and vdim must be embed_dim (got {module.kdim} and {module.vdim})")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn must be False (got True)")
        return {"num_heads": module.num_heads, "dropout_p": module.dropout}

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False  # padding stays padding, of the length that it has

    @property
    def model_dim(self) -> int:
        return self.embed_dim

    # TransformerEncoderLayer computes its own softmax attention in evaluation mode, past this module, unless this is
    # False; only __init__ sets it, and only the forward that is replaced here reads it.
    @property
    def _qkv_same_embed_dim(self) -> bool:
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As in ``torch.nn.MultiheadAttention``, for self-attention, without its weights.

        Args:
            query: ``[B, n, embed_dim]``, or ``[n, B, embed_dim]`` unless ``batch_first``, or ``[n, embed_dim]``.
            key, value: query itself.
            key_padding_mask: ``[B, n]``, True or -inf for padding, on either side.
            need_weights: False: sparse attention has no matrix of weights to give away.
            attn_mask: None, or the causal mask where the module was converted with ``is_causal=True``.
            average_attn_weights: not used.
            is_causal: may be True only if the module is causal; a causal module is it always.

        Raises:
            ValueError: what is said above does not hold, or a nested tensor.
        """
        if key is not query or value is not query:
            raise ValueError(f"{_NAME}: key and value must be query itself (got other tensors: cross-attention)")
        if query.is_nested:
            raise ValueError(f"{_NAME}: query must not be a nested tensor: convert the TransformerEncoder as a whole")
        if need_weights:
            raise ValueError(f"{_NAME}: need_weights must be False, as sparse attention keeps no weights (got True)")
        causal = self.prior_attention.is_causal
        if is_causal and not causal:
            raise ValueError(f"{_NAME}: is_causal must be False unless converted with is_causal=True (got True)")
        batched = query.dim() == 3
        x = query if batched else query.unsqueeze(0)
        x = x.transpose(0, 1) if batched and not self.batch_first else x
        if attn_mask is not None:
            allowed = _visible(attn_mask, "attn_mask")
            plain = torch.ones_like(allowed)
            expect(
                (allowed == (plain.tril() if causal else plain)).all(),
                f"{_NAME}: attn_mask must hide {'what is behind the query, and that only' if causal else 'nothing'} "
                f"(converted with is_causal={causal})",
            )
        padding = None
        if key_padding_mask is not None:
            mask = key_padding_mask if batched else key_padding_mask.unsqueeze(0)
            padding = Padding(_visible(mask, "key_padding_mask"), f"{_NAME}: key_padding_mask")
        x = x if padding is None else padding.roll(x, 1)
        output = self.out_proj(self._attend(x, padding))
        output = output if padding is None else padding.unroll(output, 1)
        output = output.transpose(0, 1) if batched and not self.batch_first else output
        return (output if batched else output.squeeze(0)), None

    def _attend(self, x: Tensor, padding: Padding | None) -> Tensor:
        kv_lens = None if padding is None else padding.kv_lens
        query, key, value = self.project_qkv(x, Weights(self.in_proj_weight, self.in_proj_bias))
        if self.prior_attention.is_compacted:
            kv_lens = self.kept_lens(x, kv_lens)
        return self.prior_attention(query, key, value, kv_lens=kv_lens).transpose(1, 2).flatten(2)


_NAME = PriorMultiheadAttention.__name__


@register_attention(nn.TransformerDecoderLayer)
class PriorTransformerDecoderLayer(ConvertedAttention, nn.TransformerDecoderLayer):
    """Not supported: this class exists to say so."""

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        raise ValueError("whose attention to the encoder's output (multihead_attn) is not self-attention")


def _visible(mask: Tensor, name: str) -> Tensor:
    """bool, True where attended: torch.nn's boolean masks are True where *not*, and its float ones 0 and -inf."""
    if mask.dtype == torch.bool:
        return ~mask
    expect(((mask == 0) | (mask == -torch.inf)).all(), f"{_NAME}: {name} must hold 0 and -inf only, if it is not bool")
    return mask == 0
