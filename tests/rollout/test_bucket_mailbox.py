"""Buckets through a mailbox into the parameters of a model in another process, as in a rank of an SGLang server.

The reader runs the real receiver; only `sglang.srt.utils.MultiprocessingSerializer`, which SGLang's environment has, is
three lines of pickle here. Real servers: tests/integration/test_sglang_delivery.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_rl.parallel.agreement import Agreement, Alone
from megatron_rl.rollout.sglang.server import SERVER_MODULES
from megatron_rl.rollout.sglang.weight_transfer.bucket_mailbox import Mailbox
from megatron_rl.rollout.sglang.weight_transfer.bucket_relay import BucketRelay
from megatron_rl.rollout.sglang.weight_transfer.wire import named_tensors, shared_buffer

SERIALIZER = """
import base64, pickle
class MultiprocessingSerializer:
    @staticmethod
    def deserialize(text):
        return pickle.loads(base64.b64decode(text))
"""
READER = """
import sys, torch
from megatron_rl_receiver import receive
model = torch.nn.Linear(4, 3).bfloat16()
receive(model, [(sys.argv[1], torch.zeros(1))])
torch.save(model.state_dict(), sys.argv[2])
"""
SENDER = """
import sys, time
from megatron_rl.rollout.sglang.weight_transfer.bucket_mailbox import Mailbox
box = Mailbox(64)
print(box.path, flush=True)
time.sleep(600)
"""


@pytest.fixture
def paths(tmp_path: Path) -> str:
    package = tmp_path / "sglang" / "srt"
    package.mkdir(parents=True)
    (package / "utils.py").write_text(SERIALIZER)
    return os.pathsep.join([str(tmp_path), str(SERVER_MODULES)])


@pytest.fixture
def box() -> Iterator[Mailbox]:
    mailbox = Mailbox(4096)
    yield mailbox
    mailbox.close()


def start_reader(path: str, result: Path, paths: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", READER, path, str(result)], env=os.environ | {"PYTHONPATH": paths})


def wait_until_read(box: Mailbox) -> None:
    deadline = time.monotonic() + 120
    while not box.is_read and time.monotonic() < deadline:
        time.sleep(0.01)
    assert box.is_read


def never() -> list[bytes]:
    raise AssertionError("mails of a bucket that does not go were made")


def mail(**tensors: torch.Tensor) -> bytes:
    return named_tensors(tensors, shared=True).encode()


def test_buckets_are_written_one_after_another_from_memory_that_is_used_again(box, paths, tmp_path):
    path, memory = box.path, shared_buffer(24).view(torch.bfloat16)
    reader = start_reader(path, tmp_path / "result", paths)
    memory.copy_(torch.arange(12))
    box.post(mail(weight=memory.view(3, 4)))
    wait_until_read(box)
    memory.fill_(7)  # of the next bucket; the first was read
    box.post(mail(bias=memory[:3]))
    assert not Path(path).exists()  # nothing is left behind by whoever is killed from here on
    wait_until_read(box)
    assert box.error == ""
    box.end()
    assert reader.wait(60) == 0
    written = torch.load(tmp_path / "result")
    assert torch.equal(written["weight"], torch.arange(12).view(3, 4).bfloat16())
    assert torch.equal(written["bias"], torch.full((3,), 7).bfloat16())


@pytest.mark.parametrize(
    ("name", "shape", "error"),
    [("weight", (4, 3), r"weight has shape \[3, 4\], but \[4, 3\] came"), ("wieght", (3, 4), "KeyError")],
)
def test_what_cannot_be_written_is_an_error_for_the_sender_and_not_the_end_of_the_reader(
    name, shape, error, paths, tmp_path
):
    relay = BucketRelay(Agreement(Alone()), {name: shape}, num_servers=1)
    reader = start_reader(*relay.paths, tmp_path / "result", paths)
    relay.put([mail(**{name: shared_buffer(24).view(torch.bfloat16).view(shape)})])
    assert not relay.post(True, never, lambda: "")
    assert re.search(error, relay.error)
    relay.close()
    assert reader.wait(60) == 0


def test_a_reader_whose_sender_was_killed_goes_on_without_it(paths, tmp_path):
    with subprocess.Popen([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        reader = start_reader(sender.stdout.readline().strip(), tmp_path / "result", paths)
        deadline = time.monotonic() + 120
        while "megatron_rl_" not in Path(f"/proc/{reader.pid}/maps").read_text() and time.monotonic() < deadline:
            time.sleep(0.1)  # until it has mapped the mailbox
        sender.kill()
        sender.wait()  # a zombie would still be there
        assert reader.wait(60) == 0


def test_a_request_that_failed_ends_the_wait_for_its_readers():
    relay = BucketRelay(Agreement(Alone()), {"w": (1,)}, num_servers=2)
    relay.put([b"never read"] * 2)
    assert not relay.post(True, never, lambda: "the server has ended")
    relay.close()


def test_a_bucket_that_no_mailbox_holds_leaves_the_relay_once_the_last_one_was_read(paths, tmp_path):
    relay = BucketRelay(Agreement(Alone()), {"weight": (3, 4)}, num_servers=1)
    reader = start_reader(*relay.paths, tmp_path / "result", paths)
    relay.put([mail(weight=shared_buffer(24).view(torch.bfloat16).view(3, 4).fill_(5))])
    assert not relay.post(False, never, lambda: "")
    relay.close()
    assert reader.wait(60) == 0
    assert torch.equal(torch.load(tmp_path / "result")["weight"], torch.full((3, 4), 5).bfloat16())


def test_a_sender_that_died_before_the_reader_looked_is_noticed_too(paths, tmp_path):
    with subprocess.Popen([sys.executable, "-c", SENDER], stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        path = sender.stdout.readline().strip()
        sender.kill()
        sender.wait()  # before the reader looks for the first time
        assert start_reader(path, tmp_path / "result", paths).wait(60) == 0


def test_a_reader_of_an_update_that_was_given_up_before_ends_at_once(paths, tmp_path):
    gone = Mailbox(64)
    path = gone.path
    gone.close()
    assert start_reader(path, tmp_path / "result", paths).wait(60) == 0
