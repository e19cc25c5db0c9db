"""How fast a GRPO step is, by megatron_rl at TP1 and TP2 and by TRL: one JSON object on the last line.

The same task for all three (`stories_task.py`): a 260,032-parameter Llama, 16 prompts x 8 samples x 48 new tokens, KL
to a frozen reference, one optimizer step, fp32, one thread a process, on this CPU. The three are started
once and then take turns, step by step, so that what else the machine does disturbs them alike; the first steps are not
counted; figures are medians. Seconds are of wall time; ``cpu`` is the processor time of one rank, which a busy machine
changes least: at one thread the two are equal on a machine that does nothing else.

    make bench-train            # with TRL in ./.venv-trl
    python tools/bench_train.py [--trl PYTHON_WITH_TRL] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from stories_task import KL, MARK, MAX_TOKENS, PROMPTS, SAMPLES, find_model

TOOLS = Path(__file__).resolve().parent
WARM_UP = 3  # steps of each that are not counted: first uses, and responses that still grow longer
PARTS = ("rollout", "reward", "logprob", "update", "weight_sync", "total", "cpu")


class Participant:
    """A program that makes one step each time it is told to."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.steps: list[dict[str, Any]] = []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TOOLS.parent), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> None:
        """Let it make one step, and wait for the figures."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                self.steps.append(json.loads(line[len(MARK) :]))
                return
        sys.exit(f"{self.name} ended with code {self.process.wait()} before step {len(self.steps)}: see above")

    def finish(self) -> None:
        """End of input ends it."""
        assert self.process.stdin
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @property
    def counted(self) -> list[dict[str, Any]]:
        return self.steps[WARM_UP:]

    def seconds(self, part: str) -> float:
        """Median of one part of a step."""
        return statistics.median(step["seconds"][part] for step in self.counted)

    def figures(self) -> dict[str, Any]:
        return {
            "tokens_per_s": round(statistics.median(s["tokens"] / s["seconds"]["total"] for s in self.counted), 1),
            "step_s": {part: round(self.seconds(part), 4) for part in PARTS if part in self.counted[0]["seconds"]},
            "peak_rss_mb": round(max(step["peak_rss_mb"] for step in self.steps), 1),
        }


def ours(tp: int) -> Participant:
    script = [str(TOOLS / "stories_ours.py"), f"tp={tp}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={tp}"] if tp > 1 else []
    return Participant(f"megatron_rl at TP{tp}", [sys.executable, *launcher, *script])


def measure(participants: list[Participant], steps: int) -> None:
    try:
        for number in range(WARM_UP + steps):
            for participant in participants:
                participant.step()
                if number >= WARM_UP:
                    print(participant.name, participant.steps[-1]["seconds"], file=sys.stderr)
    finally:
        for participant in participants:
            participant.finish()


def processor() -> str:
    """The processor's name as Linux tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="the python of an environment with TRL; without it only ours is run")
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each")
    options = parser.parse_args()
    find_model()
    tp1, tp2 = ours(1), ours(2)
    trl = [Participant("TRL", [str(options.trl), str(TOOLS / "stories_trl.py")])] if options.trl else []
    load_before = os.getloadavg()[0]
    measure([tp1, tp2, *trl], options.steps)
    result: dict[str, Any] = {"tp1": tp1.figures(), "tp2": tp2.figures()}
    if trl:
        theirs = trl[0].figures()
        result |= {"trl": theirs, "trl_step_s": theirs["step_s"]["total"]}
        result["ratio_vs_trl"] = round(trl[0].seconds("total") / tp1.seconds("total"), 3)
        result["ratio_vs_trl_cpu"] = round(trl[0].seconds("cpu") / tp1.seconds("cpu"), 3)
    result["measured"] = {
        "task": f"GRPO, stories260k, {len(PROMPTS)} prompts x {SAMPLES} samples x {MAX_TOKENS} tokens, KL {KL}, fp32",
        "device": f"cpu: {processor()}",
        "cores": os.cpu_count(),
        "threads_per_process": 1,
        "steps": options.steps,
        "load_average": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
