"""``PriorAttention`` and ``MultiHeadSelfAttention``, dense and pruned, against ``fiak_ext.reference``."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fiak_ext import MultiHeadSelfAttention, PriorAttention, SparsePattern, reference

KINDS = ("fiak", "gmm", "softmax")
PARAMETERIZATIONS = ("logits", "clamp")
HEADS, QUERIES, KEYS = 4, 7, 9


def random_mask(*sizes: int, density: float = 0.5, causal: bool = False, seed: int = 0) -> Tensor:
    mask = torch.rand(sizes, generator=torch.Generator().manual_seed(seed)) < density
    return mask.tril() if causal else mask


def random_inputs(
    batch: int, queries: int, keys: int, heads: int = HEADS, key_heads: int = HEADS, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((batch, heads, queries, 6), (batch, key_heads, keys, 6), (batch, key_heads, keys, 3))
    query, key, value = (torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def trained(module: nn.Module, seed: int = 0) -> Any:
    """The module in float64 with priors that are not uniform."""
    module = module.double()
    generator = torch.Generator().manual_seed(seed)
    for attention in module.modules():
        if isinstance(attention, PriorAttention) and attention.prior is not None:
            noise = torch.randn(attention.prior.shape, dtype=torch.float64, generator=generator)
            attention.prior.data = noise if attention.parameterization == "logits" else noise / 2
    return module


def dense(kind: str = "fiak", parameterization: str = "logits", **kwargs: Any) -> PriorAttention:
    kwargs = {"kind": kind, "parameterization": parameterization} | kwargs
    return trained(PriorAttention(HEADS, QUERIES, KEYS, **kwargs))


def pruned(num_queries: int = QUERIES, num_keys: int = KEYS, groups: int = 1, **kwargs: Any) -> PriorAttention:
    attention = PriorAttention(HEADS, num_queries, num_keys, groups=groups, **kwargs)
    mask = random_mask(groups, HEADS, num_queries, num_keys, causal=attention.is_causal)
    attention.set_pattern(SparsePattern.from_mask(mask))
    return attention.double()


# ---------------------------------------------------------------- the prior


def test_initial_priors_are_the_papers() -> None:
    def value(num_keys: int = KEYS, **kwargs: Any) -> list[float]:
        prior = PriorAttention(HEADS, QUERIES, num_keys, **kwargs).prior
        assert prior is not None
        return prior.unique().tolist()

    for kind in ("fiak", "gmm"):
        assert value(kind=kind) == [0]
        assert value(kind=kind, is_causal=True) == [0]
        assert value(kind=kind, parameterization="clamp", is_causal=True) == [1]
    assert value(parameterization="clamp") == pytest.approx([KEYS**-0.5])
    assert value(kind="gmm", parameterization="clamp") == pytest.approx([1 / KEYS])
    assert PriorAttention(HEADS, QUERIES, kind="softmax").prior is None


@pytest.mark.parametrize("kind", ["fiak", "gmm"])
def test_shape_of_the_prior(kind: str) -> None:
    prior = dense(kind, groups=3).prior
    assert prior is not None
    assert prior.shape == (3, HEADS, QUERIES if kind == "fiak" else 1, KEYS)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [5, KEYS, 12])
def test_weights_from_logits_average_one_over_the_eligible_keys(is_causal: bool, queries: int) -> None:
    attention: PriorAttention = trained(PriorAttention(HEADS, queries, KEYS, is_causal=is_causal))
    weight, eligible = attention.weight(), attention.eligible()
    assert torch.equal(weight != 0, eligible.expand_as(weight))
    torch.testing.assert_close(weight.sum(-1), eligible.sum(-1).double().expand(1, HEADS, -1))
    uniform = PriorAttention(HEADS, queries, KEYS, is_causal=is_causal).weight()
    torch.testing.assert_close(uniform, eligible.float().expand_as(uniform))


@pytest.mark.parametrize("is_causal", [False, True])
def test_weights_from_logits_of_a_uniform_prior_are_exactly_one(is_causal: bool) -> None:
    for keys in range(1, 100):  # softmax times the count misses one at 41, 47, 55 and others
        attention = PriorAttention(1, keys, is_causal=is_causal)
        assert torch.equal(attention.weight()[0, 0], attention.eligible().float())


def test_gmm_weights_average_one_over_all_keys() -> None:
    torch.testing.assert_close(dense("gmm").weight().mean(-1), torch.ones(1, HEADS, 1, dtype=torch.float64))


@pytest.mark.parametrize("is_causal", [False, True])
def test_clamped_weights(is_causal: bool) -> None:
    attention = dense(parameterization="clamp", is_causal=is_causal)
    assert attention.prior is not None
    expected = torch.where(attention.eligible(), attention.prior.detach().abs().clamp(max=1), 0.0)
    torch.testing.assert_close(attention.weight().detach(), expected)


def test_weights_are_float32_unless_the_prior_is_float64() -> None:
    attention = PriorAttention(HEADS, QUERIES, KEYS)
    assert attention.weight().dtype == torch.float32
    assert attention.to(torch.bfloat16).weight().dtype == torch.float32
    assert attention.double().weight().dtype == torch.float64


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_importance(kind: str, parameterization: str, is_causal: bool) -> None:
    attention = dense(kind, parameterization, is_causal=is_causal)
    importance = attention.importance()
    assert importance.shape == (1, HEADS, QUERIES, KEYS)
    assert not importance.requires_grad
    assert not importance[:, :, ~attention.eligible()].any()
    if attention.prior is None:
        expected = torch.ones_like(importance)
    elif parameterization == "clamp":
        expected = attention.prior.detach().abs().expand_as(importance)  # not clamped
    else:
        expected = attention.weight().detach().expand_as(importance)
    eligible = attention.eligible()
    torch.testing.assert_close(importance[:, :, eligible], expected[:, :, eligible])


def test_there_is_no_prior_after_pruning() -> None:
    attention = pruned()
    assert attention.prior is None
    with pytest.raises(RuntimeError, match=r"weight: there is no prior \(pruned to"):
        attention.weight()
    with pytest.raises(RuntimeError, match="importance: there is no prior any more"):
        attention.importance()
    with pytest.raises(RuntimeError, match=r"weight: there is no prior \(dense\)"):
        PriorAttention(HEADS, QUERIES, kind="softmax").weight()


# ---------------------------------------------------------------- attention


def expected_output(attention: PriorAttention, inputs: tuple[Tensor, Tensor, Tensor], **kwargs: Any) -> Tensor:
    """The reference for dense or pruned attention over the first rows and columns."""
    query, key, value = inputs
    if attention.pattern is not None:
        prior: Tensor | None = attention.pattern.to_mask().double()
    elif attention.prior is not None:
        prior = attention.weight()
    else:
        prior = None
    if prior is not None:
        prior = prior[:, :, : query.size(2), : key.size(2)]
    options: Any = {"is_causal": attention.is_causal, "score": attention.score, "scale": attention.scale}
    return reference.prior_attention(query, key, value, prior, **options, **kwargs)[0]


@pytest.mark.parametrize(("score", "scale"), [("dot", None), ("gaussian", 0.4)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_forward_and_backward(state: str, is_causal: bool, score: Any, scale: float | None) -> None:
    options: dict[str, Any] = {"is_causal": is_causal, "score": score, "scale": scale}
    attention = pruned(**options) if state == "pruned" else dense(state, **options)
    for lens in (None, torch.tensor([9, 0, 4])):
        inputs = random_inputs(3, QUERIES, KEYS, key_heads=2)
        leaves = [tensor.requires_grad_() for tensor in inputs] + list(attention.parameters())
        output = attention(*inputs, kv_lens=lens)
        expected = expected_output(attention, inputs, kv_lens=lens)
        torch.testing.assert_close(output, expected)
        cotangent = torch.randn_like(expected)
        torch.testing.assert_close(
            torch.autograd.grad(output, leaves, cotangent), torch.autograd.grad(expected, leaves, cotangent)
        )


@pytest.mark.parametrize("state", ["fiak", "gmm", "pruned"])
def test_groups(state: str) -> None:
    attention = pruned(groups=2) if state == "pruned" else dense(state, groups=2)
    inputs = random_inputs(4, QUERIES, KEYS)
    torch.testing.assert_close(attention(*inputs), expected_output(attention, inputs))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_shorter_inputs(state: str, is_causal: bool) -> None:
    attention = pruned(is_causal=is_causal) if state == "pruned" else dense(state, is_causal=is_causal)
    for queries, keys in [(QUERIES, 5), (3, KEYS), (4, 4), (1, 1)]:
        inputs = random_inputs(3, queries, keys)
        for lens in (None, torch.tensor([keys, 0, keys // 2])):
            torch.testing.assert_close(
                attention(*inputs, kv_lens=lens), expected_output(attention, inputs, kv_lens=lens)
            )


class _Made(TorchDispatchMode):
    """Counts the numbers of all tensors that ops make."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not func.is_view:
                self.numbers += tensor.numel()
        return result


