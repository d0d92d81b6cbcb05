"""``fiak_ext.calibrate`` against the mean posterior attention written out in plain Python loops."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from fiak_ext import (
    PriorAttention,
    SoftEM,
    VisionTransformer,
    calibrate,
    calibration,
    find_dead_rows,
    flops,
    param_groups,
    prune,
)

KINDS: tuple[Literal["fiak", "gmm", "softmax"], ...] = ("fiak", "gmm", "softmax")


class Recorded(nn.Module):
    """Passes query, key and value to its attentions, and in training mode dropout, which makes results differ."""

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
                        if "bias" in batch:
                            score += float(batch["bias"][b % groups % len(batch["bias"]), h, i, j])
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
@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
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


@pytest.mark.parametrize("biases", [1, 3])
def test_added_bias(biases: int) -> None:
    torch.manual_seed(0)
    attention = randomised(PriorAttention(2, 4, groups=3))
    batches = batches_of(attention, [6])
    batches[0]["bias"] = torch.randn(biases, 2, 4, 4)
    calibrate(Recorded(attention), batches)
    assert_calibrated(attention, batches)


@pytest.mark.parametrize("importance", ["posterior", "gradient"])
def test_pairs_without_weight_are_not_visible(importance: Any) -> None:
    """Far below the largest bias of the row in all heads: in one head, or less far, is not enough."""
    torch.manual_seed(0)
    attention = PriorAttention(2, 4, groups=3)
    (batch,) = batches_of(attention, [6])
    batch["bias"] = torch.full((3, 2, 4, 4), 30.0)
    batch["bias"][1, :, 2, 3] = -60  # e^-90
    batch["bias"][1, :, 2, 1] = -50  # e^-80
    batch["bias"][1, 0, 3, 0] = -60
    calibrate(
        Recorded(attention),
        [batch],
        importance=importance,
        forward=lambda model, batch: torch.stack(model(**batch)).square().sum(),
    )
    hidden = torch.zeros(3, 2, 4, 4, dtype=torch.bool)
    hidden[1, :, 2, 3] = True
    assert attention.reached is not None
    assert torch.equal(attention.reached, torch.where(hidden, 0, 2))


def test_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = randomised(PriorAttention(2, 7))
    batches = batches_of(attention, [2])
    monkeypatch.setattr(calibration, "_CHUNK_BYTES", 3 * 8 * 2 * 7)
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


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (torch.zeros(2, 1, 3, 4), "a Tensor of floating-point numbers with 4 dimensions"),
        ({"x": torch.zeros(2, 1, 3, 4)}, "a dict"),
        ((torch.zeros(2, 1, 3, 4), torch.zeros(2)), "a tuple"),
        (({"x": torch.zeros(2, 1, 3, 4)}, torch.zeros(2)), "a tuple"),
        (3, "a int"),
    ],
)
def test_one_batch_in_the_place_of_several(batches: Any, got: str) -> None:
    attention = PriorAttention(1, 3)
    with pytest.raises(ValueError, match=rf"calibrate: batches must be a list or another iterable.*\(got {got}\)"):
        calibrate(attention, batches)
    assert attention.posterior is None and attention.recorder is None


def test_one_batch_of_inputs_and_labels_in_the_place_of_two_batches() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = PriorAttention(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.reshape(-1, 1, 3, 4).float()  # takes anything of the size
            output: Tensor = self.attention(x, x, x)
            return output

    model, inputs = Model(), torch.randn(2, 1, 3, 4)
    for labels in (torch.zeros(24), torch.zeros(2, 1, 3, 4, dtype=torch.int64), torch.zeros(12)):
        with pytest.raises(ValueError, match=r"one batch with inputs and labels is \[.inputs, labels.\] .got a Tensor"):
            calibrate(model, [inputs, labels])
        with pytest.raises(ValueError, match=r"got a Tensor of .* after a dict"):
            calibrate(model, [{"x": inputs}, labels])
        assert model.attention.posterior is None
    calibrate(model, [inputs], forward=lambda module, batch: module(batch))
    first = model.attention.posterior
    calibrate(model, [({"x": inputs}, torch.zeros(2))])
    assert first is not None and model.attention.posterior is not None
    assert torch.equal(model.attention.posterior, first)


# ---------------------------------------------------------------- compiled models


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def unbroken(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True)  # type: ignore[return-value]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(fullgraph=True, backend="aot_eager")
    return model


def in_parts(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module).__name__ == "TransformerBlock":
            module.compile(backend="aot_eager", dynamic=True)
    return model


COMPILED = pytest.mark.parametrize("compiled", [whole, unbroken, in_place, in_parts])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attentions_of(model: nn.Module) -> list[PriorAttention]:
    return [module for module in model.modules() if isinstance(module, PriorAttention)]


@COMPILED
def test_compiled_models_are_measured_as_eager_ones(compiled: Any, fresh_compiler: None) -> None:
    torch.manual_seed(0)
    eager = VisionTransformer(8, 4, 1, 3, dim=8, depth=2, num_heads=2)
    model = compiled(copy.deepcopy(eager))
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(3, (6,))
    model(images)
    batches = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    for each in (eager, model):
        calibrate(each, batches)
        calibrate(each, batches, importance="gradient", forward=lambda module, batch: module(batch[0]).square().sum())
    for one, other in zip(attentions_of(eager), attentions_of(model), strict=True):
        for name in ("posterior", "saliency", "reached"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    dead, expected_dead = find_dead_rows(model, images), find_dead_rows(eager, images)
    names = ["blocks.0.attention.prior_attention", "blocks.1.attention.prior_attention"]
    assert list(dead) == list(expected_dead) == names
    assert all(torch.equal(dead[name], rows) for name, rows in expected_dead.items())
    assert flops.model_report(model, images).to_dict() == flops.model_report(eager, images).to_dict()
    arguments: dict[str, Any] = {"scope": "global", "importance": "posterior", "example": images}
    reports = [prune(each, target_flops=0.95, dead_rows=dead, **arguments) for each in (eager, model)]
    assert reports[0] == reports[1]
    assert flops.model_report(model, images).to_dict() == flops.model_report(eager, images).to_dict()
    torch.testing.assert_close(model.eval()(images), eager.eval()(images))


@COMPILED
def test_soft_em_of_compiled_models(compiled: Any, fresh_compiler: None) -> None:
    torch.manual_seed(0)
    eager = VisionTransformer(8, 4, 1, 3, dim=8, depth=2, num_heads=2)
    model = compiled(copy.deepcopy(eager))
    images = torch.randn(6, 1, 8, 8)
    for each in (eager, model):
        with SoftEM(each, momentum=0.5) as em:
            for batch in images.split(3):
                each(batch).sum().backward()
                em.step()
        with SoftEM(each, momentum=0.5) as em:  # another one, after the first
            each(images)
            em.step()
    for one, other in zip(attentions_of(eager), attentions_of(model), strict=True):
        assert one.prior is not None and other.prior is not None and one.prior.std() > 0
        torch.testing.assert_close(other.prior, one.prior, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what it costs


@pytest.mark.parametrize("importance", ["posterior", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_memory_is_the_results_and_less_than_the_sums_of_a_layer(kind: Any, importance: Any) -> None:
    heads, tokens, depth = 2, 256, 6
    model = Recorded(*[PriorAttention(heads, tokens, kind=kind, is_causal=True) for _ in range(depth)])
    batches = batches_of(PriorAttention(heads, tokens), [2, 1], dim=2)
    pairs = heads * tokens * tokens
    results = depth * (4 * pairs + 8 * pairs // heads)
    sums = 8 * pairs + 8 * pairs // heads
    forward = flops.peak_memory(lambda: model(**batches[0]))
    if importance == "gradient":
        # Backward holds what autograd saves in all layers and one gradient: measured on uniform priors.
        twin = Recorded(*[PriorAttention(heads, tokens, is_causal=True) for _ in range(depth)])
        with torch.enable_grad():
            forward = flops.peak_memory(lambda: loss_of(twin, batches[0])) + 4 * pairs
    chunks = 3 * calibration._CHUNK_BYTES
    peak = flops.peak_memory(lambda: calibrate(model, batches, importance=importance, forward=FORWARDS[importance]))
    assert peak <= results + max(sums, forward) + chunks


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
    with pytest.raises(ValueError, match=r"calibrate: importance must be 'posterior' or 'gradient' .got 'prior'"):
        calibrate(model, batches, importance="prior")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"calibrate: forward must return the loss, .* .got list"):
        calibrate(model, batches, importance="gradient")
    with pytest.raises(ValueError, match=r"calibrate: forward must return the loss, .* .got shape .1, 1, 3, 2"):
        calibrate(model, batches, importance="gradient", forward=lambda module, batch: module(**batch)[0])
    with pytest.raises(ValueError, match=r"none ran through 'layers\.1'"):
        calibrate(model, batches, forward=lambda module, batch: module.get_submodule("layers.0")(**batch))
    prune(model, 0.5, importance="random")
    with pytest.raises(ValueError, match=r"must not be pruned yet .pruned: 'layers\.0', 'layers\.1'"):
        calibrate(model, batches)


# ---------------------------------------------------------------- saliency


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that treats every position, head and layer differently, summed over the samples."""
    outputs = model(**batch)
    factors = [torch.linspace(-1, 1, output[0].numel()).view(output[0].shape) for output in outputs]
    terms = [(output * factor).square().sum() for output, factor in zip(outputs, factors, strict=True)]
    return torch.stack(terms).sum()


