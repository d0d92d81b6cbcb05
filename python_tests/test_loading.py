"""Importing the package with a library that is missing or does not fit, and what ``_C`` tells."""

import sys
from pathlib import Path

import pytest
import torch

from fiak_ext import _C, _loading


def test_a_library_for_another_torch_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "1.13.0")
    with pytest.raises(ImportError, match=r"built for torch .*, and torch 1\.13\.0 is installed\. Build it again: \S+"):
        _loading.load_library()


def test_a_missing_module_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fiak_ext._C", None)
    with pytest.raises(ImportError, match=r"is missing or was built for another Python .*\. Build it: \S+"):
        _loading.load_library()


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_loading, "__file__", str(tmp_path / "fiak_ext" / "_loading.py"))
    with pytest.raises(ImportError, match=r"does not load \(.*libfiak\.so.*\)\. Build it again: .* -m pip install"):
        _loading.load_library()


def test_loading_twice_changes_nothing() -> None:
    _loading.load_library()


def test_build_info_names_what_was_built() -> None:
    info = _C.build_info()
    assert info["torch"] == torch.__version__
    assert info["isas"][0] == "scalar"
    assert info["cuda"] is None or torch.version.cuda is not None


def test_the_environment_lowers_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    best = _C.cpu_capabilities()["machine_isa"]
    assert _C.kernel_isa("float64") == "scalar"
    assert _C.kernel_isa("bfloat16") == best
    assert _C.kernel_isa("float32") == ("avx512" if best.endswith("bf16") else best)  # nothing more is for float32
    monkeypatch.setenv("FIAK_CPU_ISA", "scalar")
    assert _C.kernel_isa("float32") == "scalar"
    monkeypatch.setenv("FIAK_CPU_ISA", "sse")
    message = r"FIAK_CPU_ISA must be one of scalar, avx2, avx512, avx512_bf16, amx_bf16 \(got sse\)"
    with pytest.raises(ValueError, match=message):
        _C.kernel_isa("float32")


def test_kernel_isa_refuses_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"dtype must be float64, .* \(got int8\)"):
        _C.kernel_isa("int8")