@pytest.mark.parametrize("lens", [None, torch.tensor([20, 7])], ids=["all", "lens"])
def test_a_pruned_step_makes_nothing_of_the_longest_inputs_size(lens: Tensor | None) -> None:
    made = []
    for longest in (32, 64, 512, 2048):
        attention = pruned(longest, longest)
        query, key, value = random_inputs(2, 1, 20)
        offsets = torch.tensor([19, 6])
        with torch.no_grad():
            attention(query, key, value, kv_lens=lens, query_offsets=offsets)  # the plan
            with _Made() as counts:
                attention(query, key, value, kv_lens=lens, query_offsets=offsets)
        made.append(counts.numbers)
    assert made == made[:1] * 4


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_decoding_gives_what_the_full_pass_gives(state: Any, groups: int, is_causal: bool) -> None:
    options: dict[str, Any] = {"is_causal": is_causal, "groups": groups}
    if state == "pruned":
        attention = pruned(KEYS, KEYS, **options)
    else:
        attention = trained(PriorAttention(HEADS, KEYS, KEYS, kind=state, **options))
    query, key, value = random_inputs(2, KEYS, KEYS)
    full = attention(query, key, value)
    offsets = torch.tensor([5, 2])
    rows = torch.stack([query[b, :, offset : offset + 3] for b, offset in enumerate(offsets.tolist())])
    expected = torch.stack([full[b, :, offset : offset + 3] for b, offset in enumerate(offsets.tolist())])
    torch.testing.assert_close(attention(rows, key, value, query_offsets=offsets), expected)
    if is_causal:  # keys after the last query need not exist yet
        torch.testing.assert_close(attention(rows, key[:, :, :8], value[:, :, :8], query_offsets=offsets), expected)


