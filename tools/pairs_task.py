"""The DPO task of `bench_dpo.py`, the same for everyone who runs it; no library of either side is needed to read it.

A Llama of about five million parameters with random weights learns from real preference pairs (HH-RLHF). A program that
takes part reads one line from standard input before each step, and writes one JSON line after it (`report`).
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path

from stories_task import find_model, peak_rss_mb, report, wait_for_turn

BATCH = 8  # pairs of one optimizer step
BETA, LEARNING_RATE, BETAS, CLIP_GRADIENT = 0.1, 1e-4, (0.9, 0.99), 1.0
MAX_CHARS = 1200  # longer pairs are left out for both sides, so that nobody truncates
NUM_PAIRS = 512
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}

__all__ = ["find_model", "peak_rss_mb", "report", "wait_for_turn"]


def find_pairs() -> Path:
    """The file with the pairs; ends the program with a message where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MEGATRON_RL_TEST_DATA") or beside)
    path = Path(os.environ.get("BENCH_DPO_PAIRS") or folder / "data" / "hh_harmless_test_pairs.jsonl.gz")
    if not path.is_file():
        sys.exit(f"no preference pairs in {path}: set BENCH_DPO_PAIRS to a .jsonl(.gz) with prompt, chosen, rejected")
    return path


def read_pairs() -> list[dict[str, str]]:
    """The pairs in their order, each with columns prompt, chosen and rejected."""
    path = find_pairs()
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    rows = [json.loads(line) for line in text.split("\n") if line]
    pairs = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    short = [p for p in pairs if len(p["prompt"]) + max(len(p["chosen"]), len(p["rejected"])) <= MAX_CHARS]
    return [p for p in short if p["chosen"].strip() and p["chosen"] != p["rejected"] and p["rejected"].strip()][
        :NUM_PAIRS
    ]


def write_model(folder: Path) -> Path:
    """The random model and its tokenizer as a Hugging Face folder; the same weights whenever it is called."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = find_model()
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=0, **SHAPE)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
