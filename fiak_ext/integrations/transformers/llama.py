"""Attention of Llama."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, rotate_half

from fiak_ext.conversion import register_attention
from fiak_ext.integrations.transformers.base import HuggingFaceAttention

__all__ = ["PriorLlamaAttention"]


@register_attention(LlamaAttention)
class PriorLlamaAttention(HuggingFaceAttention, LlamaAttention):
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
