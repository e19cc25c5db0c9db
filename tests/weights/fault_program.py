"""Weight pushes that go wrong, between real processes over gloo; prints one line for each case that ended as it must.

Everything is imported once; each case is then played by forks of this process, which die by SIGKILL where the case says
so. Every engine is a real `LocalEngine`: what it serves is compared with transformers' greedy tokens for that version.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rollout.rollout_models import architecture_of, random_model
from torch import Tensor

from megatron_rl.models import hf_layout, megatron_layout, rollout_layout
from megatron_rl.parallel import ParallelSizes, RankGrid
from megatron_rl.parallel.agreement import Peers
from megatron_rl.reshard import Layout, P2PTransport, Transport
from megatron_rl.reshard.transport import Pending
from megatron_rl.rollout import LocalEngine, SamplingParams
from megatron_rl.weights.fill import empty_tensors, fill
from megatron_rl.weights.source import in_memory
from megatron_rl.weights.sync import WeightSync
from megatron_rl.weights.target import WeightTarget

WORLD, WAIT, CASE_SECONDS = 4, 4.0, 90.0  # seconds that an exchange may take, and a whole case
PROMPTS = [[5, 9, 11, 40, 3], [7, 8]]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
MODELS = [random_model("llama", seed) for seed in range(4)]  # by version
ARCHITECTURE = architecture_of(MODELS[0].config)
TP2PP2 = ParallelSizes(tp=2, pp=2)
VOCAB = 128  # Megatron's, padded
O_PROJ = "model.layers.{}.self_attn.o_proj.weight"


@dataclass(frozen=True)
class Case:
    """A push of version 2 over engines that serve version 1."""

    name: str
    victim: int = -1  # the rank that dies
    step: str = ""  # where
    sizes: ParallelSizes = TP2PP2
    trainers: tuple[int, ...] = (0, 1, 2, 3)
    engines: tuple[int, ...] = (0, 1, 2, 3)
    spoiler: int = -1  # the rank whose weights are spoiled after the transfer
    spoil: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], object] = lambda new, old: None
    says: str = ""  # in the message of every rank
    attest: bool = True
    version: Callable[[int], int] = lambda rank: 2
    halved: int = -1  # the rank whose engine restarts in another dtype before the push
    wire: torch.dtype | None = torch.float32


def source_layout(case: Case) -> Layout:
    layout = megatron_layout(ARCHITECTURE, RankGrid(case.sizes, len(case.trainers)), VOCAB)
    return replace(layout, replica_of=dict(zip(case.trainers, layout.replica_of.values(), strict=True)))


def trained(layout: Layout, rank: int, version: int) -> dict[str, Tensor]:
    tensors = empty_tensors(layout, rank, torch.float32)
    if rank in layout.replica_of:
        fill(layout, rank, tensors, in_memory(MODELS[version].state_dict(), hf_layout(ARCHITECTURE)))
    return tensors


@functools.cache
def greedy(version: int) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(GREEDY.max_tokens):
            with torch.no_grad():
                tokens.append(int(MODELS[version](torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt) :])
    return answers


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingTransport(Transport):
    """Dies instead of posting its ``left``-th exchange."""

    def __init__(self, inner: Transport, left: int) -> None:
        self._inner, self._left = inner, left

    def exchange(self, peer: int, send: Tensor | None, receive: Tensor | None) -> Pending:
        self._left -= 1
        if self._left == 0:
            die()
        return self._inner.exchange(peer, send, receive)

    def peers(self, ranks: Sequence[int], rank: int, device: torch.device | str = "cpu") -> Peers:
        return self._inner.peers(ranks, rank, device)


class FaultySync(WeightSync):
    """Dies or spoils its weights where the case says so."""

    def __init__(
        self,
        case: Case,
        rank: int,
        source: Layout,
        target: WeightTarget,
        transport: Transport,
        wire: torch.dtype | None,
        attest: bool,
    ) -> None:
        super().__init__(source, target, rank, transport, wire, attest=attest)
        self._case = case
        self._old: dict[str, Tensor] = {}
        self._dies_at = ""

    def arm(self) -> None:
        """From now on things go wrong."""
        self._old = {name: tensor.clone() for name, tensor in self.target.targets().items()}
        self._dies_at = self._case.step if self.rank == self._case.victim else ""

    def _begin(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
        super()._begin(tensors, own)
        if self._dies_at == "after begin":
            die()
        if self._dies_at == "mid-transfer":
            self._resharder._transport = DyingTransport(self._transport, 2)  # type: ignore[union-attr]
            super()._begin(tensors, own)

    def _attest(self, tensors: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
        if self._dies_at == "after the transfer":
            die()
        if self._old and self.rank == self._case.spoiler:
            self._case.spoil(held, self._old)
        super()._attest(tensors, held)

    def _compare(self, *args: Any) -> None:
        super()._compare(*args)
        if self._dies_at == "before prepared":
            die()

    def _commit(self, version: int) -> None:
        if self._dies_at == "between prepared and commit":
            die()
        super()._commit(version)
        if self._dies_at == "after commit":
            die()


def join(folder: Path, name: str, rank: int, world: int) -> P2PTransport:
    store = dist.FileStore(str(folder / name), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    return P2PTransport(timeout=WAIT)


def serves(engine: LocalEngine) -> int | None:
    """The version that the engine serves, all its tokens being those of that version; None when it refuses."""
    try:
        answers = engine.generate(PROMPTS, GREEDY)
    except RuntimeError as refusal:
        if "middle of a weight update" in str(refusal) or "holds no weights" in str(refusal):
            return None
        raise
    version = engine.policy_version
    assert {completion.policy_version for (completion,) in answers} == {version}
    assert [completion.token_ids for (completion,) in answers] == greedy(version), f"not the tokens of {version}"
    return version


def play(case: Case, rank: int, folder: Path) -> dict[str, object]:
    """One rank's part; what it saw."""
    transport = join(folder, "first", rank, WORLD)
    source = source_layout(case)
    target = rollout_layout(ARCHITECTURE, 1, [[r] for r in case.engines])
    engine = LocalEngine(ARCHITECTURE, target, rank) if rank in case.engines else None
    face = engine or Nobody(target)
    sync = FaultySync(case, rank, source, face, transport, case.wire, case.attest)
    sync.push(trained(source, rank, 1), 1)
    if case.halved >= 0:
        if rank == case.halved:
            engine = face = LocalEngine(ARCHITECTURE, target, rank, torch.float16)
        sync = FaultySync(case, rank, source, face, transport, case.wire, case.attest)
    sync.arm()
    start, seen = time.perf_counter(), {"error": "", "message": ""}
    try:
        sync.push(trained(source, rank, 2), case.version(rank))
    except (RuntimeError, ValueError) as error:
        seen |= {"error": type(error).__name__, "message": str(error)}
    seen["seconds"] = time.perf_counter() - start
    seen["serves"] = serves(engine) if engine and case.attest else None
    dist.destroy_process_group()
    seen["healed"] = heal(case, rank, folder, engine)
    return seen