@pytest.mark.parametrize("state", ["fiak", "gmm", "pruned"])
def test_output_lies_in_the_order_that_projections_want(state: str) -> None:
    attention = pruned() if state == "pruned" else dense(state)
    output = attention(*random_inputs(2, QUERIES, KEYS))
    assert output.transpose(1, 2).flatten(2).data_ptr() == output.data_ptr()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_uniform_prior_changes_nothing(kind: Any, parameterization: Any, is_causal: bool) -> None:
    inputs = random_inputs(2, QUERIES, QUERIES, dtype=torch.float32)
    plain = PriorAttention(HEADS, QUERIES, kind="softmax", is_causal=is_causal)(*inputs)
    attention = PriorAttention(HEADS, QUERIES, kind=kind, parameterization=parameterization, is_causal=is_causal)
    torch.testing.assert_close(attention(*inputs), plain)


@pytest.mark.parametrize("state", ["fiak", "pruned"])
def test_dropout_follows_torchs_generator_and_the_mode(state: str) -> None:
    attention = pruned(dropout_p=0.5) if state == "pruned" else dense(state, dropout_p=0.5)
    inputs = random_inputs(2, QUERIES, KEYS)
    torch.manual_seed(3)
    first, second = attention(*inputs), attention(*inputs)
    torch.manual_seed(3)
    assert torch.equal(attention(*inputs), first)
    assert not torch.equal(first, second)
    attention.eval()
    torch.testing.assert_close(attention(*inputs), expected_output(attention, inputs))


