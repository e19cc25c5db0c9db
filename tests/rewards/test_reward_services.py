"""Reward services over real HTTP: each product is asked in its own schema, and its answers are read in order."""

from __future__ import annotations

import shutil
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from contract_server import ContractServer, true_reward

from megatron_rl import RewardModel
from megatron_rl.batch import Batch, Prompt, Sample
from megatron_rl.config import ConfigError
from megatron_rl.rewards import NoReward, RewardConfig, RewardError, build_reward, build_service


@pytest.fixture
def server() -> Iterator[ContractServer]:
    server = ContractServer()
    yield server
    server.close()


def samples(count: int, answer: object = "7") -> list[Sample]:
    prompts = [Prompt([1], text=f"question {i}: ", answer=answer, index=10 + i) for i in range(count)]
    return [Sample(p, [2], [0.0], response_text="a" * (3 * i + 1)) for i, p in enumerate(prompts)]


def expected(batch: list[Sample]) -> list[float]:
    return [true_reward(s.prompt.text + s.response_text) for s in batch]


KINDS = {
    "vllm classify": ("vllm", "/vllm", {"model": "rm"}),
    "vllm pooling": ("vllm", "/vllm", {"model": "rm", "endpoint": "pooling"}),
    "vllm score": ("vllm", "/vllm", {"model": "rm", "endpoint": "score"}),
    "sglang": ("sglang", "/sglang", {}),
    "tei": ("tei", "/tei", {"label": "good"}),
    "tgi": ("tgi", "/tei", {"label": "good"}),
    "http": ("http", "/own", {"request": {"rows": "{texts}"}, "path": "out[*].value"}),
    "http one by one": ("http", "/one", {"request": {"q": "{prompt}", "a": ["{response}"]}, "path": "$.score"}),
}


@pytest.mark.parametrize("case", KINDS)
def test_each_product_takes_our_requests_and_rewards_keep_their_order(server: ContractServer, case: str) -> None:
    server.plain["/own"] = lambda body: {"out": [{"value": true_reward(text)} for text in body["rows"]]}
    server.plain["/one"] = lambda body: {"score": true_reward(body["q"] + body["a"][0])}
    kind, path, options = KINDS[case]
    batch = samples(11)
    reward = build_service(server.url + path, kind, batch_size=4, retries=0, **options)
    assert reward(batch) == pytest.approx(expected(batch))
    assert len(server.bodies) == (11 if case == "http one by one" else 3)
    metrics = reward.take_metrics()
    assert metrics[f"reward_service/{kind}/samples_count"] == 11
    assert metrics[f"reward_service/{kind}/retries_count"] == 0
    assert reward.take_metrics()[f"reward_service/{kind}/samples_count"] == 0


def test_two_texts_are_a_batch_and_not_a_pair_for_text_embeddings_inference(server: ContractServer) -> None:
    batch = samples(2)
    assert build_service(server.url + "/tei", "tei", label="good")(batch) == pytest.approx(expected(batch))
    assert server.bodies[0]["inputs"] == [[s.prompt.text + s.response_text] for s in batch]


def test_judge_reads_the_last_grade_and_brings_it_to_0_and_1(server: ContractServer) -> None:
    batch = samples(2)
    assert build_service(server.url, "judge", model="j", rubric="Be right.")(batch) == [0.75, 0.75]
    system, user = server.bodies[0]["messages"]
    assert "Be right." in system["content"]
    assert batch[0].response_text in user["content"]


def test_criteria_of_a_judge_are_weighted_and_each_is_logged(server: ContractServer) -> None:
    options = {
        "url": server.url,
        "model": "j",
        "criteria": {"correct": "right", "brief": "short"},
        "weights": {"correct": 3.0},
    }
    reward = build_reward([RewardConfig(name="judge", label="rubric", options=options)])
    batch = Batch(samples=samples(2))
    RewardModel(reward).score().run(batch)
    assert batch.sequences["rewards"].tolist() == pytest.approx([(3 * 0.8 + 0.5) / 4] * 2)
    assert batch.samples[0].reward_parts == pytest.approx({"rubric": 0.725, "rubric/correct": 0.8, "rubric/brief": 0.5})
    assert batch.metrics["reward_parts/rubric/brief/mean"] == pytest.approx(0.5)


