"""What tools do to the state of a pruned model: average, copy, save, load, place and move it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed_checkpoint
from converted import CASES, priors
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn

from fiak_ext import (
    MultiHeadSelfAttention,
    PriorAttention,
    SparsePattern,
    calibrate,
    compact,
    convert,
    patterns,
    prune,
    resize_priors,
    set_patterns,
)

TOKENS, HEADS, DIM = 40, 2, 8
STATES = ("dense", "calibrated", "pruned", "compacted")
every_state = pytest.mark.parametrize("state", STATES)


def mask(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Few pairs a row, at places that an average in float32 truncates; no query keeps key 3."""
    kept = torch.rand((HEADS, tokens, tokens), generator=torch.Generator().manual_seed(seed)) < 0.3
    kept |= torch.eye(tokens, dtype=torch.bool)
    kept[:, :, 3] = False
    return kept


def model_in(state: str, seed: int = 0, kind: Any = "fiak") -> Any:
    """Two layers of self-attention; the seed is that of the weights and of the pattern."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(MultiHeadSelfAttention(DIM, HEADS, TOKENS, kind=kind) for _ in range(2)))
    for attention in priors(model):
        if attention.prior is not None:
            nn.init.normal_(attention.prior)
    if state == "calibrated":
        calibrate(model, [torch.randn(2, TOKENS, DIM)])
    if state in ("pruned", "compacted"):
        for index, attention in enumerate(priors(model)):
            attention.set_pattern(SparsePattern.from_mask(mask(seed + index)))
    return compact(model) if state == "compacted" else model


def tokens(seed: int = 9) -> Tensor:
    return torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(seed))


def storages(model: nn.Module) -> list[int]:
    """Where the tensors lie that a checkpoint of the model's attention holds."""
    names = ("prior", "pattern_crow_indices", "pattern_col_indices", "keep")
    found = [getattr(attention, name) for attention in priors(model) for name in names]
    return [tensor.untyped_storage().data_ptr() for tensor in found if tensor is not None]


# ---------------------------------------------------------------- averages

AVERAGES: dict[str, Callable[[nn.Module], AveragedModel]] = {
    "swa": AveragedModel,
    "swa, one by one": lambda m: AveragedModel(m, avg_fn=get_swa_avg_fn()),
    "swa with buffers": lambda m: AveragedModel(m, use_buffers=True),
    "ema with buffers": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9999), use_buffers=True),
    "ema of lists with buffers": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
}


@every_state
@pytest.mark.parametrize("average", AVERAGES.values(), ids=list(AVERAGES))
def test_averaged_models(average: Callable[[nn.Module], AveragedModel], state: str) -> None:
    model = model_in(state)
    x = tokens()
    expected = model(x)  # which makes the plans
    averaged = average(model)
    for _ in range(5):
        averaged.update_parameters(model)
    torch.testing.assert_close(averaged(x), expected)


@every_state
@pytest.mark.parametrize("make", [ModelEmaV2, ModelEmaV3], ids=["V2", "V3"])
def test_timms_averages(make: Any, state: str) -> None:
    model = model_in(state)
    x = tokens()
    expected = model(x)
    average = make(model, decay=0.9999)
    for _ in range(5):
        average.update(model)
    torch.testing.assert_close(average.module(x), expected)


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("state", ["pruned", "compacted"])
def test_indices_averaged_as_numbers_are_refused(state: str, decay: float, truncated: bool) -> None:
    """What code makes of a state_dict that averages it by itself; of small integers, these decays move a fifth."""
    model = model_in(state)
    before = model(tokens())
    averaged = {name: decay * tensor + (1 - decay) * tensor for name, tensor in model.state_dict().items()}
    if truncated:
        averaged = {name: averaged[name].to(tensor.dtype) for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"attention\.pattern: .*(crow_indices|col_indices|keep) must"):
        model.load_state_dict(averaged)
    torch.testing.assert_close(model(tokens()), before)


@pytest.mark.parametrize("tensor", ["pattern_crow_indices", "pattern_col_indices", "keep"])
@pytest.mark.parametrize("place", [8, 16])
def test_other_indices_that_are_a_pattern_too_are_refused(place: int, tensor: str) -> None:
    """One index, moved by one, as averages in integers move them: a pattern still, but not the one that was saved."""
    model = model_in("dense")
    query, key = torch.arange(TOKENS)[:, None], torch.arange(TOKENS)
    kept = (query // 4 == key // 4) & (key % 2 == 0)
    pattern = SparsePattern.from_mask(kept.expand(HEADS, -1, -1))
    set_patterns(model, dict.fromkeys(("0.prior_attention", "1.prior_attention"), pattern))
    compact(model)
    before, state = model(tokens()), model.state_dict()
    state[f"0.prior_attention.{tensor}"].view(-1)[place] -= 1
    with pytest.raises(RuntimeError, match="pattern_checksum must be that of crow_indices, col_indices and keep"):
        model.load_state_dict(state)
    assert torch.equal(model(tokens()), before)


def test_averages_that_move_no_index_load() -> None:
    model = model_in("compacted")
    expected = model(tokens())
    averaged = {name: 0.75 * tensor + 0.25 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: averaged[name].to(tensor.dtype) for name, tensor in model.state_dict().items()})
    torch.testing.assert_close(model(tokens()), expected)


