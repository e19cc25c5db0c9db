"""`RolloutEngine`: the interface through which workers and weight sync use any engine that generates text.

An engine says in what layout it holds its weights, takes new ones between `begin_update` and `commit_update` (or
`abort_update`), and turns token ids into token ids with their log-probabilities. Workers build none of its parts
themselves: ``ENGINES[name](...)`` builds one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import torch
from pydantic import Field

from megatron_rl.config import ConfigRecord
from megatron_rl.config.ranges import Seed, TokenId
from megatron_rl.models import Architecture, rollout_layout
from megatron_rl.registry import Registry
from megatron_rl.reshard import Layout

FinishReason = Literal["stop", "length", "abort"]
Progress = Callable[[int, int], None]  # (completions finished, completions asked for)

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class SamplingParams(ConfigRecord):
    """How to draw completions. Engines give the same meaning to every field."""

    n: int = Field(default=1, ge=1)
    """Completions of each prompt."""
    max_tokens: int = Field(default=128, ge=1)
    """Longest completion, in tokens, the stop token included."""
    temperature: float = Field(default=1.0, ge=0)
    """Logits are divided by it; 0 = greedy, whose log-probabilities are those of temperature 1."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of likeliest tokens whose probability reaches this; 1 = off."""
    top_k: int = Field(default=0, ge=0)
    """Draw from this many likeliest tokens; 0 = off."""
    stop: tuple[str, ...] = ()
    """A completion ends with the token that completes one of these texts; that token is kept."""
    stop_token_ids: tuple[TokenId, ...] = ()
    """A completion ends with one of these tokens, beside the model's own end-of-sequence tokens."""
    ignore_eos: bool = False
    """The model's own end-of-sequence tokens do not end a completion; `stop` and `stop_token_ids` still do."""
    seed: Seed = 0
    """Mixed into the seed of every prompt."""


@dataclass(slots=True)
class Completion:
    """One answer of an engine to one prompt. Every field is filled by the engine."""

    token_ids: list[int]  # generated tokens, the stop token included
    logprobs: list[float]  # of each token under the temperature-scaled full softmax, before top-k and top-p
    finish_reason: FinishReason
    policy_version: int  # of the weights that generated the last token
    policy_version_spans: list[tuple[int, int]] = field(default_factory=list)  # (version, token count) runs
    metadata: dict[str, Any] = field(default_factory=dict)  # "stop": the stop text found; engines may add more