def test_a_judge_without_a_grade_has_no_reward(server: ContractServer) -> None:
    reward = build_service(server.url, "judge", model="j", rubric="r", question="none", retries=1, retry_wait=0.01)
    with pytest.raises(RewardError, match=r"no line 'Score: NUMBER'.*prompt 10 'question 0"):
        reward(samples(1))
    assert len(server.bodies) == 2


def test_reward_model_of_an_address_is_a_stage_and_drops_what_has_no_reward(server: ContractServer) -> None:
    server.too_long = 30
    batch = Batch(samples=samples(8))
    kept = [s for s in batch.samples if len(s.prompt.text + s.response_text) <= 30]
    model = RewardModel(server.url + "/sglang", kind="sglang", on_failure="drop", retries=0)
    model.score().run(batch)
    assert 0 < len(kept) < 8
    assert batch.samples == kept
    assert batch.sequences["rewards"].tolist() == pytest.approx(expected(kept))
    assert [s.reward for s in kept] == pytest.approx(expected(kept))
    assert batch.metrics["reward_service/sglang/dropped_count"] == 8 - len(kept)


def test_nothing_is_left_when_no_sample_has_a_reward(server: ContractServer) -> None:
    server.too_long = 1
    model = RewardModel(server.url + "/sglang", kind="sglang", on_failure="drop", retries=0)
    with pytest.raises(RewardError, match="could not be computed for any of 3 samples"):
        model.score().run(Batch(samples=samples(3)))


def test_weighted_sum_of_a_sample_without_one_of_its_rewards_is_no_reward(server: ContractServer) -> None:
    server.too_long = 15
    options = {"url": server.url + "/sglang", "on_failure": "drop", "retries": 0}
    reward = build_reward(
        [RewardConfig(name="sglang", weight=2.0, options=options), RewardConfig(name="number", weight=0.5)]
    )
    batch = samples(3)
    batch[0].response_text = "7"
    first, *others = reward(batch)
    assert first == pytest.approx(2 * true_reward(batch[0].prompt.text + "7") + 0.5)
    assert all(isinstance(other, NoReward) for other in others)
    assert batch[1].reward_parts == {"number": 0.0}


def test_answers_are_kept_on_disk_by_what_was_asked(server: ContractServer, tmp_path: Path) -> None:
    options = {"model": "rm", "cache_dir": str(tmp_path)}
    batch = samples(5)
    assert build_service(server.url + "/vllm", "vllm", **options)(batch) == pytest.approx(expected(batch))
    with next(tmp_path.glob("*.jsonl")).open("a") as file:
        file.write('{"key": "half a li')
    again = build_service(server.url + "/vllm", "vllm", **options)
    assert again(batch[::-1]) == pytest.approx(expected(batch)[::-1])
    assert len(server.bodies) == 1
    assert again.take_metrics()["reward_service/vllm/cache_hits_count"] == 5
    build_service(server.url + "/vllm", "vllm", **options | {"model": "another"})(batch)
    assert len(server.bodies) == 2


READINGS = {
    "http": ("http", {"request": {"q": "{prompt}"}, "path": "low"}, {"path": "high"}),
    "judge": (
        "judge",
        {"model": "j", "criteria": {"correct": "right", "brief": "short"}, "weights": {"correct": 3.0}},
        {"weights": {"brief": 3.0}},
    ),
}


@pytest.mark.parametrize("case", READINGS)
def test_kept_answers_are_those_of_the_same_way_to_read_them(server: ContractServer, tmp_path: Path, case: str) -> None:
    server.plain["/http"] = lambda body: {"low": -1.0, "high": 1.0}
    kind, options, other = READINGS[case]
    url, cache = server.url + ("/http" if kind == "http" else ""), {"cache_dir": str(tmp_path)}

    def reward(**changes: object) -> object:
        return build_service(url, kind, **options | cache | changes)(samples(1))

    first, second = reward(), reward(**other)
    assert first != second
    asked = len(server.bodies)
    assert (reward(), reward(**other)) == (first, second)
    assert reward(timeout=5.0, on_failure="drop") == first
    assert len(server.bodies) == asked


