"""Weights into real SGLang servers, from one or two trainer ranks over gloo; prints one line for each case.

Everything is imported once; the ranks are forks of this process. The trainer holds the weights as Megatron would
(TP = number of ranks), in fp32; the servers run in bf16, started by the engine itself on rank 0.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from integration.servers import members_of, processes_of
from rollout.rollout_models import architecture_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3MoeConfig

from megatron_rl.models import hf_layout, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.reshard import LocalTransport, P2PTransport
from megatron_rl.rollout import SamplingParams, SGLangEngine
from megatron_rl.rollout.sglang.server import ServerConfig, SGLangServer
from megatron_rl.rollout.sglang.sglang_client import SGLangClient
from megatron_rl.rollout.sglang.weight_transfer import TRANSFERS
from megatron_rl.rollout.sglang.weight_transfer.sharded import ShardedTransfer
from megatron_rl.rollout.sglang.weight_transfer.wire import named_tensors
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory
from megatron_rl.weights.sync import WeightSync

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    # All experts take each token: in bf16 two rounded routers may else choose different ones, and rightly so.
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=32, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=128, norm_topk_prob=True
    ),
}
PROMPTS = [[5, 9, 11, 40, 3], list(range(100, 130)), [7]]
# Of a log-probability: one unit in the last place of a bf16 logit between 2 and 4. The tokens are drawn anew in each
# run; up to 0.0078 was seen.
TOLERANCE = 2.0**-6
PADDED = 1024
MAX_STAGING_BYTES = 1 << 20  # several buckets

Models = dict[int, PreTrainedModel]  # by version
Weights = dict[int, dict[str, torch.Tensor]]


def model_of(family: str, version: int) -> PreTrainedModel:
    torch.manual_seed(version)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(torch.bfloat16).float()


def logical(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors as its files name them: each expert by itself. Not under a process group, where
    transformers writes on one rank only."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


class Job:
    """One rank of a trainer whose weights go to one server."""

    def __init__(self, family: str, rank: int, world: int, python: str, models: Models, weights: Weights) -> None:
        self.family, self.rank, self.world, self.models = family, rank, world, models
        self.weights = weights
        self.architecture = architecture_of(self.models[1].config)
        self.group = dist.group.WORLD if world > 1 else None
        self.source = megatron_layout(self.architecture, RankGrid(ParallelSizes(tp=world), world), PADDED)
        target = rollout_layout(self.architecture, world, [list(range(world))])
        server = {"python": python, "context_length": 512, "max_total_tokens": 4096}
        self.engine = SGLangEngine(
            self.architecture, target, rank, torch.bfloat16, tp_group=self.group, max_running=8, server=server
        )
        self.transport = P2PTransport() if world > 1 else LocalTransport()
        self.sync = self.new_sync()

    def new_sync(self) -> WeightSync:
        return WeightSync(self.source, self.engine, self.rank, self.transport, torch.bfloat16, MAX_STAGING_BYTES)

    def push(self, version: int) -> float:
        tensors = empty_tensors(self.source, self.rank, torch.float32)
        fill(self.source, self.rank, tensors, in_memory(self.weights[version], hf_layout(self.architecture)))
        report = self.sync.push(tensors, version)
        assert report.num_buckets > 1
        assert report.num_oversized == 0
        assert report.peak_bytes <= MAX_STAGING_BYTES, report
        return report.write_s

    def deliver_by(self, name: str, **options: Any) -> None:
        self.engine._transfer = TRANSFERS[name](
            loop=self.engine._loop,
            architecture=self.architecture,
            layout=self.engine.layout,
            rank=self.rank,
            dtype=torch.bfloat16,
            tp_group=self.group,
            **options,
        )
        self.sync = self.new_sync()  # buckets are cut for the copies that a way of writing makes
        self.engine._membership._runs_loader = self.engine._transfer.runs_loader

    def check(self, version: int) -> float:
        """The largest error of a sampled token's log-probability against transformers in bf16."""
        params = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
        answers = self.engine.generate(PROMPTS, params)
        assert self.engine.policy_version == version
        if self.rank:
            return 0.0
        assert httpx.get(f"{self.engine.urls[0]}/model_info").json()["weight_version"] == str(version)
        worst = 0.0
        model = self.models[version].bfloat16()
        for prompt, group in zip(PROMPTS, answers, strict=True):
            for completion in group:
                assert completion.policy_version == version
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + completion.token_ids])).logits[0].float()
                expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
                expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
                worst = max(worst, float((torch.tensor(completion.logprobs) - expected).abs().max()))
        model.float()
        assert worst <= TOLERANCE, worst
        return worst