T = TypeVar("T")
Ask = Callable[[Sequence[int], int, int], Awaitable[Completion]]  # (token ids, max_tokens, seed)
Conversation = Callable[[Ask], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """Whether engines hold what was pushed; `RolloutEngine.verify_weights` fills it."""

    compared: int = 0  # servers whose weights were compared; 0 = nothing is known
    faults: tuple[str, ...] = ()  # one for each server that holds others: which it is, and what differs


class ServersLostError(RuntimeError):
    """No server holds the weights any more, and only a push can bring them back: push the same version again, and then
    ask for what is not in ``answers`` (index of the prompt -> its completions)."""

    def __init__(self, message: str, answers: Mapping[int, list[Completion]]) -> None:
        super().__init__(message)
        self.answers = dict(answers)


class RolloutEngine(ABC):
    """Generates completions, and serves exactly the version of the weights that was committed last.

    An engine is a context manager: leaving it closes it.
    """

    streams = False  # its weights live in another process and get there bucket by bucket; the same on every rank
    recomputes = False  # an update ends with the tensors of `Layout.recomputed` computed anew
    bucket_copies = 2  # of an engine that streams: how often a bucket may lie in one rank's memory, the next included

    @classmethod  # noqa: B027  not every engine has something to check
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """Check the user's options before anything is built.

        Raises:
            ConfigError: they cannot work.
        """

    @classmethod  # noqa: B027  most engines serve whatever can be trained
    def check_model(cls, architecture: Architecture) -> None:
        """Check the model before anything is built.

        Raises:
            ConfigError: the engine cannot serve it.
        """

    @classmethod
    def for_model(cls, architecture: Architecture) -> type[RolloutEngine]:
        """The class that stands for this one where the model is such."""
        return cls

    @classmethod
    def lay_out(cls, architecture: Architecture, tp: int, replicas: Sequence[Sequence[int]], ep: int = 1) -> Layout:
        """The layout of the weights, as `models.rollout_layout`.

        Raises:
            ConfigError: the sizes do not fit the architecture.
        """
        return rollout_layout(architecture, tp, replicas, ep)

    @classmethod
    def context(cls, options: Mapping[str, Any], max_positions: int) -> int:
        """Most tokens of prompt and completion together, for the user's options and a model of ``max_positions``."""
        return max_positions

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Where each global rank's shards of the rollout weights sit."""

    @property
    @abstractmethod
    def policy_version(self) -> int:
        """Version committed last.

        Raises:
            RuntimeError: no weights were committed yet.
        """

    @abstractmethod
    def targets(self) -> Mapping[str, torch.Tensor]:
        """This rank's own parameter storage by shard name, to be written in place between `begin_update` and
        `commit_update`; empty where the weights live in another process (`streams`), which `write_shards` reaches."""

    @abstractmethod
    def begin_update(self) -> None:
        """Stop serving: from here until `commit_update` the weights may be a mixture of two versions. May be called
        again after an update that was neither committed nor aborted."""

    def new_buffer(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """Of an engine that streams: memory for the shards of `write_shards`, ``[num_bytes]`` uint8 on ``device``."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    @abstractmethod
    def write_shards(self, shards: Mapping[str, torch.Tensor], fault: str = "") -> None:
        """Inside an update: put some of this rank's shards into the engine, by name, in the layout's shapes; each comes
        once. Weight sync calls it for engines that stream, whose ranks call it together.

        Args:
            shards: read until the next call has returned; without any the call waits for just that.
            fault: why this rank's must not be written: raised on all ranks of the engine.

        Raises:
            ValueError: a shard is unknown, of another shape, or comes again.
            RuntimeError: an earlier bucket failed, or there is a fault, on any rank.
        """

    @abstractmethod
    def finish_update(self) -> str:
        """After the last `write_shards`: return once the engine provably holds every shard, to be served from
        `commit_update` on. "" = proved; otherwise why it cannot be, which the engine logs.

        Raises:
            ValueError: shards are missing.
            RuntimeError: the engine holds something else.
        """

    @abstractmethod
    def commit_update(self, version: int) -> None:
        """Serve the weights now held as ``version``.

        Raises:
            RuntimeError: no update was begun.
        """

    @abstractmethod
    def abort_update(self, intact: bool) -> None:
        """Abandon the update under way. The version committed last is served again if it is still whole; otherwise the
        engine goes on refusing, until a later update is committed. Nothing to do where none is under way.

        Args:
            intact: nothing was written since `begin_update`, neither into `targets` nor by `write_shards`.
        """

    def load_shards(self, shards: Mapping[str, torch.Tensor], version: int) -> None:
        """A whole update in one call.

        Raises:
            ValueError: a shard is missing, unknown or of another shape; the weights served do not change.
        """
        self.begin_update()
        try:
            self.write_shards(shards)
            self.finish_update()
        except BaseException:
            self.abort_update(intact=False)
            raise
        self.commit_update(version)

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """``params.n`` completions of each prompt, in the order of ``prompts``.

        Args:
            prompts: token ids of each prompt.
            params: the same for all prompts.
            seeds: one per prompt; None numbers the prompts. See `sample_seed`.
            progress: called now and then with the number of completions finished and asked for.

        Raises:
            ValueError: a prompt that is empty, too long, or has a token outside the vocabulary.
            RuntimeError: no weights are committed, or an update is under way.
            ServersLostError: on every rank of the engine.
        """

    def submit(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, seeds: Sequence[int]
    ) -> list[Future[list[Completion]]]:
        """`generate`, group by group: the completions of each prompt, as they come. Engines in other processes return
        at once and go on over updates of the weights, as ``policy_version_spans`` then say; by default all are there on
        return. Collective over the engine's ranks; futures on the first one, elsewhere there may be none.

        Raises:
            ValueError, RuntimeError: as `generate`; what fails later is raised by the futures.
        """
        done = []
        for completions in self.generate(prompts, params, seeds):
            future: Future[list[Completion]] = Future()
            future.set_result(completions)
            done.append(future)
        return done

    def converse(self, conversations: Sequence[Conversation[T]], params: SamplingParams) -> list[T]:
        """Hold conversations at the same time: each is a coroutine that asks for one completion after another. The
        results are returned on the engine's first rank, where the conversations are held; elsewhere an empty list.
        Collective over the engine's ranks.

        Args:
            params: of every completion, but for ``n``, which is 1, and ``max_tokens``.

        Raises:
            Exception: a conversation's own, on the first rank only; the others are cancelled.
            ServersLostError: on every rank; its answers are lists of one result, by the number of the conversation.
        """
        raise NotImplementedError(f"{type(self).__name__} holds no conversations")

    def verify_weights(self) -> WeightCheck:
        """Check whether the weights served are still those of the last push. For diagnosis: it reads all of them. By
        default nothing is known; engines whose weights other processes can reach compare checksums."""
        return WeightCheck()

    @abstractmethod
    def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Free the memory of ``tags``; its contents are lost."""

    @abstractmethod
    def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Allocate the memory of ``tags`` again. Weights must be updated before the next `generate`."""

    @abstractmethod
    def close(self) -> None:
        """Release everything; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Each is called with the keywords architecture, layout, rank, dtype, tp_group, eos_token_ids, tokenizer, max_running
# and device, which mean what they mean to `LocalEngine`, and with the options the user gives for this engine.
ENGINES: Registry[type[RolloutEngine]] = Registry("rollout engine")


def sample_seed(seed: int, prompt_seed: int, sample: int) -> int:
    """64-bit seed of sample ``sample`` of a prompt: what it draws depends on nothing else, so neither the batch, nor
    its order, nor the number of ranks changes a completion. Unsigned; SplitMix64 finaliser over the three numbers."""
    state = 0
    for part in (seed, prompt_seed, sample):
        state = _mix((state + _GOLDEN + part) & _MASK)
    return state


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
