"""Every mistake ends `train` with exit code 2, one line that says what to do, and no output folder left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from forked import run_ranks
from small_run import write_run
from transformers import AutoTokenizer

REWARDS = Path(__file__).with_name("failing_rewards.py")


def own(function: str) -> str:
    return f"rewards=[{{name: 'python:{REWARDS}:{function}'}}]"


# overrides -> parts of the message
MISTAKES = {
    "a misspelt key": (["actor.optimizer.learning_rat=1"], ["did you mean 'actor.optimizer.learning_rate'"]),
    "a value of the wrong type": (["trainer.num_steps=many"], ["trainer.num_steps", "many"]),
    "an override without a value": (["parallel.tp"], ["section.key=value"]),
    "more ranks than torchrun started": (["parallel.tp=2", "parallel.pp=2"], ["tp=2 * pp=2 * cp=1 = 4", "started 1"]),
    "an axis of no ranks": (["parallel.tp=0"], ["parallel.tp=0", "at least 1"]),
    "a rollout wider than its replica": (["actor.rollout.tp=2"], ["tp=2"]),
    "a model that is not there": (["model=/nowhere/model"], ["/nowhere/model"]),
    "data that are not there": (["data.path=/nowhere/rows.jsonl"], ["/nowhere/rows.jsonl"]),
    "a column that is not there": (["data.prompt=question"], ["question", "prompt, answer"]),
    "answers as long as the context": (
        ["actor.sampling.max_tokens=64"],
        ["max_tokens=64 leaves no room", "context of 64"],
    ),
    "prompts that leave no room for answers": (
        ["actor.sampling.max_tokens=62"],
        ["none of 40 rows is left: 40 longer"],
    ),
    "a prompt too long for the context": (
        ["actor.sampling.max_tokens=60", "data.overlong=error"],
        ["train.jsonl:1: the prompt has 6 tokens, more than the 4 that max_tokens=60 leaves"],
    ),
    "a long prompt of the evaluation": (
        [
            "evaluation.data.path=${data.path}",
            "evaluation.data.template=1+1+1+1+{prompt}",
            "evaluation.data.overlong=error",
            "actor.sampling.max_tokens=51",
        ],
        ["the prompt has 14 tokens, more than the 13"],
    ),
    "an unknown algorithm": (["algorithm.name=gppo"], ["grpo"]),
    "a misspelt key of the algorithm": (["algorithm.kl_coeficient=0.1"], ["did you mean 'kl_coefficient'"]),
    "an unknown engine": (["actor.rollout.engine=locl"], ["actor.rollout.engine", "'local'"]),
    "an unknown tracker": (["tracking.trackers=[jsnl]"], ["tracking.trackers", "'jsonl'"]),
    "an unknown reward": (["rewards=[{name: exakt}]"], ["'exact'"]),
    "a reward function that is not there": ([own("evne")], ["Did you mean 'even'"]),
    "a reward that raises": ([own("raising")], ["'raising' raised KeyError", "no such entry", "prompt "]),
    "a reward that is not a number": ([own("not_a_number")], ["returned nan, expected a finite number", "prompt "]),
    "a checkpoint that is not there": (
        ["trainer.resume=/nowhere/step_000001"],
        ["expected auto, never, a checkpoint folder"],
    ),
    "an empty stop text": (["actor.sampling.stop=['']"], ["actor.sampling.stop", "empty"]),
    "a negative number of records": (["data.max_records=-1"], ["data.max_records = -1"]),
    "a negative learning rate": (["actor.optimizer.learning_rate=-1"], ["learning_rate = -1", "at least 0"]),
    "a rate that is no number": (["actor.optimizer.clip_gradient=.nan"], ["actor.optimizer.clip_gradient = "]),
    "no output folder": (["trainer.output_dir=''"], ["trainer.output_dir = ''"]),
    "an output folder below a file": (["trainer.output_dir=/dev/null/out"], ["/dev/null is not a folder"]),
    "a critic that nobody asks": (["critic={}"], ["critic", "grpo", "leave critic out"]),
    "a critic beside one on the actor's weights": (
        ["critic={}", "algorithm={name: ppo, shared_critic: true}", "actor.value_head=true"],
        ["section critic", "shared_critic=true", "leave one of them out"],
    ),
    "a shared critic without its head": (
        ["algorithm={name: ppo, shared_critic: true}"],
        ["shared_critic=true needs actor.value_head=true"],
    ),
    "PPO without a critic": (["algorithm={name: ppo}"], ["'ppo' needs a value model", "section critic"]),
    "a KL without a reference": (["reference=null"], ["kl_coefficient=0.01 needs a reference", "section reference"]),
    "an algorithm on fixed data": (["algorithm={name: dpo}"], ["'dpo' learns from given responses", "DPOTrainer"]),
    "options of a tracker that is not used": (
        ["tracking.options={mlflow: {uri: 'http://h'}}"],
        ["tracking.options has 'mlflow'"],
    ),
    "a key into a list": (["rewards.name=x"], ["rewards.name=x", "does not fit"]),
    "an option that the engine does not take": (
        ["actor.rollout.options={kv_cache_byte: 1}"],
        ["actor.rollout.options", "did you mean 'kv_cache_bytes'"],
    ),
    "an option of the wrong kind": (
        ["actor.rollout.options={prefill_tokens: 0}"],
        ["prefill_tokens = 0", "at least 1"],
    ),
    "servers without SGLang": (
        ["actor.rollout.engine=sglang"],
        ["has no SGLang to start servers with", "server.python"],
    ),
    "one sample where samples are compared": (["actor.sampling.n=1"], ["n=1, but GRPO compares the samples"]),
    "a link that the machine lacks": (
        ["actor.collectives={all_reduce: hybrid, links: [eth99]}"],
        ["collectives.links has eth99, but", "has the interfaces"],
    ),
    "a link named twice": (
        ["actor.collectives={all_reduce: hybrid, links: [lo, lo]}"],
        ["actor.collectives", "links has lo more than once"],
    ),
    "a text in place of a list": (["actor.lora={target_modules: linear_fc1}"], ["'linear_fc1': expected a list"]),
    "a value of no kind that a key may have": (
        ["environment={name: tools, tool_format: xml}"],
        ["environment.tool_format = 'xml': Input should be 'hermes', 'llama' or 'mistral', or Input should be 'auto'"],
    ),
    "adapters that are not there": (["actor.lora={path: /nowhere/adapters}"], ["/nowhere/adapters"]),
    "a model in place of adapters": (["actor.lora={path: '${model}'}"], ["adapter_config.json"]),
    "a server without http": (
        ["actor.rollout.engine=sglang", "actor.rollout.options={urls: ['localhost:30000']}"],
        ["options: urls has 'localhost:30000'", "http://host:port"],
    ),
    "an option that the delivery does not take": (
        [
            "actor.rollout.engine=sglang",
            "actor.rollout.options={urls: ['http://127.0.0.1:9'], delivery: disk, delivery_options: {bucket: 1}}",
        ],
        ["delivery_options has bucket; known here: bucket_bytes, folder, verify"],
    ),
    "a lag without rollout ranks": (["rollout_lag=2"], ["rollout_lag=2 needs ranks", "parallel.rollout_ranks"]),
    "tools that are not there": (
        ["environment={name: tools, options: {tools: ['python:/nowhere/x.py:f']}}"],
        ["file '/nowhere/x.py' does not exist"],
    ),
    "a trace of all steps": (["trainer.trace=all"], ["trainer.trace = 'all'", "valid integer"]),
    "a log level that is none": (["log_level=LOUD"], ["log_level", "'WARNING'"]),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    write_run(folder)
    return folder


def assert_refused(ended, folder: Path, expected: list[str]) -> None:
    for part in expected:
        assert part in ended.error
    assert ended.code == 2
    assert not (folder / "out").exists()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_train_refuses(mistake, command, run_folder):
    overrides, expected = MISTAKES[mistake]
    assert_refused(command("train", run_folder / "config.yaml", *overrides), run_folder, expected)


def test_train_names_the_configurations_that_do_exist(command, run_folder):
    assert_refused(command("train", run_folder / "confg.yaml"), run_folder, ["does not exist", "config.yaml"])


def test_train_shows_the_line_of_broken_yaml(command, run_folder):
    broken = run_folder / "broken.yaml"
    broken.write_text("model: x\nactor: dtype: float32\n")
    assert_refused(command("train", broken), run_folder, [f"{broken}:2: not valid YAML"])


def test_train_refuses_data_without_rows(command, run_folder):
    (run_folder / "empty.jsonl").touch()
    ended = command("train", run_folder / "config.yaml", f"data.path={run_folder / 'empty.jsonl'}")
    assert_refused(ended, run_folder, ["empty.jsonl"])


def test_train_asks_for_a_pad_token_where_nobody_names_one(command, tmp_path):
    config = write_run(tmp_path)
    for name, keys in {"tokenizer_config": ["pad_token"], "config": ["pad_token_id"]}.items():
        path = tmp_path / "model" / f"{name}.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in keys}))
    (tmp_path / "model" / "special_tokens_map.json").unlink(missing_ok=True)
    assert_refused(command("train", config), tmp_path, ["no pad token", "pad_token='eos'"])
    assert command("train", config, "pad_token=eos", "trainer.num_steps=1").code == 0


def test_a_check_prints_the_whole_configuration_and_runs_nothing(command, run_folder):
    ended = command("train", run_folder / "config.yaml", "--check", "parallel.tp=2", "parallel.pp=2")
    assert ended.code == 0
    shown = json.loads(ended.out)
    assert (shown["parallel"]["tp"], shown["actor"]["optimizer"]["beta1"]) == (2, 0.9)
    assert "the number of ranks is not known here" in ended.err
    assert "a multiple of 4 (TP2 x PP2)" in ended.err
    assert not (run_folder / "out").exists()


@pytest.mark.parametrize("check", [["--check"], []], ids=["check", "run"])
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_is_refused(command, run_folder, tmp_path, check):
    words = AutoTokenizer.from_pretrained(run_folder / "model")
    vocab = json.loads((run_folder / "model" / "config.json").read_text())["vocab_size"]
    words.add_tokens([f"<new {index}>" for index in range(vocab - len(words) + 1)])
    words.save_pretrained(tmp_path / "words")
    ended = command("train", run_folder / "config.yaml", *check, f"tokenizer={tmp_path / 'words'}")
    assert_refused(ended, run_folder, [f"token ids up to {vocab}", f"resize_token_embeddings({vocab + 1})"])


@pytest.mark.parametrize(
    ("fields", "layers"), [({"decoder_sparse_step": 2}, "0, 2"), ({"mlp_only_layers": [3]}, "3")], ids=["step", "list"]
)
def test_dense_layers_among_experts_are_refused_for_sglang_before_a_server_starts(
    command, run_folder, tmp_path, fields, layers
):
    config = json.loads((run_folder / "model" / "config.json").read_text())
    sizes = {"num_hidden_layers": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    mixed = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "head_dim": 16, **sizes, **fields}
    shutil.copytree(run_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | mixed))
    model = [f"model={tmp_path / 'model'}"]
    sglang = ["actor.rollout.engine=sglang", "actor.rollout.options={urls: ['http://127.0.0.1:9']}"]
    ended = command("train", run_folder / "config.yaml", "--check", *model, *sglang)
    assert_refused(ended, run_folder, [f"layers {layers} of this qwen3_moe", "set actor.rollout.engine=local"])
    local = command("train", run_folder / "config.yaml", "--check", *model)
    assert "incomplete" in local.error  # the layers are no matter there: only the weights of such a model are missing
    assert "sglang" not in local.error.lower()


def test_a_model_that_transformers_cannot_build_is_refused(command, run_folder, tmp_path):
    shutil.copytree(run_folder / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    spiral = {"rope_type": "spiral", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"rope_parameters": spiral}))
    ended = command("train", run_folder / "config.yaml", f"model={tmp_path / 'model'}")
    assert_refused(ended, run_folder, ["cannot be built from this config.json", "spiral"])


def test_a_check_refuses_whole_modules_in_parts(command, run_folder):
    parts = ["parallel.tp=2", "actor.rollout.tp=2", "actor.rollout.engine=transformers"]
    ended = command("train", run_folder / "config.yaml", "--check", *parts, WORLD_SIZE=2)
    assert_refused(ended, run_folder, ["rollout.tp=2", "holds whole modules (llama): set rollout.tp to 1"])


def test_a_check_knows_the_number_of_ranks_that_is_in_the_environment(command, run_folder):
    def check(ranks: object, *overrides: str, rank: int = 0):
        return command("train", run_folder / "config.yaml", "--check", *overrides, WORLD_SIZE=ranks, RANK=rank)

    fits = check(8, "parallel.tp=2", "parallel.pp=2")
    assert (fits.code, fits.err) == (0, "")
    other = check(8, rank=3)
    assert (other.code, other.out, other.err) == (0, "", "")
    assert_refused(check(6, "parallel.tp=2", "parallel.pp=2"), run_folder, ["tp=2 * pp=2 * cp=1 = 4", "started 6"])
    assert_refused(check(8, "actor.rollout.tp=2"), run_folder, ["rollout tp=2 does not divide the 1 ranks"])
    assert_refused(check(3), run_folder, ["prompts_per_step=8", "3 data-parallel ranks", "a multiple of 3"])
    for nonsense in ("many", -1, 0, 10**12):
        assert_refused(check(nonsense), run_folder, [f"WORLD_SIZE='{nonsense}'"])


NOT_USED = {
    "the section reference": ["algorithm.kl_coefficient=0"],
    "reference.offload": ["reference={model: '${model}', offload: true}"],
    "actor.value_head": ["actor.value_head=true"],
    "actor.seed": ["actor.seed=5", "seed=7"],
    "trainer.evaluate_every": ["trainer.evaluate_every=2"],
    "trainer.num_epochs": ["trainer.num_epochs=3"],
    "actor.collectives.links": ["actor.collectives.links=[lo]"],
    "actor.collectives.error_feedback": ["actor.collectives.error_feedback=true"],
}


@pytest.mark.parametrize("part", NOT_USED)
def test_a_part_that_is_not_used_is_named(part, command, run_folder):
    ended = command("train", run_folder / "config.yaml", "--check", *NOT_USED[part], WORLD_SIZE=1)
    assert ended.code == 0
    assert ended.err.startswith(f"note: {part} is given, but not used: ")
    assert ended.err.count("\n") == 1


def test_a_reference_that_no_kl_reads_is_not_loaded(command, tmp_path):
    config = write_run(tmp_path)
    ended = command("train", config, "algorithm.kl_coefficient=0", "reference.model=/nowhere", "trainer.num_steps=1")
    assert ended.code == 0
    assert "the section reference is given, but not used: algorithm.kl_coefficient is 0" in ended.err


def test_a_copy_of_the_whole_configuration_is_not_taken_for_wishes(command, run_folder):
    shown = command("train", run_folder / "config.yaml", "--check").out
    (run_folder / "whole.yaml").write_text(shown)
    ended = command("train", run_folder / "whole.yaml", "--check", WORLD_SIZE=1)
    assert (ended.code, ended.err) == (0, "")


def test_a_check_names_all_mistakes_at_once(command, run_folder):
    ended = command(
        "train",
        run_folder / "config.yaml",
        "--check",
        *("algorithm.name=gppo", "actor.rollout.engine=locl", "tracking.trackers=[jsnl]", "callbacks=['nowhere.py:X']"),
        *("data.path=/nowhere/rows.jsonl", "rewards=[{name: exakt}]", "model=/nowhere/model"),
    )
    expected = [
        "7 mistakes",
        "'ppo'",
        "'local'",
        "'jsonl'",
        "nowhere.py",
        "/nowhere/rows",
        "'exact'",
        "/nowhere/model",
    ]
    assert_refused(ended, run_folder, expected)


def test_a_check_looks_into_the_model_and_the_data(command, tmp_path):
    config = write_run(tmp_path)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    tokenizer = tmp_path / "model" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({k: v for k, v in json.loads(tokenizer.read_text()).items() if k != "pad_token"}))
    rows = tmp_path / "train.jsonl"
    rows.write_text(rows.read_text().replace('"answer": "2', '"answer": "x'))
    wrong = ["rewards=[{name: number}]", "actor.rollout.tp=3", "parallel.tp=3", "evaluation.data.path=/nowhere.jsonl"]
    assert_refused(command("train", config, "--check", *wrong[2:3]), tmp_path, ["tp=3 does not divide num_heads=4"])
    ended = command("train", config, "--check", wrong[0], wrong[3], "actor.sampling.max_tokens=99", WORLD_SIZE=1)
    assert_refused(
        ended, tmp_path, ["model.safetensors is not a readable safetensors file", "max_tokens=99", "nowhere"]
    )
    ended = command("train", config, "--check", "critic.model=/nowhere/critic", "algorithm={name: ppo}")
    assert_refused(ended, tmp_path, ["2 mistakes", "/nowhere/critic", "model.safetensors"])


def test_a_check_masks_credentials_and_a_run_keeps_them_to_itself(command, run_folder):
    uri = "http://bob:hunter2@127.0.0.1:9/"
    options = ("tracking.trackers=[mlflow]", f"tracking.options={{mlflow: {{uri: '{uri}'}}}}")
    ended = command("train", run_folder / "config.yaml", "--check", *options)
    assert ended.code == 0
    assert "http://bob:***@127.0.0.1:9/" in ended.out
    assert "hunter2" not in ended.out + ended.err


def test_a_file_of_one_number_is_no_configuration(command, run_folder):
    (run_folder / "number.yaml").write_text("8")
    assert_refused(command("train", run_folder / "number.yaml"), run_folder, ["number.yaml", "one value"])


def test_a_folder_that_was_there_before_survives_a_failure(command, tmp_path):
    config = write_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert command("train", config, own("raising")).code == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.distributed
def test_a_reward_that_raises_on_one_rank_ends_all_ranks_with_the_same_message(tmp_path):
    config = write_run(tmp_path)
    with pytest.raises(AssertionError) as failure:
        run_ranks("-m", 2, "megatron_rl", "train", str(config), own("raising_on_rank_one"), timeout=200)
    said = str(failure.value)
    assert "did not end" not in said
    assert "[rank 1] RewardError: reward 'raising_on_rank_one' raised ZeroDivisionError" in said
    assert "[rank 0] PeerError: reward.score failed on rank 1: RewardError: reward 'raising_on_rank_one'" in said
    assert not (tmp_path / "out").exists()
