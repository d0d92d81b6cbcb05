"""timm's vision transformers (ViT, DeiT) and Swin transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timm.layers import to_2tuple
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fiak_ext.conversion import ConvertedAttention, GridModel, register_attention, resize_priors

__all__ = [
    "PriorAttentionOfViT",
    "PriorSwinTransformer",
    "PriorVisionTransformer",
    "PriorVisionTransformerDistilled",
    "PriorWindowAttention",
]


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
        for parent in parents:
            if isinstance(parent, NaFlexVit):
                raise ValueError("which is in a NaFlexVit, whose patches have places of their own in each image")
            drops = not isinstance(getattr(parent, "patch_drop", nn.Identity()), nn.Identity)
            if type(parent) not in _MODELS and (drops or getattr(parent, "dynamic_img_size", False)):
                raise ValueError(f"dynamic_img_size and patch_drop must be off in {type(parent).__name__} (got on)")
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

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        for module in model.modules():
            if (prior_class := _MODELS.get(type(module))) is not None:
                module.__class__ = prior_class
                assert isinstance(module, _PriorImages)
                module.prior_grid = tuple(module.patch_embed.grid_size)

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

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        for module in model.modules():
            if type(module) is SwinTransformer:
                module.__class__ = PriorSwinTransformer

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


class _PriorImages(GridModel):
    """What vision transformers get: their patches are those of the priors, or an error says what to do.

    Softmax attention without priors, before pruning and outside calibration, takes any of the patches.
    """

    patch_drop: Any
    patch_embed: Any
    num_prefix_tokens: int

    def _pos_embed(self, x: Tensor) -> Tensor:
        # Every forward pass of timm comes through here, after the patches are made and before some are dropped.
        if x.dim() == 4:
            grid = (x.size(1), x.size(2))
        else:
            grid = self.patch_embed.grid_size
            if not getattr(self.patch_embed, "strict_img_size", True) and self.has_places:
                raise ValueError(
                    f"{type(self).__name__}: patch_embed.strict_img_size must be True unless dynamic_img_size is, as "
                    "priors and patterns belong to a grid of patches (got False)"
                )
        if grid != self.prior_grid and self.has_places:
            raise ValueError(
                f"{type(self).__name__}: images must have {self.prior_grid} patches, as priors and patterns have (got "
                f"{grid}): call model.set_input_size, which resizes priors, before pruning or calibration"
            )
        if self.training and getattr(self.patch_drop, "prob", 0) > 0 and self.has_places:
            raise ValueError(
                f"{type(self).__name__}: patch_drop must be off where patches have priors or patterns (got a rate of "
                f"{self.patch_drop.prob} in training): set model.patch_drop = torch.nn.Identity()"
            )
        output: Tensor = super()._pos_embed(x)  # type: ignore[misc]
        return output

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """As timm's; priors are resized, too (:func:`~fiak_ext.resize_priors`).

        Raises:
            ValueError: another grid of patches for a pruned model, which is left as it was.
        """
        image = to_2tuple(img_size or self.patch_embed.img_size)
        patch = to_2tuple(patch_size or self.patch_embed.patch_size)
        grid = (image[0] // patch[0], image[1] // patch[1])
        if grid != self.prior_grid:
            resize_priors(self, self.prior_grid, grid, num_prefix_tokens=self.num_prefix_tokens)
        super().set_input_size(img_size=img_size, patch_size=patch_size)  # type: ignore[misc]


class PriorVisionTransformer(_PriorImages, VisionTransformer):
    """ViT and DeiT."""


class PriorVisionTransformerDistilled(_PriorImages, VisionTransformerDistilled):
    """DeiT with a distillation token."""


class PriorSwinTransformer(SwinTransformer):
    """Swin, whose windows are those of the priors."""

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Not supported.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"{type(self).__name__}: set_input_size must come before convert, as priors belong to windows (got a call)"
        )


_MODELS: dict[type[nn.Module], type[_PriorImages]] = {
    VisionTransformer: PriorVisionTransformer,
    VisionTransformerDistilled: PriorVisionTransformerDistilled,
}
