"""Real pretrained weights through everything: convert, GRPO on GSM8K, DPO on HH-RLHF, export; a table at the end.

make demo-smollm2, or: python examples/smollm2_gsm8k/demo.py NAME DATA     # outputs/NAME/model and the data are there
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE, NAME, DATA = Path(__file__).parent, sys.argv[1], Path(sys.argv[2])
OUTPUTS, MODEL = Path("outputs") / NAME, Path("outputs") / NAME / "model"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
QUIET = {"PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
LAYOUTS = {"megatron": "parallel.pp=2", "fsdp2": "{}.backend=fsdp2"}
DPO = [f"train.{k}" for k in ("max_steps=10", "warmup_steps=0", "per_device_train_batch_size=2", "save_at_end=false")]
STEPS = {"grpo": 5, "dpo": 10}
KEYS = (("grpo", "rewards/mean"), ("dpo", "loss/preference"), ("dpo", "rewards/accuracies"))
ROWS = ("greedy text, engine", "greedy text, export", "GRPO: reward", "DPO: loss", "DPO: accuracy", "seconds, of CPU")


def run(*command: object, captured: bool = False) -> str:
    """Run one step of the story; returns its last line, if captured."""
    print(f"\n$ {' '.join(map(str, command)).replace(sys.executable, 'python')}", flush=True)
    pipe = subprocess.PIPE if captured else None
    done = subprocess.run(list(map(str, command)), env=os.environ | QUIET, check=True, text=True, stdout=pipe)
    return done.stdout.strip().splitlines()[-1] if captured else ""


def story(backend: str) -> list[tuple[str, bool]]:
    """Everything, with one backend; returns its column of the table."""
    started, cpu, folder, layout = time.time(), sum(os.times()[2:4]), OUTPUTS / backend, LAYOUTS[backend]
    source = folder / "checkpoint" if backend == "megatron" else MODEL
    shutil.rmtree(folder, ignore_errors=True)
    if backend == "megatron":
        run(sys.executable, "-m", "megatron_rl", "convert", MODEL, source, "--to", "megatron", "--pp", 2)
    same = json.loads(run(*TORCHRUN, HERE / "same_text.py", MODEL, source, folder / "hf", backend, captured=True))
    gsm8k, hh = DATA / "gsm8k_train.jsonl.gz", DATA / "hh_harmless_test_pairs.jsonl.gz"
    grpo = [f"model={source}", f"tokenizer={MODEL}", f"data.path={gsm8k}", f"trainer.output_dir={folder / 'grpo'}"]
    plain = ["data.chat=false"] if NAME == "gemma3" else []
    run(*TORCHRUN, "-m", "megatron_rl", "train", HERE / "config.yaml", *grpo, layout.format("actor"), *plain)
    dpo = [f"model={folder / 'grpo/hf'}", f"data={hh}", f"train.output_dir={folder / 'dpo'}", *DPO]
    run(*TORCHRUN, HERE.parent / "dpo_pairs/train.py", *dpo, "dpo.max_length=128", layout.format("worker"))
    lines = {name: [*map(json.loads, (folder / name / "metrics.jsonl").open())] for name in STEPS}
    shown = [(f"{lines[of][0][key]:.3f} -> {lines[of][-1][key]:.3f}", len(lines[of]) == STEPS[of]) for of, key in KEYS]
    texts = [("same" if same[what] else "DIFFERS", same[what]) for what in ("engine", "export")]
    return [*texts, *shown, (f"{time.time() - started:.0f}, {sum(os.times()[2:4]) - cpu:.0f}", True)]


if __name__ == "__main__":
    table = [story(backend) for backend in LAYOUTS]
    print(f"\n{'':24}{'megatron, PP2':20}fsdp2, 2 ranks")
    print("\n".join(f"{row:24}{one:20}{other}" for row, (one, _), (other, _) in zip(ROWS, *table, strict=True)))
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"\nlargest process: {largest:.1f} GiB   models: {OUTPUTS}/megatron/dpo/hf, {OUTPUTS}/fsdp2/dpo/hf")
    sys.exit(None if all(good for column in table for _, good in column) else "the demo did not hold what it claims")
