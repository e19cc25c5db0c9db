"""KTO: `python examples/kto_binary/train.py model=PATH data=COMPLETIONS.jsonl [key=value ...]`."""

import sys
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_rl import KTOTrainer
from megatron_rl.config import ConfigRecord, load_config
from megatron_rl.parallel import ParallelSizes
from megatron_rl.workers.actor_config import ActorConfig


class Config(ConfigRecord):
    """What config.yaml and the command line may say."""

    model: str  # Hugging Face folder or id
    data: str  # JSON lines or Parquet
    parallel: ParallelSizes
    worker: ActorConfig
    kto: dict[str, Any]
    train: dict[str, Any]


def main() -> None:
    config = load_config(Config, Path(__file__).with_name("config.yaml"), sys.argv[1:])
    trainer = KTOTrainer(
        model=config.model,
        tokenizer=AutoTokenizer.from_pretrained(config.model),
        dataset=config.data,
        parallel=config.parallel,
        config=config.worker,
        **config.kto,
    )
    metrics = trainer.train(**config.train)
    print(f"loss {metrics['loss/kto']:.4f}")


if __name__ == "__main__":
    main()
