"""Transformers made of :class:`~fiak_ext.PriorAttention`: a vision transformer and a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fiak_ext.nn import MultiHeadSelfAttention, PriorAttention
from fiak_ext.nn.lengths import first_of

__all__ = ["CausalLM", "TransformerBlock", "VisionTransformer", "deit_tiny", "param_groups"]

_PRIOR_LR_FACTORS = {"logits": 30.0, "clamp": 5.0}


class TransformerBlock(nn.Module):
    """Self-attention and a two-layer MLP with GELU, each after a LayerNorm and added to its input.

    Args:
        dim: features.
        num_heads: heads.
        num_tokens: the longest input.
        hidden_dim: features between the layers of the MLP.
        dropout: probability of dropping a feature of what either part adds.
        **attention: further arguments of :class:`~fiak_ext.MultiHeadSelfAttention`.
    """

    def __init__(
        self, dim: int, num_heads: int, num_tokens: int, hidden_dim: int, dropout: float = 0.0, **attention: Any
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = MultiHeadSelfAttention(dim, num_heads, num_tokens, **attention)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Maps ``x [B, n, dim]`` to the same shape; tokens behind ``kv_lens [B]`` are not attended."""
        x = x + self.dropout(self.attention(self.attention_norm(x), kv_lens))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class VisionTransformer(nn.Module):
    """An image classifier: patches, a class token, learned positions, blocks, and a linear head on the class token.

    Args:
        image_size: height and width of the images.
        patch_size: height and width of a patch; divides ``image_size``.
        in_channels: channels of the images.
        num_classes: outputs.
        dim: features of a token.
        depth: blocks.
        num_heads: heads of each block.
        mlp_ratio: ``hidden_dim / dim`` of each MLP.
        dropout: probability of dropping a feature of the embedding and of what attention and MLP add.
        **attention: further arguments of :class:`~fiak_ext.MultiHeadSelfAttention` and
            :class:`~fiak_ext.PriorAttention`: ``kind``, ``parameterization``, ``score``, ``dropout_p``, ...

    Raises:
        ValueError: an image size that is not a multiple of the patch size.
    """

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        if patch_size < 1 or image_size % patch_size:
            raise ValueError(
                f"VisionTransformer: image_size must be a multiple of patch_size (got {image_size} and {patch_size})"
            )
        self.image_size = image_size
        self.num_tokens = (image_size // patch_size) ** 2 + 1
        self.patch_embedding = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.empty(dim))
        self.position_embedding = nn.Parameter(torch.empty(self.num_tokens, dim))
        self.dropout = nn.Dropout(dropout)
        hidden_dim = round(dim * mlp_ratio)
        self.blocks = _blocks(depth, dim, num_heads, self.num_tokens, hidden_dim, dropout, **attention)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """Maps ``images [B, in_channels, image_size, image_size]`` to logits ``[B, num_classes]``.

        Raises:
            ValueError: images of another size.
        """
        expected = (self.patch_embedding.in_channels, self.image_size, self.image_size)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(
                f"VisionTransformer: images must be [batch, *{expected}] (got shape {tuple(images.shape)})"
            )
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(patches.size(0), 1, -1)
        x = self.dropout(torch.cat([class_token, patches], 1) + self.position_embedding)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def deit_tiny(num_classes: int = 1000, **kwargs: Any) -> VisionTransformer:
    """The paper's DeiT-tiny: 12 blocks, 4 heads, 192 features, 224x224 images in patches of 16, so 197 tokens.

    It takes 1253.7M multiply-adds an image, 1224.6M of them in the blocks. ``kwargs`` are further arguments of
    :class:`VisionTransformer`.
    """
    return VisionTransformer(224, 16, 3, num_classes, 192, 12, 4, **kwargs)


class CausalLM(nn.Module):
    """A causal language model with learned positions and tied embeddings; the defaults are the paper's (Appendix A.3).

    Args:
        vocab_size: tokens of the vocabulary.
        num_tokens: the longest context.
        dim: features of a token.
        depth: blocks.
        num_heads: heads of each block.
        hidden_dim: features between the layers of each MLP.
        dropout: probability of dropping a feature of the embedding and of what attention and MLP add.
        **attention: further arguments of :class:`~fiak_ext.MultiHeadSelfAttention` and
            :class:`~fiak_ext.PriorAttention`.
    """

    def __init__(
        self,
        vocab_size: int,
        num_tokens: int = 256,
        dim: int = 128,
        depth: int = 16,
        num_heads: int = 8,
        hidden_dim: int = 2048,
        dropout: float = 0.1,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.position_embedding = nn.Parameter(torch.empty(num_tokens, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = _blocks(depth, dim, num_heads, num_tokens, hidden_dim, dropout, is_causal=True, **attention)
        self.norm = nn.LayerNorm(dim)
        nn.init.trunc_normal_(self.position_embedding, std=0.02)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor, kv_lens: Tensor | None = None) -> Tensor:
        """Maps token numbers ``[B, n]``, n up to ``num_tokens``, to logits of the next token ``[B, n, vocab_size]``.

        Args:
            tokens: int64 or int32.
            kv_lens: ``[B]``, the number of tokens of each batch element; those behind are not attended.

        Raises:
            ValueError: another number of dimensions, or a longer context.
        """
        if tokens.dim() != 2 or tokens.size(1) > self.num_tokens:
            raise ValueError(
                f"CausalLM: tokens must be [batch, at most {self.num_tokens}] (got shape {tuple(tokens.shape)})"
            )
        x = self.dropout(self.token_embedding(tokens) + first_of(self.position_embedding, 0, tokens.size(1)))
        for block in self.blocks:
            x = block(x, kv_lens)
        return F.linear(self.norm(x), self.token_embedding.weight)


def param_groups(
    model: nn.Module, lr: float, prior_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters of any model as groups for an optimizer, with the priors in groups of their own.

    Args:
        model: its parameters that need a gradient are grouped, each once.
        lr: learning rate of all but the priors.
        prior_lr: learning rate of the priors; by default 30 ``lr`` for ``"logits"`` and 5 ``lr`` for ``"clamp"``.
        weight_decay: of weights; vectors (biases, norms, class token) and priors have none.

    Returns:
        Groups ``decayed``, ``not decayed``, ``logits priors`` and ``clamp priors``, as far as they hold parameters;
        the name is each group's ``"name"``.
    """
    priors: dict[str, list[nn.Parameter]] = {"logits": [], "clamp": []}
    for module in model.modules():
        if isinstance(module, PriorAttention) and module.prior is not None and module.prior.requires_grad:
            priors[module.parameterization].append(module.prior)
    known = {id(prior) for group in priors.values() for prior in group}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]

    def group(name: str, params: Sequence[nn.Parameter], rate: float, decay: float) -> dict[str, Any]:
        return {"name": name, "params": list(params), "lr": rate, "weight_decay": decay}

    groups = [
        group("decayed", [p for p in others if p.dim() > 1], lr, weight_decay),
        group("not decayed", [p for p in others if p.dim() <= 1], lr, 0.0),
    ]
    for parameterization, params in priors.items():
        rate = _PRIOR_LR_FACTORS[parameterization] * lr if prior_lr is None else prior_lr
        groups.append(group(f"{parameterization} priors", params, rate, 0.0))
    return [entry for entry in groups if entry["params"]]


def _blocks(depth: int, *args: Any, **kwargs: Any) -> nn.ModuleList:
    return nn.ModuleList(TransformerBlock(*args, **kwargs) for _ in range(depth))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
