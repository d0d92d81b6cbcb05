"""What the attention of BERT and of models whose code is a copy of it have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fiak_ext.integrations.transformers.base import HuggingFaceAttention

__all__ = ["BertLikeAttention"]


class BertLikeAttention(HuggingFaceAttention):
    """Self-attention with projections ``query``, ``key`` and ``value``; the output projection is in a module beside."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        attention: Any = module
        return {
            "num_heads": attention.num_attention_heads,
            "is_causal": attention.is_causal,
            "scale": attention.scaling,
            "dropout_p": attention.dropout.p,
        }

    @property
    def head_dim(self) -> int:
        size: int = self.attention_head_size  # type: ignore[assignment]
        return size

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        key = self.project_kept(x, self.key)
        return self._queries(self.query(x)), key, self.project_kept(x, self.value)
