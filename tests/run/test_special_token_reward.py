"""A whole run whose regex reward names a special token: it is seen in sampled responses and in held-out ones."""

from __future__ import annotations

import pytest
import torch
from forked import run_forked
from small_run import write_run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megatron_rl.tracking import read_metrics

THINK = "</think>"


@pytest.mark.parametrize("pattern", [r"</think>", r"(?s)^(?!.*</think>)"], ids=["has it", "lacks it"])
def test_a_reward_sees_the_special_token_that_it_names(tmp_path, pattern):
    held_out = {"data": {"path": str(tmp_path / "train.jsonl")}, "temperature": 1.0}
    rewards = [{"name": "regex", "options": {"pattern": pattern}}]
    config = write_run(tmp_path, rewards=rewards, evaluation=held_out)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [THINK]})
    tokenizer.save_pretrained(tmp_path / "model")
    model = LlamaConfig.from_pretrained(tmp_path / "model")
    model.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(model).save_pretrained(tmp_path / "model")

    ended = run_forked("-m", "megatron_rl", "train", config, "trainer.num_steps=1", "trainer.save_every=0", timeout=200)
    assert ended.code == 0, ended.err
    found = {
        name: value
        for values in read_metrics(tmp_path / "out" / "metrics.jsonl").values()
        for name, value in values.items()
    }
    # 5 tokens drawn from 17 almost evenly: about a quarter of the responses have it.
    low, high = (0.02, 0.65) if pattern == THINK else (0.35, 0.98)
    assert low < found["rewards/mean"] < high
    assert low < found["eval/reward"] < high
