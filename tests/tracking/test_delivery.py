"""Tracking never ends training: outages are waited out in order, what is refused is counted, names are made legal."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name

from megatron_rl.tracking import TrackedRun, Tracker, TrackerGroup, build_tracker
from megatron_rl.tracking import mlflow as mlflow_tracker
from megatron_rl.tracking.delivery import Delivery
from megatron_rl.tracking.names import LegalNames

RUN = TrackedRun(Path("out"))


class Service(Tracker):
    """A tracker behind a network that is away for the first ``outages`` calls, and never takes ``poison``."""

    remote = True

    def __init__(self, outages: int = 0, poison: int | None = None) -> None:
        super().__init__(RUN)
        self.outages, self.poison = outages, poison
        self.taken: list[object] = []
        self.gate = threading.Event()
        self.gate.set()

    def _take(self, what: object) -> None:
        self.gate.wait(10)
        if self.outages > 0:
            self.outages -= 1
            raise ConnectionError("503 Service Unavailable")
        if what == self.poison:
            raise ValueError("not a metric")
        self.taken.append(what)

    def start(self, resume_step: int | None = None) -> None:
        self._take("start")

    def log(self, metrics, step) -> None:
        self._take(step)

    def close(self, status: str = "finished") -> None:
        self._take(status)


def run(service: Service, steps: int = 5, **times: float) -> Delivery:
    delivery = Delivery(service, "service", **({"first_delay": 0.01, "patience": 5.0} | times))
    delivery.start()
    for step in range(1, steps + 1):
        delivery.log({"loss": 1.0}, step)
    delivery.close("finished")
    return delivery


@pytest.mark.parametrize("outages", [1, 3, 6])
def test_an_outage_is_waited_out_and_nothing_is_lost(outages, caplog) -> None:
    service = Service(outages)
    with caplog.at_level(logging.INFO):
        delivery = run(service)
    assert service.taken == ["start", 1, 2, 3, 4, 5, "finished"]
    assert (delivery.num_lost, delivery.num_failed_tries) == (0, outages)
    assert f"service has every record, after {outages} failed tries" in caplog.text


def test_what_is_refused_is_counted_and_the_rest_arrives(caplog) -> None:
    service = Service(poison=3)
    delivery = run(service)
    assert service.taken == ["start", 1, 2, 4, 5, "finished"]
    assert delivery.num_lost == 1
    assert "service did not take 1 of 7 records of this run; last error: ValueError: not a metric" in caplog.text


def test_a_service_that_never_comes_back_ends_nothing_and_is_told(caplog) -> None:
    service = Service(outages=10**9)
    delivery = run(service, patience=0.1)
    assert service.taken == []
    assert delivery.num_lost == delivery.num_records == 7
    assert "service did not take 7 of 7 records" in caplog.text


def test_training_does_not_wait_for_a_service() -> None:
    service = Service()
    service.gate.clear()
    delivery = Delivery(service, "service")
    delivery.start()
    delivery.log({"loss": 1.0}, 1)  # returns although the service hangs
    assert service.taken == []
    service.gate.set()
    delivery.close()
    assert service.taken == ["start", 1, "finished"]


def test_a_tracker_of_this_machine_is_called_at_once_and_raises_nothing(caplog) -> None:
    service = Service(poison=2)
    service.remote = False
    delivery = Delivery(service, "file")
    delivery.start()
    for step in (1, 2, 3):
        delivery.log({}, step)
        assert service.taken[-1] == (step if step != 2 else 1)
    delivery.close("failed")
    assert "file did not take 1 of 5 records" in caplog.text


def test_mlflow_tells_outages_from_mistakes(tmp_path) -> None:
    tracker = mlflow_tracker.MlflowTracker(TrackedRun(tmp_path))
    outages = [MlflowException("failed with exception"), MlflowException("busy", 6), ConnectionError("refused")]
    assert [tracker.is_outage(error) for error in outages] == [True] * 3
    assert not tracker.is_outage(MlflowException.invalid_parameter_value("Invalid value"))
    assert not tracker.is_outage(KeyError("x"))


NAMES = ["hero@1 (strict)", "hero_1 _strict_", "hero@1 [strict]", "a//b", "a/_b", "../up", "..up", "/root", "end/", "."]
NAMES += ["a/./b", "", "loss/policy", "größe", "x" * 300, "x" * 299, "täg\n", "a\ud800"]


def test_mlflow_takes_every_name_and_none_meets_another() -> None:
    names = LegalNames(mlflow_tracker.ILLEGAL, mlflow_tracker.MAX_NAME_CHARS)
    legal = [names(name) for name in NAMES]
    for name in legal:
        _validate_metric_name(name)
        assert len(name) <= 250
    assert len(set(legal)) == len(NAMES)
    assert [names(name) for name in NAMES] == legal
    assert names("loss/policy") == "loss/policy"
    assert names("hero@1 (strict)") == "hero_1 _strict_"


def test_a_reward_label_that_no_backend_knows_reaches_all_of_them(tmp_path) -> None:
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    group = build_tracker(TrackerGroup.Config(trackers=("jsonl", "mlflow", "tensorboard")), tmp_path)
    group.start()
    group.log_params({"rewards": {"hero@1 (strict)": 1}})
    group.log({"hero@1 (strict)": 0.5, "hero@1 [strict]": 0.25}, 1)
    group.close("killed")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run((tmp_path / "mlflow_run_id").read_text().strip())
    assert sorted(found.data.metrics.values()) == [0.25, 0.5]
    assert found.data.metrics["hero_1 _strict_"] == 0.5
    assert (found.info.status, found.data.params["rewards.hero_1 _strict_"]) == ("KILLED", "1")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Tags()["scalars"]) == 2
    assert '"hero@1 (strict)": 0.5' in (tmp_path / "metrics.jsonl").read_text()
