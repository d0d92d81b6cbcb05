"""timm's vision transformers (ViT, DeiT) and Swin transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.layers.attention import Attention
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fiak_ext.conversion import ConvertedAttention, register_attention

__all__ = ["PriorAttentionOfViT", "PriorWindowAttention"]


@register_attention(Attention)
class PriorAttentionOfViT(ConvertedAttention, Attention):
    """``timm.layers.Attention``, that of the VisionTransformer family, with any tokens before the patches."""

    qkv: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module
    gate: nn.Linear | None
    proj: nn.Linear
    proj_drop: nn.Module

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, Attention)
        tokens = [
            parent.patch_embed.num_patches + parent.num_prefix_tokens
            for parent in parents
            if isinstance(parent, VisionTransformer)
        ]
        return {
            "num_heads": module.num_heads,
            "num_queries": tokens[0] if tokens else None,
            "is_causal": False,
            "scale": module.scale,
            "dropout_p": module.attn_drop.p,
        }

    @property
    def model_dim(self) -> int:
        return self.qkv.in_features

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """As timm's, without masks.

        Raises:
            ValueError: a mask.
        """
        if attn_mask is not None or is_causal:
            raise ValueError(f"{type(self).__name__}: attn_mask must be None and is_causal False (got a mask)")
        query, key, value = self.project_qkv(x, self.qkv)
        kv_lens = self.kept_lens(x, None) if self.prior_attention.is_compacted else None
        output = self.prior_attention(self.q_norm(query), self.k_norm(key), value, kv_lens=kv_lens)
        output = self.norm(output.transpose(1, 2).flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        output = self.proj_drop(self.proj(output))
        return output


@register_attention(WindowAttention)
class PriorWindowAttention(ConvertedAttention, WindowAttention):
    """Swin's attention within windows. Where windows are shifted, each place of a window has priors of its own.

    The relative position bias and the mask between parts of a shifted window, -100 as in timm, are added to the scores.
    Pairs between such parts have no weight, so ``calibrate`` does not reach them: then ``prune`` takes them first and
    counts them towards nothing.
    """

    qkv: nn.Linear
    proj: nn.Linear
    proj_drop: nn.Module

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, WindowAttention)
        block = parents[-1] if parents else None
        if not isinstance(block, SwinTransformerBlock):
            raise ValueError("which must be in a SwinTransformerBlock")
        if block.dynamic_mask:
            raise ValueError("dynamic_mask must be False (got True)")
        return {
            "num_heads": module.num_heads,
            "num_queries": module.window_area,
            "is_causal": False,
            "scale": module.scale,
            "dropout_p": module.attn_drop.p,
            "groups": 1 if block.attn_mask is None else block.attn_mask.size(0),
        }

    @property
    def model_dim(self) -> int:
        return self.qkv.in_features

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """As timm's.

        Args:
            x: ``[images * windows, tokens, dim]``.
            mask: ``[windows, tokens, tokens]``, what is added to the scores in each window, or None.

        Raises:
            ValueError: another number of windows than at conversion, for images of another size.
        """
        groups = self.prior_attention.groups
        if groups != (1 if mask is None else mask.size(0)):
            raise ValueError(
                f"{type(self).__name__}: mask must have {groups} windows, as at conversion "
                f"(got {1 if mask is None else mask.size(0)})"
            )
        bias: Tensor = super()._get_rel_pos_bias()
        bias = bias if mask is None else bias + mask.unsqueeze(1)
        query, key, value = self.project_qkv(x, self.qkv)
        output = self.prior_attention(query, key, value, bias=bias).transpose(1, 2).flatten(2)
        output = self.proj_drop(self.proj(output))
        return output
