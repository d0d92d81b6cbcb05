"""benchmarks/gpu.sh, as far as it goes without a GPU: it must run at the first try where there is one."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import gpu, gpu_checks, gpu_stages, gpu_tables, peers
from benchmarks.gpu_stages import Stage
from benchmarks.records import Records, library_id, read_lines

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def _records(folder: Path, **changes: Any) -> Records:
    (folder / "state").mkdir(parents=True, exist_ok=True)
    given = {"library": "a", "begin": time.time(), "end": time.time() + 60, **changes}
    return Records([folder / "kept" / "x.jsonl", folder / "out" / "x.jsonl"], state=folder / "state", **given)


def _stage(folder: Path, name: str = "test", device: str = "cpu", seconds: float = 60) -> Stage:
    (folder / "out").mkdir(exist_ok=True)
    given = argparse.Namespace(device=device, build=folder / "build", out=folder / "out")
    return Stage(name, given, time.time() + seconds)


def _shell(build: Path, *arguments: str) -> list[str]:
    """The command with nothing in the environment but which Python and which build folder to take."""
    return ["env", "-i", f"PYTHON={sys.executable}", f"FIAK_GPU_BUILD={build}", str(SCRIPT), *arguments]


def _is_running(*command: str) -> bool:
    wanted = "".join(word + "\0" for word in command).encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == wanted:
                return True
        except OSError:
            continue  # it is gone
    return False


# gpu.sh


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["prove"],
        ["test", "--seconds"],
        ["test", "--seconds", "0"],
        ["test", "--seconds", "9.5"],
        ["test", "--device", "tpu"],
        ["test", "more"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_print_the_usage(arguments: list[str], tmp_path: Path) -> None:
    run = subprocess.run(_shell(tmp_path / "build", *arguments), capture_output=True, text=True)
    assert run.returncode == 2
    assert "benchmarks/gpu.sh STAGE [--out DIR]" in run.stdout
    assert not (tmp_path / "build").exists()


def test_a_python_without_torch_is_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    command = ["env", "-i", f"PYTHON={python}", f"FIAK_GPU_BUILD={tmp_path}", str(SCRIPT), "test"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert "gpu.sh: PYTHON must be a Python with torch" in run.stderr


def test_a_killed_stage_goes_on(tmp_path: Path) -> None:
    """SIGKILL to all its processes, a line that was cut off and an emptied output folder cost no other result."""
    build, out = tmp_path / "build", tmp_path / "out"
    command = _shell(build, "sanitize", "--device", "cpu", "--out", str(out), "--seconds")
    process = subprocess.Popen([*command, "100"], start_new_session=True, stdout=subprocess.DEVNULL)
    lines = build / "results" / "sanitize.jsonl"
    while len(_keys(lines)) < 8:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = _keys(lines)
    copied = _keys(out / "sanitize.jsonl")
    assert copied == before[: len(copied)] and len(copied) >= len(before) - 1
    for path in out.iterdir():
        path.unlink()
    with lines.open("a") as file:
        file.write('{"key": "plain: cut o')
    run = subprocess.run([*command, "30"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    after = _keys(lines)
    assert after == _keys(out / "sanitize.jsonl")
    assert after[: len(before)] == before and len(after) > len(before)
    assert len(set(after)) == len(after)
    assert "left out: memcheck; racecheck; initcheck: compute-sanitizer looks at GPUs" in run.stdout
    assert sorted(path.name for path in out.iterdir()) == ["log.txt", "sanitize.jsonl", "summary.md"]


def _keys(path: Path) -> list[str]:
    return [line["key"] for line in read_lines(path) if "key" in line]


# Records


def test_lines_outlive_a_cut_and_a_lost_folder(tmp_path: Path) -> None:
    records = _records(tmp_path)
    records.open()
    records.add({"key": "one", "status": "passed"}, {"key": "two", "status": "passed"})
    kept, out = records.paths
    kept.write_text(kept.read_text() + '{"key": "thr')
    out.unlink()
    records.open()
    assert kept.read_bytes() == out.read_bytes()
    records.add({"key": "three", "status": "passed"})
    assert list(records.results()) == ["one", "two", "three"]
    kept.unlink()  # another machine's build folder
    records.open()
    assert list(records.results()) == ["one", "two", "three"]


def test_results_count_for_their_library_and_failures_for_their_run(tmp_path: Path) -> None:
    records = _records(tmp_path)
    records.open()
    records.add({"key": "good", "status": "passed"}, {"key": "bad", "status": "failed"})
    assert records.plan(["bad", "good", "new"]) == ["new"]
    assert _records(tmp_path, begin=time.time() + 9).plan(["bad", "good", "new"]) == ["new", "bad"]
    assert _records(tmp_path, library="b").plan(["bad", "good"]) == ["bad", "good"]
    passed_on = json.loads(records.environment()["FIAK_RECORDS"])
    assert passed_on["library"] == "a" and passed_on["paths"] == [str(path) for path in records.paths]


def test_a_library_is_known_by_its_bytes_and_its_python(tmp_path: Path) -> None:
    assert library_id(tmp_path) == ""
    (tmp_path / "libfiak.so").write_text("a")
    first = library_id(tmp_path)
    (tmp_path / "module.py").write_text("x = 1\n")
    second = library_id(tmp_path)
    (tmp_path / "libfiak.so").write_text("b")
    assert len({first, second, library_id(tmp_path)}) == 3


# The processes of a stage

WORKER = """
import os, sys, time
from benchmarks.records import LEFT, RESTART, Records
records = Records.of_environment()
for key in records.plan("abcd"):
    records.start(key)
    {what}
    records.add({{"key": key, "status": "passed"}})
