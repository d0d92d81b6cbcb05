"""Attention of RoBERTa."""

from __future__ import annotations

from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from fiak_ext.conversion import register_attention
from fiak_ext.integrations.transformers.bert_like import BertLikeAttention

__all__ = ["PriorRobertaSelfAttention"]


@register_attention(RobertaSelfAttention)
class PriorRobertaSelfAttention(BertLikeAttention, RobertaSelfAttention):
    """RoBERTa."""
