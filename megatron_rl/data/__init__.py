"""Prompts, preferences and completions: rows in, token ids out, in a resumable order."""

from megatron_rl.data.completions import (
    CompletionDataset,
    CompletionLoader,
    LabelledDataset,
    PromptCompletion,
    pack_completions,
)
from megatron_rl.data.dataset import Limits
from megatron_rl.data.loader import GlobalBatchLoader, PromptLoader
from megatron_rl.data.preferences import PairDataset, PairLoader, PreferencePair, pack_pairs
from megatron_rl.data.prompts import PromptDataset
from megatron_rl.data.records import DataError, Records, read_records

__all__ = [
    "CompletionDataset",
    "CompletionLoader",
    "DataError",
    "GlobalBatchLoader",
    "LabelledDataset",
    "Limits",
    "PairDataset",
    "PairLoader",
    "PreferencePair",
    "PromptCompletion",
    "PromptDataset",
    "PromptLoader",
    "Records",
    "pack_completions",
    "pack_pairs",
    "read_records",
]
