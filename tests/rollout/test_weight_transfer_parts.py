"""What transfers to SGLang are made of, without a server: requests, payloads, whole tensors, checksums."""

from __future__ import annotations

import base64
import io
import pickle
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch
from models.oracle import ALL, random_logical
from rollout.rollout_models import random_model
from rollout.sglang_stand_in import checksum

from megatron_rl.models import Architecture, hf_layout, logical_tensors, rollout_layout
from megatron_rl.rollout.sglang.sglang_client import ServerError
from megatron_rl.rollout.sglang.weight_transfer.checksums import server_checksum
from megatron_rl.rollout.sglang.weight_transfer.full import FullTensors
from megatron_rl.rollout.sglang.weight_transfer.proof import UsualLayout, compare
from megatron_rl.rollout.sglang.weight_transfer.wire import flattened_bucket, named_tensors, requests, serialize
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory


def opened(payload: str) -> object:
    return pickle.load(io.BytesIO(base64.b64decode(payload)))


def test_requests_keep_the_order_and_the_limit_except_for_what_is_larger_alone() -> None:
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1}
    assert requests(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert requests(sizes, 100) == [["a", "b", "c", "d", "e"]]


def test_a_payload_carries_each_tensor_and_not_the_rest_of_its_storage() -> None:
    large = torch.arange(1 << 16, dtype=torch.bfloat16)
    payload = named_tensors({"part": large[8:12], "whole": torch.ones(3)})
    assert len(payload) < 4000
    (first, part), (second, whole) = opened(payload)
    assert (first, second) == ("part", "whole")
    assert torch.equal(part, large[8:12])
    assert torch.equal(whole, torch.ones(3))


def test_a_shared_payload_is_mapped_by_another_process_and_written_anew_for_the_next() -> None:
    reader = "import base64, pickle, sys, torch; print(pickle.loads(base64.b64decode(sys.stdin.read()))[0][1].tolist())"
    weight = torch.arange(1 << 16, dtype=torch.float32)
    for value in (1.0, 2.0):
        weight.fill_(value)
        payload = named_tensors({"w": weight}, shared=True)
        assert len(payload) < 2000
        ended = subprocess.run(
            [sys.executable, "-c", reader], input=payload, capture_output=True, text=True, check=True
        )
        assert ended.stdout.strip() == str([value] * (1 << 16))
    assert weight.is_shared()
    assert torch.multiprocessing.get_sharing_strategy() == "file_descriptor"


def test_a_flattened_bucket_says_where_each_tensor_lies() -> None:
    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(7), "c": torch.randn(5, 3).T}
    content = opened(serialize(flattened_bucket(tensors)))
    for place in content["metadata"]:
        bits = content["flattened_tensor"][place.start_idx : place.end_idx]
        assert torch.equal(bits.view(place.dtype).reshape(place.shape), tensors[place.name])


@pytest.mark.parametrize("architecture", ALL, ids=lambda a: a.family)
@pytest.mark.parametrize("bucket_bytes", [1, 4096, 1 << 30])
def test_whole_tensors_are_those_of_the_trainer_whatever_the_buckets(
    architecture: Architecture, bucket_bytes: int
) -> None:
    layout = rollout_layout(architecture, 1, [[0]])
    full = {name: tensor.bfloat16() for name, tensor in random_logical(architecture).items()}
    shards = empty_tensors(layout, 0, torch.bfloat16)
    fill(layout, 0, shards, in_memory(full, hf_layout(architecture)))
    whole = FullTensors(layout, logical_tensors(architecture), [0], 0, None, torch.bfloat16, bucket_bytes)
    for _ in range(2):  # the second time from the plans of the first
        found = {}
        for tensors in whole.collect(shards):
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= bucket_bytes
            found |= {name: tensor.clone() for name, tensor in tensors.items()}
        assert found.keys() == full.keys()
        assert all(torch.equal(found[name], full[name]) for name in full)


def test_checksums_that_differ_are_missing_or_are_derived_name_the_parameter() -> None:
    state = {name: tensor for name, tensor in random_model("llama").state_dict().items() if "norm" in name}

    def sums(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
        return {name: server_checksum(tensor, "cpu") for name, tensor in weights.items()}

    held = sums(state)
    compare("here", held, held)
    name = "model.layers.1.input_layernorm.weight"
    with pytest.raises(ServerError, match=f"1 parameters differ .'{name}'"):
        compare("here", held, sums(state | {name: state[name] + 1}))
    without = {other: value for other, value in held.items() if other != name}
    with pytest.raises(ServerError, match=f"1 are missing .'{name}'"):
        compare("here", without, held)
    with pytest.raises(ServerError, match=f"holds .'{name}'. beside the weights delivered: derived"):
        compare("here", held, without)


def test_of_a_usual_layout_equal_checksums_alone_prove_and_what_they_proved_stays_due() -> None:
    usual, held = UsualLayout(), {"norm": "1", "qkv_proj": "2", "c_attn": "3"}
    reason = usual.compare("here", held, {"norm": "1", "qkv_proj": "2", "c_attn": "4"})
    assert "here provably holds 2 of 3 parameters" in reason
    assert "['c_attn']" in reason
    assert usual.compare("here", held, held) == ""
    with pytest.raises(ServerError, match=r"here does not hold the weights delivered: \['qkv_proj'\] differ"):
        usual.compare("here", held, held | {"qkv_proj": "5"})


# Of `gpu_tensor_hash` itself (SGLang 0.5.23; the same in 0.5.21), run by Triton's interpreter.
KERNEL_HASHES = [
    ((1,), torch.bfloat16, "1847807bf60c38c4"),
    ((3, 5), torch.bfloat16, "6902908ec84f4dfc"),
    ((33,), torch.float32, "7b8d16af96352fd5"),
    ((8192,), torch.float32, "25e18430e320deed"),
    ((8193,), torch.float32, "6c9a99f7cc267dff"),
    ((97, 1021), torch.bfloat16, "ecdf8e9537083dd2"),
    ((3, 64, 700), torch.float32, "6c8993a8980eec83"),
]


@pytest.mark.parametrize(("shape", "dtype", "expected"), KERNEL_HASHES, ids=lambda v: str(v).replace(" ", ""))
def test_the_checksum_of_a_cuda_server_is_that_of_its_own_kernel(
    shape: tuple[int, ...], dtype: torch.dtype, expected: str
) -> None:
    numel = torch.Size(shape).numel()
    # Exact in float32 on every machine, which sin() is not.
    tensor = ((torch.arange(numel) * 7919 % 65521).float() / 1024 - 30).to(dtype).view(shape)
    assert server_checksum(tensor, "cuda") == checksum(tensor, "cuda") == expected
    changed = tensor.clone()
    changed.view(-1)[numel // 2] += 1
    assert server_checksum(changed, "cuda") == checksum(changed, "cuda") != expected
    assert server_checksum(tensor, "cpu") == checksum(tensor, "cpu")


def test_what_a_cuda_server_would_hash_in_several_launches_is_hashed_alike() -> None:
    tensor = torch.randn(5 * 8192 * 3 + 7)
    assert server_checksum(tensor, "cuda") == checksum(tensor, "cuda")
    assert server_checksum(torch.empty(0), "cuda") == f"{0:016x}"