FORWARDS: dict[str, Any] = {"posterior": None, "gradient": loss_of}


def saliency(attention: PriorAttention) -> Tensor:
    assert attention.saliency is not None
    return attention.saliency


@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_saliency_is_what_a_smaller_weight_costs(parameterization: Any, is_causal: bool) -> None:
    """Against central differences of the loss in log w, for which the clamp parameter is w itself."""
    torch.manual_seed(0)
    attention = PriorAttention(2, 4, parameterization="clamp", is_causal=is_causal).double()
    assert attention.prior is not None
    nn.init.uniform_(attention.prior, 0.1, 0.9)
    batches = [{name: tensor.double() for name, tensor in batch.items()} for batch in batches_of(attention, [2, 3])]
    batches[0]["kv_lens"] = torch.tensor([4, 2])
    tested = copy.deepcopy(attention)
    if parameterization == "logits":
        tested.parameterization = "logits"
        assert tested.prior is not None
        nn.init.zeros_(tested.prior)
        tested.prior.data.copy_(attention.prior.log())
    calibrate(Recorded(tested), batches, importance="gradient", forward=loss_of)
    _, count = expected(attention, batches)
    model = Recorded(attention).eval()
    step = 1e-5
    for place in torch.cartesian_prod(*map(torch.arange, attention.prior.shape[1:])).tolist():
        losses = []
        for sign in (1, -1):
            changed = copy.deepcopy(model)
            prior = changed.get_parameter("layers.0.prior")
            with torch.no_grad():
                prior[0][tuple(place)] *= math.exp(sign * step)
                losses.append(sum(float(loss_of(changed, batch)) for batch in batches))
        slope = (losses[0] - losses[1]) / (2 * step)
        samples = int(count[0][tuple(place)])
        assert saliency(tested)[0][tuple(place)].item() == pytest.approx(-slope / max(samples, 1), rel=1e-4, abs=1e-6)
    assert tested.reached is not None and torch.equal(tested.reached, count)
    assert tested.posterior is None