def heal(case: Case, rank: int, folder: Path, engine: LocalEngine | None) -> int | None:
    """The survivors join anew and push version 3, each of them now a whole trainer."""
    living = [r for r in range(WORLD) if r != case.victim]
    at = living.index(rank)
    transport = join(folder, "second", at, len(living))
    source = megatron_layout(ARCHITECTURE, RankGrid(ParallelSizes(), len(living)), VOCAB)
    target = rollout_layout(ARCHITECTURE, 1, [[living.index(r)] for r in case.engines if r in living])
    face = engine or Nobody(target)
    if engine is not None:
        engine._layout = target  # the same engine under its rank's new number
    if rank == case.halved:
        engine = face = LocalEngine(ARCHITECTURE, target, at)  # restarted, as its error says
    WeightSync(source, face, at, transport, torch.float32).push(trained(source, at, 3), 3)
    version = serves(engine) if engine is not None else None
    dist.barrier()
    dist.destroy_process_group()
    return version


class Nobody:
    """A rank without an engine."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def targets(self) -> dict[str, Tensor]:
        return {}

    streams = False
    begin_update = commit_update = abort_update = None  # never called


STEPS = ("after begin", "mid-transfer", "after the transfer", "before prepared", "between prepared and commit")
APART = {"sizes": ParallelSizes(tp=2), "trainers": (0, 1), "engines": (2, 3)}


def flip(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    new[O_PROJ.format(1)].view(torch.int32)[3, 5] ^= 1


def swap(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    one, two = (new[O_PROJ.format(layer)] for layer in (0, 2))
    kept = one.clone()
    one.copy_(two), two.copy_(kept)


def keep(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    new[O_PROJ.format(1)].copy_(old[O_PROJ.format(1)])


CASES = [
    *(Case(f"rank {victim} dies {step}", victim, step) for step in (*STEPS, "after commit") for victim in (0, 3)),
    *(Case(f"trainer 1 dies {step}, engines apart", 1, step, **APART) for step in STEPS[:4]),
    *(Case(f"engine 3 dies {step}, engines apart", 3, step, **APART) for step in STEPS),
    Case("a flipped element", spoiler=2, spoil=flip, says=f"{O_PROJ.format(1)}[0:32, 0:32]"),
    Case("swapped shards", spoiler=0, spoil=swap, says="(permuted)"),
    Case("a stale shard", spoiler=3, spoil=keep, says="(stale)"),
    Case(
        "a duplicated shard",
        spoiler=1,
        spoil=lambda new, old: new[O_PROJ.format(1)].copy_(new[O_PROJ.format(2)]),
        says="(duplicated)",
        **APART | {"engines": (1, 2, 3)},
    ),
    Case("a missing shard", spoiler=3, spoil=lambda new, old: new[O_PROJ.format(0)].zero_(), says="(missing)", **APART),
    Case("an engine of another dtype", halved=2, says="wrong dtype: rollout rank 2 holds model.embed_tokens.weight"),
    Case("engines that disagree on the dtype", halved=2, wire=None, says="sent as"),
    Case("different versions", version=lambda rank: 2 + (rank == 1), says="version 3"),
    Case("unattested", spoiler=2, spoil=flip, attest=False),
]


def judge(case: Case, seen: dict[int, dict]) -> str:
    """Raise AssertionError unless the case ended as it must; else its line."""
    living = [rank for rank in range(WORLD) if rank != case.victim]
    assert sorted(seen) == living, f"only ranks {sorted(seen)} reported"
    untouched = case.step == "after begin" or case.halved >= 0 or case.name == "different versions"
    committed = case.step in ("between prepared and commit", "after commit")
    expected = 1 if untouched else 2 if committed else None
    for rank, saw in seen.items():
        assert saw["seconds"] < 2 * WAIT, f"rank {rank} waited {saw['seconds']:.1f} s"
        assert saw["healed"] == (3 if rank in case.engines else None), (rank, saw)
        has_weights = rank in case.engines and rank != case.halved
        assert saw["serves"] == (expected if has_weights else None), (rank, saw)
        if case.attest and case.step != "after commit":
            assert saw["error"], f"rank {rank} saw no error"
            assert case.says in saw["message"], (rank, saw)
    if case.spoiler >= 0 and case.attest:
        assert {rank: saw["error"] for rank, saw in seen.items()} == {
            rank: "AttestationError" if rank == case.spoiler else "PeerError" for rank in range(WORLD)
        }
    if not case.attest:
        assert not any(saw["error"] for saw in seen.values()), "nothing looks where attestation is off"
    slowest = max(saw["seconds"] for saw in seen.values())
    return f"ok {case.name}: {slowest:.2f} s, served {[saw['serves'] for saw in seen.values()]}"


def run(case: Case) -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = [fork(case, rank, folder) for rank in range(WORLD)]
        deadline = time.monotonic() + CASE_SECONDS
        while children and time.monotonic() < deadline:
            children = [child for child in children if os.waitpid(child, os.WNOHANG)[0] == 0]
            time.sleep(0.02)
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        assert not children, f"{case.name}: {len(children)} ranks did not end in {CASE_SECONDS} s"
        return judge(case, {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")})


def fork(case: Case, rank: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    try:
        (folder / f"{rank}.json").write_text(json.dumps(play(case, rank, folder)))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def main() -> None:
    torch.set_num_threads(1)
    for version in range(1, 4):
        greedy(version)
    chosen = [case for case in CASES if not sys.argv[1:] or sys.argv[1] in case.name]
    for case in chosen:
        print(run(case), flush=True)


if __name__ == "__main__":
    main()