def test_the_recorder_sees_every_call() -> None:
    attention = dense()
    calls: list[Any] = []
    attention.recorder = lambda query, key, arguments: calls.append((query, key, arguments))
    query, key, value = random_inputs(2, QUERIES, KEYS)
    lens = torch.tensor([3, 9])
    attention(query, key, value, kv_lens=lens)
    assert calls == [(query, key, {"kv_lens": lens, "query_offsets": None, "bias": None})]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, r"num_heads must be at least 1 \(got 0\)"),
        ({"num_keys": 0}, r"num_keys must be at least 1 \(got 0\)"),
        ({"groups": 0}, r"groups must be at least 1 \(got 0\)"),
        ({"kind": "vit"}, r"kind must be one of fiak, gmm, softmax \(got 'vit'\)"),
        ({"parameterization": "relu"}, r"parameterization must be one of logits, clamp \(got 'relu'\)"),
        ({"score": "cosine"}, r"score must be one of dot, gaussian \(got 'cosine'\)"),
        ({"dropout_p": 1.5}, r"dropout_p must be in 0..1 \(got 1.5\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PriorAttention(**({"num_heads": HEADS, "num_queries": QUERIES} | arguments))


@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_wrong_inputs_are_named(state: str) -> None:
    attention = pruned() if state == "pruned" else dense(state)
    with pytest.raises(ValueError, match=r"query must have at most 7 rows \(got 8\)"):
        attention(*random_inputs(1, QUERIES + 1, KEYS))
    with pytest.raises(ValueError, match=r"key must have at most 9 rows \(got 10\)"):
        attention(*random_inputs(1, QUERIES, KEYS + 1))
    with pytest.raises(ValueError, match=r"query must have 4 heads \(got 8\)"):
        attention(*random_inputs(1, QUERIES, KEYS, heads=8))
    with pytest.raises(ValueError, match=r"key must have 4 dimensions \(got shape \(4, 9, 6\)\)"):
        query, key, value = random_inputs(1, QUERIES, KEYS)
        attention(query, key[0], value)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kind", ["fiak", "gmm"])
def test_priors_of_one_have_gradients(kind: Any, with_bias: bool) -> None:
    """Where clamped causal priors start; beyond 1 there is none, and NaN stays NaN."""
    attention: Any = PriorAttention(2, 6, kind=kind, parameterization="clamp", is_causal=True).double()
    assert (attention.prior == 1).all()
    inputs = random_inputs(2, 6, 6, heads=2, key_heads=2)
    bias = torch.zeros(1, 2, 6, 6, dtype=torch.float64) if with_bias else None
    gradients = []
    for shift in (0.0, -1e-6, 1e-6):  # the derivative to the left is that at 1
        attention.prior.data.fill_(1 + shift)
        (gradient,) = torch.autograd.grad(attention(*inputs, bias=bias).square().sum(), attention.prior)
        gradients.append(gradient)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert not gradients[2].any()
    (weights,) = torch.autograd.grad(attention.weight().sum(), attention.prior)
    assert not weights.any()


# ---------------------------------------------------------------- patterns and checkpoints


def test_set_pattern() -> None:
    attention = dense()
    for name in ("posterior", "reached"):
        setattr(attention, name, torch.ones(1))
    pattern = SparsePattern.from_mask(random_mask(HEADS, QUERIES, KEYS))
    attention.set_pattern(pattern)
    assert attention.is_pruned and not attention.is_compacted
    assert attention.pattern == pattern
    assert not list(attention.parameters())
    assert attention.posterior is None and attention.reached is None
    assert sorted(attention.state_dict()) == ["pattern_checksum", "pattern_col_indices", "pattern_crow_indices"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, QUERIES, KEYS), r"pattern.num_heads must be 4 \(got 2\)"),
        ((HEADS, QUERIES + 1, KEYS), r"pattern.num_queries must be 7 \(got 8\)"),
        ((HEADS, QUERIES, KEYS - 1), r"pattern.num_keys must be 9 \(got 8\)"),
        ((2, HEADS, QUERIES, KEYS), r"pattern.groups must be 1 \(got 2\)"),
    ],
)
def test_a_pattern_of_other_sizes_is_refused(sizes: tuple[int, ...], message: str) -> None:
    attention = dense()
    with pytest.raises(ValueError, match=message):
        attention.set_pattern(SparsePattern.from_mask(random_mask(*sizes)))
    assert not attention.is_pruned


def test_a_causal_module_takes_causal_patterns_only() -> None:
    mask = random_mask(HEADS, QUERIES, KEYS, causal=True)
    attention = dense(is_causal=True)
    mask[2, 3, 4] = True
    with pytest.raises(ValueError, match="pattern must keep no pair above the diagonal"):
        attention.set_pattern(SparsePattern.from_mask(mask))
    mask[2, 3, 4] = False
    attention.set_pattern(SparsePattern.from_mask(mask))


def test_a_malformed_pattern_is_refused() -> None:
    crow = torch.arange(HEADS * QUERIES + 1)
    pattern = SparsePattern(crow, torch.full((HEADS * QUERIES,), KEYS), HEADS, QUERIES, KEYS)
    with pytest.raises(RuntimeError, match="csr_plan: col_indices"):
        dense().set_pattern(pattern)


@pytest.mark.parametrize("target", ["fiak", "gmm", "softmax", "pruned"])
def test_a_checkpoint_decides_what_it_is_loaded_into(target: str) -> None:
    inputs = random_inputs(2, QUERIES, KEYS)
    source = pruned()
    module = dense("fiak", "clamp") if target == "pruned" else dense(target)
    if target == "pruned":
        module.set_pattern(SparsePattern.from_mask(random_mask(HEADS, QUERIES, KEYS, seed=5)))
    module.load_state_dict(source.state_dict())
    assert module.pattern == source.pattern
    assert torch.equal(module(*inputs), source(*inputs))
    assert module.pattern_col_indices is not None and source.pattern_col_indices is not None
    assert module.pattern_col_indices.data_ptr() != source.pattern_col_indices.data_ptr()


