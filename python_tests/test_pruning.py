"""``fiak_ext.prune`` against Algorithms 1-3 written out in plain Python loops."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fiak_ext import (
    PriorAttention,
    PruningReport,
    SparsePattern,
    VisionTransformer,
    compact,
    find_dead_rows,
    flops,
    patterns,
    prune,
    pruning,
    set_patterns,
)
from fiak_ext.flops import model_report

Scope = Literal["layer", "head", "global", "row"]
SCOPES: tuple[Scope, ...] = ("layer", "head", "global", "row")


# ---------------------------------------------------------------- the oracle


@dataclass
class Layer:
    """One layer as nested lists over [pattern head][query][key]."""

    importance: list[list[list[float]]]
    visible: list[list[bool]]
    reached: list[list[list[bool]]]
    causal: bool
    gmm: bool

    def counts(self, h: int, i: int, j: int) -> bool:
        return self.visible[i][j] and self.reached[h][i][j]

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        for h, head in enumerate(self.importance):
            for i, row in enumerate(head):
                for j in range(len(row)):
                    yield h, i, j


class Impossible(Exception):
    pass


def pruned_keys(layer: Layer, h: int, keys: float) -> set[int]:
    """Step 3 of Algorithms 2 and 3 for one head."""
    scores = []
    for j in range(len(layer.visible[0])):
        queries = [i for i in range(len(layer.visible)) if layer.counts(h, i, j)]
        total = 0.0
        for i in queries:
            total += layer.importance[h][i][j]
        if not queries:
            total = -math.inf
        elif layer.causal:
            total /= len(queries)
        scores.append((total, j))
    return {j for _, j in sorted(scores)[: round(keys * len(scores))]}


def unit_of(scope: Scope, index: int, h: int, i: int) -> tuple[int, ...]:
    return {"global": (), "layer": (index,), "head": (index, h), "row": (index, h, i)}[scope]


def oracle(layers: list[Layer], amount: float | None, keys: float, scope: Scope, keep_diagonal: bool) -> list[Any]:
    """The masks of what is kept, by layer; raises Impossible."""
    kept = []
    units: dict[tuple[int, ...], dict[str, Any]] = {}
    for index, layer in enumerate(layers):
        mask = [[[False] * len(layer.visible[0]) for _ in layer.visible] for _ in layer.importance]
        kept.append(mask)
        gone = [pruned_keys(layer, h, keys) for h in range(len(layer.importance))]
        for h, i, j in layer.pairs():
            protected = layer.gmm or (keep_diagonal and i == j)
            mask[h][i][j] = layer.visible[i][j] and j not in gone[h] and (layer.reached[h][i][j] or protected)
            if layer.counts(h, i, j):
                unit = units.setdefault(unit_of(scope, index, h, i), {"pairs": 0, "gone": 0, "candidates": []})
                unit["pairs"] += 1
                if not mask[h][i][j]:
                    unit["gone"] += 1
                elif not protected:
                    unit["candidates"].append((layer.importance[h][i][j], index, h, i, j))
    for unit in units.values():
        if amount is None:
            break
        need = round(amount * unit["pairs"]) - unit["gone"]
        if not 0 <= need <= len(unit["candidates"]):
            raise Impossible
        for _, index, h, i, j in sorted(unit["candidates"])[:need]:
            kept[index][h][i][j] = False
    return kept


# ---------------------------------------------------------------- models


class Attentions(nn.Module):
    """Nothing but attentions, as ``layers.0`` and so on."""

    def __init__(self, *layers: PriorAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def __iter__(self) -> Iterator[PriorAttention]:
        for layer in self.layers:
            assert isinstance(layer, PriorAttention)
            yield layer


def tensors(model: Attentions, seed: int, levels: int) -> dict[str, Tensor]:
    """An importance for every layer, with few levels, so that ties are common and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for index, layer in enumerate(model):
        shape = (layer.groups, layer.num_heads, layer.num_queries, layer.num_keys)
        result[f"layers.{index}"] = torch.randint(levels, shape, generator=generator).double()
    return result


def described(attention: PriorAttention, importance: Tensor) -> Layer:
    reached = torch.ones_like(importance) if attention.reached is None else attention.reached
    return Layer(
        importance.flatten(0, 1).tolist(),
        attention.eligible().tolist(),
        (reached > 0).flatten(0, 1).tolist(),
        attention.is_causal,
        attention.kind == "gmm",
    )


