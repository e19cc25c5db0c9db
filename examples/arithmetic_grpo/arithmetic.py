"""Two-digit addition as text: the tokenizer, the sums with their held-out part, and the reward.

`python arithmetic.py FOLDER` writes what a run reads: FOLDER/tokenizer, FOLDER/train.jsonl and FOLDER/heldout.jsonl.
"""

import json
import random
import sys
from itertools import combinations, product
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", *"0123456789+="]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; nothing is added to a text."""
    tokens = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokens.decoder = decoders.Fuse()
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=64, **special)


def split_sums(num_held_out: int = 500, seed: int = 0) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Training sums and held-out sums; a held-out sum is trained on in neither order."""
    pairs = random.Random(seed).sample(list(combinations(range(10, 100), 2)), num_held_out // 2)
    held_out = [ordered for a, b in pairs for ordered in ((a, b), (b, a))]
    training = sorted(set(product(range(10, 100), repeat=2)) - set(held_out))
    return training, held_out


def prompt(a: int, b: int) -> str:
    return f"{a}+{b}="


def text(a: int, b: int) -> str:
    return f"{prompt(a, b)}{a + b}<eos>"


def score(sample) -> float:
    """1 for the right number and nothing else, otherwise 0."""
    return float(sample.response_text == str(sample.prompt.answer))


def write_files(folder: Path) -> None:
    build_tokenizer().save_pretrained(folder / "tokenizer")
    for name, sums in zip(("train", "heldout"), split_sums(), strict=True):
        lines = [json.dumps({"prompt": prompt(a, b), "answer": str(a + b)}) for a, b in sums]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write_files(Path(sys.argv[1]))