def checksums(url: str) -> dict[int, dict[str, str]]:
    ranks = httpx.post(f"{url}/weights_checker", json={"action": "checksum"}, timeout=60).json()["ranks"]
    return {rank["parallelism_info"][0]["tp_rank"]: rank["checksums"] for rank in ranks}


class Assassin(ShardedTransfer):
    """Kills the server once, before the second bucket of the first attempt."""

    def __init__(self, victims: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._victims, self._buckets = list(victims), 0

    def write(self, shards: Mapping[str, torch.Tensor], fault: str = "") -> None:
        self._buckets += 1
        if self._buckets == 2:
            for victim in self._victims:
                os.kill(victim, signal.SIGKILL)
        super().write(shards, fault)


def say(job: Job, text: str) -> None:
    if job.rank == 0:
        print(f"ok {job.family} tp{job.world} {text}", flush=True)


def play(job: Job, python: str) -> None:
    start = time.perf_counter()
    job.push(1)
    say(job, f"first push with the start of the server: {time.perf_counter() - start:.1f} s")
    say(job, f"direct, log-probabilities within {job.check(1):.4f}")
    if job.rank == 0:
        parity(job, python)
    if job.group is not None:
        dist.barrier()
    for version, name in enumerate(("flattened_bucket", "disk", "distributed", "direct"), 2):
        job.deliver_by(name, bucket_bytes=1 << 18)
        if name == "direct" and job.rank == 0:  # as a trainer leaves a server that dies in the middle of a push
            job.engine._loop.run(job.engine._membership.members[0].client.begin_weight_update())
        seconds = job.push(version)
        say(job, f"{name}: written in {seconds:.2f} s, log-probabilities within {job.check(version):.4f}")
    restarted(job)


def restarted(job: Job) -> None:
    """The server dies in the middle of a push: it is named, started anew, and serves that push whole."""
    victims = processes_of(members_of(job.engine)[0].server) if job.rank == 0 else []
    job.deliver_by("assassin", victims=victims, bucket_bytes=1 << 16)
    job.push(6)
    say(job, f"server killed in mid-push, log-probabilities within {job.check(6):.4f}")
    left = processes_of(members_of(job.engine)[0].server) if job.rank == 0 else []
    assert not set(victims) & set(left), "the server did not die"
    job.deliver_by("broken")
    with pytest.raises((RuntimeError, ValueError), match=r"model\.norm\.weight"):
        job.push(7)
    with pytest.raises(RuntimeError, match="middle of a weight update"):
        job.engine.generate(PROMPTS, SamplingParams(max_tokens=2))
    job.deliver_by("direct")
    job.push(7)
    say(job, f"wrong weights in the server were refused, the next push healed: within {job.check(7):.4f}")


class Broken(ShardedTransfer):
    """Writes one parameter wrongly into the server."""

    async def complete(self, client: SGLangClient) -> None:
        spoiled = named_tensors({"model.norm.weight": torch.zeros(128, dtype=torch.bfloat16)})
        await client.update_weights_from_tensor([spoiled] * len(self.ranks), load_format="direct")


TRANSFERS.register("assassin")(Assassin)
TRANSFERS.register("broken")(Broken)


def parity(job: Job, python: str) -> None:
    """The server holds, bit for bit, what one holds that loaded the exported Hugging Face folder by itself."""
    with tempfile.TemporaryDirectory() as folder:
        job.models[1].bfloat16().save_pretrained(folder)
        job.models[1].float()
        config = ServerConfig(python=python, context_length=512, max_total_tokens=4096)
        fresh = SGLangServer(
            folder, config, tp=job.world, max_running=8, with_tokenizer=False, load_weights=True, name="fresh"
        )
        with fresh as server:
            assert checksums(server.url) == checksums(job.engine.urls[0])
    say(job, "direct, checksums are those of a server that loaded the exported folder")


def main() -> None:
    family, world, python = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    models = {version: model_of(family, version) for version in range(1, 8)}
    weights = {version: logical(model) for version, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os._exit(one_rank(family, rank, world, folder, python, models, weights))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(map(abs, codes)))


def one_rank(family: str, rank: int, world: int, folder: str, python: str, models: Models, weights: Weights) -> int:
    try:
        if world > 1:
            store = dist.FileStore(str(Path(folder) / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=400))
        job = Job(family, rank, world, python, models, weights)
        with job.engine:
            play(job, python)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    main()