@pytest.mark.parametrize("kind", ["fiak", "gmm"])
def test_a_dense_checkpoint_brings_the_prior_back(kind: str) -> None:
    source, module = dense(kind), dense(kind)
    module.set_pattern(SparsePattern.from_mask(random_mask(HEADS, QUERIES, KEYS)))
    module.load_state_dict(source.state_dict())
    assert not module.is_pruned
    inputs = random_inputs(2, QUERIES, KEYS)
    assert torch.equal(module(*inputs), source(*inputs))


def test_loading_by_assignment_from_the_meta_device() -> None:
    source = pruned()
    with torch.device("meta"):
        module = PriorAttention(HEADS, QUERIES, KEYS)
    module.load_state_dict(source.state_dict(), assign=True)
    inputs = random_inputs(2, QUERIES, KEYS)
    assert torch.equal(module(*inputs), source(*inputs))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pattern_col_indices": torch.full((3,), KEYS)}, r"0\.prior_attention\.pattern: csr_plan: "),
        (
            {"pattern_crow_indices": torch.zeros(5, dtype=torch.int64)},
            r"0\.prior_attention\.pattern: .*= 8 or 29 elements \(got 5\)",
        ),
        ({"pattern_crow_indices": torch.zeros(29)}, r"0\.prior_attention\.pattern: .*must be int32 or int64"),
    ],
)
def test_a_malformed_checkpoint_is_refused(changed: dict[str, Tensor], message: str) -> None:
    model = nn.Sequential(nn.ModuleDict({"prior_attention": pruned()}))
    state = model.state_dict() | {f"0.prior_attention.{name}": tensor for name, tensor in changed.items()}
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(state)


def test_a_checkpoint_without_its_pattern_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*pattern_crow_indices"):
        pruned().load_state_dict({})


def test_copies_make_their_own_plan() -> None:
    source = pruned()
    inputs = random_inputs(2, QUERIES, KEYS)
    expected = source(*inputs)
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    copies = (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), torch.load(file, weights_only=False))
    for module in copies:
        assert module._plan is None
        assert torch.equal(module(*inputs), expected)
    assert source._plan is not None


def test_moves() -> None:
    module = pruned().float()
    inputs = random_inputs(2, QUERIES, KEYS, dtype=torch.float32)
    expected = module(*inputs)
    plan = module._plan
    module.to(torch.bfloat16).to("cpu")
    assert module._plan is plan
    assert module.pattern_col_indices is not None and module.pattern_col_indices.dtype == torch.int32
    assert module.to("meta")._plan is None
    module.to_empty(device="cpu").load_state_dict(pruned().state_dict())
    assert torch.equal(module(*inputs), expected)


def test_calibrated_modules_go_to_meta_and_back() -> None:
    module = dense()
    module.posterior, module.reached = torch.ones(1, HEADS, QUERIES, KEYS), torch.ones(1, HEADS, QUERIES, KEYS).long()
    module.to("meta").to_empty(device="cpu")
    assert module.posterior.device == module.reached.device == torch.device("cpu")


def test_a_plan_made_in_inference_mode_serves_training() -> None:
    source = copy.deepcopy(pruned())
    inputs = random_inputs(2, QUERIES, KEYS)
    with torch.inference_mode():
        source(*inputs)
    inputs[0].requires_grad_()
    source(*inputs).sum().backward()
    assert inputs[0].grad is not None


