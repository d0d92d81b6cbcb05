"""Linear layers with packed weights, for inference on CPU.

``torch.nn.functional.linear`` takes MKL's GEMM for float32, which on some CPUs (AMD's) leaves half the speed unused.
oneDNN, which PyTorch brings along, is faster from about a hundred rows on, the more so with weights that are packed
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from fiak_ext.projection import Weights, register_linear

__all__ = ["PackedLinear", "pack_linears"]

Model = TypeVar("Model", bound=nn.Module)

_LEAST_ROWS = 96  # below, oneDNN's overhead of a call makes it the slower one
_DTYPES = (torch.float32, torch.bfloat16)

# One opaque op, because torch.compile takes a packed weight as an op's input, but not where it would see into the op.
_LIBRARY = torch.library.Library("fiak_ext", "DEF")
_LIBRARY.define("packed_linear(Tensor input, Tensor weight, Tensor packed, Tensor? bias) -> Tensor")


@torch.library.impl(_LIBRARY, "packed_linear", "CompositeExplicitAutograd")
def _packed_linear(input: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    if input.numel() < _LEAST_ROWS * weight.size(1):
        return F.linear(input, weight, bias)
    output: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return output


@torch.library.register_fake("fiak_ext::packed_linear", lib=_LIBRARY)
def _packed_linear_fake(input: Tensor, weight: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.size(0)))


@register_flop_formula(torch.ops.fiak_ext.packed_linear)
def _packed_linear_flops(input: Any, weight: Any, packed: Any, bias: Any, *, out_shape: Any, **_: Any) -> int:
    return 2 * int(torch.Size(out_shape).numel()) * int(weight[1])


def _check(weight: Tensor) -> None:
    """Raises ValueError for a weight of a dtype, or on a device, that cannot be packed."""
    if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
        raise ValueError(
            f"PackedLinear: weight must be float32 or bfloat16 on cpu (got {weight.dtype} on {weight.device})"
        )
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError(
            "PackedLinear: weight must be float32 on this CPU, whose oneDNN packs no bfloat16 (got torch.bfloat16)"
        )


class PackedLinear(nn.Linear):
    """A linear layer for inference whose weight is packed once; :func:`pack_linears` makes it from a ``nn.Linear``.

    Its parameters and its ``state_dict`` are those of ``nn.Linear``. Loading a ``state_dict``, copying, moving and
    changing its dtype pack it anew; after changing its weight in place in another way, call :meth:`pack`.
    """

    _packed: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> PackedLinear:
        """A packed layer with the parameters, not copies, of ``linear``.

        Raises:
            ValueError: a weight that is not on CPU and in float32 or, with AVX-512, bfloat16.
        """
        packed = cls.__new__(cls)
        packed.__dict__.update(linear.__dict__)
        packed._parameters = dict(linear._parameters)
        packed.pack()
        return packed

    @torch.no_grad()
    def pack(self) -> None:
        """Packs the weight as it is now.

        Raises:
            ValueError: a weight that is not on CPU and in float32 or, with AVX-512, bfloat16.
        """
        weight = self.weight
        _check(weight)
        # Not a buffer: it is opaque, and neither saved nor moved.
        with torch.inference_mode(False):
            self.__dict__["_packed"] = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())

    def forward(self, input: Tensor) -> Tensor:
        """Maps ``[..., in_features]`` to ``[..., out_features]``.

        Raises:
            RuntimeError: in training mode, or where a gradient would be wanted.
            ValueError: an input of another dtype than the weight's.
        """
        if self.training:
            raise RuntimeError("PackedLinear: module must be in evaluation mode (got training mode)")
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            raise RuntimeError("PackedLinear: gradients must be off, by torch.no_grad or inference_mode (got enabled)")
        if input.dtype != self.weight.dtype:
            raise ValueError(f"PackedLinear: input must be {self.weight.dtype}, as weight is (got {input.dtype})")
        output: Tensor = torch.ops.fiak_ext.packed_linear(input, self.weight, self._packed, self.bias)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.pack()

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        _check(fn(self.weight.detach()[:0]))  # before anything is changed
        super()._apply(fn, recurse)
        self.pack()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.pack()


# Where compacted attention needs few rows, fiak::compact_linear leaves out more than a packed weight saves.
register_linear(PackedLinear, lambda layer: Weights(layer.weight, layer.bias))


def pack_linears(model: Model) -> Model:
    """Replaces every ``nn.Linear`` of a model by a :class:`PackedLinear`, for inference on CPU.

    Outputs change by rounding only. The ``state_dict`` stays as it was; the model can be compiled, not trained or
    exported. Do this last, after :func:`~fiak_ext.prune` and :func:`~fiak_ext.compact`.

    Args:
        model: in evaluation mode; changed in place. Layers of subclasses of ``nn.Linear`` are left as they are.

    Returns:
        The model itself.

    Raises:
        RuntimeError: PyTorch without oneDNN.
        ValueError: a model in training mode, without ``nn.Linear`` layers below it, or with one that is not on CPU and
            in float32 or, with AVX-512, bfloat16; the model is then left as it was.
    """
    if not torch.backends.mkldnn.is_available():
        raise RuntimeError("pack_linears: PyTorch must be built with oneDNN (got a build without)")
    if model.training:
        raise ValueError("pack_linears: model must be in evaluation mode (got training mode)")
    packed: dict[nn.Linear, PackedLinear] = {}
    places = []
    for parent in model.modules():
        for name, child in parent._modules.items():  # named_children leaves out repeated ones
            if type(child) is nn.Linear:
                if child not in packed:
                    packed[child] = PackedLinear.from_linear(child).eval()
                places.append((parent, name, packed[child]))
    if not places:
        raise ValueError(f"pack_linears: model must hold nn.Linear layers (got {type(model).__name__})")
    for parent, name, layer in places:
        setattr(parent, name, layer)
    return model
