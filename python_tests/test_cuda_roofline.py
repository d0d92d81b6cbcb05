"""The predicted share of the roofline: its arithmetic, and that the committed table is of the kernels as they are."""

from __future__ import annotations

import json
import subprocess

import pytest

from benchmarks import cuda_roofline
from benchmarks.report import to_json

ROW = {
    "op": "prior_attention",
    "kernel": "fiak_prior_forward_f16_d64",
    "batch": 1,
    "heads": 1,
    "queries": 197,
    "keys": 197,
    "head_dim": 64,
    "blocks": 4,
    "copied_bytes": 226944,
    "loaded_bytes": 0,
    "products": 3328,
}


def test_a_prediction_by_hand() -> None:
    row = cuda_roofline.predict(ROW)
    pairs = 256 * 3 * 197 * 197
    assert row["least_operations"] == 4 * 64 * pairs
    assert row["least_bytes"] == 2 * 256 * 3 * 197 * 64 * 4 + 4 * 256 * 3 * 197 + 4 * 3 * 197 * 197
    assert row["operations"] == 3328 * 4096 * 256 * 3
    a100 = row["gpus"]["A100 SXM 80 GB"]
    assert a100["floor_us"] == pytest.approx(1e6 * row["least_bytes"] / 2.039e12)  # 38 us; the operations take 24
    assert a100["bound_by"] == "bytes" and a100["share"] == 1
    tighter = cuda_roofline.predict({**ROW, "products": 2 * 3328})["gpus"]["A100 SXM 80 GB"]
    assert tighter["bound_by"] == "operations"
    assert tighter["share"] == pytest.approx(row["least_bytes"] / 2.039e12 / (2 * row["operations"] / 312e12))


def test_a_prediction_of_a_kernel_by_entries_by_hand() -> None:
    row = {**ROW, "op": "csr_attention", "kernel": "fiak_csr_entries_grad_key_f16_d64_e2", "head_dim": 48}
    row.update(batch=2, nnz=10000, copied_bytes=0, loaded_bytes=2 * 3 * 10000 * 96, products=0)
    prediction = cuda_roofline.predict(row)
    pairs, row_bytes = 256 * 4 * 10000, 2 * 256 * 4 * 197 * 48
    assert prediction["least_operations"] == 6 * 48 * pairs
    assert prediction["operations"] == 6 * 64 * pairs
    # query, grad_output, key, value and grad_key; logsumexp and delta; the pattern
    assert prediction["least_bytes"] == 5 * row_bytes + 2 * 4 * 256 * 4 * 197 + 4 * (2 * 10000 + 8 * 197)
    assert prediction["loaded_bytes"] == 3 * pairs * 96
    a100 = prediction["gpus"]["A100 SXM 80 GB"]
    assert a100["bound_by"] == "operations"
    assert a100["floor_us"] == pytest.approx(1e6 * 6 * 48 * pairs / 19.5e12)
    assert a100["share"] == pytest.approx(0.75)


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="prior_sideways has no formula"):
        cuda_roofline.predict({**ROW, "kernel": "prior_sideways"})


def test_the_committed_table_is_that_of_the_committed_figures() -> None:
    committed = cuda_roofline.RESULTS.read_text()
    assert cuda_roofline.markdown(json.loads(committed)) == cuda_roofline.RESULTS.with_suffix(".md").read_text()


def test_the_committed_figures_are_up_to_date() -> None:
    if not cuda_roofline.TESTS.exists():
        pytest.skip("fiak_tests is not built: cmake --build build/release")
    command = [str(cuda_roofline.TESTS), "--gtest_filter=CudaCounts.*"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [cuda_roofline.predict(row) for row in cuda_roofline.parse(output)]
    assert len(rows) >= 20 + 12
    assert to_json(rows) == cuda_roofline.RESULTS.read_text()
