"""`receive`: SGLang's custom weight loader for a whole update: one request, in which buckets come through a mailbox.

A request for each bucket would cost SGLang 12 to 20 ms of its own in two tensor-parallel ranks, whatever it holds. This
runs in each rank of a server that was started with `--custom-weight-loader megatron_rl_receiver.receive`, and imports
nothing of megatron_rl: the server's environment need not have it. `weight_transfer/bucket_mailbox.py` is the other end.

Mailbox, a file in shared memory of one sender and one reader:

    8 words of 64 bits (`POSTED` ...) | `ERROR_BYTES` for the reader's error | the mail

A mail is a bucket: lines of base64, each a list of (parameter, tensor) as /update_weights_from_tensor takes it. Nothing
is raised: an exception here would end the server. The sender reads the error, and gives the update up.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

POSTED, READ, LENGTH, ERROR, SENDER, NAMESPACE = range(6)  # words; READ and ERROR are the reader's
WORDS, ERROR_BYTES = 8, 1024
MAIL = 8 * WORDS + ERROR_BYTES  # where it begins
ENDED = -1  # in POSTED: no more buckets will come
NAP, LOOK = 2e-4, 1.0  # seconds between two looks at the mailbox, and at whether the sender still runs


def receive(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Write buckets into the parameters of ``model`` until the sender ends the update or is gone.

    Args:
        named_tensors: one; its name is the path of this rank's mailbox, its values mean nothing.
    """
    ((path, _),) = named_tensors
    try:
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        os.unlink(path)  # so that nothing is left behind, whoever is killed
    except FileNotFoundError:
        return  # the update was given up before it began
    words = memoryview(memory)[: 8 * WORDS].cast("q")
    parameters = dict(model.named_parameters())
    while words[ERROR] == 0 and _wait(words):
        try:
            for line in memory[MAIL : MAIL + words[LENGTH]].splitlines():
                _write(parameters, line)
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[:ERROR_BYTES]
            memory[8 * WORDS : 8 * WORDS + len(text)] = text
            words[ERROR] = len(text)
        time.sleep(0)  # orders what was written before the count: gives up the interpreter's lock and takes it back
        words[READ] += 1
    words.release()
    memory.close()


def namespace() -> int:
    """Of process ids: the sender's mean something in the same one only. 0 = unknown."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _wait(words: memoryview) -> bool:
    """Whether another bucket has come."""
    sender = Path(f"/proc/{words[SENDER]}")
    visible, looked = words[NAMESPACE] == namespace() != 0, time.monotonic()
    while words[POSTED] == words[READ]:
        time.sleep(NAP)
        if time.monotonic() > looked + LOOK:
            looked = time.monotonic()
            if visible and not sender.exists():
                return False
    return words[POSTED] != ENDED


def _write(parameters: dict[str, torch.nn.Parameter], line: bytes) -> None:
    from sglang.srt.utils import MultiprocessingSerializer

    with torch.no_grad():
        tensors = MultiprocessingSerializer.deserialize(line.decode())
        for name, tensor in tensors:
            if parameters[name].shape != tensor.shape:
                raise ValueError(f"{name} has shape {list(parameters[name].shape)}, but {list(tensor.shape)} came")
            parameters[name].data.copy_(tensor)
        if tensors and tensors[0][1].is_cuda:
            torch.cuda.synchronize()  # the sender uses the memory again once this is counted as read