def test_identical_texts_are_asked_for_once(server: ContractServer) -> None:
    batch = [samples(1)[0] for _ in range(6)]
    assert build_service(server.url + "/sglang", "sglang")(batch) == pytest.approx([expected(batch)[0]] * 6)
    assert [len(body["text"]) for body in server.bodies] == [1]


def test_requests_under_way_are_bounded(server: ContractServer) -> None:
    build_service(server.url + "/sglang", "sglang", batch_size=1, concurrency=3)(samples(20))
    assert 1 < server.most_at_once <= 3


def test_token_comes_from_the_environment_only(server: ContractServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "s3cret"
    options = {"token_env": "REWARD_TOKEN", "retries": 0}
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="token_env names 'REWARD_TOKEN', which is not set"):
        build_service(server.url + "/sglang", "sglang", **options)
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    assert len(build_service(server.url + "/sglang", "sglang", **options)(samples(2))) == 2
    with pytest.raises(RewardError, match=r"status 401.*set token_env"):
        build_service(server.url + "/sglang", "sglang", retries=0)(samples(2))
    with pytest.raises(ConfigError, match="no credentials in the address"):
        build_service("http://me:s3cret@host:1", "sglang")


def test_certificates_are_verified(server: ContractServer, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    subprocess.run(made, check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http://", "https://") + "/sglang"
    with pytest.raises(RewardError, match="CERTIFICATE_VERIFY_FAILED"):
        build_service(url, "sglang", retries=0)(samples(2))
    assert server.bodies == []
    assert build_service(url, "sglang", ca_file=certificate)(samples(2)) == pytest.approx(expected(samples(2)))


def test_verification_cannot_be_switched_off(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ca_file .* does not exist"):
        build_service("https://127.0.0.1:1", "sglang", ca_file=str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="unknown key 'verify'"):
        build_service("https://127.0.0.1:1", "sglang", verify=False)


def test_a_reward_inside_an_event_loop_works(server: ContractServer) -> None:
    import asyncio

    async def notebook() -> list[float | NoReward]:
        return build_service(server.url + "/sglang", "sglang")(samples(2))

    assert asyncio.run(notebook()) == pytest.approx(expected(samples(2)))


def test_several_classes_need_their_index_or_label(server: ContractServer) -> None:
    server.plain["/classify"] = lambda body: [{"embedding": [0.25, 0.75]} for _ in body["text"]]
    assert build_service(server.url, "sglang", class_index=1)(samples(2)) == [0.75, 0.75]
    with pytest.raises(RewardError, match="class_index=2, but the model gives 2"):
        build_service(server.url, "sglang", class_index=2)(samples(2))
    with pytest.raises(RewardError, match=r"expected one class, the server gave \['bad', 'good'\]: set label"):
        build_service(server.url + "/tei", "tei")(samples(2))


def test_unknown_kinds_and_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs kind, one of vllm, sglang"):
        RewardModel("http://127.0.0.1:1")
    with pytest.raises(ConfigError, match="kind='vlm' is none of them"):
        RewardModel("http://127.0.0.1:1", kind="vlm")
    with pytest.raises(ConfigError, match="unknown key 'modle'; did you mean 'model'"):
        RewardModel("http://127.0.0.1:1", kind="vllm", modle="x")
    with pytest.raises(ConfigError, match="a judge needs a rubric"):
        RewardModel("http://127.0.0.1:1", kind="judge", model="x")


def test_templates_do_not_look_again_at_what_they_filled_in(server: ContractServer) -> None:
    server.plain["/one"] = lambda body: {"score": 1}
    (sample,) = samples(1)
    sample.response_text = 'tell me "{answer}" {"json": 1}'
    build_service(server.url + "/one", "http", request={"all": "{prompt}|{response}|{answer} {x}"})([sample])
    assert server.bodies == [{"all": 'question 0: |tell me "{answer}" {"json": 1}|7 {x}'}]
