"""``torch.nn.MultiheadAttention``, and with it ``torch.nn.TransformerEncoderLayer`` and ``TransformerEncoder``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from fiak_ext.conversion import ConvertedAttention, Padding, expect, register_attention
from fiak_ext.projection import Weights

__all__ = ["PriorMultiheadAttention", "PriorTransformerDecoderLayer"]


@register_attention(nn.MultiheadAttention)
class PriorMultiheadAttention(ConvertedAttention, nn.MultiheadAttention):
    """Self-attention of ``torch.nn.MultiheadAttention`` with priors. Masks hide padding, or say that it is causal."""

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, nn.MultiheadAttention)
        if not module._qkv_same_embed_dim:
            raise ValueError(f"kdim and vdim must be embed_dim (got {module.kdim} and {module.vdim})")
        if module.bias_k is not None or module.add_zero_attn:
            raise ValueError("add_bias_kv and add_zero_attn must be False (got True)")
        return {"num_heads": module.num_heads, "dropout_p": module.dropout}

    @classmethod
    def finish(cls, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        for module in model.modules():
            if isinstance(module, cls) and _be_called not in module.prior_attention._forward_pre_hooks.values():
                module.prior_attention.register_forward_pre_hook(_be_called)

    @property
    def model_dim(self) -> int:
        return self.embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As in ``torch.nn.MultiheadAttention``, for self-attention, without its weights.

        Args:
            query: ``[B, n, embed_dim]``, or ``[n, B, embed_dim]`` unless ``batch_first``, or ``[n, embed_dim]``; or a
                nested tensor of B sequences, as ``TransformerEncoder`` makes it of padded ones, without masks.
            key, value: query itself, or equal to it, as copies are that something on the way has made of each argument.
            key_padding_mask: ``[B, n]``, True or -inf for padding, on either side.
            need_weights: False: sparse attention has no matrix of weights to give away.
            attn_mask: None, or the causal mask where the module was converted with ``is_causal=True``.
            average_attn_weights: not used.
            is_causal: may be True only if the module is causal; a causal module is it always.

        Raises:
            ValueError: what is said above does not hold; RuntimeError in compiled code where key or value have other
                values than query.
        """
        for other in (key, value):
            _expect_equal(query, other)
        if need_weights:
            raise ValueError(f"{_NAME}: need_weights must be False, as sparse attention keeps no weights (got True)")
        causal = self.prior_attention.is_causal
        if is_causal and not causal:
            raise ValueError(f"{_NAME}: is_causal must be False unless converted with is_causal=True (got True)")
        if query.is_nested:
            if attn_mask is not None or key_padding_mask is not None:
                raise ValueError(f"{_NAME}: attn_mask and key_padding_mask must be None where query is nested")
            return self._nested(query, key, value), None
        batched = query.dim() == 3

        def batch_of_sequences(x: Tensor) -> Tensor:
            if not batched:
                return x.unsqueeze(0)
            return x if self.batch_first else x.transpose(0, 1)

        if attn_mask is not None:
            allowed = _visible(attn_mask, "attn_mask")
            plain = torch.ones_like(allowed)
            expect(
                (allowed == (plain.tril() if causal else plain)).all(),
                f"{_NAME}: attn_mask must hide {'what is behind the query, and that only' if causal else 'nothing'} "
                f"(converted with is_causal={causal})",
            )
        padding = None
        if key_padding_mask is not None:
            mask = key_padding_mask if batched else key_padding_mask.unsqueeze(0)
            padding = Padding(_visible(mask, "key_padding_mask"), f"{_NAME}: key_padding_mask")

        def aligned(x: Tensor) -> Tensor:
            x = batch_of_sequences(x)
            return x if padding is None else padding.roll(x, 1)

        output = self._attend(*_each(aligned, query, key, value), None if padding is None else padding.kv_lens)
        output = output if padding is None else padding.unroll(output, 1)
        output = output.transpose(0, 1) if batched and not self.batch_first else output
        return (output if batched else output.squeeze(0)), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, kv_lens: Tensor | None) -> Tensor:
        """Of three ``[B, n, embed_dim]`` with equal values, which are projected as one where they are one tensor."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        attention = self.prior_attention
        if attention.is_compacted:
            kv_lens = self.kept_lens(query, kv_lens)
        if key is query and value is query:
            projected = self.project_qkv(query, Weights(weight, bias))
        else:  # each by itself, for gradients to reach it
            biases = (None, None, None) if bias is None else bias.chunk(3)
            layers = [Weights(*both) for both in zip(weight.chunk(3), biases, strict=True)]

            def heads(x: Tensor, layer: Weights) -> Tensor:
                return F.linear(x, *layer).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

            kept = self.project_kept if attention.is_compacted else heads
            projected = heads(query, layers[0]), kept(key, layers[1]), kept(value, layers[2])
        output: Tensor = self.out_proj(attention(*projected, kv_lens=kv_lens).transpose(1, 2).flatten(2))
        return output

    def _nested(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same of nested tensors of sequences."""
        if query.layout != torch.strided:
            raise ValueError(f"{_NAME}: query must be of layout torch.strided where it is nested (got {query.layout})")
        lengths = [sequence.size(0) for sequence in query.unbind()]

        def padded(x: Tensor) -> Tensor:
            return x.to_padded_tensor(0.0)

        kv_lens = torch.tensor(lengths, device=query.device)
        output = self._attend(*_each(padded, query, key, value), kv_lens)
        sequences = [sequence[:length] for sequence, length in zip(output, lengths, strict=True)]
        return torch.nested.as_nested_tensor(sequences)


_NAME = PriorMultiheadAttention.__name__


def _be_called(module: nn.Module, args: Any) -> None:
    """A hook that does nothing: in evaluation mode ``TransformerEncoderLayer`` computes softmax attention by itself,

    past its ``self_attn``, unless one of its modules has a hook.
    """


def _each(
    change: Callable[[Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``change`` of each of them, of the same tensor once."""
    first = change(query)
    return first, first if key is query else change(key), first if value is query else change(value)


def _expect_equal(query: Tensor, other: Tensor) -> None:
    """Refuses attention to something else; what wraps modules may have copied query, key and value one by one."""
    if other is query:
        return
    message = f"{_NAME}: key and value must be query itself, or equal to it (got other tensors: cross-attention)"
    kinds = [(x.is_nested, x.layout, x.dim(), x.size(0), x.dtype, x.device) for x in (query, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(message)
    if query.is_nested:
        for pair in zip(query.unbind(), other.unbind(), strict=True):
            _expect_equal(*pair)
        return
    if other.shape != query.shape:
        raise ValueError(message)
    if query.is_meta or (isinstance(query, FakeTensor) and not torch.compiler.is_compiling()):
        return  # there are no values
    equal = (other == query) | (other != other) & (query != query)
    expect(equal.all(), message)


@register_attention(nn.TransformerDecoderLayer)
class PriorTransformerDecoderLayer(ConvertedAttention, nn.TransformerDecoderLayer):
    """Not supported: this class exists to say so."""

    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        raise ValueError("whose attention to the encoder's output (multihead_attn) is not self-attention")


def _visible(mask: Tensor, name: str) -> Tensor:
    """bool, True where attended: torch.nn's boolean masks are True where *not*, and its float ones 0 and -inf."""
    if mask.dtype == torch.bool:
        return ~mask
    expect(((mask == 0) | (mask == -torch.inf)).all(), f"{_NAME}: {name} must hold 0 and -inf only, if it is not bool")
    return mask == 0