def test_saliency_without_a_prior_is_that_of_a_uniform_one() -> None:
    torch.manual_seed(0)
    plain, uniform = Recorded(PriorAttention(2, 4, kind="softmax")), Recorded(PriorAttention(2, 4))
    batches = batches_of(PriorAttention(2, 4), [3, 2])
    for model in (plain, uniform):
        calibrate(model, batches, importance="gradient", forward=loss_of)
    first, second = plain.get_submodule("layers.0"), uniform.get_submodule("layers.0")
    assert isinstance(first, PriorAttention) and isinstance(second, PriorAttention)
    torch.testing.assert_close(saliency(first), saliency(second))
    assert saliency(first).abs().max() > 0.01
    assert first.kind == "softmax" and first.prior is None and not list(plain.parameters())


def test_saliency_of_a_gmm_prior_is_that_of_its_key() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 5, kind="gmm")
    calibrate(Recorded(attention), batches_of(attention, [3]), importance="gradient", forward=loss_of)
    values = saliency(attention)
    assert torch.equal(values, values[:, :, :1].expand_as(values)) and values.abs().max() > 0
    assert prune(attention, keys=0.4, importance="gradient").keys_pruned == 4


def test_prunes_the_least_salient_pairs_of_a_frozen_model() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 5)
    assert attention.prior is not None
    attention.prior.requires_grad_(False)
    calibrate(Recorded(attention), batches_of(attention, [4]), importance="gradient", forward=loss_of)
    assert not attention.prior.requires_grad and attention.prior.grad is None
    values = saliency(attention)
    report = prune(attention, 0.6, importance="gradient")
    assert report.importance == "gradient" and attention.pattern is not None and attention.saliency is None
    assert torch.equal(attention.pattern.to_mask(), values > values.flatten().kthvalue(30).values)


