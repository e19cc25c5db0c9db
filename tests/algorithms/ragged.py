"""Small ragged inputs for loss tests, and what every loss must satisfy: numeric gradients, additivity, CP halves.

A *row* is one sequence: a dict of equally long lists (``mask``, ``logprobs``, further token fields), already
predictor-aligned. Oracles are plain Python functions of rows.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from megatron_rl.workers.loss import LossInputs, LossOutput, Totals

Rows = list[dict[str, list[float]]]


def totals_of(rows: Rows) -> Totals:
    answered = [row for row in rows if sum(row["mask"])]
    return Totals(
        tokens=float(sum(sum(row["mask"]) for row in rows)),
        sequences=float(len(answered)),
        groups=float(sum(1 for a, b in zip(rows[0::2], rows[1::2], strict=False) if sum(a["mask"]) + sum(b["mask"]))),
    )


def make_inputs(
    rows: Rows, totals: Totals | None = None, dtype=torch.float64, sequences=None, cp_group=None, keep=None
):
    """`LossInputs` of the rows; ``keep(sequence, position)`` selects the tokens that this rank holds."""
    keep = keep or (lambda sequence, position: True)
    places = [(s, p) for s, row in enumerate(rows) for p in range(len(row["mask"])) if keep(s, p)]

    def column(name: str) -> torch.Tensor:
        return torch.tensor([rows[s][name][p] for s, p in places], dtype=dtype)

    special = {"mask", "logprobs", "entropy", "current_values"}
    fields = {name: column(name) for name in rows[0] if name not in special}
    fields["response_mask"] = column("mask").bool()
    optional = {
        "entropy": column("entropy").requires_grad_() if "entropy" in rows[0] else None,
        "values": column("current_values").requires_grad_() if "current_values" in rows[0] else None,
    }
    return LossInputs(
        logprobs=column("logprobs").requires_grad_(),
        fields=fields,
        sequences={name: torch.as_tensor(value) for name, value in (sequences or {}).items()},
        sequence_ids=torch.tensor([s for s, _ in places], dtype=torch.int64),
        num_sequences=len(rows),
        totals=totals or totals_of(rows),
        cp_group=cp_group,
        **optional,
    )


def numeric_gradient(
    oracle: Callable[[Rows], float], rows: Rows, name: str = "logprobs", step: float = 1e-6
) -> np.ndarray:
    """Central differences of the oracle by every entry of field ``name``, in packed order."""
    gradient = []
    for s, row in enumerate(rows):
        for p in range(len(row[name])):
            ends = []
            for sign in (1.0, -1.0):
                moved = copy.deepcopy(rows)
                moved[s][name][p] += sign * step
                ends.append(oracle(moved))
            gradient.append((ends[0] - ends[1]) / (2 * step))
    return np.array(gradient)


def gradient_of(output: LossOutput, tensor: torch.Tensor) -> np.ndarray:
    (gradient,) = torch.autograd.grad(output.loss, tensor, allow_unused=True, retain_graph=True)
    return np.zeros(tensor.shape) if gradient is None else gradient.numpy().copy()


def check_against_oracle(
    loss, oracle, rows: Rows, sequences=None, fields=("logprobs",), rtol: float = 1e-6
) -> LossOutput:
    """Value and gradients in float64 against the oracle, and the fp32 value against it too."""
    inputs = make_inputs(rows, sequences=sequences)
    output = loss(inputs)
    expected = oracle(rows)
    np.testing.assert_allclose(output.loss.item(), expected, rtol=1e-9, atol=1e-12)
    tensors = {"logprobs": inputs.logprobs, "entropy": inputs.entropy, "current_values": inputs.values}
    for name in fields:
        numeric = numeric_gradient(oracle, rows, name)
        scale = max(np.abs(numeric).max(), 1e-3)
        np.testing.assert_allclose(gradient_of(output, tensors[name]) / scale, numeric / scale, rtol=rtol, atol=rtol)
    single = loss(make_inputs(rows, dtype=torch.float32, sequences=sequences)).loss.item()
    np.testing.assert_allclose(single, expected, rtol=3e-5, atol=1e-5)
    return output


def metric_value(parts: list[LossOutput], name: str) -> float:
    weight = sum(part.metrics[name].weight.item() for part in parts)
    return sum(part.metrics[name].total.item() for part in parts) / weight


def check_micro_batches(loss, rows: Rows, pieces: list[list[int]], sequences=None) -> None:
    """Loss, gradients and metrics do not depend on how the rows are cut into micro-batches."""
    sequences = sequences or {}
    totals = totals_of(rows)
    whole_inputs = make_inputs(rows, totals, sequences=sequences)
    whole = loss(whole_inputs)
    parts, gradients = [], []
    for piece in pieces:
        local = {name: [value[i] for i in piece] for name, value in sequences.items()}
        inputs = make_inputs([rows[i] for i in piece], totals, sequences=local)
        parts.append(loss(inputs))
        gradients.append(gradient_of(parts[-1], inputs.logprobs))
    np.testing.assert_allclose(sum(part.loss.item() for part in parts), whole.loss.item(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(
        np.concatenate(gradients), gradient_of(whole, whole_inputs.logprobs), rtol=1e-10, atol=1e-14
    )
    for name in whole.metrics:
        np.testing.assert_allclose(metric_value(parts, name), metric_value([whole], name), rtol=1e-10, err_msg=name)


class ThreadGroup:
    """Stands for a process group of threads; `check_context_halves` routes all_reduce to it."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30)
        self._parts: dict[int, torch.Tensor] = {}
        self._size = size

    def size(self) -> int:
        return self._size

    def all_reduce(self, tensor: torch.Tensor, group=None) -> None:
        self._parts[threading.get_ident()] = tensor.clone()
        self._barrier.wait()
        total = sum(self._parts.values())
        self._barrier.wait()
        tensor.copy_(total)


def check_context_halves(loss, rows: Rows, monkeypatch, sequences=None, split=lambda s, p: (p // 2) % 2) -> None:
    """Two context-parallel ranks (as threads) that each hold some tokens of every sequence: same gradient, same
    metrics as one rank with whole sequences."""
    totals = totals_of(rows)
    whole_inputs = make_inputs(rows, totals, sequences=sequences)
    whole = loss(whole_inputs)
    group = ThreadGroup(2)
    monkeypatch.setattr(dist, "all_reduce", group.all_reduce)
    outputs: dict[int, tuple[LossOutput, np.ndarray]] = {}

    def run(rank: int) -> None:
        inputs = make_inputs(rows, totals, sequences=sequences, cp_group=group, keep=lambda s, p: split(s, p) == rank)
        output = loss(inputs)
        outputs[rank] = output, gradient_of(output, inputs.logprobs)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outputs) == 2, "a rank failed or hung"
    places = [(s, p) for s, row in enumerate(rows) for p in range(len(row["mask"]))]
    joined = np.zeros(len(places))
    for rank in range(2):
        joined[[i for i, place in enumerate(places) if split(*place) == rank]] = outputs[rank][1]
    np.testing.assert_allclose(joined, gradient_of(whole, whole_inputs.logprobs), rtol=1e-10, atol=1e-14)
    parts = [outputs[rank][0] for rank in range(2)]
    share = 2 if whole.of_sequences else 1  # such a loss is whole on every rank
    np.testing.assert_allclose(sum(p.loss.item() for p in parts) / share, whole.loss.item(), rtol=1e-12, atol=1e-14)
    for name in whole.metrics:
        np.testing.assert_allclose(
            metric_value(parts, name), metric_value([whole], name), rtol=1e-10, atol=1e-12, err_msg=name
        )
