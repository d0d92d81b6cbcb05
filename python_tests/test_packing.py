"""Packed linear layers compute what nn.Linear does, keep its state, and refuse to train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fiak_ext
from fiak_ext import pack_linears
from fiak_ext.packing import PackedLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="hardware: PyTorch without oneDNN")


def mlp(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.GELU(), nn.Sequential(nn.Linear(40, 7, bias=bias)))
    return layers.to(dtype).eval()


def require_packing(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("hardware: oneDNN packs bfloat16 with AVX-512 only")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (3, 5, 24), (4, 50, 24), (0, 24)])
def test_the_output_is_that_of_linear(dtype: torch.dtype, bias: bool, shape: tuple[int, ...]) -> None:
    require_packing(dtype)
    plain = mlp(dtype, bias)
    packed = pack_linears(copy.deepcopy(plain))
    x = torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x))


def test_strided_inputs() -> None:
    plain = mlp()
    packed = pack_linears(copy.deepcopy(plain))
    for x in (torch.randn(24, 200).t(), torch.randn(2, 150, 3, 24)[:, :, 1], torch.randn(200, 48)[:, ::2]):
        with torch.no_grad():
            torch.testing.assert_close(packed(x), plain(x))


def test_state_is_that_of_linear_and_loading_packs_anew() -> None:
    packed, other = pack_linears(mlp()), mlp()
    assert packed.state_dict().keys() == other.state_dict().keys()
    for assign in (False, True):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.normal_()
        packed.load_state_dict(other.state_dict(), assign=assign)
        x = torch.randn(200, 24)
        with torch.no_grad():
            torch.testing.assert_close(packed(x), other(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_and_other_dtypes_are_packed_anew(dtype: torch.dtype) -> None:
    require_packing(dtype)
    plain = mlp()
    packed = copy.deepcopy(pack_linears(copy.deepcopy(plain)))
    x = torch.randn(200, 24)
    with torch.no_grad():
        first, layer = plain[0], packed[0]
        assert isinstance(first, nn.Linear) and isinstance(layer, PackedLinear)
        first.weight.zero_()
        layer.weight.zero_()
        layer.pack()
        torch.testing.assert_close(packed(x), plain(x))
        torch.testing.assert_close(packed.to(dtype)(x.to(dtype)), plain.to(dtype)(x.to(dtype)))


def test_a_dtype_that_cannot_be_packed_changes_nothing() -> None:
    plain = mlp()
    layer = pack_linears(copy.deepcopy(plain))[0]
    assert isinstance(layer, PackedLinear)
    with pytest.raises(ValueError, match="PackedLinear: weight must be float32 or bfloat16 on cpu"):
        layer.half()
    x = torch.randn(200, 24)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain[0](x))


def test_a_layer_in_two_places_stays_one() -> None:
    layer = nn.Linear(8, 8)
    model = pack_linears(nn.Sequential(layer, nn.ReLU(), layer).eval())
    assert isinstance(model[0], PackedLinear) and model[0] is model[2]
    assert model[0].weight is layer.weight


@pytest.mark.parametrize("compacted", [False, True])
def test_a_pruned_model(compacted: bool) -> None:
    torch.manual_seed(0)
    model = fiak_ext.VisionTransformer(40, 4, 3, 5, 16, 2, 2).eval()
    fiak_ext.prune(model, 0.7, keys=0.3)
    if compacted:
        fiak_ext.compact(model)
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        expected = model(images)
        pack_linears(model)
        assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 4 + 1
        torch.testing.assert_close(model(images), expected)


def test_compiled() -> None:
    torch.compiler.reset()
    packed = pack_linears(mlp())
    for rows in (200, 300, 3):
        x = torch.randn(rows, 24)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(packed, fullgraph=True)(x), packed(x))


def test_operations_are_counted() -> None:
    for model in (mlp(), pack_linears(mlp())):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randn(200, 24))
        assert counter.get_total_flops() == 2 * 200 * (24 * 40 + 40 * 7)


def test_bfloat16_is_refused_where_onednn_cannot_pack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = mlp(torch.bfloat16)
    with pytest.raises(ValueError, match=r"weight must be float32 on this CPU, .* \(got torch.bfloat16\)"):
        pack_linears(model)
    assert type(model[0]) is nn.Linear


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model must be in evaluation mode \(got training mode\)"):
        pack_linears(mlp().train())
    with pytest.raises(ValueError, match=r"model must hold nn.Linear layers \(got Sequential\)"):
        pack_linears(nn.Sequential(nn.GELU()).eval())
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()).eval()
    with pytest.raises(ValueError, match=r"weight must be float32 or bfloat16 on cpu \(got torch.float64 on cpu\)"):
        pack_linears(mixed)
    assert type(mixed[0]) is nn.Linear
    packed = pack_linears(mlp())
    with pytest.raises(RuntimeError, match=r"gradients must be off, .* \(got enabled\)"):
        packed(torch.randn(2, 24))
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"input must be torch.float32, as weight is \(got torch.bfloat16\)"):
            packed(torch.randn(2, 24, dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match=r"must be in evaluation mode \(got training mode\)"):
            packed.train()(torch.randn(2, 24))