def masks(model: Attentions) -> list[Any]:
    return [layer.pattern.to_mask().flatten(0, 1).tolist() for layer in model if layer.pattern is not None]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """All that a checkpoint holds, as copies."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    torch.testing.assert_close(snapshot(model), before, rtol=0, atol=0, equal_nan=True)


def trained(attention: PriorAttention, seed: int) -> PriorAttention:
    """With a prior as after training."""
    assert attention.prior is not None
    with torch.no_grad():
        attention.prior.copy_(torch.randn(attention.prior.shape, generator=torch.Generator().manual_seed(seed)))
    return attention


# ---------------------------------------------------------------- Algorithms 1 and 2


def assert_as_oracle(model: Attentions, importance: dict[str, Tensor], **arguments: Any) -> None:
    full: dict[str, Any] = {"amount": None, "keys": 0.0, "scope": "layer", "keep_diagonal": False} | arguments
    layers = [described(attention, importance[f"layers.{index}"]) for index, attention in enumerate(model)]
    before = snapshot(model)
    try:
        expected = oracle(layers, full["amount"], full["keys"], full["scope"], full["keep_diagonal"])
    except Impossible:
        with pytest.raises(ValueError, match="prune: amount"):
            prune(model, importance=importance, **arguments)
        assert_untouched(model, before)
        return
    prune(model, importance=importance, **arguments)
    assert masks(model) == expected


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keys", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("scope", SCOPES)
def test_algorithms_1_and_2(scope: Scope, keys: float, is_causal: bool, keep_diagonal: bool) -> None:
    for seed, amount in enumerate([0.0, 0.25, 0.5, 0.6, 0.77, 0.9, 1.0, None]):
        if amount is None and keys == 0:
            continue
        model = Attentions(PriorAttention(2, 6, is_causal=is_causal), PriorAttention(3, 4, 7, is_causal=is_causal))
        importance = tensors(model, seed, levels=3 + 5 * seed)
        assert_as_oracle(model, importance, amount=amount, keys=keys, scope=scope, keep_diagonal=keep_diagonal)


@pytest.mark.parametrize("scope", SCOPES)
def test_groups_have_patterns_of_their_own(scope: Scope) -> None:
    for seed in range(3):
        model = Attentions(PriorAttention(2, 5, groups=3), PriorAttention(1, 5, groups=2))
        assert_as_oracle(model, tensors(model, seed, 9), amount=0.6, keys=0.4, scope=scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
def test_learned_prior(scope: Scope, parameterization: Literal["logits", "clamp"]) -> None:
    layers = [PriorAttention(2, 7, parameterization=parameterization, is_causal=causal) for causal in (False, True)]
    model = Attentions(*(trained(layer, seed) for seed, layer in enumerate(layers)))
    own = {f"layers.{index}": layer.importance() for index, layer in enumerate(model)}
    again = copy.deepcopy(model)
    assert_as_oracle(model, own, amount=0.7, scope=scope)
    prune(again, 0.7, scope=scope)
    assert masks(again) == masks(model)
    assert all(layer.prior is None and layer.is_pruned for layer in again)


def test_exact_budget() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        sizes = [(draw.randint(1, 3), draw.randint(1, 12), draw.randint(1, 12)) for _ in range(draw.randint(1, 3))]
        model = Attentions(*(PriorAttention(*size, is_causal=draw.random() < 0.5) for size in sizes))
        amount, keys, scope = draw.random(), draw.choice([0.0, draw.random()]), draw.choice(SCOPES)
        try:
            report = prune(model, amount, keys=keys, scope=scope, importance="random")
        except ValueError as error:
            assert "removes" in str(error)  # more than the amount, by keys alone
            continue
        assert report.pruned == report.asked
        for layer, attention in zip(report.layers, model, strict=True):
            assert attention.pattern is not None
            assert layer.kept == layer.pairs - layer.pruned == attention.pattern.nnz
            assert {head.keys_pruned for head in layer.heads} == {round(keys * attention.num_keys)}
            if scope == "layer":
                assert layer.pruned == layer.asked == round(amount * layer.pairs)
            if scope == "head":
                assert all(head.pruned == head.asked == round(amount * head.pairs) for head in layer.heads)
            if scope == "row":
                pairs = attention.eligible().sum(-1).tolist()
                rows = attention.pattern.to_mask().sum(-1).flatten(0, 1).tolist()
                assert all(row == [n - round(amount * n) for n in pairs] for row in rows)
        if scope == "global":
            assert report.pruned == round(amount * report.pairs)


def test_autoregressive_keys_are_ranked_by_mean_not_by_sum() -> None:
    # Below the diagonal the keys' sums are 3, 6, 2 and their means 1, 3, 2.
    importance = torch.tensor([[[1.0, 9, 9], [1, 3, 9], [1, 3, 2]]])
    causal, full = PriorAttention(1, 3, is_causal=True), PriorAttention(1, 3)
    prune(causal, keys=1 / 3, importance=importance)
    prune(full, keys=1 / 3, importance=importance.tril())
    assert causal.pattern is not None and full.pattern is not None
    assert causal.pattern.empty_columns().flatten().tolist() == [True, False, False]
    assert full.pattern.empty_columns().flatten().tolist() == [False, False, True]


def test_equal_importance_takes_the_lower_index() -> None:
    attention = PriorAttention(2, 4)
    prune(attention, 0.5, importance=torch.ones(2, 4, 4))
    assert attention.pattern is not None
    assert attention.pattern.to_mask().flatten().tolist() == [False] * 16 + [True] * 16


def test_equal_columns_tie_whatever_the_rounding() -> None:
    importance = torch.rand(1, 300, 1, dtype=torch.float64).expand(1, 300, 37)
    attention = PriorAttention(1, 300, 37)
    prune(attention, keys=10 / 37, importance=importance)
    assert attention.pattern is not None
    assert attention.pattern.empty_columns().flatten().tolist() == [True] * 10 + [False] * 27


def test_no_dependence_on_threads() -> None:
    importance = torch.rand(4, 65, 65)
    patterns = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            attention = PriorAttention(4, 65)
            prune(attention, 0.7, keys=0.2, importance=importance)
            patterns.append(attention.pattern)
    finally:
        torch.set_num_threads(threads)
    assert patterns[0] == patterns[1]


# ---------------------------------------------------------------- Algorithm 3


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
def test_algorithm_3(parameterization: Literal["logits", "clamp"], is_causal: bool) -> None:
    attention = trained(PriorAttention(3, 10, kind="gmm", parameterization=parameterization, is_causal=is_causal), 0)
    assert attention.prior is not None
    prior = attention.prior.flatten(0, 2)
    prior = prior.abs() if parameterization == "clamp" else prior
    least = [sorted(range(10), key=row.__getitem__)[:3] for row in prior.tolist()]
    report = prune(attention, keys=0.3)
    assert report.asked is None and report.keys_pruned == report.keys_asked == 9
    assert attention.pattern is not None
    for head, gone in zip(attention.pattern.to_mask()[0], least, strict=True):
        expected = attention.eligible()
        expected[:, gone] = False
        assert torch.equal(head, expected)


def test_gmm_takes_only_the_amount_of_its_keys() -> None:
    report = prune(PriorAttention(2, 10, kind="gmm"), 0.3, keys=0.3)
    assert report.asked == report.pruned == 60
    for amount in (0.2, 0.4):
        attention = PriorAttention(2, 10, kind="gmm")
        with pytest.raises(ValueError, match=r"removes 60|at most 60 can go, as kind='gmm' loses whole keys only"):
            prune(attention, amount, keys=0.3)
        assert not attention.is_pruned


# ---------------------------------------------------------------- importances


def test_random_is_reproducible_and_uniform_over_the_scopes() -> None:
    def pattern(seed: int, scope: Scope) -> Any:
        attention = PriorAttention(2, 20, kind="softmax")
        prune(attention, 0.5, scope=scope, importance="random", generator=torch.Generator().manual_seed(seed))
        return attention.pattern

    assert pattern(0, "layer") == pattern(0, "global") == pattern(0, "layer")
    assert pattern(0, "layer") != pattern(1, "layer")
    assert 0.4 < pattern(0, "layer").to_mask()[..., :10].double().mean() < 0.6
    torch.manual_seed(7)
    attention = PriorAttention(2, 20)
    prune(attention, 0.5, importance="random")
    torch.manual_seed(7)
    other = PriorAttention(2, 20)
    prune(other, 0.5, importance="random")
    assert attention.pattern == other.pattern


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_importance_of_any_real_dtype(dtype: torch.dtype) -> None:
    importance = torch.randint(-50, 50, (2, 5, 5)).to(dtype)
    attention, other = PriorAttention(2, 5), PriorAttention(2, 5)
    prune(attention, 0.6, keys=0.2, importance=importance)
    prune(other, 0.6, keys=0.2, importance=importance.double()[None])
    assert attention.pattern == other.pattern


def test_importance_need_not_be_finite_where_nothing_is_eligible() -> None:
    attention = PriorAttention(1, 5, is_causal=True)
    importance = torch.rand(1, 5, 5).masked_fill(~attention.eligible(), math.nan)
    assert prune(attention, 0.4, keys=0.2, importance=importance).pruned == 6


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("keep_diagonal", [False, True])
def test_unreached_pairs_go_first_and_do_not_count(scope: Scope, is_causal: bool, keep_diagonal: bool) -> None:
    for seed in range(4):
        model = Attentions(
            PriorAttention(2, 6, is_causal=is_causal),
            PriorAttention(2, 6, is_causal=is_causal, kind="softmax"),
        )
        posterior = tensors(model, seed, levels=20)
        for index, layer in enumerate(model):
            layer.posterior = posterior[f"layers.{index}"]
            seen = torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(seed)) < 0.7
            layer.reached = seen.long() * layer.eligible()
        unreached = sum(int((layer.eligible() & (layer.reached == 0)).sum()) for layer in model)
        for keys in (0.0, 0.34):
            arguments: dict[str, Any] = {"scope": scope, "keys": keys, "keep_diagonal": keep_diagonal}
            assert_as_oracle(copy.deepcopy(model), posterior, amount=0.5, **arguments)
            by_name, by_tensor = copy.deepcopy(model), copy.deepcopy(model)
            try:
                report = prune(by_name, 0.5, importance="posterior", **arguments)
            except ValueError:
                continue
            prune(by_tensor, 0.5, importance=posterior, **arguments)
            assert masks(by_name) == masks(by_tensor)
            assert report.unreached == unreached
            assert report.pruned == report.asked
            assert f"{unreached} pairs that calibration did not reach" in str(report)


# ---------------------------------------------------------------- errors


def _two() -> Attentions:
    return Attentions(PriorAttention(2, 4), PriorAttention(2, 4))


def _with_nan() -> Attentions:
    model = Attentions(PriorAttention(2, 4), PriorAttention(2, 4))
    last = list(model)[1].prior
    assert last is not None
    nn.init.constant_(last, math.nan)
    return model


def _half_pruned() -> Attentions:
    model = _two()
    prune(model.layers[1], 0.5, importance="random")
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (_two, {}, "amount, keys or target_flops must be given"),
        (_two, {"amount": -0.1}, "amount must be a number from 0 to 1 .got -0.1"),
        (_two, {"amount": 1.5}, "amount must be a number from 0 to 1 .got 1.5"),
        (_two, {"amount": math.nan}, "amount must be a number"),
        (_two, {"amount": "half"}, "amount must be a number"),
        (_two, {"amount": True}, "amount must be a number"),
        (_two, {"keys": -1}, "keys must be a number from 0 to 1"),
        (_two, {"keys": 1.01}, "keys must be a number from 0 to 1"),
        (_two, {"amount": 0.2, "keys": 0.5}, "got 0.2, that is 6 of 32 pairs of layer 'layers.0', but keys=0.5 .* 16"),
        (_two, {"amount": 0.2, "keys": 0.5, "scope": "global"}, "13 of 64 pairs of the model, but"),
        (_two, {"amount": 0.2, "keys": 0.5, "scope": "head"}, "3 of 16 pairs of head 0 of layer 'layers.0', but"),
        (
            _two,
            {"amount": 0.2, "keys": 0.5, "scope": "row"},
            "1 of 4 pairs of row 0 of head 0 of layer 'layers.0', but",
        ),
        (_two, {"amount": 0.9, "keep_diagonal": True}, "29 of 32 .* at most 24 can go, as keep_diagonal=True"),
        (_two, {"amount": 0.5, "scope": "column"}, "scope must be one of layer, head, global, row .got 'column'"),
        (
            _two,
            {"amount": 0.5, "importance": "magnitude"},
            "importance must be one of prior, posterior, gradient, random",
        ),
        (_two, {"amount": 0.5, "importance": 3}, "importance must be one of"),
        (_two, {"amount": 0.5, "importance": "posterior"}, "needs calibrate first .layer 'layers.0'"),
        (_two, {"amount": 0.5, "importance": torch.ones(2, 4, 4)}, "must be a dict .*got a Tensor for 2"),
        (_two, {"amount": 0.5, "importance": {"layers.0": torch.ones(2, 4, 4)}}, "missing: 'layers.1'; unknown: none"),
        (_two, {"amount": 0.5, "generator": torch.Generator()}, "generator must be None unless"),
        (_with_nan, {"amount": 0.5}, "must be finite where eligible .layer 'layers.1'"),
        (_half_pruned, {"amount": 0.5}, "must not be pruned yet .pruned: 'layers.1'"),
        (lambda: nn.Linear(3, 3), {"amount": 0.5}, "must hold a PriorAttention .got Linear"),
        (lambda: PriorAttention(2, 4, kind="softmax"), {"amount": 0.5}, "needs a prior .*kind='softmax'"),
        (
            lambda: PriorAttention(2, 4),
            {"amount": 0.5, "importance": torch.ones(2, 5, 4)},
            r"of shape \(1, 2, 4, 4\) or \(2, 4, 4\) \(got torch.float32 \(2, 5, 4\)\)",
        ),
        (lambda: PriorAttention(2, 4), {"amount": 0.5, "importance": {"": [1.0]}}, "must be a real Tensor .*got list"),
        (
            lambda: PriorAttention(2, 4),
            {"amount": 0.5, "importance": torch.ones(2, 4, 4, dtype=torch.complex64)},
            "real Tensor",
        ),
        (
            lambda: PriorAttention(2, 4),
            {"amount": 0.5, "importance": torch.full((2, 4, 4), math.inf)},
            "must be finite",
        ),
        (
            lambda: PriorAttention(2, 4, groups=2),
            {"amount": 0.5, "importance": torch.ones(2, 4, 4)},
            r"of shape \(2, 2, 4, 4\) \(got",
        ),
    ],
)
def test_errors_leave_the_model_untouched(
    make: Callable[[], nn.Module], arguments: dict[str, Any], message: str
) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^prune: .*{message}"):
        prune(model, **arguments)
    assert_untouched(model, before)


def test_pruning_twice() -> None:
    attention = trained(PriorAttention(2, 4), 0)
    prune(attention, 0.5)
    pattern = attention.pattern
    with pytest.raises(ValueError, match="must not be pruned yet"):
        prune(attention, 0.6)
    assert attention.pattern == pattern


def test_an_error_in_the_last_layer_touches_no_layer() -> None:
    model = Attentions(PriorAttention(2, 4), PriorAttention(2, 4, kind="gmm"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="kind='gmm'"):
        prune(model, 0.5)
    assert_untouched(model, before)


# ---------------------------------------------------------------- the report


@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
def test_dead_rows_of_class_token_pooling(parameterization: Literal["logits", "clamp"]) -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 6, parameterization=parameterization)
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.1)
    for _ in range(2):
        query, key, value = torch.randn(3, 4, 2, 6, 8)
        optimizer.zero_grad()
        attention(query, key, value)[:, :, 0].square().sum().backward()
        optimizer.step()
    report = prune(attention, 0.5)
    assert report.dead_rows == 10
    assert [head.dead_ranges for head in report.layers[0].heads] == [((1, 6),), ((1, 6),)]
    assert "  (model): rows 1-5 of heads 0-1" in str(report)


def test_dead_rows_are_unknown_without_evidence() -> None:
    for attention in (PriorAttention(2, 4), PriorAttention(2, 4, kind="softmax"), PriorAttention(2, 4, kind="gmm")):
        report = prune(attention, keys=0.5, importance="random")
        assert report.dead_rows is None
        assert "Dead rows" not in str(report)


def test_a_row_with_one_eligible_key_is_not_called_dead() -> None:
    attention = trained(PriorAttention(1, 4, is_causal=True), 0)
    assert prune(attention, 0.3).dead_rows == 0


def _mixed_report() -> tuple[Attentions, PruningReport]:
    model = Attentions(PriorAttention(2, 6, is_causal=True), PriorAttention(3, 5, groups=2))
    return model, prune(model, 0.6, keys=0.2, importance=tensors(model, 0, 100))


def test_report_says_what_the_patterns_are() -> None:
    model, report = _mixed_report()
    assert (report.amount, report.keys, report.scope, report.importance) == (0.6, 0.2, "layer", "tensor")
    assert [layer.name for layer in report.layers] == ["layers.0", "layers.1"]
    for layer, attention in zip(report.layers, model, strict=True):
        pattern = attention.pattern
        assert pattern is not None
        assert [head.kept for head in layer.heads] == pattern.to_mask().flatten(0, 1).sum((1, 2)).tolist()
        assert [head.empty_rows for head in layer.heads] == pattern.empty_rows().flatten(0, 1).sum(1).tolist()
        assert [head.empty_columns for head in layer.heads] == pattern.empty_columns().flatten(0, 1).sum(1).tolist()
        assert [(head.group, head.head) for head in layer.heads] == [
            (group, head) for group in range(attention.groups) for head in range(attention.num_heads)
        ]
        assert all(head.density == pytest.approx(head.kept / head.pairs) for head in layer.heads)
        assert all(head.asked is None for head in layer.heads)
    for name in ("pairs", "pruned", "kept", "keys_pruned", "empty_rows", "empty_columns"):
        total = getattr(report, name)
        assert total == sum(getattr(layer, name) for layer in report.layers)
        assert total == sum(getattr(head, name) for layer in report.layers for head in layer.heads)
    assert report.asked == sum(layer.asked or 0 for layer in report.layers) == report.pruned


def test_report_as_json_and_as_table() -> None:
    _, report = _mixed_report()
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["layers"][1]["heads"][5]["group"] == 1
    lines = str(report).splitlines()
    assert lines[0] == "amount 0.6, keys 0.2, scope layer, importance tensor"
    assert [line.split()[0] for line in lines[1:]] == ["layer", "layers.0", "layers.1", "total"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert str(report.pruned) in lines[-1].split()


def test_report_of_keys_only() -> None:
    report = prune(PriorAttention(2, 10), keys=0.3, importance="random")
    assert report.asked is None and report.amount is None
    assert report.pruned == 60 and report.keys_pruned == 6
    assert str(report).startswith("keys only, keys 0.3,")


# ---------------------------------------------------------------- afterwards


def test_survivors_have_weight_one() -> None:
    attention = trained(PriorAttention(2, 6), 0)
    prune(attention, 0.5, keep_diagonal=True)
    assert attention.pattern is not None and not list(attention.parameters())
    query, key, value = torch.randn(3, 2, 2, 6, 4, dtype=torch.float64)
    mask = attention.pattern.to_mask()
    expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(attention(query, key, value), expected)


# ---------------------------------------------------------------- what is left by input length


@pytest.mark.parametrize("is_causal", [False, True])
def test_density_by_length(is_causal: bool) -> None:
    model = Attentions(PriorAttention(2, 6, is_causal=is_causal), PriorAttention(3, 6, groups=2, is_causal=is_causal))
    report = prune(model, 0.6, importance=tensors(model, 0, 100))
    everything = [0, 0]
    for length in range(1, 7):
        everything = [0, 0]
        for layer, attention in zip(report.layers, model, strict=True):
            assert attention.pattern is not None
            kept = attention.pattern.crop(length).nnz
            pairs = attention.groups * attention.num_heads * int(attention.eligible()[:length, :length].sum())
            assert layer.density_by_length[length - 1] == pytest.approx(kept / pairs)
            everything[0] += kept
            everything[1] += pairs
        assert report.density_by_length[length - 1] == pytest.approx(everything[0] / everything[1])
    assert len(report.density_by_length) == 6 and report.density_by_length[-1] == pytest.approx(report.density)
    one, three = (f"{report.density_by_length[length - 1]:.1%}" for length in (1, 3))
    assert f"by its length: 1: {one}, 3: {three}, " in str(report)


def test_density_by_length_counts_pairs_that_calibration_did_not_reach() -> None:
    attention = PriorAttention(1, 4, kind="softmax")
    attention.posterior = torch.arange(16.0).view(1, 1, 4, 4)
    attention.reached = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    attention.reached[..., :2, :2] = 1
    report = prune(attention, 0.5, importance="posterior")
    assert report.density == 0.5
    assert report.density_by_length == pytest.approx((0.0, 2 / 4, 2 / 9, 2 / 16))


@pytest.mark.parametrize("scope", ["layer", "head", "global", "row"])
def test_memory_is_in_proportion_to_the_pairs(scope: Scope) -> None:
    """Two masks, the patterns with their plans, and little else: 7 bytes a pair at any size."""
    for tokens in (256, 512, 1024):
        model = Attentions(*[PriorAttention(2, tokens, kind="softmax", is_causal=True) for _ in range(2)])
        for layer in model:
            layer.posterior = torch.rand(1, 2, tokens, tokens)
            layer.reached = torch.ones(1, 1, tokens, tokens, dtype=torch.int64).expand(1, 2, -1, -1)
        peak = flops.peak_memory(
            lambda model=model: prune(model, 0.7, importance="posterior", scope=scope)  # type: ignore[misc]
        )
        assert peak <= 7 * 2 * 2 * tokens**2 + (2 << 20) + 40 * min(tokens**2, pruning._CHUNK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["layer", "head", "global", "row"])
def test_thresholds_of_numbers_of_any_size_and_sign(
    scope: Scope, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks of a few rows, and with 0 and -0, which are equal, beside denormal and huge numbers of both signs."""
    monkeypatch.setattr(pruning, "_CHUNK", 21)
    values = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 1.0, -1.0, 3e38, -3e38, 1.0000001, 1.0], dtype=dtype)
    model = Attentions(PriorAttention(2, 7), PriorAttention(3, 7, groups=2))
    generator = torch.Generator().manual_seed(3)
    importance = {
        f"layers.{index}": values[torch.randint(10, (layer.groups, layer.num_heads, 7, 7), generator=generator)]
        for index, layer in enumerate(model)
    }
    importance["layers.0"] = importance["layers.0"].float()  # ranked together with another type where global
    assert_as_oracle(model, importance, amount=0.4, scope=scope)


