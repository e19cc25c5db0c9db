"""The story with a real SGLang server: pretrain at TP2 x PP2, then GRPO whose answers come from SGLang at TP4.

make demo-sglang
"""

import json
import shutil
import sys
from pathlib import Path

from demo import HERE, TORCHRUN, run

OUTPUTS = Path("outputs/arithmetic_sglang")
STEPS, WINDOW = 40, 8  # of the run; averaged at its begin and end
MAX_KL, MIN_RISE = 0.01, 0.03  # nats a token between bf16 server and fp32 trainer; training reward


def main() -> None:
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    run("the sums", [sys.executable, str(HERE / "arithmetic.py"), str(OUTPUTS / "data")])
    pretrain = [*TORCHRUN, str(HERE / "pretrain.py"), "--query-groups", "4", "--output", str(OUTPUTS / "pretrained")]
    run("pretraining: plain Megatron-Core, TP2 x PP2", pretrain)
    train = [*TORCHRUN, "-m", "megatron_rl", "train", str(HERE / "sglang.yaml")]
    seconds, _ = run("GRPO at TP2 x PP2, answers from SGLang at TP4", train)
    lines = [json.loads(line) for line in (OUTPUTS / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "mismatch/kl" in line]
    rewards, gaps = ([line[name] for line in steps] for name in ("rewards/mean", "mismatch/kl"))
    first, last = sum(rewards[:WINDOW]) / WINDOW, sum(rewards[-WINDOW:]) / WINDOW
    worst = max(line["mismatch/logprob_difference_max"] for line in steps)
    syncs = sorted(line["time/weight_sync_s"] for line in steps)
    log = "".join(file.read_text() for file in (OUTPUTS / "servers").glob("*.log"))
    pushes = log.count('POST /update_weight_version HTTP/1.1" 200')
    claims = [
        ("steps", f"{len(steps)}", len(steps) == STEPS),
        ("pushes that the server saw", f"{pushes}", pushes >= STEPS),
        ("training reward", f"{first:.3f} -> {last:.3f}", last - first >= MIN_RISE),
        ("largest mismatch/kl of a step", f"{max(gaps):.2e}", max(gaps) <= MAX_KL),
        ("largest logprob difference", f"{worst:.4f}", True),
        ("weight sync, median", f"{syncs[len(syncs) // 2]:.2f} s", True),
        ("GRPO with the server's start", f"{seconds:.0f} s", True),
    ]
    print("\n" + "\n".join(f"{name:32} {value:20} {'ok' if good else 'FAILED'}" for name, value, good in claims))
    if not all(good for _, _, good in claims):
        sys.exit("the demo did not hold what it claims")


if __name__ == "__main__":
    main()
