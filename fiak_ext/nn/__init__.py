"""Attention modules: a prior or a pattern, the projections around them, and what all such modules have in common."""

from fiak_ext.nn.host import PriorAttentionHost
from fiak_ext.nn.prior_attention import Parameterization, PriorAttention
from fiak_ext.nn.self_attention import MultiHeadSelfAttention
from fiak_ext.nn.state import Kind

__all__ = ["Kind", "MultiHeadSelfAttention", "Parameterization", "PriorAttention", "PriorAttentionHost"]
