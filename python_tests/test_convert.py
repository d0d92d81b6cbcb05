"""``convert`` on every kind of model it knows: the same outputs, names and gradients, dense, pruned and compacted."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from converted import BATCH, CASES, DIM, HEADS, Case, left_out, priors
from torch import Tensor, nn

from fiak_ext import (
    ConvertedAttention,
    MultiHeadSelfAttention,
    PriorAttention,
    calibrate,
    compact,
    convert,
    flops,
    prune,
    register_attention,
)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_case
def test_uniform_priors_change_nothing(case: Case) -> None:
    model, converted = case.model(), case.converted()
    inputs = case.inputs()
    with torch.no_grad():  # where torch.nn would take its fast path
        torch.testing.assert_close(case.run(converted, inputs), case.run(model, inputs))
    case.run(model, inputs).square().sum().backward()
    case.run(converted, inputs).square().sum().backward()
    expected, got = gradients(model), gradients(converted)
    torch.testing.assert_close({name: got[name] for name in expected}, expected)
    added = set(got) - set(expected)
    assert added == {name for name, _ in converted.named_parameters() if name.endswith("prior_attention.prior")}
    assert any(bool(got[name].any()) for name in added)


@every_case
def test_priors_are_used(case: Case) -> None:
    converted = case.converted()
    expected = case.run(converted, case.inputs())
    for attention in priors(converted):
        attention.prior.data.normal_()  # type: ignore[union-attr]
    with torch.no_grad():
        assert not torch.allclose(case.run(converted, case.inputs()), expected, rtol=1e-2, atol=1e-2)


@every_case
def test_names_and_values_stay(case: Case) -> None:
    model = case.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    assert convert(model, num_tokens=case.num_tokens) is model
    state = model.state_dict()
    assert [name for name in state if "prior_attention" not in name] == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert {name.rsplit(".", 1)[1] for name in set(state) - set(before)} == {"prior"}
    assert all(isinstance(module, classes[name]) for name, module in model.named_modules() if name in classes)
    assert {attention.num_queries for attention in priors(model)} == {case.num_tokens or case.tokens}


@every_case
@pytest.mark.parametrize("compacted", [False, True])
def test_pruned_is_the_original_with_the_same_mask(case: Case, compacted: bool) -> None:
    mask = case.mask()
    model, converted = case.model(), case.pruned(mask=mask)
    if compacted:
        compact(converted)
        assert all(attention.is_compacted for attention in priors(converted))
    inputs = case.inputs()
    expected, output = case.run_masked(model, inputs, mask), case.run(converted, inputs)
    torch.testing.assert_close(output, expected)
    expected.square().sum().backward()
    output.square().sum().backward()
    torch.testing.assert_close(gradients(converted), gradients(model))
    with torch.no_grad():
        torch.testing.assert_close(case.run(converted, inputs), expected)


@every_case
def test_compaction_drops_keys_and_keeps_outputs(case: Case) -> None:
    mask = left_out(case.mask())
    converted = case.pruned(mask=mask)
    expected = case.run(converted, case.inputs())
    names = set(converted.state_dict())
    compact(converted)
    torch.testing.assert_close(case.run(converted, case.inputs()), expected)
    for attention in priors(converted):
        assert attention.keep is not None and attention.keep.size(1) == mask.size(-1) - 1
    assert {name.rsplit(".", 1)[1] for name in set(converted.state_dict()) - names} == {"keep"}


@every_case
def test_calibrate_and_prune(case: Case) -> None:
    converted = case.converted(kind="softmax")
    calibrate(converted, [case.inputs()], forward=case.run)
    report = prune(converted, 0.5, importance="posterior")
    assert len(report.layers) == 2 and report.pruned == round(0.5 * report.pairs / 2) * 2
    assert bool(case.run(converted, case.inputs()).isfinite().all())


@every_case
def test_what_is_longer_than_the_prior_is_refused(case: Case) -> None:
    if case.num_tokens is None:
        with pytest.raises(ValueError, match=rf"num_tokens must be {case.tokens}, as in the model, or be left out"):
            convert(case.model(), num_tokens=3)
        return
    converted = convert(case.model(), num_tokens=7, is_causal=case.is_causal)
    with pytest.raises(ValueError, match=r"query must have at most 7 rows \(got 8\)"):
        case.run(converted, case.inputs())


def test_own_models_are_left_as_they_are() -> None:
    module = nn.Sequential(MultiHeadSelfAttention(8, 2, 4), PriorAttention(2, 4))
    names = list(module.state_dict())
    assert convert(module) is module and list(module.state_dict()) == names
    converted = CASES["bert"].converted()
    attention = priors(converted)[0]
    assert convert(converted) is converted and priors(converted)[0] is attention


def test_importing_imports_no_other_library() -> None:
    code = "import sys, fiak_ext; print(sorted({'timm', 'transformers', 'safetensors'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------- what is refused leaves the model as it was


class Pair(nn.Module):
    """One attention that is supported and one that is not."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(DIM, HEADS)
        self.second = other


