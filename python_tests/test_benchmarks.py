"""The benchmarks compare what they say: equal outputs, masks of the asked density, every contestant timed."""

import json
import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import compare, cost_model, models, peers, report, timm_models
from benchmarks.attention import Effort, contestants
from benchmarks.cases import (
    MASK_KINDS,
    PRUNED,
    Case,
    load_cases,
    load_mask,
    make_mask,
    recorded_heads,
    recorded_pruned,
)
from benchmarks.memory import peak_bytes
from benchmarks.report import break_even, markdown, plot, to_json
from benchmarks.timing import quartiles, times_of_rounds
from fiak_ext import _C, PriorAttention, SparsePattern

SMALL = Case("small", 2, 4, 4, 17, 17, 8, 8, is_causal=False, recorded="vit_fashion_n197")
SMALL_CAUSAL = Case("small_causal", 2, 4, 4, 17, 17, 8, 8, is_causal=True, recorded="lm_kjv_n128")
DECODING = Case("decoding", 2, 4, 2, 3, 17, 8, 8, is_causal=False, recorded="lm_kjv_n128")
CASES = [SMALL, SMALL_CAUSAL, DECODING]


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(case.batch, case.query_heads, case.queries, case.head_dim, generator=generator)
    key, value = torch.randn(2, case.batch, case.key_heads, case.keys, case.head_dim, generator=generator)
    return query, key, value


# ---------------------------------------------------------------- cases and masks


def test_the_case_table_has_what_the_paper_measures() -> None:
    cases = {case.name: case for case in load_cases()}
    paper = Case("deit_tiny_paper", 16, 4, 4, 197, 197, 48, 48, is_causal=False, recorded="vit_fashion_n197")
    assert cases["deit_tiny_paper"] == paper
    lm = Case("causal_lm_paper", 32, 8, 8, 256, 256, 16, 16, is_causal=True, recorded="lm_kjv_n128")
    assert cases["causal_lm_paper"] == lm
    assert {case.queries for case in cases.values() if case.is_decoding} == {1, 2, 4, 8}
    for case in cases.values():
        assert 0.7 in recorded_pruned(case.recorded)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("pruned", [0.0, 0.5, 0.9])