"""


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("if key == 'b': os._exit(9)", "the process ended with status 9"),
        ("if key == 'b': os.kill(os.getpid(), 11)", "the process ended with status -11"),
        ("if key == 'b': time.sleep(99)", "no answer"),
    ],
)
def test_what_dies_or_hangs_costs_its_own_line(
    what: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_stages, "PATIENCE", 2.0)
    stage = _stage(tmp_path)
    stage.records.prefix = "it: "
    assert stage.work("letters", [sys.executable, "-c", WORKER.format(what=what)])
    results = stage.records.results()
    assert {key: result["status"] for key, result in results.items()} == {
        "it: a": "passed",
        "it: b": "failed",
        "it: c": "passed",
        "it: d": "passed",
    }
    assert results["it: b"]["error"] == why
    assert not stage.failed and not stage.left


def test_a_broken_process_is_followed_by_a_new_one(tmp_path: Path) -> None:
    what = "if key == 'b': records.add({'key': key, 'status': 'failed'}); sys.exit(RESTART)"
    stage = _stage(tmp_path)
    assert stage.work("letters", [sys.executable, "-c", WORKER.format(what=what)])
    assert list(stage.records.results()) == list("abcd")


def test_the_limit_is_kept_and_the_rest_is_named(tmp_path: Path) -> None:
    what = "if key == 'c': import subprocess; subprocess.run(['sleep', '7654'])"
    stage = _stage(tmp_path, seconds=4)
    start = time.monotonic()
    assert not stage.work("letters", [sys.executable, "-c", WORKER.format(what=what)])
    assert time.monotonic() - start < 60
    assert stage.left == ["c", "d"] and not stage.failed
    assert not _is_running("sleep", "7654")
    assert not stage.work("more", [sys.executable, "-c", WORKER.format(what="pass")])
    assert stage.left[-1] == "more: not begun"


def test_a_process_that_cannot_start_fails_the_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = _stage(tmp_path)
    assert not stage.work("nothing", [sys.executable, "-c", "import no_such_module"])
    assert stage.failed and stage.left == ["nothing"]
    assert "No module named 'no_such_module'" in capsys.readouterr().out


def test_a_build_is_stopped_in_time(tmp_path: Path) -> None:
    stage = _stage(tmp_path, "build", seconds=6)
    start = time.monotonic()
    assert stage._run_interrupted(["sh", "-c", "sleep 7655; sleep 7656"]) == "over"
    assert time.monotonic() - start < 60
    assert not _is_running("sleep", "7655") and not _is_running("sleep", "7656")


# pytest's plugin

TESTS = """
import os
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
def test_skipped(): pytest.skip("no such thing here")
def test_seen_by_the_sanitizer():
    with open(os.environ["FIAK_SANITIZER_LOG"], "a") as log:
        log.write("========= Invalid __global__ read of size 4\\n")
