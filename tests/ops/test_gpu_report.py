"""`make test-gpu` always ends with its report: what breaks on the way is a reason in it, not a stack trace."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_report.py"


@pytest.fixture
def tool(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_report", TOOL)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUTPUTS", tmp_path)
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    return module


def test_a_report_that_pytest_did_not_finish_is_a_reason(tool, tmp_path, monkeypatch):
    report = tool.Report(tmp_path, time.monotonic() + 60)

    def killed(*_):
        (tmp_path / "test_x.xml").write_text("<testsuites><testsuite><testcase na")
        raise tool.PartError("ended with signal SIGKILL")

    monkeypatch.setattr(report, "process", killed)
    found = report.test_file(tool.Part("tests", 60), Path("test_x.py"), 60)
    assert found == {"passed": 0, "failed": 0, "reason": "ended with signal SIGKILL"}


def test_a_machine_without_what_is_needed_gets_a_report(tmp_path):
    """No wheels, and a Python that sees no megatron-core: nothing can run, and the last line still says why."""
    copy = tmp_path / "checkout" / "tools" / "gpu_report.py"
    copy.parent.mkdir(parents=True)
    copy.write_text(TOOL.read_text())
    command = [sys.executable, "-S", str(copy), "--wheels", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, summary["passed"]) == (1, 0), done.stderr
    assert "make gpu-wheels" in summary["parts"]["environment"]["reason"]
    assert "Traceback" not in done.stderr


def test_a_terminated_run_ends_its_process_and_reports(tool, tmp_path):
    """SIGTERM, as from a scheduler, while a part runs."""
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(TOOL.parent)!r})
import gpu_report as tool
tool.OUTPUTS, tool.PYTHON = Path({str(tmp_path)!r}), Path(sys.executable)
def environment(self, part):
    self.process("part", ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(60)"], part.limit)
tool.Report.environment = environment
sys.exit(tool.main())
"""
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "part.log", time.monotonic() + 30
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    out, _ = started.communicate(timeout=30)
    assert json.loads(out.splitlines()[-1])["parts"]["environment"]["reason"] == "interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
