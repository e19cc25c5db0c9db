"""The contract of `token_logprobs` and its edge checks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rl.ops.selection import choose
from megatron_rl.ops.token_logprobs.differentiable import LogprobOptions

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    chunk_tokens: int | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``log_softmax(hidden @ weight.T / temperature)[targets]``, and the entropy of each softmax.

    Logits exist for a few tokens at a time, in the forward and again in the backward pass. Rows whose gradients are
    all exactly 0 (prompts, padding) cost nothing in the backward pass.

    With a ``group`` the vocabulary is split over its ranks: values are of the whole vocabulary and equal on all ranks;
    the gradient of ``weight`` is that of the rank's rows; the gradient of ``hidden`` is what the rank's rows contribute
    (their sum over the group is the gradient: give the op hidden states whose backward takes that sum, as
    `engines.megatron.model.hidden_states` does).

    Args:
        hidden: [tokens, hidden], fp32, bf16 or fp16.
        weight: [rows, hidden] of the output layer, same dtype: rows ``vocab_start`` onward of the padded vocabulary.
        targets: [tokens] int64, each in [0, vocab_size).
        vocab_start: first row of this rank.
        vocab_size: real vocabulary; rows from there on are padding and take no part. None: no padding, no group.
        temperature: logits are divided by it.
        softcap: before that they become ``softcap * tanh(logit / softcap)`` (Gemma 2); None = they stay as they are.
        group: ranks that hold the other rows; every one must call.
        with_entropy: also return entropies.
        chunk_tokens: tokens whose logits exist at once; None bounds them by memory.
        implementation: forces one ("reference", "cpu", "triton"); None takes the best available.

    Returns:
        log-probabilities [tokens] fp32, and entropies [tokens] fp32 in nats or None; both differentiable.

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature that is not positive.
        UnavailableError: the forced implementation cannot run here.
    """
    _check(hidden, weight, targets, temperature)
    vocab_size = _vocab_size(vocab_size, vocab_start + weight.shape[0], group)
    options = LogprobOptions(vocab_start, vocab_size, temperature, group, with_entropy, chunk_tokens, softcap)
    return choose("token_logprobs", hidden.device.type, implementation)(hidden, weight, targets, options)


def from_logits(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = False,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``log_softmax(logits / temperature)[targets]``, and the entropy of each softmax, of logits that exist already.

    A logit of -inf is a token of probability 0, and 0 log 0 = 0. With a ``group`` every rank has some columns; values
    are equal on all ranks, and the gradient is that of the rank's own columns.

    Args:
        logits: [tokens, rows], fp32, bf16 or fp16: columns ``vocab_start`` onward of the padded vocabulary.
        Others, results and errors: as for `token_logprobs`.
    """
    if logits.dim() != 2 or logits.dtype not in FLOATS:
        raise ValueError(f"logits {list(logits.shape)} {logits.dtype}: expected [tokens, rows] of one of {FLOATS}")
    _check_targets(targets, logits.shape[0], temperature)
    vocab_size = _vocab_size(vocab_size, vocab_start + logits.shape[1], group)
    options = LogprobOptions(vocab_start, vocab_size, temperature, group, with_entropy, None)
    return choose("token_logprobs", logits.device.type, implementation)(logits, None, targets, options)


def _vocab_size(given: int | None, end: int, group: dist.ProcessGroup | None) -> int:
    if given is None and group is not None:
        raise ValueError("vocab_size is required with a group: the last rows may be padding")
    return end if given is None else given


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {list(hidden.shape)} and weight {list(weight.shape)}: expected [tokens, hidden] and [rows, hidden]"
        )
    _check_targets(targets, hidden.shape[0], temperature)
    if hidden.dtype != weight.dtype or hidden.dtype not in FLOATS:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: expected one of {FLOATS} for both")


def _check_targets(targets: Tensor, tokens: int, temperature: float) -> None:
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(f"targets {list(targets.shape)} {targets.dtype}: expected [{tokens}] torch.int64")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a positive number (greedy decoding has no softmax)")
