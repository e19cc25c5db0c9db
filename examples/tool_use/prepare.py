"""Products of two-digit numbers as text: `python prepare.py FOLDER` writes what the runs read.

A model of random weights with its tokenizer and chat template, rows to warm up on, and questions to train on and to
hold out.
"""

import json
import random
import re
import sys
from itertools import product
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

CALL = ("<tool_call>", '{"name": "calculate", "arguments": {"expression": "', '"}}', "</tool_call>")
SPECIAL = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<tool>"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{# calls are written as <tool_call> #}"
)
MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 2}


def build_tokenizer(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    """One token a character, and one for each part of a call that never changes."""
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = "|".join(map(re.escape, [*SPECIAL, *CALL]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Split(Regex(f"{words}|."), "isolated"), decoders.Fuse()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<end>", "chat_template": TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def warm_up_rows(questions: list[tuple[int, int]]):
    """Answers by heart, one call in five, and what to do with the tool's result."""
    for a, b in questions:
        asked, call = f"<user>{a}*{b}=<end><assistant>", f"{CALL[0]}{CALL[1]}{a}*{b}{CALL[2]}{CALL[3]}"
        yield {"prompt": asked, "completion": call if random.random() < 0.2 else str(a * b)}
        yield {"prompt": f"{asked}{call}<end><tool>{a * b}<end><assistant>", "completion": str(a * b)}


def main() -> None:
    folder = Path(sys.argv[1])
    set_seed(1)
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *CALL, *"0123456789+-*="])}
    build_tokenizer(vocabulary).save_pretrained(folder / "model")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **MODEL, **HEADS)).save_pretrained(folder / "model")
    questions = random.sample(list(product(range(10, 100), repeat=2)), 8100)
    prompts = [{"prompt": f"{a}*{b}=", "answer": str(a * b)} for a, b in questions]
    files = {"warm_up": list(warm_up_rows(questions[200:])), "train": prompts[200:], "heldout": prompts[:200]}
    for name, found in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, found)) + "\n")


if __name__ == "__main__":
    main()
