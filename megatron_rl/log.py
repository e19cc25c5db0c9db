"""Logging for many ranks: every module uses `logging.getLogger(__name__)`; this sets what reaches the terminal.

Rank 0 speaks at INFO; other ranks only from WARNING up, with their rank in front, so that 512 ranks do not
repeat one another but none fails in silence.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable


class MaskingFormatter(logging.Formatter):
    """Lines as ``rewrite`` leaves them: without credentials, whatever part of the program put them there."""

    def __init__(self, form: str, dates: str, rewrite: Callable[[str], str]) -> None:
        super().__init__(form, dates)
        self.rewrite = rewrite

    def format(self, record: logging.LogRecord) -> str:
        return self.rewrite(super().format(record))


def configure_logging(rank: int = 0, level: str = "INFO", rewrite: Callable[[str], str] = str) -> None:
    """Send the ``megatron_rl`` loggers to stderr, once per process; calling it again only changes the level.

    Args:
        rank: global rank of this process.
        level: threshold on rank 0; the other ranks use at least WARNING.
        rewrite: what every line goes through, such as `config.masked`.
    """
    logger = logging.getLogger("megatron_rl")
    threshold = logging.getLevelName(level)
    if not isinstance(threshold, int):
        raise ValueError(f"log level {level!r} is unknown: use DEBUG, INFO, WARNING or ERROR")
    logger.setLevel(threshold if rank == 0 else max(threshold, logging.WARNING))
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        MaskingFormatter(f"%(asctime)s %(levelname).1s [rank {rank}] %(name)s: %(message)s", "%H:%M:%S", rewrite)
    )
    logger.addHandler(handler)
    logger.propagate = False
    # Megatron-Core calls collectives by names that torch 2.13 gave new ones: a line for each name and rank otherwise.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def leave_out(logger: str, beginning: str) -> None:
    """Drop the messages of another library's ``logger`` that begin so, because here they say nothing."""
    logging.getLogger(logger).addFilter(lambda record: not record.getMessage().startswith(beginning))