class UnknownAttention(nn.Module):
    pass


class OwnMultihead(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (UnknownAttention(), r"got second: test_convert\.UnknownAttention, for which nothing is registered"),
        (
            nn.Sequential(OwnMultihead(DIM, HEADS)),
            r"got second\.0: test_convert\.OwnMultihead, for which nothing is reg",
        ),
        (nn.MultiheadAttention(DIM, HEADS, kdim=3), r"got second: MultiheadAttention, kdim and vdim must be embed_dim"),
        (nn.MultiheadAttention(DIM, HEADS, add_zero_attn=True), r"second: MultiheadAttention, add_bias_kv and add_zer"),
        (nn.TransformerDecoderLayer(DIM, HEADS), r"got second: TransformerDecoderLayer, whose attention to the enc"),
    ],
)
def test_unsupported_attention_is_named(other: nn.Module, message: str) -> None:
    model = Pair(other)
    names, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, num_tokens=4)
    assert list(model.state_dict()) == names and [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"convert: num_tokens must be given \(got None; needed by first, MultiheadAttention\)"),
        ({"num_tokens": 0}, r"convert: num_tokens must be an integer of at least 1 \(got 0\)"),
        ({"num_tokens": 4, "kind": "none"}, "kind must be one of fiak, gmm, softmax"),
        ({"num_tokens": 4, "score": "cosine"}, "score must be one of dot, gaussian"),
    ],
)
def test_wrong_arguments_are_refused(arguments: Any, message: str) -> None:
    model = Pair(nn.Identity())
    with pytest.raises(ValueError, match=message):
        convert(model, **arguments)
    assert type(model.first) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"convert: model must hold attention modules \(got Linear\)"):
        convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"is_causal must be False, as in the model, or be left out \(got True"):
        convert(CASES["bert"].model(), num_tokens=4, is_causal=True)


# ---------------------------------------------------------------- torch.nn


def padded(left: bool) -> Tensor:
    """True for padding; no element without tokens."""
    lengths = torch.tensor([8, 5, 1])
    hidden = torch.arange(8) >= lengths[:, None]
    return hidden.flip(1) if left else hidden


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
def test_padding_in_an_encoder(state: str, left: bool) -> None:
    case = CASES["torch.nn"]
    model, mask, hidden = case.model(), case.mask(), padded(left)
    converted = case.converted() if state == "dense" else case.pruned(mask=mask)
    converted = compact(converted) if state == "compacted" else converted
    inputs = case.inputs()["src"]
    with torch.no_grad():
        output = converted(inputs, src_key_padding_mask=hidden)
        for element, length in enumerate((~hidden).sum(1).tolist()):
            tokens = inputs[element, ~hidden[element]][None]
            allowed = mask if state != "dense" else torch.ones_like(mask)
            expected = model(tokens, mask=~allowed[:, :length, :length])
            torch.testing.assert_close(output[element, ~hidden[element]][None], expected)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("mask_check", [True, False])
