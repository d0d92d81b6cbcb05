"""The base of attention modules that have projections around a :class:`~fiak_ext.PriorAttention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fiak_ext.nn.lengths import may_be_shorter
from fiak_ext.nn.prior_attention import PriorAttention
from fiak_ext.projection import Projection, project_kept, project_qkv

__all__ = ["PriorAttentionHost"]


class PriorAttentionHost(nn.Module):
    """Base of modules that project tokens to query, key and value and call a ``PriorAttention`` with them.

    It says what ``fiak_ext.compact`` and ``fiak_ext.flops.model_report`` ask about the projections, and has what
    ``forward`` needs once compacted. Where the module has a ``head_dim``, projections must have as many features a
    head. A module of one's own::

        class Attention(fiak_ext.PriorAttentionHost):
            def __init__(self, dim, num_heads, num_tokens):
                super().__init__()
                self.into = nn.Linear(dim, 3 * dim)
                self.prior_attention = fiak_ext.PriorAttention(num_heads, num_tokens)

            @property
            def model_dim(self):
                return self.into.in_features

            def forward(self, x):
                query, key, value = self.project_qkv(x, self.into)
                output = self.prior_attention(query, key, value, kv_lens=self.kept_lens(x, None))
                return output.transpose(1, 2).flatten(2)

    Attributes:
        prior_attention: what ``forward`` calls with query, key and value ``[B, heads, positions, features]``.
    """

    prior_attention: PriorAttention

    @property
    def model_dim(self) -> int | None:
        """Features of the tokens that ``forward`` projects, for ``flops.model_report``; None leaves projections out."""
        return None

    @property
    def num_key_heads(self) -> int:
        """Heads of key and value."""
        return self.prior_attention.num_heads

    def projects_all_keys(self, arguments: Mapping[str, Any]) -> bool:
        """Whether ``forward`` projects the keys that no query keeps, too, once compacted; for ``flops.model_report``.

        Args:
            arguments: what ``forward`` is called with by name.
        """
        return False

    def compact(self) -> None:
        """Projects keys and values of the positions only that some query of a head keeps (:meth:`project_kept`).

        Outputs change by rounding only. Parameters stay as they are, and so do optimizers.

        Raises:
            RuntimeError: attention that is not pruned, or compacted already.
        """
        self.prior_attention.compact(self.num_key_heads)

    def project_kept(self, x: Tensor, layer: Projection) -> Tensor:
        """Key or value of the kept positions, once compacted: ``x [B, n, dim]`` to ``[B, key heads, K, D]``.

        Args:
            x: the tokens.
            layer: the projection, ``[B, n, dim]`` to ``[B, n, key heads * D]``. It is called unless it is exactly a
                linear layer without hooks, whose rows that nobody keeps are not computed.

        Raises:
            ValueError: a layer that gives anything else.
        """
        keep = self.prior_attention.kept(x.size(1))
        return project_kept(layer, x, keep, head_dim=getattr(self, "head_dim", None), owner=self)

    def project_qkv(self, x: Tensor, layer: Projection) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value by one projection; once compacted, key and value of the kept positions.

        Args:
            x: the tokens ``[B, n, dim]``.
            layer: the projection to ``[B, n, 3 * heads * D]``: queries of all heads, keys, values. It is called or not
                as by :meth:`project_kept`.

        Returns:
            query ``[B, heads, n, D]``, and key and value ``[B, heads, n, D]`` or, once compacted, ``[B, heads, K, D]``.

        Raises:
            ValueError: a layer that gives anything else.
        """
        attention = self.prior_attention
        keep = attention.kept(x.size(1)) if attention.is_compacted else None
        head_dim = getattr(self, "head_dim", None)
        return project_qkv(layer, x, attention.num_heads, keep, head_dim=head_dim, owner=self)

    def kept_lens(self, x: Tensor, kv_lens: Tensor | None) -> Tensor | None:
        """``kv_lens`` for :class:`~fiak_ext.PriorAttention` once compacted, which needs it where ``x`` is short."""
        attention = self.prior_attention
        if kv_lens is None and not attention.is_causal and may_be_shorter(x.size(1), attention.num_keys):
            return torch.full((x.size(0),), x.size(1), device=x.device)
        return kv_lens
