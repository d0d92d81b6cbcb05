"""The stages of gpu.sh, which see to it that time is kept and that no hang or crash takes more than its own line.

Work is done by another process, whose results are lines of :class:`benchmarks.records.Records`. Where it dies, or says
nothing for too long, this becomes the result of what it was doing, and a new process does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_tables
from benchmarks.records import LEFT, RESTART, Records, library_id

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fiak_ext"
PATIENCE = 150.0  # seconds that one test or measurement may take, compilation included
LOG_BYTES = 8_000_000
TESTS = [  # most important first; each line is a process
    ["cuda_device"],
    ["prior_attention", "csr_attention", "csr_plan", "compact"],
    ["reference", "pattern", "modules", "models", "compaction", "packing", "pruning", "flops", "state", "calibration"],
    ["compile", "ecosystem", "convert", "convert_training", "convert_saving", "convert_timm", "convert_transformers"],
]
TOOLS = ("memcheck", "racecheck", "initcheck")
SANITIZED = [  # pytest's -k
    "test_every_feature and float16",
    "test_compaction and float16 and not 768",
    "test_every_feature and (float32 or bfloat16)",
    "test_compaction and (float32 or bfloat16) and not 768",
    "test_large_sizes and (129 or 65)",
]
COUNTERS = [  # of ncu
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__t_bytes.sum",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "smsp__inst_executed.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
    "launch__occupancy_limit_registers",
    "launch__occupancy_limit_shared_mem",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "smsp__sass_inst_executed_op_local.sum",
]


class Stage:
    """One stage's records, and the processes that make them."""

    def __init__(self, name: str, arguments: argparse.Namespace, end: float) -> None:
        self.name, self.device, self.build, self.end = name, arguments.device, arguments.build, end
        self.log = arguments.out / "log.txt"
        kept = arguments.build / "results"
        state = arguments.build / "state"
        state.mkdir(parents=True, exist_ok=True)
        folders = dict.fromkeys(folder.resolve() for folder in (kept, arguments.out))
        library = "" if name == "build" else f"{library_id(PACKAGE)} {self.device}"
        self.records = Records([folder / f"{name}.jsonl" for folder in folders], library, state, time.time(), end - 2)
        self.records.open()
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.write_bytes(self.log.read_bytes()[-LOG_BYTES // 2 :])
        self.left: list[str] = []
        self.failed = False  # where a process fails outside of what it measures or tests

    def left_out(self, key: str, why: str) -> None:
        """Says, once in the file, that something cannot be done here."""
        if self.records.results().get(key, {}).get("left_out") != why:
            self.records.add({"key": key, "left_out": why})

    def work(self, what: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> bool:
        """Runs a process until it has done all, anew where it breaks; False where time or processes do not let it."""
        state = self.records.state
        while True:
            for name in ("current", "planned"):
                (state / name).unlink(missing_ok=True)
            if self.records.is_over():
                self.left.append(f"{what}: not begun")
                return False
            status = self._run(command, environment or {})
            current = self._state("current")
            planned = json.loads(self._state("planned") or "[]")
            done = self.records.done()
            left = [key for key in planned if key not in done]
            if status == "over" or (status == LEFT and left):
                self.left.extend(left or [what])
                return False
            if status in (0, LEFT):
                return True
            if status == RESTART and current in done:
                continue
            if current and current not in done:  # it died or hung in there
                why = "no answer" if status == "hung" else f"the process ended with status {status}"
                result = {"key": current.removeprefix(self.records.prefix), "status": "failed", "error": why}
                self.records.add({**result, "why": f"{self._tail()}\n{why}"})
                continue
            why = f"{what}: the process ended with status {status} outside of what it measures or tests"
            print(f"{self.name}: FAILED: {why}\n{self._tail()}")
            self.records.append({"failed": what, "status": status, "why": self._tail()})
            self.failed = True
            self.left.extend(left or [what])
            return False

    def _run(self, command: Sequence[str], environment: Mapping[str, str]) -> int | str:
        """An exit status, "over" where the time is, or "hung"."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **self.records.environment(), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                close_fds=False,  # it must hold gpu.sh's lock
            )
            since, current = time.time(), ""
            while (status := process.poll()) is None:
                time.sleep(0.1)
                if self._state("current") != current:
                    since, current = time.time(), self._state("current")
                if time.time() > self.end or time.time() - since > PATIENCE:
                    _kill_tree(process.pid)
                    process.wait()
                    return "over" if time.time() > self.end else "hung"
            return status

    def _state(self, name: str) -> str:
        path = self.records.state / name
        return path.read_text() if path.exists() else ""

    def _tail(self) -> str:
        """The end of what the last process printed."""
        with self.log.open("rb") as log:
            log.seek(max(self.log.stat().st_size - 2000, 0))
            return log.read().decode(errors="replace").rpartition("\n$ ")[2]

    # -----------------------------------------------------------------------------------------------------------------

    def run_build(self) -> None:
        """CMake and ninja; what ninja has finished is not done again."""
        start, folder = time.time(), self.build / "cmake"
        configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFIAK_CCACHE=OFF",
                     "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]  # fmt: skip
        architectures = ""
        if self.device == "cuda":
            code = "import torch; print(*{'%d%d-real' % torch.cuda.get_device_capability(i) "
            code += "for i in range(torch.cuda.device_count())}, sep=';')"
            found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            if found.returncode or not found.stdout.strip():
                why = found.stderr.strip().splitlines()[-1:] or ["torch sees no CUDA device; try --device cpu"]
                self.records.add({"key": "device", "status": "failed", "why": why[0]})
                return
            architectures = found.stdout.strip()
            configure += ["-DFIAK_CUDA=on", f"-DFIAK_CUDA_ARCHS={architectures}"]
        else:
            configure += ["-DFIAK_CUDA=off"]
            self.left_out("CUDA kernels", "--device cpu")
        self.records.add({"key": "device", "status": "passed", "architectures": architectures})
        install = ["cmake", "--install", str(folder), "--component", "python", "--prefix", str(ROOT)]
        for key, command in (
            ("configure", configure),
            ("compile", ["cmake", "--build", str(folder), "--target", "python"]),
            ("install", install),
        ):
            begin = time.time()
            status = self._run_interrupted(command)
            if key == "compile":
                self._add_compiled(folder, start)
            if status == "over":
                print(f"build: left to do: {key}; what is compiled stays")
                self.left.append(key)
                return
            result = {"key": key, "seconds": round(time.time() - begin, 1), "command": " ".join(command)}
            if status:
                self.records.add({**result, "status": "failed", "why": self._tail()})
                return
            self.records.add({**result, "status": "passed"})
        self.records.add({"key": "library", "status": "passed", "id": library_id(PACKAGE), **_versions()})

    def _run_interrupted(self, command: Sequence[str]) -> int | str:
        """As :meth:`_run`, and without a limit for being silent; ninja removes what it has half made."""
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, close_fds=False
            )
            try:
                return process.wait(max(self.end - 5 - time.time(), 0))
            except subprocess.TimeoutExpired:
                for pid in [*_descendants(process.pid), process.pid]:
                    _signal(pid, signal.SIGINT)
            try:
                process.wait(4)
            except subprocess.TimeoutExpired:
                _kill_tree(process.pid)
                process.wait()
            return "over"

    def _add_compiled(self, folder: Path, start: float) -> None:
        """Seconds of each file, as ninja notes them."""
        log = folder / ".ninja_log"
        results = self.records.results()
        for line in log.read_text().splitlines()[1:] if log.exists() else []:
            begin, end, _, output, *_ = line.split("\t")
            seconds = (int(end) - int(begin)) / 1000
            if output.endswith((".o", ".so", ".a")) and results.get(output, {}).get("seconds") != seconds:
                self.records.add({"key": output, "status": "passed", "seconds": seconds})

    def run_test(self) -> None:
        """All tests that can run here, those on the device first."""
        for names in TESTS:
            files = [f"python_tests/test_{name}.py" for name in names]
            if not self.work(" ".join(files), _pytest(*files)):
                self.left += [f"test_{name}.py" for rest in TESTS[TESTS.index(names) + 1 :] for name in rest]
                return

    def run_sanitize(self) -> None:
        """Small tests under each tool of compute-sanitizer."""
        program = _find_program("compute-sanitizer", "nvidia/cu13/bin")
        if self.device == "cpu":
            tools: Sequence[str] = ("plain",)
            for tool in TOOLS:
                self.left_out(tool, "compute-sanitizer looks at GPUs; the tests run without it")
        elif program is None:
            tools = ()
            for tool in TOOLS:
                self.left_out(tool, "compute-sanitizer is not on the PATH, in CUDA_HOME/bin or beside torch")
        else:
            tools = TOOLS
        runs = [(expression, tool) for expression in SANITIZED for tool in tools]
        for index, (expression, tool) in enumerate(runs):
            self.records.prefix = f"{tool}: "
            # Tensors of their own allocation, so that reads beyond one are seen.
            environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            command = _pytest("python_tests/test_cuda_device.py", "-k", expression)
            log = self.records.state / "sanitizer.log"
            log.unlink(missing_ok=True)
            if tool != "plain":
                # initcheck must see what torch's kernels write.
                ours = [] if tool == "initcheck" else ["--kernel-name", "kernel_substring=fiak_"]
                options = ["--tool", tool, "--report-api-errors", "explicit", "--log-file", str(log), *ours]
                command = [str(program), *options, *command]
                environment["FIAK_SANITIZER_LOG"] = str(log)
            goes_on = self.work(f"{tool}: {expression}", command, environment)
            text = log.read_text(errors="replace") if log.exists() else ""
            with self.log.open("a") as whole:
                whole.write(text)
            if self.failed:
                print(text)
            if not goes_on:
                self.left += [f"{rest}: {of}" for of, rest in runs[index + 1 :]]
                return
            self._check_summary(expression, text)

    def _check_summary(self, expression: str, text: str) -> None:
        """What compute-sanitizer counted must have been seen during some test; else the whole run has failed."""
        faults = re.findall(r".* SUMMARY: [1-9].*", text)
        found = [line for result in self.records.results().values() for line in result.get("why", "").splitlines()]
        if faults and not any(line.startswith("=====") and line in text for line in found):
            self.records.add({"key": expression, "status": "failed", "why": f"{faults[0]}\n{text[-3000:]}"})

    def run_time(self) -> None:
        """benchmarks/gpu.py."""
        self.work("benchmarks.gpu", [sys.executable, "-m", "benchmarks.gpu", "--device", self.device])

    def run_profile(self) -> None:
        """ncu's counters of the kernels that calls of the main cases take."""
        program = _find_program("ncu", "") if self.device == "cuda" else None
        if program is None:
            why = "counters are a GPU's" if self.device == "cpu" else "ncu is not on the PATH or in CUDA_HOME/bin"
            self.left_out("ncu", f"{why}; the calls run without it")
        calls = [sys.executable, "-m", "benchmarks.gpu", "--device", self.device]
        done = self.records.done()
        keys = [key for key in self._list_calls(calls) if key not in done]
        counters = list(COUNTERS)
        log = self.records.state / "ncu.csv"
        while keys:
            command = [*calls, "--call", keys[0]]
            if program is not None:
                # The clocks stay as they are.
                options = ["--csv", "--page", "raw", "--clock-control", "none", "--kernel-name", "regex:fiak_"]
                options += ["--metrics", ",".join(counters), "--log-file", str(log), "--target-processes", "all"]
                command = [str(program), *options, *command]
            for name in ("current", "ncu.csv"):
                (self.records.state / name).unlink(missing_ok=True)
            begin = time.time()
            status = "over" if self.records.is_over() else self._run(command, {})
            text = log.read_text(errors="replace") if log.exists() else ""
            if status == "over":
                break
            kernels = gpu_tables.read_counters(text)
            if status and (unknown := [name for name in counters if f"metric {name}" in text + self._tail()]):
                self.left_out(", ".join(unknown), "not a counter of this ncu")
                counters = [name for name in counters if name not in unknown]
                continue
            result = {"key": keys[0], "seconds": round(time.time() - begin, 1), "kernels": kernels}
            denied = "ERR_NVGPUCTRPERM" in text + (self._tail() if status else "")
            if status or denied or (program is not None and not kernels):
                why = "ERR_NVGPUCTRPERM: the driver lets only an administrator read counters\n" if denied else ""
                self.records.add({**result, "status": "failed", "why": f"{why}{text[-2000:]}\n{self._tail()}"})
            else:
                self.records.add({**result, "status": "passed"})
            del keys[0]
            if denied:
                break
        self.left += keys

    def _list_calls(self, calls: Sequence[str]) -> list[str]:
        listed = subprocess.run([*calls, "--list-calls"], cwd=ROOT, capture_output=True, text=True)
        if listed.returncode:
            print(f"profile: FAILED: {(listed.stderr.strip().splitlines() or ['--list-calls'])[-1]}")
            self.failed = True
        return listed.stdout.splitlines()


def _pytest(*arguments: str) -> list[str]:
    options = ["-q", "-p", "benchmarks.gpu_pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *options, *arguments]


def _find_program(name: str, beside_torch: str) -> Path | None:
    """On the PATH, which has CUDA_HOME/bin, or in a folder among Python's packages."""
    if (found := shutil.which(name)) is not None:
        return Path(found)
    places = [Path(place) / beside_torch for place in sys.path if beside_torch]
    places += sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True)
    return next((place / name for place in places if (place / name).exists()), None)


def _descendants(pid: int) -> list[int]:
    """Children and theirs, the youngest first."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it is gone
        children.setdefault(parent, []).append(int(path.parent.name))

    def below(of: int) -> Iterator[int]:
        for child in children.get(of, ()):
            yield from below(child)
            yield child

    return list(below(pid))


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _kill_tree(pid: int) -> None:
    for child in [*_descendants(pid), pid]:
        _signal(child, signal.SIGKILL)


def _versions() -> dict[str, Any]:
    """Of what is there; None where it is not."""
    import importlib.metadata as metadata  # torch itself would take seconds to import

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names = ("torch", "triton", "numpy", "timm", "transformers", "pytest", "pybind11")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "commit": commit.stdout.strip() or None,
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--end", type=float, required=True, help="in seconds since the epoch")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Of the time that the stages before have left.
    shares = {"build": 1.0, "test": 0.4, "sanitize": 0.3, "time": 0.8, "profile": 1.0}
    failed = False
    for name in shares if arguments.stage == "all" else [arguments.stage]:
        begin = time.time()
        share = shares[name] if arguments.stage == "all" else 1.0
        stage = Stage(name, arguments, begin + share * (arguments.end - 3 - begin))
        if name != "build" and not library_id(PACKAGE):
            print(f"{name}: FAILED: the compiled library is missing: benchmarks/gpu.sh build")
            failed = True
            break
        getattr(stage, f"run_{name}")()
        results = stage.records.results()
        faults = [key for key, result in results.items() if result.get("status") == "failed"]
        failed = failed or bool(faults) or stage.failed
        print(gpu_tables.counts(name, results, stage.left, len(stage.left), time.time() - begin))
        stage.records.append({"end": name, "seconds": round(time.time() - begin, 1), "left": stage.left[:10],
                              "left_count": len(stage.left)})  # fmt: skip
        if name == "build" and (faults or stage.left):
            break
        gpu_tables.write_summary(arguments.out)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