def test_learned_like_masks_keep_exactly_the_asked_share_of_eligible_pairs(case: Case, pruned: float) -> None:
    mask = make_mask("learned-like", case, pruned, torch.Generator().manual_seed(0))
    pairs = case.query_heads * int(case.eligible().sum())
    assert int(mask.sum()) == round((1 - pruned) * pairs)
    assert not (mask & ~case.eligible()).any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_uniform_masks_keep_about_the_asked_share_of_eligible_pairs(case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    eligible = case.eligible().expand(case.query_heads, -1, -1)
    assert torch.equal(make_mask("uniform", case, 0.0, generator), eligible)
    assert not make_mask("uniform", case, 1.0, generator).any()
    mask = make_mask("uniform", case, 0.7, generator)
    assert not (mask & ~eligible).any()
    assert mask[eligible].float().mean().item() == pytest.approx(0.3, abs=0.1)


def test_recorded_masks_have_their_share_of_every_layer() -> None:
    for name, length, causal in (
        ("vit_fashion_n197", 197, False),
        ("lm_kjv_n128", 128, True),
        ("minilm_n48", 48, False),
    ):
        eligible = torch.ones(length, length).tril().bool() if causal else torch.ones(length, length, dtype=torch.bool)
        assert recorded_pruned(name)[:2] == (0.5, 0.7)
        for pruned in recorded_pruned(name):
            mask = load_mask(name, pruned)
            assert mask.dtype == torch.bool and mask.shape[2:] == (length, length)
            assert not (mask & ~eligible).any()
            share = mask.sum((1, 2, 3)) / (mask.size(1) * eligible.sum())
            assert torch.allclose(share, torch.full_like(share, 1 - pruned), atol=1e-3)


def test_recorded_masks_at_their_own_size_are_the_recorded_ones() -> None:
    case = next(case for case in load_cases() if case.name == "deit_tiny_paper")
    mask = load_mask(case.recorded, 0.7)
    assert torch.equal(make_mask("recorded", case, 0.7, torch.Generator()), mask[0])
    assert torch.equal(recorded_heads(mask, case, 2), mask[2])
    assert torch.equal(recorded_heads(mask, case, 3), mask[0])


@pytest.mark.parametrize("name", ["vit_785", "causal_1024", "minilm", "decode_8"])
def test_recorded_masks_are_tiled_to_longer_sequences(name: str) -> None:
    case = next(case for case in load_cases() if case.name == name)
    recorded = load_mask(case.recorded, 0.7)
    length = recorded.size(2)
    mask = make_mask("recorded", case, 0.7, torch.Generator())
    assert mask.shape == (case.query_heads, case.queries, case.keys)
    assert not (mask & ~case.eligible()).any()
    share = float(mask.sum() / (case.query_heads * case.eligible().sum()))
    assert share == pytest.approx(0.3, abs=0.02)
    first = case.keys - case.queries
    for head, query, key in torch.randint(10**6, (200, 3)).tolist():
        head, query, key = head % case.query_heads, query % case.queries, key % case.keys
        row, column = (first + query) % length, key % length
        if name not in ("vit_785", "minilm") and column > row:
            row, column = column, row
        kept = recorded.flatten(0, 1)[head % (recorded.size(0) * recorded.size(1)), row, column]
        assert bool(mask[head, query, key]) == bool(kept & case.eligible()[query, key])


def test_unknown_masks_are_named() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of uniform, learned-like, recorded \(got 'striped'\)"):
        make_mask("striped", SMALL, 0.5, torch.Generator())
    with pytest.raises(FileNotFoundError, match="vit_fashion_n197_60"):
        load_mask("vit_fashion_n197", 0.6)


# ---------------------------------------------------------------- contestants


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_peers_with_a_mask_compute_what_csr_attention_does(case: Case, kind: str) -> None:
    query, key, value = operands(case)
    mask = make_mask(kind, case, 0.5, torch.Generator().manual_seed(0))
    expected = SparsePattern.from_mask(mask).attend(query, key, value)
    rows = mask.any(2)  # others are NaN or 0, by peer
    for name, actual in {
        "sdpa": peers.sdpa_bool_mask(case, mask)(query, key, value),
        "eager": peers.eager(query, key, value, mask[None].float()),
        "torch.sparse": peers.torch_sparse(case, mask)(query, key, value),
    }.items():
        assert torch.allclose(actual[:, rows], expected[:, rows], rtol=1e-4, atol=1e-5), name


def test_flex_computes_what_csr_attention_does() -> None:
    query, key, value = operands(SMALL_CAUSAL)
    mask = make_mask("uniform", SMALL_CAUSAL, 0.5, torch.Generator().manual_seed(0))
    expected = SparsePattern.from_mask(mask).attend(query, key, value)
    torch.testing.assert_close(peers.flex(SMALL_CAUSAL, mask)(query, key, value), expected)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peers_with_a_prior_compute_what_prior_attention_does(case: Case) -> None:
    query, key, value = operands(case)
    table, _ = contestants(case, torch.float32, Effort(slow_peers=False))
    prior = table["prior_attention"].parameters[0]
    expected = table["prior_attention"].call(query, key, value, prior)
    bias = table["sdpa float bias"]
    torch.testing.assert_close(bias.call(query, key, value, *bias.parameters), expected)
    torch.testing.assert_close(peers.eager(query, key, value, prior * case.eligible()), expected)
    torch.testing.assert_close(
        table["prior_attention without prior"].call(query, key, value), peers.sdpa(case)(query, key, value)
    )


def test_slow_calls_take_part_in_the_first_rounds_only() -> None:
    counts = {"fast": 0, "slow": 0}

    def run(name: str) -> dict[str, float]:
        counts[name] += 1
        return {"forward": float(counts[name])}

    calls = {name: partial(run, name) for name in counts}
    times = times_of_rounds(calls, rounds=5, seconds=60, slow=["slow"], slow_rounds=2)
    assert counts == {"fast": 5, "slow": 2}
    assert [time["forward"] for time in times["fast"]] == [1, 2, 3, 4, 5]
    assert quartiles([3.0]) == [3.0] * 3


# ---------------------------------------------------------------- results


def test_the_command_writes_json_a_table_and_a_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "load_cases", lambda: CASES)
    monkeypatch.setattr(compare, "DENSITY_CASES", ("small",))
    threads = torch.get_num_threads()
    sections = ["--section", "attention", "scaling", "density", "planning", "linear", "overhead"]
    file = tmp_path / "new" / "machine.json"
    compare.main([*sections, "--dtype", "float32", "bfloat16", "--quick", "--results", str(file)])
    assert torch.get_num_threads() == threads
    found = json.loads(file.read_text())
    assert found["machine"]["torch"] == torch.__version__
    measured = {(row["case"], row["dtype"], row["threads"], row["direction"]) for row in found["attention"]}
    directions = {"small": 3, "small_causal": 3, "decoding": 1}
    assert len(measured) == 2 * 2 * sum(directions.values())
    for row in found["attention"]:
        assert row["milliseconds"] > 0 and row["ratios"]
        assert all(len(ratio) == 3 and ratio[0] <= ratio[1] <= ratio[2] for ratio in row["ratios"].values())
    assert {row["threads"] for row in found["scaling"]} == {2}
    assert {"csr_attention", "prior_attention", "sdpa"} <= {row["contestant"] for row in found["overhead"]}
    assert {row["case"] for row in found["density"]} == {"small"}
    trained = {"small", "small_causal"}
    planned = [(row["case"], row["threads"], row["pruned"]) for row in found["planning"]]
    assert sorted(planned) == sorted(product(trained, (1, 2), PRUNED))
    assert all(0 < row["calls"][0] <= row["calls"][1] <= row["calls"][2] for row in found["planning"])
    projected = [(row["case"], row["dtype"], row["threads"], row["kept"]) for row in found["linear"]]
    assert sorted(projected) == sorted(product(trained, ("float32", "bfloat16"), (1, 2), (0.25, 0.5, 0.75, 1.0)))
    for row in found["linear"]:
        kept = {0.25: 4, 0.5: 8, 0.75: 13, 1.0: 17}[row["kept"]]
        assert row["per_flop"] == pytest.approx([ratio * kept / 17 for ratio in row["ratio"]], rel=1e-4)
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = file.with_suffix(".md").read_text()
    for text in (
        "## Forward+backward, bfloat16, 2 threads",
        "csr_attention uniform 70% / sdpa bool mask",
        "break-even",
        "| small_causal | 2 | 90% |",
        "50% kept, per multiply-add",
        "the same figures are in machine.json",
        "](machine.png)",
    ):
        assert text in table
    file.with_suffix(".md").unlink()
    report.main([str(file)])
    assert file.with_suffix(".md").read_text() == table
    assert str(Path.home()) not in table
    assert "B2 H4/2 N3/17 D8" in capsys.readouterr().out


