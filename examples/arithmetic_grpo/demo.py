"""The whole story in one go: pretrain, GRPO, export, check; ends with a table, and with an error if a claim fails.

make demo, or demo.py --processes 1 (on one GPU, for example)
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE

HERE, OUTPUTS = Path(__file__).parent, Path("outputs/arithmetic_grpo")
PROCESSES, LAYOUT = ("1", "TP1") if sys.argv[1:] == ["--processes", "1"] else ("4", "TP2 x PP2")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", PROCESSES]
QUIET = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
REQUIRED_GAIN = 0.1  # the last bits of arithmetic differ by CPU, and 70 steps of sampling make paths of them
TOLERANCES = {"cpu": (1e-5, 0.0), "cuda": (1e-3, 0.004)}  # of logits and of accuracy: kernels differ on a GPU


def run(title: str, command: list[str], capture: bool = False) -> tuple[float, str]:
    """Run one step of the story; returns its seconds and, captured, its last line."""
    print(f"\n=== {title}\n$ {' '.join(command).replace(sys.executable, 'python')}", flush=True)
    started = time.time()
    done = subprocess.run(command, env=os.environ | QUIET, check=True, text=True, stdout=PIPE if capture else None)
    return time.time() - started, done.stdout.strip().splitlines()[-1] if capture else ""


def main() -> None:
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    run("the sums", [sys.executable, str(HERE / "arithmetic.py"), str(OUTPUTS / "data")])
    pretrain_s, _ = run(f"pretraining: plain Megatron-Core, {LAYOUT}", [*TORCHRUN, str(HERE / "pretrain.py")])
    grpo_s, _ = run("the same job with GRPO plugged in", [*TORCHRUN, str(HERE / "train_rl.py")])
    lines = [json.loads(line) for line in (OUTPUTS / "run/metrics.jsonl").read_text().splitlines()]
    evaluations = [line["eval/reward"] for line in lines if "eval/reward" in line]
    newest = sorted((OUTPUTS / "run/checkpoints").iterdir())[-1]
    check = [sys.executable, str(HERE / "check_export.py"), str(newest), str(OUTPUTS / "run/hf")]
    found = json.loads(run("the exported Hugging Face folder, loaded by transformers", check, capture=True)[1])
    accuracy, difference = found["transformers_accuracy"], found["max_logit_difference"]
    gain, (close, same) = evaluations[-1] - evaluations[0], TOLERANCES[found["device"]]
    claims = [
        ("held-out accuracy before", f"{evaluations[0]:.3f}", True),
        ("held-out accuracy after", f"{evaluations[-1]:.3f} (+{gain:.3f})", gain >= REQUIRED_GAIN),
        ("the same by transformers", f"{accuracy:.3f}", abs(accuracy - evaluations[-1]) <= same),
        ("largest logit difference", f"{difference:.1e}", difference <= close),
        ("seconds: pretraining, GRPO", f"{pretrain_s:.0f}, {grpo_s:.0f}", True),
    ]
    print("\n" + "\n".join(f"{name:28} {value:20} {'ok' if good else 'FAILED'}" for name, value, good in claims))
    print(f"\ncurve: {OUTPUTS}/run/reward_curve.png   model: {OUTPUTS}/run/hf")
    print(f"mlflow ui --backend-store-uri sqlite:///{(OUTPUTS / 'run/mlflow.db').absolute()}")
    sys.exit(None if all(good for _, _, good in claims) else "the demo did not hold what it claims")


if __name__ == "__main__":
    main()
