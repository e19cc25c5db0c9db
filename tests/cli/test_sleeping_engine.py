"""An engine that sleeps while the trainer works changes memory, and nothing else."""

from __future__ import annotations

from small_run import metrics_of, write_run


def test_a_run_whose_engine_sleeps_gives_the_same_metrics(command, tmp_path):
    config = write_run(tmp_path)
    runs = {}
    for sleeps in ("false", "true"):
        out = tmp_path / sleeps
        options = ("trainer.num_steps=3", f"trainer.output_dir={out}", "trainer.save_every=0")
        ended = command("train", config, *options, f"actor.rollout.sleep_while_training={sleeps}")
        assert ended.code == 0, ended.err
        runs[sleeps] = metrics_of(out)
    assert len(runs["true"]) == 3
    assert runs["true"] == runs["false"]