@pytest.mark.parametrize("final_norm", [True, False])
def test_padded_positions_of_an_encoder(nested: bool, mask_check: bool, final_norm: bool) -> None:
    """In each mode what the original gives: zeros where it makes nested tensors, so that mean pooling stays."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, 0.0, batch_first=True)
    norm = nn.LayerNorm(DIM) if final_norm else None
    model = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=nested, mask_check=mask_check).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    converted = convert(copy.deepcopy(model), num_tokens=8)
    again = nn.TransformerEncoder(converted.layers[0], 2, norm, enable_nested_tensor=nested, mask_check=mask_check)
    again.load_state_dict(converted.state_dict())
    x = CASES["torch.nn"].inputs()["src"]
    for lengths in ([8, 5, 1], [6, 5, 2]):
        hidden = torch.arange(8) >= torch.tensor(lengths)[:, None]
        for training in (True, False):
            for gradients in (True, False):
                with torch.set_grad_enabled(gradients):
                    expected = model.train(training)(x, src_key_padding_mask=hidden)
                    for candidate in (converted, again):
                        output = candidate.train(training)(x, src_key_padding_mask=hidden)
                        torch.testing.assert_close(output, expected)
        if nested and not final_norm:
            assert not bool(output[hidden].any())


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
def test_nested_tensors_have_gradients(state: str) -> None:
    """Where all that the encoder looks at is frozen, it makes nested tensors although priors are trained."""
    case = CASES["torch.nn"]
    model = case.converted() if state == "dense" else case.pruned()
    model = compact(model) if state == "compacted" else model
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.shape[0] == 1)  # priors
    for name, parameter in model.layers[1].named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name == "linear1.weight")
    hidden = padded(left=False)
    grads = []
    for nested in (True, False):
        model.use_nested_tensor = nested
        output = model(case.inputs()["src"], src_key_padding_mask=hidden)
        assert nested is not bool(output[hidden].any())
        grads.append(
            torch.autograd.grad(output[~hidden].square().sum(), [p for p in model.parameters() if p.requires_grad])
        )
    torch.testing.assert_close(grads[0], grads[1])
    assert len(grads[0]) == (3 if state == "dense" else 1)


def test_what_is_put_into_an_encoder_layer_after_conversion_is_called() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, HEADS, 24, batch_first=True).eval()
    layer.self_attn = convert(layer.self_attn, num_tokens=8)
    priors(layer)[0].prior.data.normal_()  # type: ignore[union-attr]
    x = torch.randn(BATCH, 8, DIM)
    expected = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected)
        torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    assert convert(layer) is layer and len(priors(layer)[0]._forward_pre_hooks) == 1


def test_layouts_of_multihead_attention() -> None:
    torch.manual_seed(0)
    for bias in (False, True):
        model = nn.MultiheadAttention(DIM, HEADS, bias=bias).eval()
        converted = convert(copy.deepcopy(model), num_tokens=6)
        for shape in ((6, BATCH, DIM), (4, BATCH, DIM), (6, DIM)):
            x = torch.randn(shape)
            output, weights = converted(x, x, x, need_weights=False)
            torch.testing.assert_close(output, model(x, x, x, need_weights=False)[0])
            assert weights is None and output.shape == shape


def test_what_multihead_attention_refuses() -> None:
    module: Any = convert(nn.MultiheadAttention(DIM, HEADS), num_tokens=6)
    x, hole = torch.randn(6, BATCH, DIM), torch.zeros(BATCH, 6, dtype=torch.bool)
    hole[0, 2] = True
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    for arguments, message in (
        (((x, x, x), {}), "need_weights must be False"),
        (((x, x + 1, x), {"need_weights": False}), "key and value must be query itself, or equal to it"),
        (((x, x, x), {"need_weights": False, "key_padding_mask": hole}), "must hide tokens at the ends only"),
        (((x, x, x), {"need_weights": False, "attn_mask": causal}), "attn_mask must hide nothing"),
        (((x, x, x), {"need_weights": False, "is_causal": True}), "is_causal must be False unless converted with"),
        (((x, x, x), {"need_weights": False, "attn_mask": causal / 2 + 1}), "attn_mask must hold 0 and -inf only"),
    ):
        with pytest.raises(ValueError, match=message):
            module(*arguments[0], **arguments[1])
    module = convert(nn.MultiheadAttention(DIM, HEADS), num_tokens=6, is_causal=True)
    module(x, x, x, need_weights=False, attn_mask=causal)
    with pytest.raises(ValueError, match="attn_mask must hide what is behind the query, and that only"):
        module(x, x, x, need_weights=False, attn_mask=torch.zeros(6, 6))


# ---------------------------------------------------------------- another library


class ToyAttention(nn.Module):
    """What some library might have: no base class in common with anything, names of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.into = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


