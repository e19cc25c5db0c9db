"""Before training: greedy text of the rollout engine, and of the export and the original in `transformers`.

torchrun --nproc-per-node 2 examples/smollm2_gsm8k/same_text.py ORIGINAL SOURCE EXPORT megatron|fsdp2

ORIGINAL is a Hugging Face folder; SOURCE the same or a Megatron checkpoint made of it. The last line is JSON.
"""

import json
import sys

from megatron_rl import Actor
from megatron_rl.batch import Prompt
from megatron_rl.parallel import ParallelSizes

import torch  # isort: skip
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = ("What is 2 + 2?", "The capital of France is", "Tom has 3 apples and buys 4 more. How many has he now?")
TOKENS = 24


def greedy(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """What `transformers` answers; each prompt alone, so that nothing is padded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"do_sample": False, "max_new_tokens": TOKENS}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]


def main(original: str, source: str, export: str, backend: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(original)
    parallel = ParallelSizes(pp=2) if backend == "megatron" else ParallelSizes()
    actor = Actor(model=source, tokenizer=tokenizer, parallel=parallel, config={"backend": backend})
    prompts = [tokenizer(question).input_ids for question in QUESTIONS]
    ours = actor.generate([Prompt(ids, index=index) for index, ids in enumerate(prompts)], max_tokens=TOKENS)
    actor.save_pretrained(export)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        expected = greedy(original, prompts)
        result = {
            "engine": [sample.response_ids for sample in ours] == expected,
            "export": greedy(export, prompts) == expected,
            "text": tokenizer.decode(expected[-1], skip_special_tokens=True),
        }
        print(json.dumps(result), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
