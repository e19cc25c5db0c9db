"""DPO: `python examples/dpo_pairs/train.py model=PATH data=PAIRS.jsonl [key=value ...]`."""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_rl import DPOTrainer
from megatron_rl.config import ConfigRecord, load_config
from megatron_rl.parallel import ParallelSizes
from megatron_rl.workers.actor_config import ActorConfig


class Config(ConfigRecord):
    """What config.yaml and the command line may say."""

    model: str  # Hugging Face folder or id
    data: str  # JSON lines or Parquet
    parallel: ParallelSizes
    worker: ActorConfig
    dpo: dict[str, Any]
    train: dict[str, Any]


def main() -> None:
    config = load_config(Config, Path(__file__).with_name("config.yaml"), sys.argv[1:])
    trainer = DPOTrainer(
        model=config.model,
        tokenizer=AutoTokenizer.from_pretrained(config.model),
        dataset=config.data,
        parallel=config.parallel,
        config=config.worker,
        **config.dpo,
    )
    metrics = trainer.train(**config.train)
    print(f"loss {metrics['loss/preference']:.4f}, accuracy {metrics['rewards/accuracies']:.3f}")


if __name__ == "__main__":
    main()
