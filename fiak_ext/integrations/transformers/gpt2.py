"""Attention of GPT-2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.pytorch_utils import Conv1D

from fiak_ext.conversion import register_attention
from fiak_ext.integrations.transformers.base import HuggingFaceAttention
from fiak_ext.projection import Weights, register_linear

__all__ = ["PriorGPT2Attention"]

register_linear(Conv1D, lambda layer: Weights(layer.weight.t(), layer.bias))


@register_attention(GPT2Attention)
class PriorGPT2Attention(HuggingFaceAttention, GPT2Attention):
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
