"""A real MLflow store: written by the tracker, read by MLflow's own client and by a real `mlflow ui` over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from torchrun import free_port

from megatron_rl.tracking import TrackerGroup, build_tracker

CONFIG = TrackerGroup.Config(trackers=("mlflow",), experiment="arithmetic", run_name="first")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with one run: killed after step 3, resumed from step 2, finished at step 4."""
    output = tmp_path_factory.mktemp("run with space")
    tracker = build_tracker(CONFIG, output)
    tracker.start()
    tracker.log_params({"parallel": {"tp": 2}, "long": "x" * 9000} | {f"p{i}": i for i in range(150)})
    for step in (1, 2, 3):
        tracker.log({"reward/mean": step / 4, "loss/policy": float("nan")}, step)
    tracker.close("killed")
    resumed = build_tracker(CONFIG, output)
    resumed.start(resume_step=2)
    resumed.log_params({"parallel": {"tp": 4}, "new": "y"})
    for step in (3, 4):
        resumed.log({"reward/mean": step / 4}, step)
    picture = output / "reward.png"
    picture.write_bytes(b"png")
    resumed.log_artifact(picture, "plots")
    resumed.close()
    return output


def test_run_is_in_the_sqlite_store_of_the_output_folder(tracked: Path) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tracked}/mlflow.db")
    experiment = client.get_experiment_by_name("arithmetic")
    runs = client.search_runs([experiment.experiment_id])
    assert [(r.info.run_name, r.info.status) for r in runs] == [("first", "FINISHED")]  # resumed, not begun again
    params = runs[0].data.params
    assert (params["parallel.tp"], params["p149"], params["new"], len(params["long"])) == ("2", "149", "y", 500)
    history = client.get_metric_history(runs[0].info.run_id, "reward/mean")
    assert {(m.step, m.value) for m in history} == {(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)}


def test_artifacts_stay_inside_the_output_folder(tracked: Path) -> None:
    assert [p.name for p in (tracked / "mlflow_artifacts").rglob("plots/*")] == ["reward.png"]


def test_mlflow_ui_shows_the_run(tracked: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{tracked}/mlflow.db"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    log = tracked / "ui.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        page = wait_for(f"http://127.0.0.1:{port}/", server, log)
        experiments = post(port, "experiments/search", {"max_results": 10})["experiments"]
        wanted = next(e["experiment_id"] for e in experiments if e["name"] == "arithmetic")
        runs = post(port, "runs/search", {"experiment_ids": [wanted]})["runs"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
    assert b"<html" in page.lower()
    assert [r["info"]["run_name"] for r in runs] == ["first"]
    assert {m["key"]: m["value"] for m in runs[0]["data"]["metrics"]}["reward/mean"] == 1.0


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 120) -> bytes:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read()
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"mlflow ui did not answer in {seconds} s:\n{log.read_text()[-3000:]}")


def post(port: int, method: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/2.0/mlflow/{method}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())
