"""A converted model stays a first-class citizen: it compiles, exports, casts, copies, and trains as others do."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import CASES, Case, priors
from torch import Tensor, nn

from fiak_ext import compact, convert

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
STATES = ("dense", "pruned", "compacted")
every_state = pytest.mark.parametrize("state", STATES)
ONE_OF_EACH = [CASES[name] for name in ("torch.nn", "bert", "llama", "vit_tiny_patch16_224")]
one_of_each = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)


def in_state(case: Case, state: str, dtype: torch.dtype = torch.float32) -> Any:
    model = case.converted(dtype) if state == "dense" else case.pruned(dtype)
    return compact(model) if state == "compacted" else model


def inputs_of(case: Case, padded: bool = False) -> dict[str, Any]:
    """In float32; padded on the left if wanted."""
    inputs = dict(case.inputs())
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            inputs[name] = x.float()
    if padded:
        inputs["attention_mask"] = (torch.arange(8) >= torch.tensor([0, 3, 7])[:, None]).long()
    return inputs


def step(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients."""
    model.zero_grad()
    output = model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    output.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.detach(), grads


# Compilation takes seconds: each kind of model in one state, and each state with one of them at least.
@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("torch.nn", "pruned"),
        ("bert", "dense"),
        ("llama", "compacted"),
        ("vit_tiny_patch16_224", "compacted"),
    ],
)
def test_compile_without_graph_breaks(name: str, state: str) -> None:
    torch.compiler.reset()
    case = CASES[name]
    model = in_state(case, state)
    inputs = inputs_of(case)
    expected = step(model, inputs)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, grads = step(compiled, inputs)
    torch.testing.assert_close(output, expected[0])
    # Compiled code gives zeros to parameters that the loss does not depend on.
    torch.testing.assert_close({name: grads[f"_orig_mod.{name}"] for name in expected[1]}, expected[1])


@pytest.mark.parametrize(("name", "state"), [("bert", "compacted"), ("llama", "dense")])
def test_compile_with_padding(name: str, state: str) -> None:
    """Left padding, which compiled code does not look for; a hole in the mask is found by an assertion."""
    torch.compiler.reset()
    case = CASES[name]
    model, inputs = in_state(case, state), inputs_of(case, padded=True)
    visible = inputs["attention_mask"].bool()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs)[0][visible], model(**inputs)[0][visible])
        inputs["attention_mask"][0, 4] = 0
        with pytest.raises(RuntimeError, match="must hide tokens at the ends only"):
            compiled(**inputs)


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("torch.nn", "dense"),
        ("bert", "pruned"),
        ("llama", "compacted"),
        ("vit_tiny_patch16_224", "pruned"),
    ],
)
def test_export(name: str, state: str) -> None:
    case = CASES[name]
    model, inputs = copy.deepcopy(in_state(case, state)), inputs_of(case)  # a copy has no plans yet
    exported = torch.export.export(model, (), inputs)
    with torch.no_grad():
        output, expected = exported.module()(**inputs), model(**inputs)
    output, expected = (x if isinstance(x, Tensor) else x[0] for x in (output, expected))
    torch.testing.assert_close(output, expected)


@every_state
@every_case
def test_autocast(case: Case, state: str) -> None:
    model, inputs = in_state(case, state), inputs_of(case)
    expected = step(model, inputs)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, grads = step(model, inputs)
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    assert all(grad.dtype == torch.float32 and bool(grad.isfinite().all()) for grad in grads.values())


@every_state
@every_case
def test_bfloat16_and_back(case: Case, state: str) -> None:
    model, inputs = in_state(case, state), inputs_of(case)
    expected = case.run(model, inputs)
    model.to(torch.bfloat16)
    low = {name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    output = case.run(model, low)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.2, atol=0.2)
    model.float()
    torch.testing.assert_close(case.run(model, inputs), expected, rtol=0.2, atol=0.2)


@every_state
@every_case
def test_a_copy_is_equal_and_independent(case: Case, state: str) -> None:
    model, inputs = in_state(case, state), inputs_of(case)
    twin = copy.deepcopy(model)
    expected = case.run(model, inputs)
    assert torch.equal(case.run(twin, inputs), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(case.run(model, inputs), expected)


@every_state
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_gradient_checkpointing_of_transformers(name: str, state: str) -> None:
    case = CASES[name]
    model, inputs = in_state(case, state).train(), inputs_of(case)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for attention in priors(model):
        attention.dropout_p = 0.0
    expected = step(model, inputs)
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(step(model, inputs), expected)


@every_state
def test_gradient_checkpointing_of_timm(state: str) -> None:
    case = CASES["vit_tiny_patch16_224"]
    model, inputs = in_state(case, state).train(), inputs_of(case)
    expected = step(model, inputs)
    model.set_grad_checkpointing()
    torch.testing.assert_close(step(model, inputs), expected)


@one_of_each
def test_conversion_on_the_meta_device(case: Case) -> None:
    model = case.model().to("meta")
    convert(model, num_tokens=case.num_tokens)
    assert {attention.prior.device.type for attention in priors(model) if attention.prior is not None} == {"meta"}


@every_state
def test_torch_func(state: str) -> None:
    """``functional_call`` works; transforms of torch.func are refused by name, as the ops are autograd functions."""
    case = CASES["bert"]
    model, inputs = in_state(case, state), inputs_of(case)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, parameters, (), inputs)[0], model(**inputs)[0])

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (), inputs)[0].square().mean()

    with pytest.raises(RuntimeError, match=r"functorch|torch\.func"):
        torch.func.grad(loss)(parameters)


# ---------------------------------------------------------------- two processes

CHILD = """
import sys
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, sys.argv[2])
from test_convert_training import CASES, STATES, ids, in_state, steps

torch.set_num_threads(1)
dist.init_process_group("gloo")
for state in STATES:
    model = in_state(CASES["bert"], state, torch.float64)
    steps(DistributedDataParallel(model, find_unused_parameters=True), ids()[dist.get_rank() :: dist.get_world_size()])
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), f"{sys.argv[1]}/{state}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def ids() -> Tensor:
    return torch.randint(2, 31, (4, 8), generator=torch.Generator().manual_seed(3))


def steps(model: nn.Module, ids: Tensor) -> None:
    """Two steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids)[0].square().mean().backward()
        optimizer.step()


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Under torchrun, each with half of the batch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    subprocess.run([*torchrun, sys.executable, "-c", CHILD, str(tmp_path), str(Path(__file__).parent)], check=True)
    for state in STATES:
        model = in_state(CASES["bert"], state, torch.float64)
        before = copy.deepcopy(model.state_dict())
        steps(model, ids())
        torch.testing.assert_close(torch.load(tmp_path / f"{state}.pt"), model.state_dict())
        changed = [name for name, x in model.state_dict().items() if not torch.equal(x, before[name])]
        assert any("query.weight" in name for name in changed)
        assert any("prior" in name for name in changed) == (state == "dense")
