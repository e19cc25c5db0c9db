"""How fast rollouts are: one JSON object on the last line.

``local_vs_transformers``: tokens per second of the local engine over those of `transformers.generate` for the same
requests: same model and process, fp32, one thread, no end-of-sequence token, median of alternating rounds, seconds of
CPU. It is the lowest ratio of the models measured, which are listed under ``models``. The local engine also returns
log-probabilities; transformers is not asked for them. All figures are of the CPU that this runs on.

``client_overhead``: by how much of their time our engine's client takes longer for equal requests to one real SGLang
server than SGLang's own ``sglang.bench_serving``; median of alternating rounds, seconds of wall time. Left out without
``--sglang``, the Python of an environment that has SGLang.

    python tools/bench_rollout.py [--model HF_FOLDER] [--rounds 7] [--sglang .venv-sglang/bin/python]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rollout_client import measure_client
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from megatron_rl.models import rollout_layout
from megatron_rl.rollout import LocalEngine, SamplingParams
from megatron_rl.weights.fill import fill
from megatron_rl.weights.hf_in import model_source

PROMPTS, SAMPLES, MAX_TOKENS = 16, 8, 48


def character_model() -> PreTrainedModel:
    """Random weights in the shape of a character-level Llama of 297,000 parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_prompts(vocab: int) -> list[list[int]]:
    """Prompts of 8 to 20 random tokens."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(8, 21, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]


def local_round(model: PreTrainedModel, prompts: list[list[int]]) -> Callable[[], int]:
    """A function that answers the requests with the local engine and returns the number of tokens."""
    architecture, source = model_source(model)
    engine = LocalEngine(architecture, rollout_layout(architecture, 1, [[0]]))
    engine.begin_update()
    fill(engine.layout, 0, dict(engine.targets()), source)
    engine.commit_update(1)
    params = SamplingParams(n=SAMPLES, max_tokens=MAX_TOKENS, ignore_eos=True)

    def run() -> int:
        answers = engine.generate(prompts, params)
        return sum(len(answer.token_ids) for group in answers for answer in group)

    return run


def transformers_round(model: PreTrainedModel, prompts: list[list[int]]) -> Callable[[], int]:
    """The same through `transformers.generate`, prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": SAMPLES}
    stopping = {"max_new_tokens": MAX_TOKENS, "eos_token_id": None, "pad_token_id": 0}

    def run() -> int:
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, **sampling, **stopping)
        return output[:, longest:].numel()

    return run


def measure(model: PreTrainedModel, rounds: int) -> dict[str, float]:
    """Tokens per CPU-second of both, and their ratio: medians over rounds that alternate. With one thread, CPU-seconds
    are seconds on a machine that does nothing else, and on a busy one they are disturbed the least."""
    prompts = make_prompts(model.config.vocab_size)
    runs = {"local": local_round(model, prompts), "transformers": transformers_round(model, prompts)}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            tokens = run()
            speed = tokens / (time.process_time() - start)
            assert tokens == PROMPTS * SAMPLES * MAX_TOKENS, f"{name} made {tokens} tokens"
            if index:  # the first round warms up
                speeds[name].append(speed)
    ratios = [ours / theirs for ours, theirs in zip(speeds["local"], speeds["transformers"], strict=True)]
    figures = {f"{name}_tokens_per_s": round(statistics.median(found), 1) for name, found in speeds.items()}
    return figures | {"ratio": round(statistics.median(ratios), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a Hugging Face folder to measure too")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds of each")
    parser.add_argument("--sglang", help="Python of an environment with SGLang, to measure our client against its own")
    parser.add_argument("--client-rounds", type=int, default=5, help="measured rounds of each client")
    options = parser.parse_args()
    torch.set_num_threads(1)
    client = measure_client(character_model(), options.sglang, options.client_rounds) if options.sglang else {}
    models = {"character-297k": character_model()}
    for folder in options.model:
        models[folder.name] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    results = {}
    for name, model in models.items():
        results[name] = measure(model, options.rounds)
        print(f"{name}: {results[name]}", file=sys.stderr)
    ratio = min(result["ratio"] for result in results.values())
    requests = f"{PROMPTS} prompts x {SAMPLES} samples x {MAX_TOKENS} tokens"
    local = {"local_vs_transformers": ratio, "requests": requests, "device": "cpu", "models": results}
    print(json.dumps(client | local))


if __name__ == "__main__":
    main()
