"""benchmarks/gpu.sh, as far as it goes without a GPU: it must run at the first try where there is one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from fiak_ext import build_info

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True)


def test_dry_run_passes_every_stage() -> None:
    results = ROOT / "build" / "gpu"
    run = _run("--dry-run")
    assert run.returncode == 0, run.stdout + run.stderr
    for name in ("build", "tests", "checked", "times"):
        assert f"{name}: passed" in run.stdout
    report = json.loads((results / "times.json").read_text())
    assert report["machine"]["fiak_ext"] == build_info()
    for row in report["attention"]:
        for name in ("SDPA flash", "SDPA math", "prior_attention", "csr_attention, 70% pruned"):
            assert len(row["forward"][name]["milliseconds"]) == len(row["training"][name]["milliseconds"]) == 3
    assert all("images_per_second" in result for row in report["models"] for result in row["results"].values())
    assert "FlexAttention" in (results / "times.md").read_text()


def test_a_failing_stage_is_named(tmp_path: Path) -> None:
    """The script's own functions, with a stage that fails and one that is too slow."""
    text = SCRIPT.read_text()
    functions = text[text.index("stage() {") : text.index("find_sanitizer() {")]
    script = f"results={tmp_path}\nfailed=()\n{functions}\nstage bad 9 sh -c 'echo why; exit 3'\nstage slow 1 sleep 9\n"
    run = subprocess.run(["bash", "-uc", script + 'echo "${failed[*]}"'], capture_output=True, text=True)
    assert "bad: FAILED with status 3" in run.stdout and "why" in run.stdout
    assert "slow: FAILED with status 124" in run.stdout
    assert run.stdout.splitlines()[-1] == "bad slow"


def test_usage() -> None:
    run = _run("--help")
    assert run.returncode == 2
    assert "benchmarks/gpu.sh --dry-run" in run.stdout
