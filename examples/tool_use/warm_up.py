"""A model of random weights learns the formats, and calls the tool now and then: `python warm_up.py FOLDER`."""

import sys
from pathlib import Path

from transformers import AutoTokenizer

from megatron_rl import SFTTrainer


def main() -> None:
    folder = Path(sys.argv[1])
    trainer = SFTTrainer(
        model=str(folder / "model"),
        tokenizer=AutoTokenizer.from_pretrained(folder / "model"),
        dataset=str(folder / "warm_up.jsonl"),
        max_length=64,
    )
    trainer.train(
        num_train_epochs=3, per_device_train_batch_size=128, learning_rate=2e-3, output_dir=str(folder / "warm_up")
    )


if __name__ == "__main__":
    main()
