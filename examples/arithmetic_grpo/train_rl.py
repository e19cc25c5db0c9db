"""The pretraining job of pretrain.py, extended: its model, optimizer and parallel_state learn from their own answers.

    torchrun --nproc-per-node 4 examples/arithmetic_grpo/train_rl.py

What a job needs for this stands between the two lines of dashes.
"""

from importlib.util import find_spec
from pathlib import Path

from arithmetic import build_tokenizer, score
from pretrain import SIDE, build_model, build_optimizer, initialize, load_checkpoint, parallel_state

OUTPUTS = Path("outputs/arithmetic_grpo")
TRACKERS = ("console", "jsonl", "mlflow") if find_spec("mlflow") else ("console", "jsonl")


def main() -> None:
    initialize(tensor_parallel=SIDE, pipeline_parallel=SIDE, seed=1)
    model = build_model()
    load_checkpoint(OUTPUTS / "pretrained", model)
    optimizer = build_optimizer(model, learning_rate=3e-4)
    # ---------------------------------------------------------------------------------------------------------------
    from megatron_rl import GRPO, Actor, RewardModel, Trainer
    from megatron_rl.data import PromptDataset, PromptLoader
    from megatron_rl.run import Evaluation
    from megatron_rl.tracking import TrackerGroup
    from megatron_rl.trainer import TrainerConfig

    tokenizer = build_tokenizer()
    actor = Actor(model=model, tokenizer=tokenizer, optimizer=optimizer, parallel_state=parallel_state)
    reward = RewardModel(score)
    grpo = GRPO(actor=actor, loss_aggregation="token-mean")
    flow = actor.sample(n=8, max_tokens=6) >> reward.score() >> grpo.update()

    prompts = PromptDataset(OUTPUTS / "data/train.jsonl", tokenizer)
    loader = PromptLoader(prompts, batch_size=128, replica=actor)
    held_out = PromptDataset(OUTPUTS / "data/heldout.jsonl", tokenizer)
    evaluation = Evaluation(actor, list(held_out), reward.reward, max_tokens=6)
    config = TrainerConfig(output_dir=str(OUTPUTS / "run"), num_steps=70, evaluate_every=35, save_every=35)
    tracking = TrackerGroup.Config(trackers=TRACKERS, experiment="arithmetic_grpo")
    Trainer(flow, loader, config, tracking=tracking, evaluate=evaluation).train()
    # ---------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    main()