def test_a_checkpoint_moves_between_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MultiHeadSelfAttention(8, 2, 6)
    module.prior_attention.set_pattern(SparsePattern.from_mask(random_mask(2, 6, 6)))
    x = torch.randn(3, 6, 8)
    torch.save({"state": module.state_dict(), "x": x, "output": module(x).detach()}, tmp_path / "checkpoint.pt")
    program = (
        "import sys, torch\n"
        "from fiak_ext import MultiHeadSelfAttention\n"
        "saved = torch.load(sys.argv[1], weights_only=True)\n"
        "module = MultiHeadSelfAttention(8, 2, 6)\n"
        "module.load_state_dict(saved['state'])\n"
        "assert module.prior_attention.is_pruned\n"
        "assert torch.equal(module(saved['x']), saved['output'])\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "checkpoint.pt"], check=True)


# ---------------------------------------------------------------- with projections


def self_attention(state: str, **kwargs: Any) -> MultiHeadSelfAttention:
    torch.manual_seed(0)
    kind: Any = "fiak" if state == "pruned" else state
    module = MultiHeadSelfAttention(12, 3, 8, kind=kind, **kwargs)
    if state == "pruned":
        mask = random_mask(3, 8, 8, causal=kwargs.get("is_causal", False))
        module.prior_attention.set_pattern(SparsePattern.from_mask(mask))
    return module


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_self_attention(state: str, is_causal: bool) -> None:
    module: MultiHeadSelfAttention = trained(self_attention(state, head_dim=5, is_causal=is_causal))
    for tokens in (8, 5):
        x = torch.randn(2, tokens, 12, dtype=torch.float64)
        for lens in (None, torch.tensor([tokens, 2])):
            assert module.qkv is not None
            projected = module.qkv(x).view(2, tokens, 3, 3, 5).permute(2, 0, 3, 1, 4)
            heads = expected_output(module.prior_attention, (projected[0], projected[1], projected[2]), kv_lens=lens)
            torch.testing.assert_close(module(x, lens), module.proj(heads.transpose(1, 2).reshape(2, tokens, 15)))


def test_biases_are_optional() -> None:
    assert [name for name, _ in self_attention("softmax").named_parameters() if "bias" in name] == [
        "qkv.bias",
        "proj.bias",
    ]
    module = self_attention("softmax", qkv_bias=False, proj_bias=False)
    assert not [name for name, _ in module.named_parameters() if "bias" in name]


def test_wrong_uses_of_self_attention_are_named() -> None:
    with pytest.raises(ValueError, match=r"dim must be a multiple of num_heads .* \(got 10 and 4\)"):
        MultiHeadSelfAttention(10, 4, 8)
    with pytest.raises(ValueError, match=r"x must have at most 8 tokens \(got 9\)"):
        self_attention("softmax")(torch.zeros(1, 9, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_autocast_and_low_precision(state: str, dtype: torch.dtype) -> None:
    module = self_attention(state)
    x = torch.randn(2, 8, 12)
    expected = module(x)
    with torch.autocast("cpu", dtype=dtype):
        output = module(x)
        assert output.dtype == dtype
        output.float().square().sum().backward()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    torch.testing.assert_close(module.to(dtype)(x.to(dtype)).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("state", [*KINDS, "pruned"])
def test_compile_without_graph_breaks(state: str) -> None:
    torch.compiler.reset()
    module = self_attention(state)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, tokens in [(2, 8), (3, 8), (2, 5), (2, 7)]:
        x = torch.randn(batch, tokens, 12)
        for lens in (None, torch.randint(1, tokens + 1, (batch,))):
            module.zero_grad()
            expected = module(x, lens)
            expected.square().sum().backward()
            gradients = [p.grad for p in module.parameters()]
            module.zero_grad()
            output = compiled(x, lens)
            output.square().sum().backward()
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close([p.grad for p in module.parameters()], gradients)


def test_compile_draws_dropout_seeds() -> None:
    torch.compiler.reset()
    module = self_attention("pruned", dropout_p=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 12)
    assert not torch.equal(compiled(x), compiled(x))
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))


def test_a_copy_is_compiled_before_it_has_a_plan() -> None:
    torch.compiler.reset()
    module = copy.deepcopy(self_attention("pruned"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 12)
    torch.testing.assert_close(compiled(x), self_attention("pruned")(x))
    torch.testing.assert_close(compiled(x), self_attention("pruned")(x))


def test_representation() -> None:
    assert repr(PriorAttention(4, 7, 9, kind="gmm", is_causal=True, dropout_p=0.1)) == (
        "PriorAttention(4, 7, 9, kind='gmm', dense, parameterization='logits', is_causal=True, dropout_p=0.1)"
    )


# ---------------------------------------------------------------- an additive bias


@pytest.mark.parametrize("state", ["dense", "softmax", "pruned", "compacted"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_is_added_to_the_scores(shared: bool, state: str) -> None:
    """Also where the largest biases of a row are at pairs that are pruned, far above all that are left."""
    groups = 2
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn((1 if shared else groups, HEADS, QUERIES, KEYS), dtype=torch.float64, generator=generator)
    mask = random_mask(groups, HEADS, QUERIES, KEYS)
    mask[..., 4] = False
    mask[:, :, 2] = torch.arange(KEYS) == 5
    query, key, value = random_inputs(4, QUERIES, KEYS)
    if state in ("dense", "softmax"):
        attention: PriorAttention = dense("fiak" if state == "dense" else "softmax", groups=groups)
        weight = attention.weight() if state == "dense" else torch.ones(1, 1, 1, 1, dtype=torch.float64)
        inputs = (query, key, value)
    else:
        bias[:, :, :, 4] = 800.0
        bias[:, :, 2, 5] = -800.0
        attention = PriorAttention(HEADS, QUERIES, KEYS, groups=groups)
        attention.set_pattern(SparsePattern.from_mask(mask))
        weight, inputs = mask.double(), (query, key, value)
        if state == "compacted":
            inputs = (query, *torch.ops.fiak.compact_kv(key, value, attention.compact()))
    largest = bias.masked_fill(weight.expand(groups, HEADS, QUERIES, KEYS) == 0, -torch.inf)
    factor = (bias - largest.amax(-1, keepdim=True).clamp(min=-1e4)).exp().nan_to_num(posinf=0.0)
    expected, _ = reference.prior_attention(query, key, value, (weight * factor).expand(groups, HEADS, QUERIES, KEYS))
    torch.testing.assert_close(attention(*inputs, bias=bias), expected)


# ---------------------------------------------------------------- priors and biases that an input hides


def sdpa(query: Tensor, key: Tensor, value: Tensor, lens: list[int], mask: Tensor | None = None) -> Tensor:
    """SDPA of each element over its first keys, with a float mask over these."""
    outputs = [
        F.scaled_dot_product_attention(q, k[:, :n], v[:, :n], None if mask is None else mask[..., :n])
        for q, k, v, n in zip(query, key, value, lens, strict=True)
    ]
    return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [95.0, 103.0, 104.0, 200.0, 1e4])
@pytest.mark.parametrize("kind", ["fiak", "gmm"])
def test_a_prior_behind_kv_lens_changes_nothing(kind: Any, size: float, dtype: torch.dtype) -> None:
    attention: Any = PriorAttention(2, 64, kind=kind)
    attention.prior.data[..., 50] = size
    query, key, value = (x.requires_grad_() for x in random_inputs(2, 64, 64, heads=2, key_heads=2, dtype=dtype))
    for lens in ([10, 10], [10, 50], [1, 33]):
        output = attention(query, key, value, kv_lens=torch.tensor(lens))
        expected = sdpa(query, key, value, lens)
        cotangent = torch.randn_like(expected)
        grads = torch.autograd.grad(output, (query, key, value, attention.prior), cotangent)
        tolerance: dict[str, Any] = {} if dtype != torch.bfloat16 else {"rtol": 5e-2, "atol": 5e-2}
        torch.testing.assert_close(output, expected, **tolerance)
        for ours, wanted in zip(grads, torch.autograd.grad(expected, (query, key, value), cotangent), strict=False):
            torch.testing.assert_close(ours, wanted, **tolerance)
        assert grads[3].isfinite().all()
        assert (grads[3][..., 50:] == 0).all()


@pytest.mark.parametrize("size", [95.0, 103.0, 104.0, 200.0, 1e4])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["fiak", "gmm"])
def test_a_prior_behind_a_shorter_input_changes_nothing(kind: Any, is_causal: bool, size: float) -> None:
    attention: Any = PriorAttention(2, 64, kind=kind, is_causal=is_causal)
    attention.prior.data[..., 50] = size
    query, key, value = random_inputs(2, 20, 20, heads=2, key_heads=2, dtype=torch.float32)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(attention(query, key, value), expected)
    # And behind the queries that cached decoding is at.
    offsets = torch.tensor([17, 17])
    output = attention(query[:, :, 17:], key, value, query_offsets=offsets)
    torch.testing.assert_close(output, expected[:, :, 17:])


@pytest.mark.parametrize("size", [95.0, 104.0, 1e4])
@pytest.mark.parametrize("state", ["fiak", "clamp", "softmax", "pruned", "compacted"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_bias_behind_kv_lens_changes_nothing(state: str, size: float, is_causal: bool) -> None:
    tokens = 24
    bias = torch.randn(1, 2, tokens, tokens, generator=torch.Generator().manual_seed(3))
    visible = bias.clone()
    bias[..., 20] = size
    bias.requires_grad_()
    mask = torch.ones(2, tokens, tokens, dtype=torch.bool)
    mask = mask.tril() if is_causal else mask
    options: dict[str, Any] = {"is_causal": is_causal}
    if state == "clamp":
        options["parameterization"] = "clamp"
    attention: Any = PriorAttention(2, tokens, kind="softmax" if state == "softmax" else "fiak", **options)
    if state == "clamp":
        attention.prior.data.fill_(0.5)  # 1, where causal ones start, is where the gradient of clamp ends
        attention.prior.data[..., 3] = 0
        mask[..., 3] = False
        mask[:, 3, 2] = True
    inputs = random_inputs(2, tokens, tokens, heads=2, key_heads=2, dtype=torch.float32)
    query, key, value = inputs
    if state in ("pruned", "compacted"):
        mask[..., 5] = False
        attention.set_pattern(SparsePattern.from_mask(mask))
        if state == "compacted":
            inputs = (query, *torch.ops.fiak.compact_kv(key, value, attention.compact()))
    lens = [10, 20]
    expected = sdpa(query, key, value, lens, visible[0].masked_fill(~mask, -torch.inf))
    leaves = [bias, *attention.parameters()]
    output = attention(*inputs, kv_lens=torch.tensor(lens), bias=bias)
    torch.testing.assert_close(output, expected)
    for grad in torch.autograd.grad(output.square().sum(), leaves):
        assert grad.isfinite().all()
        assert (grad[..., 20:] == 0).all()
        assert grad.abs().max() > 1e-3


@pytest.mark.parametrize("state", ["fiak", "pruned"])
def test_rows_without_keys_leave_gradients_finite(state: str) -> None:
    """Padding: an element without keys, and priors that are the largest where it would be."""
    attention: Any = PriorAttention(2, 16)
    if state == "pruned":
        attention.set_pattern(SparsePattern.from_mask(torch.ones(2, 16, 16, dtype=torch.bool)))
    else:
        attention.prior.data[..., 8:] = 1e4
    leaves = [x.requires_grad_() for x in random_inputs(3, 16, 16, heads=2, key_heads=2, dtype=torch.float32)]
    bias = torch.zeros(1, 2, 16, 16)
    bias[..., 8:] = 300
    bias.requires_grad_()
    output = attention(*leaves, kv_lens=torch.tensor([0, 8, 3]), bias=bias)
    assert (output[0] == 0).all()
    for grad in torch.autograd.grad(output.square().sum(), [*leaves, bias, *attention.parameters()]):
        assert grad.isfinite().all()


def test_decoding_looks_at_its_own_rows_and_columns_only() -> None:
    """Memory of a step in proportion to its queries and keys, not to the longest input."""
    tokens, keys = 2048, 40
    for kind in ("softmax", "fiak", "gmm"):
        attention: Any = PriorAttention(2, tokens, kind=kind, is_causal=True)
        query, key, value = random_inputs(2, 1, keys, heads=2, key_heads=2, dtype=torch.float32)
        offsets = torch.tensor([30, 39])
        with torch.no_grad(), Largest() as largest:
            output = attention(query, key, value, query_offsets=offsets)
        assert largest.numel <= 2 * 2 * 2 * keys * 8
        torch.testing.assert_close(output, sdpa(query, key, value, [31, 40]))


class Largest(TorchDispatchMode):
    """The elements of the largest new tensor that an op returns; views are as large as their result."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numel = max(self.numel, result.numel())
        return result


def test_a_clamped_prior_of_zero_with_a_bias() -> None:
    attention: Any = dense(parameterization="clamp")
    attention.prior.data[..., 2] = 0.0
    inputs = random_inputs(2, QUERIES, KEYS)
    bias = torch.randn(1, HEADS, QUERIES, KEYS, dtype=torch.float64)
    weight = attention.weight() * bias.exp()
    expected, _ = reference.prior_attention(*inputs, weight)
    output = attention(*inputs, bias=bias)
    torch.testing.assert_close(output, expected)
    (ours,) = torch.autograd.grad(output.square().sum(), attention.prior)
    (wanted,) = torch.autograd.grad(expected.square().sum(), attention.prior)
    torch.testing.assert_close(ours, wanted)


def test_a_bias_of_other_sizes_is_refused() -> None:
    attention: Any = dense(groups=2)
    query, key, value = random_inputs(2, QUERIES, KEYS)
    bias = torch.zeros(2, HEADS, QUERIES, KEYS)
    for wrong in (bias[0], bias.expand(2, -1, -1, -1)[:, :1], torch.zeros(3, HEADS, QUERIES, KEYS)):
        with pytest.raises(ValueError, match=r"bias must be \[1 or 2, 4, 7, 9\] \(got shape"):
            attention(query, key, value, bias=wrong)
    with pytest.raises(ValueError, match=r"query and key must have 7 and 9 rows where there is a bias \(got 7 and 8\)"):
        attention(query, key[:, :, :8], value[:, :, :8], bias=bias)
