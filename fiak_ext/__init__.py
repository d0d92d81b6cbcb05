"""Transformers with learned attention priors (FiAK), pruned to static sparse attention that is fast.

Importing registers the operators ``torch.ops.fiak.*``.
"""
# ruff: noqa: E402 - the operators come before the modules that register things for them

from __future__ import annotations

from fiak_ext._loading import load_library

load_library()

import torch

from fiak_ext import _C, flops, ops, reference
from fiak_ext._C import build_info
from fiak_ext.calibration import SoftEM, calibrate, find_dead_rows
from fiak_ext.compaction import compact
from fiak_ext.conversion import ConvertedAttention, convert, from_pretrained, register_attention, resize_priors
from fiak_ext.models import CausalLM, VisionTransformer, deit_tiny, param_groups
from fiak_ext.nn import MultiHeadSelfAttention, PriorAttention, PriorAttentionHost
from fiak_ext.packing import pack_linears
from fiak_ext.pattern import SparsePattern
from fiak_ext.pruning import patterns, prune, set_patterns
from fiak_ext.pruning_report import PruningReport

__all__ = [
    "CausalLM",
    "ConvertedAttention",
    "MultiHeadSelfAttention",
    "PriorAttention",
    "PriorAttentionHost",
    "PruningReport",
    "SoftEM",
    "SparsePattern",
    "VisionTransformer",
    "build_info",
    "calibrate",
    "compact",
    "convert",
    "deit_tiny",
    "find_dead_rows",
    "flops",
    "from_pretrained",
    "ops",
    "pack_linears",
    "param_groups",
    "patterns",
    "prune",
    "reference",
    "register_attention",
    "resize_priors",
    "set_patterns",
    "which_kernel",
]


def which_kernel(op: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> str:
    """The kernel that a call of an op takes, as ``"op/instruction set"`` or ``"op/cuda"``: ``"csr_attention/avx512"``.

    The environment variable ``FIAK_CPU_ISA`` (scalar, avx2, avx512, avx512_bf16, amx_bf16) lowers the choice.

    Args:
        op: ``prior_attention``, ``csr_attention``, ``compact_kv`` or ``compact_linear``; backward takes the same.
        dtype: of query, or of input: float64, float32, bfloat16 or float16.
        device: where the call runs.

    Raises:
        ValueError: an op, a dtype or a device without kernels.
    """
    kernels = {
        "prior_attention": "prior_attention_forward",
        "csr_attention": "csr_attention_forward",
        "compact_kv": "compact_kv",
        "compact_linear": "compact_linear",
    }
    if op not in kernels:
        raise ValueError(f"which_kernel: op must be one of {', '.join(kernels)} (got {op!r})")
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(torch.device(device).type)
    if key is None or not torch._C._dispatch_has_kernel_for_dispatch_key(f"fiak::{kernels[op]}", key):
        raise ValueError(f"which_kernel: device must be one that this build has kernels of {op} for (got {device})")
    isa = _C.kernel_isa(str(dtype).removeprefix("torch."))
    if key == "CUDA" and dtype == torch.float64 and op != "compact_kv":
        raise ValueError(f"which_kernel: dtype must not be torch.float64 for {op} on CUDA (got {dtype})")
    if key == "CUDA":
        return f"{op}/cuda"
    return f"{op}/{'scalar' if op == 'compact_kv' else isa}"  # compact_kv copies bytes: one code for all