def test_an_error_leaves_priors_as_they_were() -> None:
    attention = PriorAttention(1, 3, kind="softmax", parameterization="clamp")

    def forward(module: nn.Module, batch: Batch) -> None:
        raise KeyError("of the caller")

    with pytest.raises(KeyError, match="of the caller"):
        calibrate(Recorded(attention), batches_of(attention, [1]), importance="gradient", forward=forward)
    assert attention.prior is None and (attention.kind, attention.parameterization) == ("softmax", "clamp")
    assert attention.saliency is None and attention.recorder is None


# ---------------------------------------------------------------- soft EM


@pytest.mark.parametrize("parameterization", ["logits", "clamp"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_soft_em_moves_pi_towards_the_mean_posterior(parameterization: Any, is_causal: bool) -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 5, parameterization=parameterization, is_causal=is_causal).double()
    model = Recorded(attention)
    model.dropout.eval()
    assert attention.prior is not None
    eligible = attention.eligible()
    start = torch.rand_like(attention.prior).masked_fill(~eligible, 0)
    start /= start.sum(-1, keepdim=True)
    pi = start
    attention.prior.data.copy_(start.log().clamp(min=-9) if parameterization == "logits" else start)
    batches = [{name: tensor.double() for name, tensor in batch.items()} for batch in batches_of(attention, [2, 1, 4])]
    with SoftEM(model, momentum=0.3) as em:
        assert not attention.prior.requires_grad
        for step in (batches[:2], batches[2:]):  # two forward passes in the first step
            posterior, _ = expected(attention, step)
            for batch in step:
                model(**batch)
            em.step()
            pi = 0.7 * pi + 0.3 * posterior
            weight = attention.weight()
            torch.testing.assert_close((weight / weight.sum(-1, keepdim=True)), pi, rtol=1e-9, atol=1e-12)
    assert all(prior.requires_grad for prior in attention.parameters()) and attention.recorder is None


def test_soft_em_of_keys_is_the_mean_over_queries() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 5, kind="gmm").double()
    model = Recorded(attention)
    model.dropout.eval()
    batches = [{name: tensor.double() for name, tensor in batch.items()} for batch in batches_of(attention, [3])]
    posterior, _ = expected(attention, batches)
    with SoftEM(model, momentum=0.4) as em:
        model(**batches[0])
        em.step()
    pi = 0.6 / 5 + 0.4 * posterior.mean(2, keepdim=True)
    torch.testing.assert_close(attention.weight() / 5, pi, rtol=1e-9, atol=1e-12)


