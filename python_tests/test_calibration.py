"""``fiak_ext.calibrate`` against the mean posterior attention written out in plain Python loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fiak_ext import PriorAttention, calibrate, prune, pruning

KINDS: tuple[Literal["fiak", "gmm", "softmax"], ...] = ("fiak", "gmm", "softmax")


class Recorded(nn.Module):
    """Passes query, key and value to its attentions, and dropout that must be off."""

    def __init__(self, *layers: PriorAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.dropout = nn.Dropout(0.9)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> list[Tensor]:
        return [layer(self.dropout(query), key, value, **options) for layer in self.layers]


Batch = dict[str, Tensor]


def batches_of(attention: PriorAttention, sizes: Sequence[int], *, key_heads: int = 1, dim: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(sum(sizes))
    heads, rows, columns = attention.num_heads, attention.num_queries, attention.num_keys
    return [
        {
            "query": torch.randn(size, heads, rows, dim, generator=generator),
            "key": torch.randn(size, key_heads, columns, dim, generator=generator),
            "value": torch.randn(size, key_heads, columns, 2, generator=generator),
        }
        for size in sizes
    ]


def expected(attention: PriorAttention, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Mean posterior and number of samples of every pair, by Eq. 12 of the paper."""
    groups, heads, rows, columns = attention.groups, attention.num_heads, attention.num_queries, attention.num_keys
    total = torch.zeros(groups, heads, rows, columns, dtype=torch.float64)
    count = torch.zeros(groups, heads, rows, columns, dtype=torch.int64)
    weight = None if attention.prior is None else attention.weight().expand(total.shape).tolist()
    for batch in batches:
        query, key = batch["query"].tolist(), batch["key"].tolist()
        for b in range(len(query)):
            length = int(batch["kv_lens"][b]) if "kv_lens" in batch else len(key[b][0])
            offset = int(batch["query_offsets"][b]) if "query_offsets" in batch else 0
            for h in range(heads):
                keys = key[b][h // (heads // len(key[b]))]
                for n, q in enumerate(query[b][h]):
                    i = n + offset
                    if rows == columns and i >= length:
                        continue
                    scale = len(q) ** -0.5 if attention.scale is None else attention.scale
                    mass = {}
                    for j in range(length):
                        if attention.is_causal and j > i:
                            continue
                        if attention.score == "dot":
                            score = scale * sum(x * y for x, y in zip(q, keys[j], strict=True))
                        else:
                            score = -scale / 2 * sum((x - y) ** 2 for x, y in zip(q, keys[j], strict=True))
                        mass[j] = math.exp(score) * (1.0 if weight is None else weight[b % groups][h][i][j])
                    normalisation = sum(mass.values())
                    for j, share in mass.items():
                        total[b % groups, h, i, j] += share / normalisation if normalisation else 0.0
                        count[b % groups, h, i, j] += 1
    return total / count.clamp(min=1), count


def randomised(attention: PriorAttention) -> PriorAttention:
    """With an arbitrary prior, some of it zero where the parameterisation allows that."""
    if attention.prior is not None:
        with torch.no_grad():
            attention.prior.normal_()
            if attention.parameterization == "clamp":
                attention.prior[..., 0, 1] = 0
    return attention


def assert_calibrated(attention: PriorAttention, batches: Sequence[Batch]) -> None:
    posterior, count = expected(attention, batches)
    assert attention.posterior is not None and attention.reached is not None
    assert attention.posterior.dtype == torch.float32 and attention.reached.dtype == torch.int64
    torch.testing.assert_close(attention.posterior.double(), posterior, rtol=1e-6, atol=1e-7)
    assert torch.equal(attention.reached, count)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("parameterization", ["softmax", "clamp"])
@pytest.mark.parametrize("score", ["dot", "gaussian"])
@pytest.mark.parametrize("kind", KINDS)
def test_mean_posterior(kind: Any, score: Any, parameterization: Any, is_causal: bool) -> None:
    torch.manual_seed(0)
    attention = randomised(
        PriorAttention(2, 5, kind=kind, score=score, parameterization=parameterization, is_causal=is_causal)
    )
    batches = batches_of(attention, [2, 1], key_heads=2)
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)


@pytest.mark.parametrize("is_causal", [False, True])
def test_padding_is_not_counted(is_causal: bool) -> None:
    torch.manual_seed(0)
    attention = randomised(PriorAttention(4, 6, is_causal=is_causal))
    batches = batches_of(attention, [3, 2], key_heads=2)
    batches[0]["kv_lens"] = torch.tensor([4, 0, 2])
    batches[1]["kv_lens"] = torch.tensor([1, 5], dtype=torch.int32)
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)
    assert (
        attention.reached is not None and not attention.reached[..., 5].any() and not attention.reached[..., 5, :].any()
    )


def test_shorter_inputs() -> None:
    torch.manual_seed(0)
    attention = randomised(PriorAttention(2, 6))
    batches = batches_of(attention, [2, 2])
    batches[0] = {name: tensor[:, :, :4] for name, tensor in batches[0].items()}
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)