@every_state
def test_there_is_no_buffer_to_average_truncate_or_offload(state: str) -> None:
    model = model_in(state)
    model(tokens())
    assert not [name for module in model.modules() for name in module._buffers]


# ---------------------------------------------------------------- shared storage


def test_one_pattern_for_all_layers(tmp_path: Path) -> None:
    model = model_in("dense")
    pattern = SparsePattern.from_mask(mask())
    set_patterns(model, dict.fromkeys(("0.prior_attention", "1.prior_attention"), pattern))
    save_model(model, str(tmp_path / "model.safetensors"))
    other = model_in("dense", seed=1)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(tokens()), model(tokens()))
    assert all(attention.pattern == pattern for attention in priors(other))
    assert len(set(storages(model))) == len(storages(model))


def test_models_share_no_storage() -> None:
    source = model_in("pruned")
    others = [model_in("dense", seed=seed) for seed in (1, 2)]
    for other in others:
        set_patterns(other, patterns(source))
    compacted = compact(copy.deepcopy(source))
    found = [place for model in (source, *others, compacted) for place in storages(model)]
    assert len(set(found)) == len(found)


def test_a_pattern_is_not_the_modules_tensors() -> None:
    pattern = SparsePattern.from_mask(mask())
    model = model_in("dense")
    model[0].prior_attention.set_pattern(pattern)
    expected = model(tokens())
    pattern.col_indices.zero_()
    assert torch.equal(model(tokens()), expected)


def test_a_state_dict_is_no_view() -> None:
    model = model_in("compacted")
    expected = model(tokens())
    for name, tensor in model.state_dict().items():
        if not name.endswith(("weight", "bias")):
            tensor.zero_()
    assert torch.equal(model(tokens()), expected)


# ---------------------------------------------------------------- inference mode


