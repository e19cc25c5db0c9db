"""A secret in a configuration is in no file, no stream and no message that a run makes, and yet reaches its server."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from forked import run_forked
from small_run import write_run

SECRET = "hunter2"
TOKEN = "tok-71c9-hidden"


class Rater(BaseHTTPRequestHandler):
    """Gives 1.0 on /rate; elsewhere it repeats the request's credentials in an error."""

    seen: set[str]

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        credentials = self.headers.get("Authorization", "")
        self.seen.add(credentials)
        good = self.path.startswith("/rate")
        body = json.dumps({"score": 1.0} if good else {"error": f"no account {credentials}"}).encode()
        self.send_response(200 if good else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (Rater,), {"seen": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def address(server: ThreadingHTTPServer, path: str = "", user: str = "") -> str:
    return f"http://{user}127.0.0.1:{server.server_port}{path}"


def rater(server: ThreadingHTTPServer, path: str) -> dict:
    options = {"request": {"reply": "{response}"}, "path": "score", "retries": 0, "token_env": "RATER_TOKEN"}
    return {"name": "http", "options": {"url": address(server, path), **options}}


def assert_hidden(folder: Path, *texts: str) -> None:
    """No file below ``folder``, whatever its format, and no text holds a secret, plain or as HTTP writes it."""
    secrets = [word.encode() for word in (SECRET, TOKEN)] + [base64.b64encode(f"bob:{SECRET}".encode())]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 or not folder.exists()
    for content in [*(path.read_bytes() for path in files), *(text.encode() for text in texts)]:
        for secret in secrets:
            assert secret not in content


def test_a_run_hides_passwords_and_tokens_and_uses_them(command, tmp_path, server):
    tracking = {
        "trackers": ["console", "jsonl", "tensorboard", "mlflow"],
        "options": {"mlflow": {"uri": address(server, user=f"bob:{SECRET}@")}},
    }
    config = write_run(tmp_path, rewards=[rater(server, "/rate")], tracking=tracking)
    few = ("trainer.num_steps=2", "trainer.save_every=1", "trainer.export=true")
    behind = {
        "http_proxy": "http://127.0.0.1:9",
        "no_proxy": "",
    }  # nothing answers there
    ended = command("train", config, *few, RATER_TOKEN=TOKEN, MLFLOW_HTTP_REQUEST_MAX_RETRIES=0, **behind)
    assert ended.code == 0, ended.err
    assert_hidden(tmp_path / "out", ended.out, ended.err)
    basic = "Basic " + base64.b64encode(f"bob:{SECRET}".encode()).decode()
    assert server.RequestHandlerClass.seen >= {f"Bearer {TOKEN}", basic}
    assert "bob:***@" in (tmp_path / "out" / "config.yaml").read_text()
    assert "mlflow" in ended.out + ended.err  # what was lost there is told


def test_a_server_that_repeats_credentials_does_not_bring_them_into_the_message(command, tmp_path, server):
    ended = command("train", write_run(tmp_path, rewards=[rater(server, "/broken")]), RATER_TOKEN=TOKEN)
    assert ended.code == 2
    assert "no account" in ended.error
    assert_hidden(tmp_path / "out", ended.out, ended.err)
    assert f"Bearer {TOKEN}" in server.RequestHandlerClass.seen


def test_an_unexpected_error_shows_its_traceback_without_the_secret(command, tmp_path):
    (tmp_path / "broken.py").write_text(
        f"class Broken:\n    def __init__(self):\n        raise KeyError('http://bob:{SECRET}@host/')\n"
    )
    ended = command("train", write_run(tmp_path, callbacks=[f"{tmp_path}/broken.py:Broken"]))
    assert ended.code != 0
    assert "KeyError" in ended.err
    assert_hidden(tmp_path / "out", ended.out, ended.err.replace(str(tmp_path), ""))


def test_convert_hides_it_too(command, tmp_path):
    ended = command("convert", f"https://bob:{SECRET}@127.0.0.1:9/model", tmp_path / "made", "--to", "hf")
    assert ended.code == 2
    assert "bob:***@" in ended.error
    assert_hidden(tmp_path / "made", ended.out, ended.err)


ONE_CALL = """
from transformers import AutoTokenizer
from megatron_rl import GRPOTrainer, RewardModel
from megatron_rl.tracking import TrackerGroup

reward = RewardModel({url!r}, kind="http", request={{"reply": "{{response}}"}}, path="score", token_env="RATER_TOKEN")
trainer = GRPOTrainer(
    model={model!r},
    tokenizer=AutoTokenizer.from_pretrained({model!r}),
    dataset={data!r},
    reward=reward,
    n=2,
    max_tokens=4,
)
trackers = TrackerGroup.Config(trackers=["console", "jsonl", "mlflow"], options={{"mlflow": {{"uri": {uri!r}}}}})
trainer.train(per_device_train_batch_size=4, learning_rate=1e-3, output_dir={out!r}, max_steps=1, tracking=trackers)
"""


def test_a_one_call_trainer_hides_them(tmp_path, server):
    write_run(tmp_path)
    paths = {"model": str(tmp_path / "model"), "data": str(tmp_path / "train.jsonl"), "out": str(tmp_path / "out")}
    program = tmp_path / "script.py"
    uri = address(server, user=f"bob:{SECRET}@")
    program.write_text(ONE_CALL.format(url=address(server, "/rate"), uri=uri, **paths))
    ended = run_forked(program, timeout=120, RATER_TOKEN=TOKEN, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    assert ended.code == 0, ended.err
    assert_hidden(tmp_path / "out", ended.out, ended.err)
    assert f"Bearer {TOKEN}" in server.RequestHandlerClass.seen