def test_soft_em_leaves_pairs_that_no_sample_has() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 6)
    model = Recorded(attention)
    model.dropout.eval()
    (batch,) = batches_of(attention, [2])
    batch["kv_lens"] = torch.tensor([4, 3])
    before = attention.weight()
    with SoftEM(model, momentum=1.0) as em:
        model(**batch)
        em.step()
    after = attention.weight()
    assert torch.equal(after[..., 4:, :], before[..., 4:, :])
    torch.testing.assert_close(after[..., :4, 4] / after[..., :4, 5], torch.ones(1, 2, 4))
    assert (after[..., :4, :4] - before[..., :4, :4]).abs().max() > 0.1


def test_soft_em_in_a_training_loop() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 1, 3, dim=8, depth=2, num_heads=2, dropout=0.1)
    images, labels = torch.randn(6, 1, 8, 8), torch.randint(3, (6,))
    optimizer = torch.optim.AdamW(param_groups(model, 1e-3), weight_decay=0.1)
    with SoftEM(model) as em:
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            em.step()
        model.eval()(images)  # a validation pass is not training
        with pytest.raises(RuntimeError, match=r"SoftEM.step: a forward pass in training mode must come first"):
            em.step()
    attention = model.get_submodule("blocks.0.attention.prior_attention")
    assert isinstance(attention, PriorAttention) and attention.prior is not None
    assert attention.prior.std() > 0 and attention.prior.grad is None
    assert prune(model, 0.5).pruned == 50


def test_soft_em_errors() -> None:
    with pytest.raises(ValueError, match=r"SoftEM: model must have priors .none in 'layers.1'"):
        SoftEM(Recorded(PriorAttention(1, 3), PriorAttention(1, 3, kind="softmax")))
    for momentum in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="SoftEM: momentum must be above 0 and at most 1"):
            SoftEM(PriorAttention(1, 3), momentum)


# ---------------------------------------------------------------- several processes


