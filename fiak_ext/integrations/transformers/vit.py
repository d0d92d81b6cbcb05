"""Attention of ViT, and its grid of patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTModel

from fiak_ext.conversion import PatchGrid, register_attention
from fiak_ext.integrations.transformers.base import HuggingFaceAttention

__all__ = ["PriorViTAttention", "PriorViTEmbeddings"]


@register_attention(ViTAttention)
class PriorViTAttention(HuggingFaceAttention, ViTAttention):
    """ViT. Tokens are patches, so there are as many as the image has, each in its place."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, ViTAttention)
        sizes = [parent.embeddings.position_embeddings.size(1) for parent in parents if isinstance(parent, ViTModel)]
        return {
            "num_heads": module.num_attention_heads,
            "num_queries": sizes[0] if sizes else None,
            "is_causal": False,
            "scale": module.scaling,
            "dropout_p": module.attention_dropout,
        }

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().finish(model, arguments)
        for module in model.modules():
            if type(module) is ViTEmbeddings:
                embeddings: Any = module
                embeddings.__class__ = PriorViTEmbeddings
                embeddings.prior_grid = embeddings.grid_of(embeddings.image_size)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        tokens = self.prior_attention.num_queries
        if hidden_states.size(1) != tokens:
            raise ValueError(
                f"{type(self).__name__}: hidden_states must have {tokens} tokens, those of the image size that the "
                f"priors are for (got {hidden_states.size(1)}); resize_priors fits priors to another size"
            )
        return super().forward(hidden_states, *args, **kwargs)

    def unpack(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        kv_lens, query_offsets, first = super().unpack(mask)
        if first is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask must hide patches at the end only, if any")
        return kv_lens, query_offsets, first

    def _project(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        key = self.project_kept(x, self.k_proj)
        return self._queries(self.q_proj(x)), key, self.project_kept(x, self.v_proj)

    def _output(self, x: Tensor) -> Tensor:
        output: Tensor = self.o_proj(x)
        return output


class PriorViTEmbeddings(PatchGrid, ViTEmbeddings):
    """ViT's embeddings, for images of the grid of patches that the priors are for."""

    patch_embeddings: Any

    def grid_of(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the patches of images of ``size``, height and width."""
        height, width = self.patch_embeddings.patch_size
        return size[0] // height, size[1] // width

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the library's.

        Raises:
            ValueError: images of another grid of patches.
        """
        self.expect_grid(self.grid_of(pixel_values.shape[-2:]))
        output: Tensor = super().forward(pixel_values, *args, **kwargs)
        return output
