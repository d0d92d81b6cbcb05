"""Converted models under other libraries' hands: what changes, wraps, moves or shards layers has the same effect once
compacted as it had before."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from converted import CASES, HEADS, Case, left_out
from test_convert_training import inputs_of
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import prune as torch_prune

from fiak_ext import compact, prune
from fiak_ext.projection import is_plain_linear

# The layers that project to key and value (and query, where they are in one).
LAYERS = {
    "bert": ("key", "value"),
    "vit": ("k_proj", "v_proj"),
    "llama": ("k_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "vit_tiny_patch16_224": ("qkv",),
}
MULTIHEAD = "torch.nn"
every_model = pytest.mark.parametrize("name", [*LAYERS, MULTIHEAD])
every_layered_model = pytest.mark.parametrize("name", LAYERS)


def pruned(name: str, dtype: torch.dtype = torch.float64) -> tuple[Case, Any]:
    """A case and its pruned model, which has a key that nobody keeps."""
    case = CASES[name]
    return case, case.pruned(dtype, mask=left_out(case.mask()))


def compacted_copy(model: Any) -> Any:
    return compact(copy.deepcopy(model))


def layers(model: nn.Module, name: str) -> list[nn.Module]:
    return [module for place, module in model.named_modules() if place.rpartition(".")[2] in LAYERS[name]]


def run(case: Case, model: Any) -> Tensor:
    """The output, in the model's dtype, which quantised weights do not say."""
    inputs = case.inputs() if next(model.parameters()).dtype == torch.float64 else inputs_of(case)
    output = model(**inputs)
    return output if isinstance(output, Tensor) else output[0]


def run_with_gradients(case: Case, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = run(case, model)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=output.dtype)
    (output * weight).sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def expect_the_same(case: Case, model: nn.Module, compacted: nn.Module) -> None:
    """Outputs, and gradients of all that is trained."""
    expected, got = run_with_gradients(case, model), run_with_gradients(case, compacted)
    torch.testing.assert_close(got, expected)
    assert expected[1]


# ---------------------------------------------------------------------------------------------------------------------
# peft


def adapter(kind: str, name: str) -> Any:
    plain: dict[str, Any] = {"target_modules": list(LAYERS[name]), "fan_in_fan_out": name == "gpt2"}
    if kind == "ia3":
        return peft.IA3Config(**plain, feedforward_modules=[])
    return peft.LoraConfig(**plain, r=2, use_dora=kind == "dora")