"""


def test_every_test_is_recorded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIAK_TEST_DEVICE", "cpu")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_more.py").write_text("import no_such_module\n")
    log = tmp_path / "sanitizer.log"
    log.write_text("========= COMPUTE-SANITIZER\n")
    stage = _stage(tmp_path)
    command = gpu_stages._pytest("--rootdir", str(tmp_path), str(tmp_path))
    assert stage.work("tests", command, {"FIAK_SANITIZER_LOG": str(log)})
    lines = read_lines(stage.records.paths[0])
    results = {line["key"].rpartition("::")[2]: line for line in lines}
    assert {key: line.get("status") for key, line in results.items()} == {
        "test_more.py": None,
        "test_good": "passed",
        "test_bad": "failed",
        "test_skipped": "skipped",
        "test_seen_by_the_sanitizer": "failed",
    }
    assert "assert 1 == 2" in results["test_bad"]["why"]
    assert results["test_skipped"]["why"] == "no such thing here"
    assert "no_such_module" in results["test_more.py"]["left_out"]
    assert results["test_seen_by_the_sanitizer"]["why"] == "========= Invalid __global__ read of size 4"
    assert stage.work("tests", command, {"FIAK_SANITIZER_LOG": str(log)})
    assert read_lines(stage.records.paths[0]) == lines
    text = gpu_tables.counts("test", stage.records.results(), [], 0, 9)
    assert "test: 2 failed, 1 passed, 1 skipped; 9 s" in text
    assert "FAILED" in text and "assert 1 == 2" in text and "left out: test_more.py: " in text


def test_what_the_sanitizer_counts_must_have_been_seen(tmp_path: Path) -> None:
    stage = _stage(tmp_path, "sanitize")
    for text, status in (
        ("========= ERROR SUMMARY: 0 errors\n", None),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "failed"),
    ):
        stage._check_summary("some", text)
        assert stage.records.results().get("some", {}).get("status") == status


# Profile

COUNTERS = """"ID","Kernel Name","Grid Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","ns","register/thread"
"0","fiak_csr_tiles_forward_bf16_d64","(64, 4, 1)","12,345","210"
"""


@pytest.mark.parametrize(
    ("script", "status", "why"),
    [
        (f"cat > $log <<'END'\n==PROF== Connected\n{COUNTERS}END", "passed", None),
        ("echo '==ERROR== ERR_NVGPUCTRPERM - no permission' > $log; exit 1", "failed", "only an administrator"),
        ("echo 'nothing was profiled' > $log", "failed", "nothing was profiled"),
        (
            "case $* in *dram__bytes_read.sum*) echo 'Failed to find metric dram__bytes_read.sum' >$log; exit 1; esac\n"
            f"cat > $log <<'END'\n{COUNTERS}END",
            "passed",
            None,
        ),
    ],
    ids=["counters", "no permission", "no kernel", "unknown counter"],
)
def test_counters(script: str, status: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text(f"#!/bin/bash\nlog={tmp_path / 'build' / 'state' / 'ncu.csv'}\n{script}\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(gpu_stages, "_find_program", lambda *_: ncu)
    stage = _stage(tmp_path, "profile", "cuda")
    monkeypatch.setattr(stage, "_list_calls", lambda _: list(gpu.calls()))
    stage.run_profile()
    results = stage.records.results()
    keys = list(gpu.calls())
    done = [key for key in keys if results.get(key, {}).get("status") == status]
    if why is None:
        assert done == keys and not stage.left
        [kernel] = results[keys[0]]["kernels"]
        assert kernel["gpu__time_duration.sum [ns]"] == 12345
        assert kernel["Kernel Name"] == "fiak_csr_tiles_forward_bf16_d64"
        assert ("dram__bytes_read.sum" in results) == ("dram" in script)
    else:
        assert why in results[keys[0]]["why"]
        assert stage.left == keys[len(done) :]


def test_calls_for_the_profiler(tmp_path: Path) -> None:
    listed = _stage(tmp_path, "profile")._list_calls([sys.executable, "-m", "benchmarks.gpu", "--device", "cuda"])
    assert listed == list(gpu.calls())
    gpu.call_once("cpu", listed[0])
    gpu.call_once("cpu", listed[1])


# What is measured


def test_every_cell_of_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind; FlexAttention is not compiled here, and has no backward on a CPU."""
    monkeypatch.setattr(peers, "compiled_flex", lambda: flex_attention)
    records = _records(tmp_path)
    records.open()
    bench = gpu.Bench("cpu", records)
    cells = {cell.key: cell for cell in bench.cells()}
    assert len(cells) == sum(1 for _ in bench.cells())
    wanted = [
        "machine",
        "attention|causal_2048|bfloat16|recorded 70%|plan",
        "attention|causal_2048|bfloat16|recorded 70%|forward",
        "attention|causal_2048|bfloat16|recorded 70%|training",
        "attention|deit_base|float32|dense 0%|forward",
        "attention|long_8192|float32|uniform 95%|forward",
        "compact|deit_tiny|bfloat16|training",
        "check|waits|csr_attention|bfloat16",
        *(f"check|empty rows|{op}|float32" for op in gpu_checks.OPS),
        "check|65536 elements|csr_attention|float32",
        "check|65536 elements|prior_attention|float32",
        "model|DeiT-tiny, 224 pixels|bfloat16",
    ]
    monkeypatch.setattr(bench, "cells", lambda: [cells[key] for key in wanted])
    monkeypatch.setattr(gpu, "Bench", lambda *_: bench)
    assert gpu.measure("cpu", records) == 0
    results = records.results()
    assert {key: results[key]["status"] for key in wanted} == dict.fromkeys(wanted, "passed")
    assert results["machine|rates"]["bytes_per_second"] > 0
    pattern = results[f"{wanted[1]}|pattern"]
    assert 0 < pattern["pairs"] < 2 * 33 * 34 / 2 and pattern["plan_bytes"] > 0
    for name in ("SDPA math, boolean mask", "SDPA math, float bias", "csr_attention, prior", "prior_attention"):
        for key in wanted[2:4]:
            line = results[f"{key}|{name}"]
            assert line["calls"] == 3 and line["milliseconds"] == sorted(line["milliseconds"])
            assert (line["case"], line["dtype"]) == ("causal_2048: B2 H2 N33 D8 causal", "bfloat16")
    assert "milliseconds" in results[f"{wanted[2]}|FlexAttention"]
    assert "backend" in results[f"{wanted[2]}|SDPA cuDNN"]["error"]
    assert results["check|waits|csr_attention|bfloat16|result"]["left_out"] == "streams and graphs are a GPU's"
    assert results[f"{wanted[-1]}|FiAK 70% pruned"]["images_per_second"] > 0

    summary = tmp_path / "summary"
    summary.mkdir()
    (summary / "time.jsonl").write_bytes(records.paths[0].read_bytes())
    gpu_tables.write_summary(summary)
    text = (summary / "summary.md").read_text()
    assert "### causal_2048: B2 H2 N33 D8 causal, bfloat16, training" in text
    assert "| DeiT-tiny, 224 pixels | bfloat16 | 2 | FiAK dense | " in text