def test_results_that_are_no_json_file_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare.main(["--results", str(tmp_path)])
    assert f"--results must be a .json file (got {tmp_path})" in capsys.readouterr().err


def test_a_row_is_a_line_and_floats_have_five_digits() -> None:
    rows = [{"ratios": {"sdpa": [1.2345678, 12345678.9]}, "bytes": 12345678}, {"case": "c", "ratios": {}}]
    lines = [
        "{",
        '"machine":{"cpu":{"model":"C"},"torch":"2"},',
        '"rows":[',
        '{"ratios":{"sdpa":[1.2346,12346000.0]},"bytes":12345678},',
        '{"case":"c","ratios":{}}',
        "],",
        '"kernels":{',
        '"a":{"registers":3}',
        "},",
        '"none":[]',
        "}",
    ]
    machine = {"cpu": {"model": "C"}, "torch": "2"}
    found = {"machine": machine, "rows": rows, "kernels": {"a": {"registers": 3}}, "none": []}
    assert to_json(found) == "\n".join(lines) + "\n"


@pytest.mark.parametrize("machine", ["xeon", "zen3", "zen4"])
def test_the_committed_tables_are_those_of_the_committed_figures(machine: str) -> None:
    file = Path(report.__file__).parent / "results" / f"{machine}.json"
    found = json.loads(file.read_text())
    assert to_json(found) == file.read_text()
    assert markdown(found, machine) == file.with_suffix(".md").read_text()


