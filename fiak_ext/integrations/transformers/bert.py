"""Attention of BERT."""

from __future__ import annotations

from transformers.models.bert.modeling_bert import BertSelfAttention

from fiak_ext.conversion import register_attention
from fiak_ext.integrations.transformers.bert_like import BertLikeAttention

__all__ = ["PriorBertSelfAttention"]


@register_attention(BertSelfAttention)
class PriorBertSelfAttention(BertLikeAttention, BertSelfAttention):
    """BERT (MiniLM and other sentence encoders included)."""