def with_adapter(model: Any, config: Any) -> Any:
    """The model with adapters that have an effect."""
    wrapped = peft.get_peft_model(model, config).to(next(model.parameters()).dtype).eval()
    generator = torch.Generator().manual_seed(4)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return wrapped


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("order", ["adapter, compact", "compact, adapter"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@every_layered_model
def test_adapters_of_peft(name: str, kind: str, order: str) -> None:
    case, model = pruned(name)
    without = run(case, model)
    compacted = compacted_copy(model)
    model = with_adapter(model, adapter(kind, name))
    compacted = compacted_copy(model) if order == "adapter, compact" else with_adapter(compacted, adapter(kind, name))
    expect_the_same(case, model, compacted)
    output, grads = run_with_gradients(case, compacted)
    assert not torch.allclose(output, without, rtol=1e-2, atol=1e-2)
    assert all(bool(grad.any()) for grad in grads.values())


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_layered_model
def test_lora_then_prune_then_compact(name: str) -> None:
    """``compact`` leaves outputs as they were, and merging the adapter changes nothing."""
    case = CASES[name]
    model = with_adapter(case.converted(), adapter("lora", name))
    prune(model, 0.5, keys=0.25, importance="random", generator=torch.Generator().manual_seed(0))
    expected = run(case, model)
    torch.testing.assert_close(run(case, compact(model)), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(run(case, merged), expected)
    assert all(is_plain_linear(layer) for layer in layers(merged, name))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
def test_lora_of_multihead_attention(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft merges it for each call; gradients of a dense model are those of the same adapter on the original."""
    config = peft.LoraConfig(target_modules=["self_attn"], r=2)
    case, model = pruned(MULTIHEAD)
    model = model if state != "dense" else case.converted()
    expected = with_adapter(case.model() if state == "dense" else copy.deepcopy(model), config)
    got = with_adapter(compacted_copy(model) if state == "compacted" else model, config)
    without = run(case, case.model() if state == "dense" else pruned(MULTIHEAD)[1])
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # which leaves peft's adapter out
    outputs, grads = run_with_gradients(case, expected)
    monkeypatch.undo()
    output, got_grads = run_with_gradients(case, got)
    torch.testing.assert_close((output, {name: got_grads[name] for name in grads}), (outputs, grads))
    assert not torch.allclose(output, without, rtol=1e-2, atol=1e-2) and all(
        bool(grad.any()) for grad in grads.values()
    )
    with torch.no_grad():  # where TransformerEncoderLayer would compute by itself, from the weights alone
        torch.testing.assert_close(run(case, got), output)


# ---------------------------------------------------------------------------------------------------------------------
# torch.nn.utils


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _prune(module: nn.Module, weight: str) -> None:
    torch_prune.l1_unstructured(module, weight, 0.5)


def _old_weight_norm(module: nn.Module, weight: str) -> None:
    torch.nn.utils.weight_norm(module, weight)


def _weight_norm(module: nn.Module, weight: str) -> None:
    parametrizations.weight_norm(module, weight)


def _double(module: nn.Module, weight: str) -> None:
    parametrize.register_parametrization(module, weight, Double())


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", [_prune, _old_weight_norm, _weight_norm, _double])
@every_model
def test_weights_that_are_computed(name: str, change: Callable[[nn.Module, str], None], before: bool) -> None:
    """Three steps of training, with the change before or after ``compact``."""
    (case, model), (_, compacted) = pruned(name), pruned(name)
    compacted = compacted if before else compact(compacted)
    for candidate in (model, compacted):
        if name == MULTIHEAD:
            for module in [module for module in candidate.modules() if isinstance(module, nn.MultiheadAttention)]:
                change(module, "in_proj_weight")
                if change is not _prune:  # torch.nn reads out_proj's weight, past its hooks; here it is called
                    change(module.out_proj, "weight")
        else:
            for layer in layers(candidate, name):
                change(layer, "weight")
                assert not is_plain_linear(layer)
    compacted = compact(compacted) if before else compacted
    for candidate in (model, compacted):
        candidate.optimizer = torch.optim.SGD(candidate.parameters(), 0.01)
    for _ in range(3):
        expect_the_same(case, model, compacted)
        for candidate in (model, compacted):
            candidate.optimizer.step()


@every_layered_model
def test_hooks_fire(name: str) -> None:
    """Of every kind, and what a forward hook returns is used."""
    case, model = pruned(name)
    compacted = compacted_copy(model)
    fired: dict[int, list[str]] = {id(model): [], id(compacted): []}

    def hook(candidate: nn.Module, kind: str, result: Callable[[Any], Any]) -> Callable[..., Any]:
        def called(module: nn.Module, *args: Any) -> Any:
            fired[id(candidate)].append(kind)
            return result(args)

        return called

    for candidate in (model, compacted):
        for layer in layers(candidate, name):
            layer.register_forward_pre_hook(hook(candidate, "pre", lambda args: (1.5 * args[0][0],)))
            layer.register_forward_hook(hook(candidate, "forward", lambda args: args[1] - 1))
            layer.register_full_backward_pre_hook(hook(candidate, "backward pre", lambda args: (2 * args[0][0],)))
            layer.register_full_backward_hook(hook(candidate, "backward", lambda args: None))
    expect_the_same(case, model, compacted)
    assert fired[id(compacted)] == fired[id(model)] and len(fired[id(model)]) == 4 * len(layers(model, name))


def test_what_a_plain_layer_is() -> None:
    class Derived(nn.Linear):
        pass

    linear = nn.Linear(3, 4)
    assert is_plain_linear(linear) and is_plain_linear(nn.Linear(3, 4, bias=False).bfloat16())
    assert is_plain_linear(copy.deepcopy(linear).to("meta"))
    assert not is_plain_linear(Derived(3, 4)) and not is_plain_linear(nn.Identity())
    handle = linear.register_forward_hook(lambda module, args, output: None)
    assert not is_plain_linear(linear)
    handle.remove()
    assert is_plain_linear(linear)
    linear.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert not is_plain_linear(linear)


def test_layers_that_cannot_be_used_are_named() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.bias

    _, model = pruned("vit_tiny_patch16_224")
    compact(model)
    attention = model.blocks[1].attn
    for layer, message in (
        (
            Pair(16, 48).double(),
            r"PriorAttentionOfViT\.qkv \(Pair\): output must be a Tensor \[3, 17, features\].*tuple",
        ),
        (
            nn.Linear(16, 24).double(),
            r"PriorAttentionOfViT\.qkv \(Linear\): output must have 4 features for each of 12",
        ),
        (nn.Linear(16, 48).to("meta"), r"PriorAttentionOfViT\.qkv \(Linear\): weight must be on cpu, .*got meta"),
        (
            nn.Sequential(nn.Linear(16, 96).double()),
            r"PriorAttentionOfViT\.qkv \(Sequential\): output must have 4 feat",
        ),
    ):
        attention.qkv = layer
        with pytest.raises(ValueError, match=message):
            run(CASES["vit_tiny_patch16_224"], model)


@pytest.mark.parametrize("name", ["bert", "vit_tiny_patch16_224"])
def test_called_layers_compile_export_and_cast(name: str) -> None:
    case, model = pruned(name, torch.float32)
    for layer in layers(model, name):
        layer.register_forward_hook(lambda module, args, output: 0.5 * output)
    compact(model)
    torch.compiler.reset()
    expected, grads = run_with_gradients(case, model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, got = run_with_gradients(case, compiled)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close({key: got[f"_orig_mod.{key}"] for key in grads}, grads)
    exported = torch.export.export(copy.deepcopy(model), (), inputs_of(case)).module()
    torch.testing.assert_close(run(case, exported), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(run(case, model).float(), expected, rtol=0.1, atol=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Offloading and quantisation


def _cpu_offload(model: nn.Module) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"))


def _cpu_offload_buffers(model: nn.Module) -> None:
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)


def _dispatch(model: nn.Module) -> None:
    accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True, offload_buffers=True)


@pytest.mark.parametrize("offload", [_cpu_offload, _cpu_offload_buffers, _dispatch])
@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@every_model
def test_offloading_of_accelerate(name: str, state: str, offload: Callable[[nn.Module], None]) -> None:
    case, model = pruned(name, torch.float32)
    model = case.converted(torch.float32) if state == "dense" else model
    model = compact(model) if state == "compacted" else model
    with torch.no_grad():
        expected = run(case, model)
        offload(model)
        assert all(hasattr(module, "_hf_hook") for module in model.modules() if type(module) is nn.Linear)
        assert offload is _dispatch or any(parameter.is_meta for parameter in model.parameters())
        for _ in range(2):
            torch.testing.assert_close(run(case, model), expected)


def _int8_weights(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig())
    return model


def _dynamic(model: nn.Module) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    quantized: nn.Module = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return quantized


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("quantize", [_int8_weights, _dynamic])
@every_model
def test_quantisation(name: str, quantize: Callable[[nn.Module], nn.Module], before: bool) -> None:
    case, model = pruned(name, torch.float32)
    with torch.no_grad():
        plain = run(case, model)
        compacted = compact(quantize(copy.deepcopy(model))) if before else quantize(compacted_copy(model))
        expected = run(case, quantize(model))
        output = run(case, compacted)
    torch.testing.assert_close(output, expected)
    assert not torch.equal(output, plain)
    torch.testing.assert_close(output, plain, rtol=0.3, atol=0.6)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2

FSDP = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

sys.path.insert(0, sys.argv[2])
from converted import CASES, left_out
from test_convert_training import inputs_of, STATES
from test_ecosystem import layers, pruned, run_with_gradients

from fiak_ext import ConvertedAttention, compact

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
results = {}
for name in ("bert", "vit_tiny_patch16_224", "torch.nn"):
    for state in STATES:
        for low in (False, True):
            case, model = pruned(name, torch.float32)
            model = case.converted(torch.float32) if state == "dense" else model
            model = compact(model) if state == "compacted" else model
            low_precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=True)
            policy = low_precision if low else MixedPrecisionPolicy()
            if name != "torch.nn":
                for layer in layers(model, name)[:1]:
                    fully_shard(layer, mesh=mesh, mp_policy=policy)
            for module in [module for module in model.modules() if isinstance(module, ConvertedAttention)]:
                fully_shard(module, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            output, grads = run_with_gradients(case, model)
            results[name, state, low] = output, {key: grad.full_tensor() for key, grad in grads.items()}
if dist.get_rank() == 0:
    torch.save(results, sys.argv[1])
dist.barrier()
dist.destroy_process_group()
"""


def test_fsdp_with_casts_of_inputs(tmp_path: Path) -> None:
    """Two processes with the same batch: what one process gives, and in bfloat16 the same to its rounding."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    file = tmp_path / "results.pt"
    subprocess.run([*torchrun, sys.executable, "-c", FSDP, str(file), str(Path(__file__).parent)], check=True)
    results = torch.load(file)
    assert len(results) == 18
    for (name, state, low), (output, grads) in results.items():
        case, model = pruned(name, torch.float32)
        model = case.converted(torch.float32) if state == "dense" else model
        expected, wanted = run_with_gradients(case, compact(model) if state == "compacted" else model)
        both = [
            torch.cat([x.flatten().float() for x in (first, *rest.values())])
            for first, rest in ((output, {key: grads[key] for key in wanted}), (expected, wanted))
        ]
        error = float((both[0] - both[1]).norm() / both[1].norm())
        assert error < (0.05 if low else 1e-5), (name, state, low, error)


# ---------------------------------------------------------------------------------------------------------------------
# Copies of arguments


@pytest.mark.parametrize("state", ["dense", "pruned", "compacted"])
@pytest.mark.parametrize("copied", [(0, 1, 2), (0,), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_multihead_attention_takes_copies_of_its_argument(state: str, copied: tuple[int, ...], padded: bool) -> None:
    """As pre-hooks and wrappers make them, one in another; gradients reach each copy."""
    case, model = pruned(MULTIHEAD)
    model = case.converted() if state == "dense" else model
    model = compact(model) if state == "compacted" else model
    attention = model.layers[0].self_attn
    x = case.inputs()["src"].requires_grad_()
    x.data[0, 1, 2] = torch.nan
    hidden = (torch.arange(8) < torch.tensor([0, 3, 7])[:, None]) if padded else None

    def step() -> tuple[Tensor, ...]:
        for parameter in (x, *attention.parameters()):
            parameter.grad = None
        output = attention(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        output[1:].square().sum().backward()
        return output.detach(), x.grad[1:], attention.in_proj_weight.grad

    expected = step()
    for _ in range(2):
        attention.register_forward_pre_hook(
            lambda module, args: tuple(arg.clone() if place in copied else arg for place, arg in enumerate(args))
        )
    torch.testing.assert_close(step(), expected, equal_nan=True)


def test_copies_under_autocast_and_compilation() -> None:
    case, model = pruned(MULTIHEAD, torch.float32)
    compact(model)
    inputs = inputs_of(case)
    with torch.no_grad():
        expected = model(**inputs)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.register_forward_pre_hook(lambda module, args: tuple(arg.bfloat16().float() + 0 for arg in args))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(model(**inputs).float(), expected, rtol=0.1, atol=0.1)
        torch.compiler.reset()
        compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs), model(**inputs))
        exported = torch.export.export(copy.deepcopy(model), (), inputs).module()
        torch.testing.assert_close(exported(**inputs), model(**inputs))
        attention: Any = model.layers[0].self_attn
        x = inputs["src"]
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        with pytest.raises(RuntimeError, match="must be query itself, or equal to it"):
            compiled(x, x + 1, x, need_weights=False)


def test_other_values_are_cross_attention() -> None:
    case, model = pruned(MULTIHEAD)
    attention, x = model.layers[0].self_attn, case.inputs()["src"]
    moved = x.clone()
    moved[2, 7, 3] += 1e-9
    for other in (moved, x[:, :7], x.float(), x.flip(0), x[:1]):
        with pytest.raises(
            ValueError, match=r"must be query itself, or equal to it \(got other tensors: cross-attention"
        ):
            attention(x, other, x, need_weights=False)
        with pytest.raises(ValueError, match="cross-attention"):
            attention(x, x.clone(), other, need_weights=False)
    assert HEADS == attention.num_heads