def test_density_by_length_of_other_keys_than_queries() -> None:
    model = Attentions(PriorAttention(1, 2, 4), PriorAttention(1, 3))
    importance = {"layers.0": torch.tensor([[[1.0, 8, 2, 7], [3, 4, 6, 5]]]), "layers.1": torch.ones(1, 3, 3)}
    report = prune(model, 0.5, importance=importance)
    assert report.layers[0].density_by_length == pytest.approx((0.0, 1 / 4, 2 / 6, 4 / 8))
    assert report.density_by_length == () and "by its length" not in str(report)


# ---------------------------------------------------------------- dead rows


def class_token_model(**attention: Any) -> VisionTransformer:
    """Five tokens, of whose last attention only the first row reaches the loss."""
    torch.manual_seed(0)
    return VisionTransformer(8, 4, 1, 3, dim=8, depth=2, num_heads=2, **attention)


NAMES = ("blocks.0.attention.prior_attention", "blocks.1.attention.prior_attention")


@pytest.mark.parametrize("kind", ["fiak", "gmm", "softmax"])
def test_dead_rows_cost_nothing_and_change_nothing(kind: Any) -> None:
    model, images = class_token_model(kind=kind).eval(), torch.randn(3, 1, 8, 8)
    expected = model(images)
    dead = find_dead_rows(model, images)
    report = prune(model, 0.0, importance="random", dead_rows=dead)
    torch.testing.assert_close(model(images), expected)
    assert (report.pairs, report.pruned, report.dead, report.dead_rows) == (60, 0, 40, 8)
    assert (report.kept, report.empty_rows, report.unreached) == (60, 8, 0)
    assert [head.dead_ranges for head in report.layers[1].heads] == [((1, 5),), ((1, 5),)]
    text = str(report)
    assert "40 pairs of rows that cannot reach the loss are gone and count towards nothing:" in text
    assert f"  {NAMES[1]}: rows 1-4 of heads 0-1" in text


