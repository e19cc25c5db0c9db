"""`LocalEngine`: generation inside the training process, for laptops, tests and CI, on CPU or GPU.

It holds its weights in the per-rank layout of SGLang, so the plan that feeds a server feeds it too. All ranks of
``tp_group`` call `generate` together with the same arguments and get the same answers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field

from megatron_rl.config import ConfigRecord
from megatron_rl.models import Architecture, describe
from megatron_rl.models.module_architecture import ModuleArchitecture
from megatron_rl.reshard import Layout
from megatron_rl.reshard.buckets import shard_dtype
from megatron_rl.rollout.admission import TAGS, check_prompts, check_shards, check_tags
from megatron_rl.rollout.base import (
    ENGINES,
    Completion,
    Conversation,
    Progress,
    RolloutEngine,
    SamplingParams,
    T,
    sample_seed,
)
from megatron_rl.rollout.gate import UpdateGate
from megatron_rl.rollout.local.decoder import Decoder
from megatron_rl.rollout.local.kv_cache import KVCache
from megatron_rl.rollout.local.running import RunningSequence
from megatron_rl.rollout.local.scheduler import PrefillRequest, Scheduler, request_groups
from megatron_rl.rollout.local.sharding import TensorParallel
from megatron_rl.rollout.local.stopping import TextDecoder, stop_table
from megatron_rl.rollout.rounds import hold_rounds

logger = logging.getLogger(__name__)


@ENGINES.register("local")
class LocalEngine(RolloutEngine):
    """A decoder with a KV cache over this rank's shards.

    Args:
        architecture: the model's sizes.
        layout: where the shards of the rollout weights sit; allocated here, written by weight sync.
        rank: this process's global rank in ``layout``.
        dtype: of weights (but those that ``layout`` gives another one), activations and the cache.
        tp_group: the ranks that share one copy of the weights; None = this rank alone.
        eos_token_ids: the model's own end-of-sequence tokens.
        tokenizer: needed for stop texts only.
        device: where to hold and run everything.
        max_running: most sequences generated at a time.
        kv_cache_bytes: upper bound of this rank's KV cache; lowers the number of running sequences where needed.
        prefill_tokens: most prompt tokens computed in one go; a longer prompt goes alone.
        max_context: most tokens of prompt and completion together; None = the model's own limit.

    Raises:
        ValueError: a limit below 1, or the layout does not hold this rank, or its shards do not fit the architecture.
    """

    recomputes = True  # it keeps nothing that is computed from weights

    class Options(ConfigRecord):
        """What ``rollout.options`` may say of it, and of the engine `transformers`."""

        kv_cache_bytes: int = Field(default=2**30, ge=1)
        """Bytes of the key-value cache of one rank; the engine `transformers` has its module's own."""
        prefill_tokens: int = Field(default=8192, ge=1)
        """Most prompt tokens of one forward pass."""
        max_context: int | None = Field(default=None, ge=1)
        """Most tokens of prompt and response together; None = the model's."""

    def __init__(
        self,
        architecture: Architecture,
        layout: Layout,
        rank: int = 0,
        dtype: torch.dtype = torch.float32,
        *,
        tp_group: dist.ProcessGroup | None = None,
        eos_token_ids: Iterable[int] = (),
        tokenizer: TextDecoder | None = None,
        device: torch.device | str = "cpu",
        max_running: int = 256,
        kv_cache_bytes: int = 2**30,
        prefill_tokens: int = 8192,
        max_context: int | None = None,
    ) -> None:
        if max_running < 1 or prefill_tokens < 1:
            raise ValueError(f"max_running={max_running}, prefill_tokens={prefill_tokens}: both must be at least 1")
        self.max_running, self.prefill_tokens = max_running, prefill_tokens
        self.max_context = max_context or architecture.max_positions
        self.architecture, self.rank, self.tokenizer = architecture, rank, tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.device = torch.device(device)
        self._layout, self._gate, self._tp = layout, UpdateGate(), TensorParallel.over(tp_group)
        self._targets = self._allocate(dtype)
        self._asleep: set[str] = set()
        self._decoder = self._make_decoder(dtype, kv_cache_bytes)

    def _allocate(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Storage of this rank's shards, zero."""
        layout, shards = self._layout, self._layout.shards(self.rank)
        if not shards:
            raise ValueError(
                f"rank {self.rank} takes no part in the rollout layout {layout.name!r} (ranks "
                f"{sorted(layout.replica_of)})"
            )
        dtypes = layout.dtypes(dtype)
        tensors = {s.name: torch.zeros(s.shape, dtype=shard_dtype(s, dtypes), device=self.device) for s in shards}
        logger.info("rollout weights: %d tensors, %.1f MB", len(shards), sum(t.nbytes for t in tensors.values()) / 1e6)
        return tensors

    def _make_decoder(self, dtype: torch.dtype, kv_cache_bytes: int) -> Any:
        """What runs prompts and decodes, as `Scheduler` asks for it, over the storage of the shards."""
        model = describe(self.architecture)
        kv_heads, head_dim = model.shared(
            lambda layer: (layer.attention.num_kv_heads, layer.attention.cached_dim), "heads"
        )
        heads = max(kv_heads // self._tp.size, 1)
        cache = KVCache(len(model.layers), heads, head_dim, kv_cache_bytes, dtype, self.device)
        return Decoder(self.architecture, self._targets, self._tp, cache)

    @classmethod
    def for_model(cls, architecture: Architecture) -> type[RolloutEngine]:
        """Without a family there is no description to decode by: the module of `transformers` generates."""
        if cls is LocalEngine and isinstance(architecture, ModuleArchitecture):
            return ENGINES["transformers"]
        return cls

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        cls.Options.parse(options, where="actor.rollout.options")

    @classmethod
    def context(cls, options: Mapping[str, Any], max_positions: int) -> int:
        return options.get("max_context") or max_positions

    @property
    def layout(self) -> Layout:
        return self._layout

    @property
    def policy_version(self) -> int:
        return self._gate.version

    def targets(self) -> Mapping[str, torch.Tensor]:
        return self._targets

    def begin_update(self) -> None:
        if "weights" in self._asleep:
            raise RuntimeError("the rollout weights sleep: call wake(['weights']) before updating them")
        self._gate.begin()

    def write_shards(self, shards: Mapping[str, torch.Tensor], fault: str = "") -> None:
        if fault:
            raise RuntimeError(fault)
        check_shards(shards, {name: self._targets[name].shape for name in shards if name in self._targets})
        for name, shard in shards.items():
            self._targets[name].copy_(shard)

    def finish_update(self) -> str:
        return ""

    def load_shards(self, shards: Mapping[str, torch.Tensor], version: int) -> None:
        check_shards(shards, {name: target.shape for name, target in self._targets.items()})
        super().load_shards(shards, version)

    def commit_update(self, version: int) -> None:
        self._gate.commit(version)

    def abort_update(self, intact: bool) -> None:
        self._gate.abort(intact)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        version = self._gate.require_ready()
        if self._asleep:
            raise RuntimeError(f"the engine sleeps ({', '.join(sorted(self._asleep))}): call wake() before generate()")
        seeds = range(len(prompts)) if seeds is None else seeds
        check_prompts(prompts, seeds, params, self.architecture.vocab, self.max_context, self.tokenizer is not None)
        if not prompts:
            return []
        rows, length = self._size(prompts, params)
        self._decoder.reserve(rows, length)
        results: list[dict[int, Completion]] = [{} for _ in prompts]
        finished = 0

        def emit(sequence: RunningSequence, completion: Completion) -> None:
            nonlocal finished
            results[sequence.prompt][sequence.sample] = completion
            finished += 1
            if progress is not None:
                progress(finished, len(prompts) * params.n)

        sample_seeds = [[sample_seed(params.seed, seed, j) for j in range(params.n)] for seed in seeds]
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else self.eos_token_ids)
        table = stop_table(stops, self.architecture.vocab, self.device)
        for requests in self._batches(request_groups(prompts, sample_seeds, rows, params.stop, self.tokenizer), rows):
            scheduler = Scheduler(self._decoder, params, rows, self.prefill_tokens, table, version, emit)
            scheduler.run(requests)
        return [[samples[j] for j in range(params.n)] for samples in results]

    def converse(self, conversations: Sequence[Conversation[T]], params: SamplingParams) -> list[T]:
        return hold_rounds(self.generate, params, self._tp, conversations)

    def _batches(self, requests: list[PrefillRequest], rows: int) -> list[list[PrefillRequest]]:
        """Requests that share a scheduler, which takes them as ``rows`` become free."""
        return [requests]

    def sleep(self, tags: Sequence[str] = TAGS) -> None:
        check_tags(tags)
        self._asleep.update(tags)
        if "kv_cache" in tags:
            self._decoder.cache.release()
        if "weights" in tags:
            self._gate.empty()
            # The tensors stay the same objects: whoever holds them may write them again after `wake`.
            for target in self._targets.values():
                target.untyped_storage().resize_(0)

    def wake(self, tags: Sequence[str] = TAGS) -> None:
        check_tags(tags)
        if "weights" in tags and "weights" in self._asleep:
            for target in self._targets.values():
                target.untyped_storage().resize_(target.numel() * target.itemsize)
                target.zero_()
        self._asleep.difference_update(tags)

    def close(self) -> None:
        self.sleep()

    def _size(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> tuple[int, int]:
        """Rows and row length of the KV cache for this call."""
        length = max(map(len, prompts)) + params.max_tokens
        rows = min(self.max_running, len(prompts) * params.n)
        fitting = self._decoder.cache.rows(length)
        if fitting < rows:
            logger.info("%d of %d sequences of %d tokens at a time fit the KV cache", fitting, rows, length)
        return min(rows, fitting), length
