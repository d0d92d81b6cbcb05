from typing import Any

def build_info() -> dict[str, Any]:
    """What the library was built with: torch and compiler (versions), isas (with kernels of their own), cuda
    (nvcc's version, or None) and, where there are CUDA kernels, cuda_architectures: '80-real 80-virtual' is code
    for sm_80, and PTX for what is newer."""

def cpu_capabilities() -> dict[str, Any]:
    """This machine: model, machine_isa, selected_isa (lowered by FIAK_CPU_ISA), flags (name -> bool)."""

def kernel_isa(dtype: str) -> str:
    """The instruction set of the kernels that a call with this dtype ('float32', ...) runs on."""

PLAN_HEADER_BYTES: int

def read_plan(plan: bytes) -> dict[str, Any]:
    """What a plan's first PLAN_HEADER_BYTES bytes say: sizes, and sections by name."""

def csr_counts(
    *,
    family: str,
    backward: bool,
    isa: str,
    machine_isa: str,
    dtype: str,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    nnz: float,
    tiles: float,
    head_dim: int,
    value_dim: int,
) -> tuple[str, dict[str, float]]:
    """What the cost model counts of a csr_attention call whose samples share a pattern, with heads that are alike, on
    the CPU's kernels of a family (see FIAK_CSR_KERNEL) for an instruction set, on a machine whose best one is
    machine_isa: the name of the rates that it costs these counts by, and name -> count. nnz and tiles are those of
    all heads; tiles is 0 where the plan has none."""
