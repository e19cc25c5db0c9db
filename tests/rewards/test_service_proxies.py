"""Proxies of the environment: never for this machine, otherwise as no_proxy says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from contract_server import ContractServer, true_reward

from megatron_rl.batch import Prompt, Sample
from megatron_rl.rewards import RewardError, build_service
from megatron_rl.rewards.service.proxies import reached_directly

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[ContractServer]:
    server = ContractServer()
    yield server
    server.close()


def ask(url: str) -> list[object]:
    prompt = Prompt([1], text="question", answer="7")
    reward = build_service(url, "http", request={"q": "{response}"}, path="score", retries=0, timeout=20)
    return list(reward([Sample(prompt, [2], [0.0], response_text="abc")]))


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_a_service_on_this_machine_is_asked_past_a_proxy(
    server: ContractServer, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    server.plain["/one"] = lambda body: {"score": true_reward(body["q"])}
    monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody listens there
    for host in ("127.0.0.1", "localhost"):
        assert ask(server.url.replace("127.0.0.1", host) + "/one") == [true_reward("abc")]


def test_another_host_is_asked_through_the_proxy_unless_excepted(
    server: ContractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)  # a proxy is asked for the whole address
    server.plain["http://rewards.example/one"] = lambda body: {"score": 0.25}
    assert ask("http://rewards.example/one") == [0.25]
    monkeypatch.setenv("no_proxy", "example")
    with pytest.raises(RewardError, match=r"ConnectError|did not answer"):
        ask("http://rewards.example/one")


@pytest.mark.parametrize(
    ("url", "no_proxy", "direct"),
    [
        *((f"http://{host}:8000", "", True) for host in ("127.0.0.1", "127.8.8.8", "[::1]", "0.0.0.0", "LOCALHOST")),
        *((f"http://{host}:8000", "", True) for host in ("x.localhost", "[::ffff:127.0.0.1]", "localhost.")),
        *((f"http://{host}", "", False) for host in ("10.0.0.5", "localhost.example", "128.0.0.1", "[::2]")),
        ("http://10.0.0.5", "10.0.0.0/8", True),
        ("http://11.0.0.5", "10.0.0.0/8, 192.168.0.0/16", False),
        ("http://10.0.0.5", "10.0.0.5", True),
        ("http://[fd00::5]:80", "fd00::/8", True),
        ("https://a.corp", ".corp", True),
        ("https://a.corp", "corp", True),
        ("https://a.corp", "*.corp", True),
        ("https://acorp", "corp", False),
        ("https://a.corp:8443", "a.corp:8443", True),
        ("https://a.corp", "a.corp:8443", False),
        ("https://a.corp", "b.corp, *", True),
        ("https://a.corp", "b.corp c.corp", False),
    ],
)
def test_no_proxy(url: str, no_proxy: str, direct: bool) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        assert reached_directly(url, {name: no_proxy}) is direct