def in_processes(work: Callable[..., dict[str, Tensor]], folder: Path, *arguments: object) -> list[dict[str, Tensor]]:
    """What two ranks save, each working on its own."""
    multiprocessing.spawn(in_one_process, (work, str(folder), arguments), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def in_one_process(rank: int, work: Callable[..., dict[str, Tensor]], folder: str, arguments: Sequence[object]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(rank, *arguments), f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def model_and_batches() -> tuple[Recorded, list[Batch]]:
    torch.manual_seed(0)
    model = Recorded(randomised(PriorAttention(2, 6)), randomised(PriorAttention(2, 6, groups=2)))
    batches = batches_of(PriorAttention(2, 6), [2, 4, 2, 6])
    batches[0]["kv_lens"] = torch.tensor([4, 6])
    batches[3]["kv_lens"] = torch.tensor([1, 2, 3, 4, 5, 6])
    return model, batches


def measured(model: Recorded) -> dict[str, Tensor]:
    names = ("posterior", "saliency", "reached", "prior")
    found = {
        f"{place}.{name}": getattr(layer, name)
        for place, layer in model.named_modules()
        for name in names
        if isinstance(layer, PriorAttention)
    }
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}


def calibrate_a_share(rank: int, first: int, last: int) -> dict[str, Tensor]:
    """Both importances and a step of soft EM; rank 0 has the first batches."""
    model, batches = model_and_batches()
    share = batches[:first] if rank == 0 else batches[first:last]
    calibrate(model, share)
    calibrate(model, share, importance="gradient", forward=loss_of)
    with SoftEM(model.train(), momentum=0.5) as em:
        for batch in share:
            for layer in model.layers:
                layer(**batch)
        em.step()
    return measured(model)


@pytest.mark.parametrize("first", [1, 4])
def test_two_processes_measure_what_one_does(first: int, tmp_path: Path) -> None:
    """Rank 0 has fewer data, or all."""
    alone = calibrate_a_share(0, 4, 4)
    assert {"layers.0.posterior", "layers.1.saliency", "layers.1.reached", "layers.0.prior"} <= set(alone)
    for together in in_processes(calibrate_a_share, tmp_path, first, 4):
        assert set(together) == set(alone)
        for name, tensor in alone.items():
            torch.testing.assert_close(together[name], tensor, rtol=3e-7, atol=1e-9)


def calibrate_nothing(rank: int) -> dict[str, Tensor]:
    model, _ = model_and_batches()
    try:
        calibrate(model, [])
    except ValueError as error:
        assert "batches must hold at least one batch" in str(error)
        return {"refused": torch.ones(())}
    return {}


def test_no_data_on_any_rank_is_refused_on_all(tmp_path: Path) -> None:
    assert all("refused" in result for result in in_processes(calibrate_nothing, tmp_path))


# ---------------------------------------------------------------- dead rows


def test_dead_rows_of_a_class_token() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(8, 4, 1, 3, dim=8, depth=2, num_heads=2).train()
    images = torch.randn(2, 1, 8, 8)
    dead = find_dead_rows(model, (images, "labels"))
    assert set(dead) == {"blocks.0.attention.prior_attention", "blocks.1.attention.prior_attention"}
    first, last = dead.values()
    assert not first.any()
    assert last.tolist() == [[[False, True, True, True, True]] * 2]
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    assert find_dead_rows(model, images)["blocks.1.attention.prior_attention"].sum() == 8


def test_rows_that_the_batch_does_not_have_are_not_dead() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(2, 6, groups=2)
    model = Recorded(attention)
    (batch,) = batches_of(attention, [2])
    batch["kv_lens"] = torch.tensor([4, 5])

    def forward(module: nn.Module, inputs: Batch) -> dict[str, Any]:
        (output,) = module(**inputs)
        return {"first": [output[:, 0, :2]], "second": (output[0, 1, 3], "text", torch.arange(3))}

    dead = find_dead_rows(model, batch, forward=forward)["layers.0"]
    assert dead.int().tolist() == [
        [[0, 0, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]],
        [[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0]],
    ]


def test_a_layer_that_leads_nowhere_is_dead() -> None:
    torch.manual_seed(0)
    model = Recorded(PriorAttention(1, 3), PriorAttention(1, 3))
    (batch,) = batches_of(PriorAttention(1, 3), [1])
    dead = find_dead_rows(model, batch, forward=lambda module, inputs: module(**inputs)[1])
    assert dead["layers.0"].all() and not dead["layers.1"].any()


def test_dead_rows_at_offsets() -> None:
    torch.manual_seed(0)
    attention = PriorAttention(1, 6, is_causal=True)
    (batch,) = batches_of(attention, [2])
    batch["query"] = batch["query"][:, :, :2]
    batch["query_offsets"] = torch.tensor([1, 3])
    dead = find_dead_rows(Recorded(attention), batch, forward=lambda module, inputs: module(**inputs)[0][:, :, 0])
    assert dead["layers.0"].flatten().int().tolist() == [0, 0, 1, 0, 1, 0]


def test_dead_rows_need_outputs() -> None:
    (batch,) = batches_of(PriorAttention(1, 3), [1])
    with pytest.raises(ValueError, match="find_dead_rows: forward must return floating-point tensors"):
        find_dead_rows(Recorded(PriorAttention(1, 3)), batch, forward=lambda module, inputs: None)