def test_slow_peers_that_cannot_take_part_are_named() -> None:
    table, left_out = contestants(SMALL, torch.bfloat16, Effort(mask_kinds=()))
    assert {"flex", "eager exp * prior"} <= table.keys()
    assert "float32" in left_out["torch.sparse"]
    assert not table["flex"].has_backward


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(0.1, 4.0), (0.5, 2.0), (1.0, 0.5)], 0.5 + 0.5 / 1.5),
        ([(0.1, 4.0), (1.0, 1.0)], None),
        ([(0.1, 0.9), (1.0, 0.5)], 0.1),
    ],
)
def test_break_even(curve: list[tuple[float, float]], expected: float | None) -> None:
    assert break_even(curve) == (None if expected is None else pytest.approx(expected))


def test_a_report_of_one_section_is_a_table_of_it(tmp_path: Path) -> None:
    machine = {
        "cpu": {"model": "C", "selected_isa": "avx2"},
        "torch": "2",
        "fiak_ext": {"compiler": "G"},
        "python": "3",
        "date": "2026-12-01",
    }
    row = {"case": "c", "dtype": "float32", "threads": 1}
    density = [
        {**row, "density": x, "ratios": {"sdpa": [y, y, y], "sdpa bool mask": [y, y, y]}}
        for x, y in ((0.0, 3.0), (1.0, 0.5))
    ]
    assert "| c | float32 | 1 | sdpa | 3.00 | 0.50 | 80% |" in markdown({"machine": machine, "density": density}, "c")
    plot(density, tmp_path / "plot.png")
    memory = [{"contestant": "prior_attention", "threads": 1, "bytes": 50_000_000}]
    memory.append({"contestant": "sdpa float bias", "threads": 1, "bytes": 500_000_000})
    assert "| prior_attention | 1 | 50 | 0.100 |" in markdown({"machine": machine, "memory": memory}, "c")


# ---------------------------------------------------------------- whole models and memory

build_of_timm = timm_models.build
TINY = models.Sizes(batch=2, image_size=40, patch_size=4, dim=24, depth=2, num_heads=3)


def test_models_of_different_attention_agree_where_they_must() -> None:
    contestants = models.build(TINY)
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        outputs = {name: model(images) for name, model in contestants.items()}
    for name, same in (
        ("unfused", "SDPA"),
        ("unfused FiAK", "FiAK dense"),
        ("SDPA, packed linears", "SDPA"),
        ("FiAK 70% pruned, packed linears", "FiAK 70% pruned"),
        ("FiAK dense", "SDPA"),  # priors start uniform
    ):
        torch.testing.assert_close(outputs[name], outputs[same])
    assert not torch.allclose(outputs["FiAK 70% pruned"], outputs["SDPA"])
    densities = [
        module.pattern.density
        for module in contestants["FiAK 70% pruned"].modules()
        if isinstance(module, PriorAttention) and module.pattern is not None
    ]
    assert len(densities) == 2


def test_all_recorded_heads_together_make_deit_tiny_70_percent_pruned() -> None:
    for sizes in models.MODELS.values():
        patterns = [
            module.pattern.density
            for module in models.build(sizes)["FiAK 70% pruned"].modules()
            if isinstance(module, PriorAttention) and module.pattern is not None
        ]
        assert sum(patterns) / len(patterns) == pytest.approx(0.3, abs=1e-3)


def test_models_are_timed_and_tabulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(models, "MODELS", {"tiny": TINY})
    file = tmp_path / "models.json"
    compare.main(["--section", "models", "--threads", "1", "--quick", "--results", str(file)])
    rows = json.loads(file.read_text())["models"]
    assert [row["contestant"] for row in rows] == list(models.build(TINY))
    for row in rows:
        assert row["modes"].keys() == {"eager"}
        assert row["modes"]["eager"]["images_per_second"] > 0
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-4)
        assert row["shares"]["attention"] > 0 and row["shares"]["linears"] > 0
    assert rows[0]["modes"]["eager"]["ratios"]["SDPA"] == [1, 1, 1]
    assert "## Whole tiny, 2 images" in file.with_suffix(".md").read_text()