@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_amounts_are_shares_of_the_live_rows(scope: Scope, keep_diagonal: bool) -> None:
    for keys in (0.0, 0.4):
        model = Attentions(PriorAttention(2, 6), PriorAttention(2, 6, is_causal=True, groups=2))
        dead = {
            f"layers.{index}": torch.rand(
                layer.groups, layer.num_heads, 6, generator=torch.Generator().manual_seed(index)
            )
            < 0.4
            for index, layer in enumerate(model)
        }
        importance = tensors(model, 3, 9)
        oracles = []
        for index, layer in enumerate(model):
            described_layer = described(layer, importance[f"layers.{index}"])
            alive = (~dead[f"layers.{index}"]).flatten(0, 1)[:, :, None].expand(-1, 6, 6)
            oracles.append(dataclasses.replace(described_layer, reached=alive.tolist()))
        arguments: dict[str, Any] = {"keys": keys, "scope": scope, "keep_diagonal": keep_diagonal}
        expected = oracle(oracles, 0.5, keys, scope, keep_diagonal)
        report = prune(model, 0.5, importance=importance, dead_rows=dead, **arguments)
        for layer, mask in zip(model, expected, strict=True):
            assert layer.pattern is not None
            rows = dead[f"layers.{list(model).index(layer)}"]
            # The oracle keeps the diagonal of every row.
            without = torch.tensor(mask).view(layer.groups, layer.num_heads, 6, 6) & ~rows.unsqueeze(-1)
            assert torch.equal(layer.pattern.to_mask(), without)
        assert report.pruned == report.asked and report.unreached == 0
        assert report.dead_rows == sum(int(rows.sum()) for rows in dead.values())
        assert report.pairs + report.dead == 2 * 36 + 4 * 21


