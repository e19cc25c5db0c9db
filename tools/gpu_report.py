"""What a machine with an NVIDIA GPU says of this project: one JSON object on the last line, whatever breaks on the way.

    make test-gpu WHEELS=folder        # or: python3 tools/gpu_report.py --wheels folder [--parts tests demo]

Run it with the Python that has torch. It makes ./.venv-gpu, which sees that Python's packages, and puts into it what is
missing, from the folder that `make gpu-wheels` fills; no network is asked. Each part runs in a process of its own
under a time limit, its output in outputs/gpu/PART.log. A part passes, fails, or is not run, and says why. The exit
status is 0 when all that was asked for passed.

This file itself imports nothing outside the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT, OUTPUTS = ROOT / ".venv-gpu", ROOT / "outputs" / "gpu"
PYTHON, NEWEST_MEGATRON = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "newest"
PROGRAMS = ROOT / "tests" / "gpu"
ALL_SECONDS = 465.0  # of all parts together, below ten minutes with room to spare
GPU_MARK = re.compile(r"pytest\.mark\.gpu\b")
LOSS_TOLERANCE = 1e-4  # relative, of one GRPO step in fp32 on the two kinds of device


@dataclass
class Part:
    """One thing to find out. ``outcome`` is passed, failed, or not run."""

    name: str
    limit: float  # seconds
    needs_gpu: bool = True
    outcome: str = "not run"
    reason: str = ""
    seconds: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        reason = {"reason": self.reason} if self.reason else {}
        return {"outcome": self.outcome, **reason, "seconds": round(self.seconds, 1), **self.found}


class PartError(Exception):
    """The part failed; the message is its reason."""


def main() -> int:
    parts = [
        Part("environment", 120, needs_gpu=False),
        Part("megatron", 100, needs_gpu=False),
        Part("build", 180, needs_gpu=False),
        Part("tests", 240),
        Part("bandwidth", 60),
        Part("memory", 60),
        Part("grpo_step", 120),
        Part("demo", 240),
    ]
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=Path("wheels"), help="folder that `make gpu-wheels` filled")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help=", ".join(names))
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="time limit of all parts together")
    options = parser.parse_args()
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's: what is known by then is still reported
    report = Report(options.wheels, time.monotonic() + options.seconds)
    for part in parts:
        if part.name not in options.parts and part.name != "environment":
            continue
        try:
            report.run(part)
        except KeyboardInterrupt:
            part.outcome, part.reason = "failed", "interrupted"
            break
    print(json.dumps(report.summary()), flush=True)
    return 0 if all(part.outcome == "passed" for part in report.parts) else 1


class Report:
    """Runs parts one after another; each has a method of its name.

    Args:
        wheels: folder of wheel files.
        deadline: of `time.monotonic`.
    """

    def __init__(self, wheels: Path, deadline: float) -> None:
        self.wheels = wheels
        self.deadline = deadline
        self.started = time.monotonic()
        self.parts: list[Part] = []
        self.machine: dict[str, Any] = {}

    def run(self, part: Part) -> None:
        self.parts.append(part)
        started = time.monotonic()
        part.limit = min(part.limit, self.deadline - started)
        if part.limit < 5:
            part.reason = "no time was left"
        elif part.needs_gpu and not self.machine.get("gpu"):
            part.reason = "torch sees no CUDA device" if self.machine else "there is no environment to run it in"
        else:
            try:
                getattr(self, part.name)(part)
                part.outcome = "passed"
            except PartError as error:
                part.outcome, part.reason = "failed", str(error)
            except Exception as error:  # a fault of this program must not cost the report of the others
                part.outcome, part.reason = "failed", f"{type(error).__name__}: {error}"
        part.seconds = time.monotonic() - started
        print(f"{part.name}: {part.outcome} in {part.seconds:.1f} s {part.reason}".rstrip(), flush=True)

    def summary(self) -> dict[str, Any]:
        counts = {what: sum(part.outcome == what for part in self.parts) for what in ("passed", "failed", "not run")}
        return {
            "machine": self.machine,
            "parts": {part.name: part.report() for part in self.parts},
            **{what.replace(" ", "_"): count for what, count in counts.items()},
            "seconds": round(time.monotonic() - self.started, 1),
        }

    # One method for each part: it fills ``part.found`` and raises PartError where the part fails.

    def environment(self, part: Part) -> None:
        part.found["installed"] = install(self.wheels, part.limit)
        self.machine = self.program(part, "environment", [str(PROGRAMS / "environment_program.py")])

    def megatron(self, part: Part) -> None:
        """Both ends of the supported range import and build a model."""
        program, faults = [str(PROGRAMS / "megatron_program.py")], []
        for name, path in (("oldest", None), ("newest", NEWEST_MEGATRON)):
            if path is not None and not path.is_dir():
                faults.append(f"{name}: no such wheel in {self.wheels}")
                continue
            try:
                part.found[name] = self.program(part, f"megatron-{name}", program, path=path)
            except PartError as error:
                faults.append(f"{name}: {error}")
        if faults:
            raise PartError("; ".join(faults))

    def build(self, part: Part) -> None:
        part.found |= self.program(part, "build", [str(PROGRAMS / "build_program.py")])

    def tests(self, part: Part) -> None:
        """Every file with tests marked gpu in a process of its own, so that one that crashes ends only itself."""
        end = time.monotonic() + part.limit
        files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if GPU_MARK.search(path.read_text())]
        part.found["files"] = {}
        for path in files:
            name = str(path.relative_to(ROOT / "tests"))
            part.found["files"][name] = self.test_file(part, path, end - time.monotonic())
        found = list(part.found["files"].values())
        for what in ("passed", "failed", "skipped"):
            part.found[what] = sum(result.get(what, 0) for result in found)
        broken = [name for name, result in part.found["files"].items() if result["failed"] or result.get("reason")]
        if broken:
            raise PartError(f"see files: {', '.join(broken)}")
        if not part.found["passed"]:
            raise PartError("all tests were skipped")

    def test_file(self, part: Part, path: Path, limit: float) -> dict[str, Any]:
        xml = OUTPUTS / f"{path.stem}.xml"
        xml.unlink(missing_ok=True)
        command = ["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={xml}", str(path)]
        reason = ""
        try:
            self.process(f"tests-{path.stem}", command, max(1.0, limit))
        except PartError as error:
            reason = str(error)
        if not xml.exists():
            return {"passed": 0, "failed": 0, "reason": reason or "pytest wrote no report"}
        try:
            return read_junit(xml) | ({"reason": reason} if reason else {})
        except ElementTree.ParseError as error:  # pytest was ended while it wrote
            return {"passed": 0, "failed": 0, "reason": reason or f"{xml} is no whole report: {error}"}

    def bandwidth(self, part: Part) -> None:
        part.found["gigabytes_per_second"] = self.program(part, "bandwidth", [str(PROGRAMS / "bandwidth_program.py")])

    def memory(self, part: Part) -> None:
        part.found |= self.program(part, "memory", [str(PROGRAMS / "memory_program.py")])

    def grpo_step(self, part: Part) -> None:
        """The same step on the GPU and, in another process that is shown none, on the CPU."""
        program = [str(PROGRAMS / "grpo_step_program.py"), str(OUTPUTS / "grpo_step")]
        cpu = self.program(part, "grpo_step-cpu", program, CUDA_VISIBLE_DEVICES="")
        gpu = self.program(part, "grpo_step-gpu", program)
        part.found |= {"gpu": gpu, "cpu": cpu}
        apart = {
            name: abs(gpu[name] - cpu[name]) / max(abs(cpu[name]), 1e-3)
            for name in ("loss", "gradient_norm", "greedy_logprob", "loss_after")
        }
        part.found["relative_difference"] = apart
        worst = max(apart, key=lambda name: apart[name])
        if not apart[worst] <= LOSS_TOLERANCE:  # NaN too
            raise PartError(f"{worst} differs by {apart[worst]:.1e} of the CPU's, more than {LOSS_TOLERANCE:g}")
        if (cpu["device"], gpu["device"]) != ("cpu", "cuda"):
            raise PartError(f"ran on {cpu['device']} and {gpu['device']}")

    def demo(self, part: Part) -> None:
        """The README's demo with one process: on one GPU it communicates through NCCL."""
        command = [str(ROOT / "examples" / "arithmetic_grpo" / "demo.py"), "--processes", "1"]
        folder = OUTPUTS / "demo"
        folder.mkdir(exist_ok=True)
        out = self.process("demo", command, part.limit, folder=folder)
        part.found["table"] = [line for line in out.splitlines() if line.rstrip().endswith((" ok", " FAILED"))]

    def program(
        self, part: Part, log: str, command: list[str], path: Path | None = None, **environment: str
    ) -> dict[str, Any]:
        """The JSON object on the last line of a program's output."""
        lines = self.process(log, command, part.limit, path, **environment).strip().splitlines()
        try:
            return dict(json.loads(lines[-1]))
        except (IndexError, ValueError):
            raise PartError(f"its last line is not JSON; see {OUTPUTS / log}.log") from None

    def process(
        self,
        log: str,
        command: list[str],
        limit: float,
        path: Path | None = None,
        folder: Path = ROOT,
        **environment: str,
    ) -> str:
        """Standard output of a Python process in the new environment; its group is killed at the limit."""
        paths = [str(folder) for folder in (path, ROOT, os.environ.get("PYTHONPATH")) if folder]
        merged = {**os.environ, **SETTINGS, "PYTHONPATH": os.pathsep.join(paths), **environment}
        out, err = OUTPUTS / f"{log}.log", OUTPUTS / f"{log}.err"
        with out.open("w") as stdout, err.open("w") as stderr:
            process = subprocess.Popen(
                [str(PYTHON), *command], cwd=folder, env=merged, stdout=stdout, stderr=stderr, start_new_session=True
            )
            try:
                status = process.wait(max(1.0, limit))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise PartError(f"not finished after {limit:.0f} s{last_words(err, out)}") from None
            except BaseException:  # Ctrl-C reaches this process only: the other has a session of its own
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if status:
            how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
            raise PartError(f"ended with {how}{last_words(err, out)}")
        return out.read_text(errors="replace")


SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "MEGATRON_RL_CACHE": str(OUTPUTS / "libraries"),
    "OMP_NUM_THREADS": "4",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONWARNINGS": "ignore",
    "TRITON_CACHE_DIR": str(OUTPUTS / "triton"),
}


def last_words(*paths: Path) -> str:
    """The last line that a process wrote, preferably an error's, and where the rest stands."""
    for path in paths:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"(E\s+)?[\w.]*(Error|Exception|FAILED)\b", line)]
        if lines:
            return f": {(errors or lines)[-1][:300]} (see {path})"
    return ""


def install(wheels: Path, limit: float) -> list[str]:
    """Make the environment and put the wheels into it that this Python lacks; returns their names."""
    site = make_environment()
    here = {normal(found.metadata["Name"]) for found in distributions() if found.metadata["Name"]}
    files = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if not files and "megatron-core" not in here:
        raise PartError(f"no wheels in {wheels.absolute()}: `make gpu-wheels` fills it where there is a network")
    versions: dict[str, list[Path]] = {}
    for file in files:
        versions.setdefault(normal(file.name.split("-")[0]), []).append(file)
    megatron = sorted(versions.pop("megatron-core", []), key=lambda file: numbers(file.name.split("-")[1]))
    missing = [found[-1] for name, found in versions.items() if name not in here]
    place([*missing, *megatron[:1]], site, limit)
    if len(megatron) > 1:
        place(megatron[-1:], NEWEST_MEGATRON, limit)
    return ["-".join(file.name.split("-")[:2]) for file in [*missing, *megatron]]