@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize("last", ["dense", "pruned", "compacted"])
def test_what_is_made_in_inference_mode_trains(last: str, made: str) -> None:
    case = CASES["vit_tiny_patch16_224"]
    model = case.model(torch.float32) if made == "outside" else None
    with torch.inference_mode():
        converted = convert(case.model(torch.float32) if model is None else model)
        if last != "dense":
            prune(converted, 0.5, importance="random")
        if last == "compacted":
            compact(converted)
    if made == "inside":  # the library's own parameters are inference tensors then; those of attention must not be
        assert not any(
            attention.prior is not None and attention.prior.is_inference() for attention in priors(converted)
        )
        return
    for attention in priors(converted):
        if attention.prior is not None:
            attention.prior.data.normal_()
    case.run(converted, case.inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


def test_moved_resized_and_loaded_in_inference_mode() -> None:
    dense, pruned = PriorAttention(HEADS, 17), PriorAttention(HEADS, 17)
    pruned.set_pattern(SparsePattern.from_mask(mask(tokens=17)))
    with torch.inference_mode():
        resize_priors(dense, (4, 4), (5, 5))
        loaded = PriorAttention(HEADS, 17)
        loaded.load_state_dict(pruned.state_dict())
        loaded.double()
        pattern = SparsePattern.from_mask(mask(tokens=17)).crop(9)
    by_pattern = PriorAttention(HEADS, 9)
    by_pattern.set_pattern(pattern)
    for module, size in ((dense, 26), (loaded, 17), (by_pattern, 9)):
        query = torch.randn(2, HEADS, size, DIM, requires_grad=True)
        module(query, query, query).sum().backward()
        assert query.grad is not None and query.grad.isfinite().all()


# ---------------------------------------------------------------- loading

LOADING_STATES = ("dense", "pruned", "compacted")


@pytest.mark.parametrize("kind", ["fiak", "gmm", "softmax"])
@pytest.mark.parametrize("into", LOADING_STATES)
@pytest.mark.parametrize("state", LOADING_STATES)
def test_every_state_loads_into_every_state(state: str, into: str, kind: Any) -> None:
    source, model = model_in(state, kind=kind), model_in(into, seed=5, kind=kind)
    model(tokens())
    model.load_state_dict(source.state_dict())
    assert torch.equal(model(tokens()), source(tokens()))
    assert [attention.is_compacted for attention in priors(model)] == [state == "compacted"] * 2


@pytest.mark.parametrize("into", LOADING_STATES)
@pytest.mark.parametrize("state", LOADING_STATES)
def test_every_state_of_timm_loads_into_every_state(state: str, into: str) -> None:
    def in_state(state: str) -> Any:
        case = CASES["vit_tiny_patch16_224"]
        model = case.pruned() if state != "dense" else case.converted()
        return compact(model) if state == "compacted" else model

    source, model = in_state(state), in_state(into)
    model.load_state_dict(source.state_dict())
    inputs = CASES["vit_tiny_patch16_224"].inputs()
    assert torch.equal(
        CASES["vit_tiny_patch16_224"].run(model, inputs), CASES["vit_tiny_patch16_224"].run(source, inputs)
    )


def damaged(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Checkpoints of one attention that do not fit, each in one way."""
    changes: dict[str, dict[str, Tensor]] = {}
    if "prior" in state:
        changes["prior of another size"] = {"prior": state["prior"][..., :-1]}
    if "pattern_col_indices" in state:
        changes["columns out of range"] = {"pattern_col_indices": state["pattern_col_indices"] + 1000}
        changes["an entry less"] = {"pattern_col_indices": state["pattern_col_indices"][:-1]}
        changes["fewer rows"] = {"pattern_crow_indices": state["pattern_crow_indices"][:-1]}
        changes["floating-point columns"] = {"pattern_col_indices": state["pattern_col_indices"].float()}
        changes["a keep of two dimensions too many"] = {"keep": torch.zeros(1, 1, 1, 1, dtype=torch.int64)}
    return {name: {**state, **change} for name, change in changes.items()}


@pytest.mark.parametrize("into", LOADING_STATES)
@pytest.mark.parametrize("state", LOADING_STATES)
def test_what_does_not_fit_is_refused_and_nothing_is_lost(state: str, into: str) -> None:
    for broken in damaged(model_in(state)[0].prior_attention.state_dict()).values():
        module = model_in(into, seed=5)[0].prior_attention
        query = torch.randn(2, HEADS, TOKENS, DIM)
        rows = query if not module.is_compacted else query[:, :, module.keep.size(1) * [0]]
        before = module.state_dict(), module(query, rows, rows)
        with pytest.raises(RuntimeError):
            module.load_state_dict(broken)
        assert module.state_dict().keys() == before[0].keys()
        assert all(torch.equal(tensor, before[0][name]) for name, tensor in module.state_dict().items())
        assert torch.equal(module(query, rows, rows), before[1])


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_checkpoint_stays_its_owners(assign: bool) -> None:
    state = model_in("compacted").state_dict()
    model = model_in("dense", seed=5)
    model.load_state_dict(state, assign=assign)
    expected = model(tokens())
    for name, tensor in state.items():
        if not name.endswith(("weight", "bias")):
            tensor.zero_()
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize("kind", ["fiak", "softmax"])
@pytest.mark.parametrize("state", LOADING_STATES)
def test_distributed_checkpoints(state: str, kind: Any, tmp_path: Path) -> None:
    source = model_in(state, kind=kind)
    distributed_checkpoint.save({"model": get_model_state_dict(source)}, checkpoint_id=tmp_path, no_dist=True)
    model = model_in(state, kind=kind)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    loaded = {"model": get_model_state_dict(model)}
    distributed_checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(model, loaded["model"])
    assert torch.equal(model(tokens()), source(tokens()))


@pytest.mark.parametrize("state", LOADING_STATES)
def test_a_distributed_checkpoint_of_another_state_is_refused(state: str, tmp_path: Path) -> None:
    distributed_checkpoint.save({"model": model_in(state).state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    for into in set(LOADING_STATES) - {state}:
        model = model_in(into, seed=5)
        before = model(tokens())
        with pytest.raises(CheckpointException, match=r"Missing key|Size mismatch"):
            distributed_checkpoint.load({"model": model.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
        assert torch.equal(model(tokens()), before)


# ---------------------------------------------------------------- places


@pytest.mark.parametrize("state", ["pruned", "compacted"])
def test_the_pattern_follows_parameters_that_are_placed_one_by_one(state: str) -> None:
    """As accelerate and transformers place them: not by ``Module.to``."""
    source = model_in(state)
    with torch.device("meta"):
        model = nn.Sequential(*(MultiHeadSelfAttention(DIM, HEADS, TOKENS) for _ in range(2)))
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(tokens()), source(tokens()))


def test_written_in_place_after_the_plan_was_made() -> None:
    pattern = SparsePattern.from_mask(torch.ones(1, 1, 4, dtype=torch.bool).tril())
    query = torch.randn(1, 1, 1, 4)
    key, value = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    torch.testing.assert_close(pattern.attend(query, key, value), value[:, :, :1])
    pattern.col_indices[0] = 2
    torch.testing.assert_close(pattern.attend(query, key, value), value[:, :, 2:3])
    pattern.col_indices.fill_(7)
    with pytest.raises(RuntimeError, match="col_indices"):
        pattern.attend(query, key, value)
    attention = PriorAttention(1, 2)
    attention.set_pattern(SparsePattern.from_mask(torch.eye(2, dtype=torch.bool)[None]))
    rows = torch.randn(1, 1, 2, 4)
    torch.testing.assert_close(attention(rows, rows, rows), rows)
    assert attention.pattern is not None
    attention.pattern.col_indices.copy_(torch.tensor([1, 0]))
    torch.testing.assert_close(attention(rows, rows, rows), rows.flip(2))
