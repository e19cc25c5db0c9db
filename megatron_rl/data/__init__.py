"""Prompts, preferences and completions: rows in, token ids out, in a resumable order."""

from megatron_rl.data.completions import Completion, CompletionDataset, LabelledDataset, pack_completions
from megatron_rl.data.loader import GlobalBatchLoader, PromptLoader
from megatron_rl.data.preferences import PairDataset, PreferencePair, pack_pairs
from megatron_rl.data.prompts import PromptDataset
from megatron_rl.data.records import DataError, Records, read_records

__all__ = [
    "Completion",
    "CompletionDataset",
    "DataError",
    "GlobalBatchLoader",
    "LabelledDataset",
    "PairDataset",
    "PreferencePair",
    "PromptDataset",
    "PromptLoader",
    "Records",
    "pack_completions",
    "pack_pairs",
    "read_records",
]
