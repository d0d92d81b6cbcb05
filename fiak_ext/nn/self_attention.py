"""Self-attention with projections of its own around a :class:`~fiak_ext.PriorAttention`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fiak_ext.nn.host import PriorAttentionHost
from fiak_ext.nn.prior_attention import PriorAttention

__all__ = ["MultiHeadSelfAttention"]


class MultiHeadSelfAttention(PriorAttentionHost):
    """Self-attention with projections around :class:`PriorAttention`.

    Args:
        dim: features of the input and the output.
        num_heads: heads.
        num_tokens: the longest input.
        head_dim: features of each head, by default ``dim / num_heads``.
        qkv_bias: whether the input projections have a bias.
        proj_bias: whether the output projection has one.
        **attention: further arguments of :class:`PriorAttention`.

    Attributes:
        qkv: the input projections in one: queries, keys, values.
        prior_attention: the :class:`PriorAttention`.
        proj: the output projection.

    Raises:
        ValueError: ``dim`` that is not a multiple of ``num_heads`` where ``head_dim`` is left out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_tokens: int,
        *,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        **attention: Any,
    ) -> None:
        super().__init__()
        if head_dim is None:
            if dim % num_heads:
                raise ValueError(
                    "MultiHeadSelfAttention: dim must be a multiple of num_heads where head_dim is left out "
                    f"(got {dim} and {num_heads})"
                )
            head_dim = dim // num_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.num_tokens = num_tokens
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=qkv_bias)
        self.prior_attention = PriorAttention(num_heads, num_tokens, **attention)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=proj_bias)

    @property
    def model_dim(self) -> int:
        return self.qkv.in_features

    def forward(self, x: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Maps ``x [B, n, dim]``, n up to ``num_tokens``, to ``[B, n, dim]``.

        Args:
            x: the tokens.
            kv_lens: ``[B]``, the number of tokens of each batch element; those behind are not attended.

        Raises:
            ValueError: an input longer than ``num_tokens``.
        """
        tokens = x.size(1)
        if tokens > self.num_tokens:
            raise ValueError(f"MultiHeadSelfAttention: x must have at most {self.num_tokens} tokens (got {tokens})")
        query, key, value = self.project_qkv(x, self.qkv)
        if self.prior_attention.is_compacted:
            kv_lens = self.kept_lens(x, kv_lens)
        return self.proj(self.prior_attention(query, key, value, kv_lens=kv_lens).transpose(1, 2).flatten(2))