def make_environment() -> Path:
    """./.venv-gpu, whose packages come before those of this Python, which may itself be an environment; its folder."""
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=False).create(ENVIRONMENT)
    site = next((ENVIRONMENT / "lib").glob("python3*")) / "site-packages"
    seen = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "seen.pth").write_text("\n".join([*seen, str(ROOT)]) + "\n")
    return site


def place(files: list[Path], target: Path, limit: float) -> None:
    if not files:
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-warn-script-location", "--upgrade", "--target", str(target), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"ended with status {done.returncode}"]
        raise PartError(f"pip: {lines[-1][:300]}")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def read_junit(path: Path) -> dict[str, Any]:
    """Counts of a pytest run, the first lines of what failed, and why tests were skipped."""
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    faults, skips = {}, set()
    for case in cases:
        for outcome in case:
            if outcome.tag in ("failure", "error"):
                message = (outcome.get("message") or outcome.text or "").strip()
                faults[str(case.get("name"))] = message.splitlines()[0][:200] if message else outcome.tag
            elif outcome.tag == "skipped":
                skips.add(str(outcome.get("message"))[:200])
    num_skipped = sum(any(outcome.tag == "skipped" for outcome in case) for case in cases)
    result: dict[str, Any] = {"passed": len(cases) - len(faults) - num_skipped, "failed": len(faults)}
    result |= {"skipped": num_skipped} if num_skipped else {}
    result |= {"failures": dict(list(faults.items())[:10])} if faults else {}
    return result | ({"skip_reasons": sorted(skips)[:5]} if skips else {})


if __name__ == "__main__":
    sys.exit(main())