@register_attention(ToyAttention)
class PriorToyAttention(ConvertedAttention, ToyAttention):
    @classmethod
    def prior_arguments(cls, module: nn.Module, parents: Sequence[nn.Module]) -> dict[str, Any]:
        assert isinstance(module, ToyAttention) and isinstance(parents[0], nn.Sequential)
        return {"num_heads": module.heads}

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.into(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.prior_attention.is_compacted:
            key, value = torch.ops.fiak.compact_kv(key, value, self.prior_attention.kept(x.size(1)))
        output = self.prior_attention(query, key, value, kv_lens=self.kept_lens(x, None))
        return output.transpose(1, 2).flatten(2)


def test_another_library() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ToyAttention(DIM, HEADS), nn.Linear(DIM, 3))
    converted = convert(copy.deepcopy(model), num_tokens=6)
    x = torch.randn(BATCH, 6, DIM)
    torch.testing.assert_close(converted(x), model(x))
    torch.testing.assert_close(converted(x[:, :4]), model(x[:, :4]))
    prune(converted, 0.5, importance="random")
    expected = converted(x), converted(x[:, :4])
    compact(converted)
    torch.testing.assert_close((converted(x), converted(x[:, :4])), expected)
    for base in (ToyAttention, ConvertedAttention):
        with pytest.raises(TypeError, match=rf"class must be a subclass of \w+ \(got {base.__name__}\)"):
            register_attention(ToyAttention)(base)  # type: ignore[type-var]


# ---------------------------------------------------------------- counts


@every_case
def test_flops_count_projections_as_attention(case: Case) -> None:
    """What is not attention costs the same dense, pruned and compacted; attention costs what its sizes say."""
    inputs = case.inputs()
    dense = flops.model_report(case.converted(), **inputs)
    pruned = case.pruned(mask=left_out(case.mask()))
    sparse = flops.model_report(pruned, **inputs)
    compacted = flops.model_report(compact(pruned), **inputs)
    assert dense.other == sparse.other == compacted.other
    assert dense.attention.dense == sparse.attention.dense == compacted.attention.dense == dense.attention.now
    assert not any(layer.name.endswith("prior_attention") for layer in dense.layers)
    tokens, head_dim, key_heads = case.tokens, DIM // HEADS, 2 if case.name == "llama" else HEADS
    projected = BATCH * 2 * tokens * DIM * head_dim * (HEADS + 2 * key_heads)
    pairs = tokens * (tokens + 1) // 2 if case.is_causal else tokens**2
    assert dense.attention.now.products == projected + BATCH * 2 * HEADS * pairs * 2 * head_dim
    patterns = [attention.pattern for attention in priors(pruned)]
    kept = sum(pattern.nnz for pattern in patterns if pattern is not None)
    assert sparse.attention.now.products == projected + BATCH * kept * 2 * head_dim
    saved = BATCH * 2 * DIM * head_dim * 2 * key_heads
    assert compacted.attention.now.products == sparse.attention.now.products - saved