def test_queries_at_offsets() -> None:
    torch.manual_seed(0)
    attention = randomised(PriorAttention(2, 6, is_causal=True))
    batches = batches_of(attention, [3])
    batches[0]["query"] = batches[0]["query"][:, :, :2]
    batches[0]["query_offsets"] = torch.tensor([0, 4, 2])
    batches[0]["kv_lens"] = torch.tensor([6, 6, 3])
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)


def test_other_keys_than_queries() -> None:
    torch.manual_seed(0)
    attention = randomised(PriorAttention(2, 3, 6, scale=0.4))
    batches = batches_of(attention, [2])
    batches[0]["kv_lens"] = torch.tensor([2, 5])
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)
    assert attention.reached is not None and attention.reached[..., 2, :5].all()  # no query is padding here


def test_groups() -> None:
    torch.manual_seed(0)
    attention = randomised(PriorAttention(2, 4, groups=3))
    batches = batches_of(attention, [6, 3])
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)


def test_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = randomised(PriorAttention(2, 7))
    batches = batches_of(attention, [2])
    monkeypatch.setattr(pruning, "_CHUNK_BYTES", 3 * 8 * 2 * 7)
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)


def test_batching_does_not_matter() -> None:
    attention, other = PriorAttention(2, 6), PriorAttention(2, 6)
    (batch,) = batches_of(attention, [5])
    calibrate(Recorded(attention), [batch])
    calibrate(Recorded(other), [{name: tensor[b : b + 1] for name, tensor in batch.items()} for b in range(5)])
    assert attention.posterior is not None and other.posterior is not None
    assert torch.equal(attention.posterior, other.posterior)


def test_prunes_the_least_attended_pairs() -> None:
    torch.manual_seed(0)
    first, second = PriorAttention(2, 8), PriorAttention(2, 8, kind="softmax")
    model = Recorded(first, second)
    batches = batches_of(first, [4])
    for batch in batches:
        batch["kv_lens"] = torch.tensor([6, 3, 5, 2])
    calibrate(model, iter(batches))
    posterior, count = expected(second, batches)
    values = posterior[count > 0]
    report = prune(model, 0.5, importance="posterior", scope="global")
    assert report.pairs == 2 * values.numel() == 2 * 2 * 36
    assert report.unreached == 2 * 2 * (64 - 36)
    assert second.pattern is not None
    assert torch.equal(second.pattern.to_mask(), (posterior > values.quantile(0.5)) & (count > 0))
    assert second.posterior is None and second.reached is None


# ---------------------------------------------------------------- the model around it


def test_default_forward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = PriorAttention(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.attention(x, x, x)
            return output

    x = torch.randn(2, 1, 3, 4)
    results = []
    for batch in (x, (x, torch.zeros(2)), [x, torch.zeros(2)], {"x": x}):
        model = Model()
        calibrate(model, [batch])
        results.append(model.attention.posterior)
    calibrate(model, [x[:1], x[1:]], forward=lambda module, batch: module(batch.clone()))
    results.append(model.attention.posterior)
    first, *others = results
    assert first is not None
    for other in others:
        assert other is not None and torch.equal(other, first)


def test_leaves_modes_hooks_and_gradients_as_they_were() -> None:
    attention = PriorAttention(1, 3, dropout_p=0.5)
    model = Recorded(attention).train()
    model.dropout.eval()
    seen: list[bool] = []
    batches = batches_of(attention, [1])

    def forward(module: nn.Module, batch: Batch) -> None:
        seen.append(any(part.training for part in module.modules()) or torch.is_grad_enabled())
        module(**batch)

    calibrate(model, batches, forward=forward)
    assert seen == [False]
    assert model.training and attention.training and not model.dropout.training
    assert attention.recorder is None and torch.is_grad_enabled()
    assert attention.prior is not None and attention.prior.grad is None
    assert not any("posterior" in name or "reached" in name for name in model.state_dict())


def test_an_error_leaves_the_model_as_it_was() -> None:
    attention = PriorAttention(1, 3)
    model = Recorded(attention).train()
    batches = batches_of(attention, [1])
    calibrate(model, batches)
    earlier = attention.posterior
    assert earlier is not None

    def forward(module: nn.Module, batch: Batch) -> None:
        module(**batch)
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        calibrate(model, batches_of(attention, [2]), forward=forward)
    assert attention.posterior is earlier
    assert attention.recorder is None and model.training


def test_errors() -> None:
    model = Recorded(PriorAttention(1, 3), PriorAttention(1, 3))
    batches = batches_of(PriorAttention(1, 3), [1])
    with pytest.raises(ValueError, match=r"calibrate: model must hold a PriorAttention .got Linear"):
        calibrate(nn.Linear(2, 2), batches)
    with pytest.raises(ValueError, match="calibrate: batches must hold at least one batch"):
        calibrate(model, [])
    with pytest.raises(ValueError, match=r"none ran through 'layers\.1'"):
        calibrate(model, batches, forward=lambda module, batch: module.get_submodule("layers.0")(**batch))
    prune(model, 0.5, importance="random")
    with pytest.raises(ValueError, match=r"must not be pruned yet .pruned: 'layers\.0', 'layers\.1'"):
        calibrate(model, batches)