def test_a_contestant_that_fails_leaves_the_others(tmp_path: Path) -> None:
    records = _records(tmp_path)
    records.open()
    clock = gpu.Clock("cpu", records)

    def fails() -> None:
        raise ValueError("too wide\nby far")

    lines = clock.compare("cell", {"FlexAttention": fails, "csr_attention": fails, "SDPA": lambda: None})
    assert [line["key"] for line in lines] == ["cell|FlexAttention", "cell|csr_attention", "cell|SDPA"]
    assert [line.get("error") for line in lines] == ["ValueError: too wide", "ValueError: too wide", None]
    assert [line.get("status") for line in lines] == [None, "failed", None]
    records.add({"key": "cell|SDPA", "status": "failed", "error": "the process ended with status -11"})
    lines = clock.compare("cell", {"SDPA": lambda: None})
    assert "milliseconds" not in lines[0]  # it would end this process, too


def test_a_device_without_kernels_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all tests would be skipped."""
    monkeypatch.setattr(gpu_checks, "build_info", lambda: {"cuda": None})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees no CUDA device" in gpu_checks.what_is_missing("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "benchmarks/gpu.sh build" in gpu_checks.what_is_missing("cuda")
    assert gpu_checks.what_is_missing("cpu") == ""
    monkeypatch.setenv("FIAK_TEST_DEVICE", "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "test_some.py").write_text(TESTS)
    stage = _stage(tmp_path)
    assert not stage.work("tests", gpu_stages._pytest("--rootdir", str(tmp_path), str(tmp_path)))
    assert stage.failed and stage.left == ["tests"] and not stage.records.results()


def test_checks_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "_run", lambda call, leaves: [torch.full((2, 2, 3, 4), torch.nan)] * 4)
    with pytest.raises(AssertionError, match="NaN"):
        gpu_checks.check("empty rows", "csr_attention", torch.float32, "cpu")
