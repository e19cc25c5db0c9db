"""Is the exported folder the trained model? transformers' logits and greedy answers against Megatron-Core's own.

python examples/arithmetic_grpo/check_export.py CHECKPOINT HF_FOLDER     # one process; prints one JSON line
"""

import json
import sys
from pathlib import Path

from arithmetic import split_sums
from pretrain import DEVICE, PAD, build_model, encode, greedy_accuracy, initialize, load_checkpoint

import torch  # isort: skip
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(checkpoint: Path, folder: Path) -> None:
    initialize(tensor_parallel=1, pipeline_parallel=1, seed=0)
    megatron = build_model()
    load_checkpoint(checkpoint, megatron)  # written by TP2 x PP2, read by one rank
    # Plain attention, as in Megatron-Core's local spec; fused kernels sum in another order (2e-5 on these logits).
    exported = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().to(DEVICE)
    rows = encode(split_sums()[1])

    positions = torch.arange(rows.shape[1], device=DEVICE).expand_as(rows)
    with torch.no_grad():
        ours, theirs = megatron[0](rows, positions, None), exported(rows).logits
    difference = (ours - theirs)[rows != PAD].abs().max().item()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sums = split_sums()[1]
    prompts = tokenizer([f"{a}+{b}=" for a, b in sums], return_tensors="pt").to(DEVICE)
    answers = exported.generate(**prompts, max_new_tokens=6, do_sample=False)[:, prompts["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = sum(text == str(a + b) for text, (a, b) in zip(texts, sums, strict=True))
    result = {
        "device": DEVICE.type,
        "max_logit_difference": difference,
        "transformers_accuracy": right / len(sums),
        "megatron_accuracy": greedy_accuracy(megatron, rows),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
