"""Whether a module keeps sequences apart that lie end to end in one row: one short pass each, of its real weights."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from megatron_rl.engines.fsdp2.attention import NAME, NotPackableError
from megatron_rl.engines.fsdp2.engine import FSDP2Engine

logger = logging.getLogger(__name__)

FIRST, SECOND = 5, 7  # tokens
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # relative to the largest value


def packs_exactly(engine: FSDP2Engine) -> bool:
    """Compare a sequence's hidden states alone with those behind another one. Collective."""
    module = engine.sharded.module
    name = type(module).__name__
    if module.config._attn_implementation != NAME:
        logger.info("%s: sequences are padded rows, since more than attention mixes positions, or it has its own", name)
        return False
    ids = torch.arange(FIRST + SECOND, device=engine.device)[None] % engine.architecture.vocab
    places = torch.cat([torch.arange(FIRST), torch.arange(SECOND)]).to(engine.device)[None]
    edges = torch.tensor([0, FIRST, FIRST + SECOND], dtype=torch.int32, device=engine.device)
    engine.sharded.eval()
    with torch.no_grad(), engine.sharded.settled():
        try:
            together = engine.sharded(ids, places, edges)[:, FIRST:]
            alone = engine.sharded(ids[:, FIRST:], places[:, FIRST:])
        except NotPackableError as error:
            logger.info("%s: sequences are padded rows (%s)", name, error)
            module.set_attn_implementation("eager")
            return False
    if not _close(together, alone, TOLERANCE[engine.dtype]):
        logger.info("%s: sequences are padded rows, since packed ones see one another", name)
        return False
    return True


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max())
