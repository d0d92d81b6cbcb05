"""The benchmarks compare what they say: equal outputs, patterns of the asked density, every contestant timed."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import compare
from benchmarks.cases import Case, load_cases, random_mask

SMALL = Case("small", 2, 4, 4, 17, 17, 8, 8, is_causal=False)
SMALL_CAUSAL = Case("small_causal", 2, 4, 4, 17, 17, 8, 8, is_causal=True)


def test_the_case_table_has_what_the_paper_measures() -> None:
    cases = {case.name: case for case in load_cases()}
    assert cases["deit_tiny_paper"] == Case("deit_tiny_paper", 16, 4, 4, 197, 197, 48, 48, is_causal=False)
    assert cases["causal_lm_paper"] == Case("causal_lm_paper", 32, 8, 8, 256, 256, 16, 16, is_causal=True)


@pytest.mark.parametrize("case", [SMALL, SMALL_CAUSAL], ids=lambda case: case.name)
@pytest.mark.parametrize("pruned", [0.0, 0.5, 0.9])
def test_masks_keep_the_asked_share_of_eligible_pairs(case: Case, pruned: float) -> None:
    mask = random_mask(case, pruned, torch.Generator().manual_seed(0))
    eligible = torch.ones(case.queries, case.keys).tril().bool() if case.is_causal else torch.ones(1, dtype=torch.bool)
    pairs = case.query_heads * int(eligible.expand(case.queries, case.keys).sum())
    assert int(mask.sum()) == round((1 - pruned) * pairs)
    assert not (mask & ~eligible).any()


@pytest.mark.parametrize("case", [SMALL, SMALL_CAUSAL], ids=lambda case: case.name)
def test_each_op_computes_what_its_equal_output_baseline_does(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, case.batch, case.query_heads, case.queries, case.head_size, generator=generator)
    table = compare.contestants(case, torch.float32)
    for name, contestant in table.items():
        if not contestant.baselines:
            continue
        baseline = table[contestant.baselines[-1]]
        expected = baseline.call(query, key, value, *baseline.parameters)
        actual = contestant.call(query, key, value, *contestant.parameters)
        rows = expected.isfinite()  # SDPA gives NaN where a row has no key
        assert torch.allclose(actual[rows], expected[rows], rtol=1e-4, atol=1e-5), name


def test_the_command_times_every_contestant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "load_cases", lambda: [SMALL])
    threads = torch.get_num_threads()
    compare.main(["--rounds", "2", "--json", str(tmp_path / "out.json")])
    torch.set_num_threads(threads)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert len(report["results"]) == 2 * len(compare.contestants(SMALL, torch.float32))
    for result in report["results"]:
        assert result["milliseconds"] > 0
        assert all(len(quartiles) == 3 and quartiles[0] <= quartiles[2] for quartiles in result["ratios"].values())
    printed = capsys.readouterr().out
    assert "B2 H4 N17 D8" in printed
    assert "csr_attention 70%" in printed