TIMM: dict[str, dict[str, Any]] = {
    "deit_tiny_patch16_224": {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {
        "img_size": 16, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_models_of_timm_agree_where_they_must(name: str) -> None:
    contestants = timm_models.build(name, **TIMM[name])
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        outputs = {contestant: model(images) for contestant, model in contestants.items()}
    pruned = "70% pruned"
    for contestant, same in (
        ("converted", "timm"),
        ("timm, packed linears", "timm"),
        (f"{pruned}, compacted", pruned),
        (f"{pruned}, packed linears", pruned),
    ):
        torch.testing.assert_close(outputs[contestant], outputs[same])
    assert not torch.allclose(outputs[pruned], outputs["timm"])
    for contestant, model in contestants.items():
        attentions = [module for module in model.modules() if isinstance(module, PriorAttention)]
        assert all(module.is_pruned == contestant.startswith(pruned) for module in attentions)
        assert all(module.is_compacted == contestant.endswith("compacted") for module in attentions)
        assert bool(attentions) == (not contestant.startswith("timm"))


def test_models_of_timm_have_the_patterns_that_they_are_said_to_have() -> None:
    for name in timm_models.MODELS:
        patterns = [
            module.pattern
            for module in timm_models.build(name)["70% pruned"].modules()
            if isinstance(module, PriorAttention) and module.pattern is not None
        ]
        densities = [pattern.density for pattern in patterns if pattern.groups == 1]
        assert sum(densities) / len(densities) == pytest.approx(0.3, abs=1e-3)
        shifted = [pattern.density for pattern in patterns if pattern.groups > 1]
        # Along each side the last of n windows has parts of 4 and 3 tokens, which do not see each other.
        visible = [] if name.startswith("deit") else [((n - 1 + 25 / 49) / n) ** 2 for n in (8, 4, 2, 2, 2)]
        assert shifted == pytest.approx([0.3 * share for share in visible], abs=1e-3)


def test_models_of_timm_are_timed_and_tabulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timm_models, "build", lambda name: build_of_timm(name, **TIMM[name]))
    file = tmp_path / "timm.json"
    threads = torch.get_num_threads()
    timm_models.main(["--batch", "2", "--rounds", "3", "--json", str(file)])
    assert torch.get_num_threads() == threads
    rows = json.loads(file.read_text())["models"]
    assert len(rows) == 2 * 2 * 6 and {row["threads"] for row in rows} == {1, 2}
    for row in rows:
        speed = row["modes"]["eager"]
        assert speed["images_per_second"] > 0 and speed["ratios"].keys() == {"timm", "timm, packed linears"}
        assert row["contestant"] not in speed["ratios"] or speed["ratios"][row["contestant"]] == [1, 1, 1]
    printed = capsys.readouterr().out
    for name in TIMM:
        assert f"## Whole {name}, 2 images, float32, 1 thread" in printed


def test_the_dense_prior_takes_an_eighth_of_the_memory_of_sdpa_with_a_bias() -> None:
    needed = 48e6  # output and gradients
    op, sdpa = (peak_bytes(name, 1) for name in ("prior_attention", "sdpa float bias"))
    assert needed < op < sdpa / 8


# ---------------------------------------------------------------- the cost model


def test_the_library_counts_bundles_of_samples_and_single_ones() -> None:
    call: dict[str, Any] = {
        "family": "entries",
        "isa": "avx512",
        "machine_isa": "avx512",
        "dtype": "float32",
        "nnz": 60,
        "tiles": 0,
    }
    call |= {"heads": 2, "queries": 10, "keys": 7, "head_dim": 8, "value_dim": 16}
    rates, counts = _C.csr_counts(backward=False, batch=9, **call)
    entries = 60 + 1.5 * 20  # every row is a segment, whose last group of four is half full
    vectors = 2 * (2 + 4) + 1 + 1  # of two bundles of four samples, and of the one that is left
    expected = {
        "entry_1": entries,
        "entry_4": 2 * entries,
        "entry_vector": vectors * entries,
        "segment": 3 * 20,
        "packed_vector": vectors * 14,
    }
    assert (rates, {name: count for name, count in counts.items() if count}) == ("avx512", expected)
    call |= {"family": "dense", "tiles": 4}
    rates, counts = _C.csr_counts(backward=True, batch=9, **call)
    pairs, products = 9 * 4 * 24 * 16, 8 + 2 * 16 + 16 + 16
    expected = {"pair": pairs, "pair_multiply": pairs * products, "dense_row": 9 * 20, "number": 9 * 14 * 24}
    assert (rates, {name: count for name, count in counts.items() if count}) == ("avx512", expected)


def test_rates_are_by_instruction_set_machine_and_storage() -> None:
    def rates(family: str, isa: str, machine_isa: str, dtype: str, size: int) -> str:
        call: dict[str, Any] = {"batch": 1, "heads": 1, "queries": 9, "keys": 9, "head_dim": size, "value_dim": size}
        call |= {"family": family, "isa": isa, "machine_isa": machine_isa, "dtype": dtype}
        return _C.csr_counts(backward=False, nnz=9, tiles=1, **call)[0]

    assert rates("entries", "avx2", "amx_bf16", "bfloat16", 64) == "avx2"
    assert rates("entries", "avx512", "avx512_bf16", "float32", 64) == "avx512"
    assert rates("entries", "avx512", "amx_bf16", "float32", 64) == "xeon"
    assert rates("entries", "avx512_bf16", "amx_bf16", "bfloat16", 64) == "avx512_bf16"
    assert rates("entries", "amx_bf16", "amx_bf16", "bfloat16", 64) == "amx_bf16"
    assert rates("entries", "amx_bf16", "amx_bf16", "bfloat16", 16) == "xeon"  # packed as float32
    assert rates("dense", "amx_bf16", "amx_bf16", "bfloat16", 16) == "amx_bf16"
    with pytest.raises(ValueError, match="family must be one of entries, entries_sliced, dense, rows"):
        rates("fast", "avx2", "avx2", "float32", 64)
    with pytest.raises(ValueError, match="isa must have vectors"):
        rates("entries", "scalar", "avx2", "float32", 64)


def test_made_up_times_give_back_the_rates_that_they_are_of() -> None:
    """What no time is of stays as it is."""

    def rates_of(text: str) -> dict[tuple[str, ...], list[float]]:
        return {part[1:4]: [float(rate) for rate in part[6].split(", ")] for part in cost_model.PART.findall(text)}

    text = cost_model.RATES.read_text()
    known = rates_of(text)
    assert len(known) == 5 * 2 * 2
    results = []
    for isa, dtype, backward in (("avx512_bf16", "bfloat16", False), ("avx2", "float32", True)):
        for case, density in product(load_cases(), cost_model.DENSITIES):
            nnz = int(density * int(case.eligible().sum())) * case.query_heads
            tiles = min(-(-case.queries // 24) * -(-case.keys // 16) * case.query_heads, nnz) if density > 0.1 else 0
            result: dict[str, Any] = {
                "case": case.name,
                "backward": backward,
                "dtype": dtype,
                "isa": isa,
                "machine_isa": isa,
            }
            result |= {"model": "CPU", "nnz": nnz, "tiles": tiles, "sdpa": 0.95 + density / 10}  # the clock drifts
            for family in cost_model.KERNELS[backward]:
                name, counts = cost_model.counts(case, result, family)
                direction = "backward" if backward else "forward"
                rates = known[name, direction, "entries"] + known[name, direction, "dense"]
                cost = sum(rate * count for rate, count in zip(rates, counts.values(), strict=True))
                result[family] = cost * 1e-9 * result["sdpa"]
            results.append(result)
    # All but the last of a part, which is held.
    wrong = cost_model.PART.sub(lambda part: "".join(part.group(1, 5, 6)) + re.sub(r"[\d.]+,", "9,", part[7]), text)
    fitted = cost_model.fit(results, wrong)
    expected = rates_of(wrong)
    expected |= {part: known[part] for part in product(["avx512_bf16"], ["forward"], ["entries", "dense"])}
    expected |= {part: known[part] for part in product(["avx2"], ["backward"], ["entries", "dense"])}
    for absent in (2, 4):  # no bundles of four samples, and no far vectors backward
        expected["avx2", "backward", "entries"][absent] = 9
    assert rates_of(fitted) == expected
    changed = [now for now, before in zip(fitted.splitlines(), wrong.splitlines(), strict=True) if now != before]
    assert changed[::2] == [
        "  // avx2, backward, entries: one core of CPU, but for entry_4 and far_vector",
        "  // avx2, backward, dense: one core of CPU",
        "  // avx512_bf16, forward, entries: one core of CPU",
        "  // avx512_bf16, forward, dense: one core of CPU",
    ]
    assert len(changed) == 8