# ---------------------------------------------------------------- a budget of operations


@pytest.mark.parametrize("scope", ["global", "layer", "head"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_target_flops_takes_the_smallest_amount(scope: Scope, is_causal: bool) -> None:
    model, images = class_token_model(is_causal=is_causal), torch.randn(3, 1, 8, 8)
    for index, name in enumerate(NAMES):
        attention = model.get_submodule(name)
        assert isinstance(attention, PriorAttention)
        trained(attention, index)
    dense, target = model_report(model, images).model.dense.torch, 0.96 if is_causal else 0.92
    pruned = copy.deepcopy(model)
    report = prune(pruned, target_flops=target, example=(images, "labels"), scope=scope)
    now = model_report(pruned, images).model
    assert now.dense.torch == dense
    assert report.flops == now.now.torch / dense <= target
    assert report.amount is not None and 0 < report.amount < 1 and report.asked == report.pruned
    assert f"{report.flops:.2%} of the dense model's operations are left (asked: {target:.2%})" in str(report)
    again = copy.deepcopy(model)
    prune(again, report.amount, scope=scope)
    assert patterns(again) == patterns(pruned)
    prune(model, report.amount - 1 / report.pairs, scope=scope)
    assert model_report(model, images).model.now.torch > target * dense


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = PriorAttention(2, 6, groups=2, is_causal=True)
        self.again = PriorAttention(1, 6, kind="softmax")

    def forward(self, x: Tensor, kv_lens: Tensor | None = None, query_offsets: Tensor | None = None) -> Tensor:
        queries = x[:, :, :3] if query_offsets is not None else x
        y = self.attention(queries, x, x[..., :3], kv_lens=kv_lens, query_offsets=query_offsets)
        return (
            y.sum()
            + self.again(x[:, :1, :5], x[:, :1], x[:, :1]).sum()
            + self.again(x[:, 1:], x[:, 1:], x[:, 1:]).sum()
        )


def test_target_flops_counts_what_the_example_executes() -> None:
    x = torch.randn(4, 2, 6, 4)
    lens, offsets = torch.tensor([6, 2, 0, 5]), torch.tensor([0, 3, 1, 2])
    examples: list[dict[str, Tensor]] = [{"x": x}, {"x": x, "kv_lens": lens}]
    examples.append({"x": x, "kv_lens": lens, "query_offsets": offsets})
    for example in examples:
        model = Padded()
        dense = model_report(model, **example).model.dense.torch
        report = prune(model, target_flops=0.5, example=example, importance="random", scope="global", keys=0.2)
        assert report.flops == model_report(model, **example).model.now.torch / dense <= 0.5


def test_target_flops_with_dead_rows_and_nothing_else_to_do() -> None:
    model, images = class_token_model(), torch.randn(1, 1, 8, 8)
    dead = find_dead_rows(model, images)
    report = prune(model, target_flops=1.0, example=images, dead_rows=dead)
    assert report.amount == 0 and report.kept == 60
    assert report.flops is not None and report.flops < 1


def test_unreachable_target_flops() -> None:
    images = torch.randn(1, 1, 8, 8)
    whole = class_token_model()
    before = snapshot(whole)
    report = model_report(whole, images)
    pairs = sum(2 * 2 * 25 * (4 + 4) for _ in report.layers)
    least = 1 - pairs / report.model.dense.torch
    with pytest.raises(ValueError, match=rf"prune: target_flops must be at least {least:.4f}, .* .got 0.3."):
        prune(whole, target_flops=0.3, example=images)
    with pytest.raises(ValueError, match=r"prune: target_flops must be at least 0\.9"):
        prune(whole, target_flops=0.9, example=images, keep_diagonal=True)
    assert_untouched(whole, before)
    for keys in (0.0, 0.4):
        gmm = class_token_model(kind="gmm")
        with pytest.raises(ValueError, match=r"prune: target_flops must be at least"):
            prune(gmm, target_flops=0.3, example=images, keys=keys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_flops": 0.5}, "example must be given with target_flops"),
        ({"amount": 0.5, "example": torch.ones(1)}, "example must be given with target_flops, and only then"),
        (
            {"amount": 0.5, "target_flops": 0.5, "example": torch.ones(1)},
            "amount must be None with target_flops .got 0.5",
        ),
        ({"target_flops": 1.5, "example": torch.ones(1)}, "target_flops must be a number from 0 to 1 .got 1.5"),
        ({"amount": 0.5, "importance": "gradient"}, "importance='gradient' needs calibrate first .layer 'layers.0'"),
        (
            {"amount": 0.5, "dead_rows": torch.ones(1)},
            "dead_rows must be a dict from module name to Tensor .got Tensor",
        ),
        (
            {"amount": 0.5, "dead_rows": {"layers.0": torch.zeros(1, 2, 4, dtype=torch.bool)}},
            "dead_rows must have the name of every PriorAttention as key .missing: 'layers.1'; unknown: none",
        ),
        (
            {"amount": 0.5, "dead_rows": dict.fromkeys(["layers.0", "layers.1"], torch.zeros(1, 2, 4))},
            r"dead_rows of layer 'layers.0' must be a bool Tensor of shape \(1, 2, 4\) \(got torch.float32",
        ),
        (
            {"amount": 0.5, "dead_rows": dict.fromkeys(["layers.0", "layers.1"], torch.zeros(2, 4, dtype=torch.bool))},
            r"must be a bool Tensor of shape \(1, 2, 4\) \(got torch.bool \(2, 4\)",
        ),
    ],
)
def test_errors_of_dead_rows_and_target_flops(arguments: dict[str, Any], message: str) -> None:
    model = _two()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^prune: .*{message}"):
        prune(model, **arguments)
    assert_untouched(model, before)


# ---------------------------------------------------------------- patterns of another model (Table 6)


def test_the_pattern_of_one_model_on_another() -> None:
    fiak, softmax, images = class_token_model(), class_token_model(kind="softmax"), torch.randn(2, 1, 8, 8)
    for name in NAMES:
        attention = fiak.get_submodule(name)
        assert isinstance(attention, PriorAttention)
        trained(attention, 1)
    prune(fiak, 0.6)
    learned = patterns(fiak)
    assert set(learned) == set(NAMES) and sum(pattern.nnz for pattern in learned.values()) == 40
    with torch.no_grad():
        for parameter in softmax.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    before = {name: parameter.clone() for name, parameter in softmax.named_parameters()}
    set_patterns(softmax, learned)
    assert patterns(softmax) == learned
    torch.testing.assert_close(dict(softmax.named_parameters()), before, rtol=0, atol=0)
    nn.functional.cross_entropy(softmax(images), torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None for parameter in softmax.parameters())
    set_patterns(softmax, {name: SparsePattern.from_mask(torch.ones(2, 5, 5, dtype=torch.bool)) for name in NAMES})
    dense = class_token_model(kind="softmax")
    dense.load_state_dict(before)
    torch.testing.assert_close(softmax(images), dense(images))


def test_patterns_of_a_model_without() -> None:
    model = class_token_model()
    with pytest.raises(ValueError, match=r"patterns: model must be pruned and not compacted .got 'blocks.* dense"):
        patterns(model)
    prune(model, 0.5, importance="random")
    compact(model)
    with pytest.raises(ValueError, match=r"patterns: model must be pruned and not compacted .got 'blocks.* compacted"):
        patterns(model)
    with pytest.raises(ValueError, match=r"set_patterns: model must not be compacted"):
        set_patterns(model, dict.fromkeys(NAMES, SparsePattern.from_mask(torch.ones(2, 5, 5, dtype=torch.bool))))
    for function in (patterns, lambda module: set_patterns(module, {})):
        with pytest.raises(ValueError, match=r"must hold a PriorAttention .got Linear"):
            function(nn.Linear(2, 2))


def test_patterns_that_do_not_fit_touch_nothing() -> None:
    model = Attentions(PriorAttention(2, 4), PriorAttention(2, 4, is_causal=True))
    before = snapshot(model)
    good = SparsePattern.from_mask(torch.ones(2, 4, 4, dtype=torch.bool).tril())
    full = SparsePattern.from_mask(torch.ones(2, 4, 4, dtype=torch.bool))
    other = SparsePattern.from_mask(torch.ones(2, 4, 5, dtype=torch.bool))
    broken = SparsePattern(good.crow_indices, good.col_indices.flip(0), 2, 4, 4)
    for last, error, message in (
        (full, ValueError, r"patterns\['layers.1'\] must fit the model .*above the diagonal"),
        (other, ValueError, r"patterns\['layers.1'\] must fit the model .*num_keys must be 4 \(got 5\)"),
        (broken, RuntimeError, r"csr_plan"),
        (torch.ones(2, 4, 4), TypeError, r"patterns\['layers.1'\] must be a SparsePattern \(got Tensor\)"),
    ):
        with pytest.raises(error, match=message):
            set_patterns(model, {"layers.0": good, "layers.1": last})  # type: ignore[dict-item]
        assert_untouched(model, before)
    with pytest.raises(ValueError, match=r"set_patterns: patterns must have .*missing: 'layers.1'; unknown: 'other'"):
        set_patterns(model, {"layers.0": good, "other": good})
    assert_untouched(model, before)
