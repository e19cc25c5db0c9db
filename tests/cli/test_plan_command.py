"""``megatron-rl plan`` from the command line, against counts made by hand."""

from __future__ import annotations

import json

import pytest

# Three tensors a layer are cut by columns or replicated, the rest by rows; sizes are chosen so that counts stay small.
CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "tie_word_embeddings": False,
}
EMBEDDINGS = 2 * 128 * 64  # embedding and output layer
LAYER = 4 * 64 * 64 + 3 * 64 + 3 * 64 * 128 + 2 * 64  # attention, its biases, gated MLP, norms
ALL = EMBEDDINGS + 2 * LAYER + 64  # and the last norm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan_command")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def plan(command, model, *options: str) -> dict:
    ended = command("plan", model, *options, "--json")
    assert ended.code == 0, ended.error
    return json.loads(ended.out.splitlines()[-1])


def test_bytes_of_engines_on_nodes_of_their_own(command, model) -> None:
    """One node of two pipeline stages feeds two nodes of one engine rank each: all of it, in bf16, once a node."""
    found = plan(command, model, "--train", "pp=2", "--nodes", "1", "--rollout-nodes", "2", "--ranks-per-node", "2")
    assert found["received"] == {"bytes": 4 * 2 * ALL, "minimum": 4 * 2 * ALL}
    assert found["inter_node"] == {"bytes": 2 * 2 * ALL, "minimum": 2 * 2 * ALL}
    assert found["sent_by_holders"] == {"bytes": 2 * ALL, "minimum": 2 * ALL}
    assert found["replicas"] == 4
    assert found["memory"]["rollout_bytes"] == 2 * ALL  # 128 rows need no padding
    assert found["resident_bytes"] == 0
    assert found["estimated_s"] > 0


def test_bytes_of_engines_on_the_training_ranks(command, model) -> None:
    """Two stages of one layer each on one node: each rank lacks what only the other one holds."""
    found = plan(command, model, "--train", "pp=2", "--ranks-per-node", "2", "--dtype", "float32")
    assert found["received"]["bytes"] == 4 * ALL
    assert found["resident_bytes"] == 4 * ALL
    assert found["inter_node"]["bytes"] == 0
    assert found["links"]["intra_received"] == 4 * max(ALL - EMBEDDINGS // 2 - LAYER, EMBEDDINGS // 2 + LAYER)


def test_faster_links_take_less_time(command, model) -> None:
    options = ("--train", "tp=2", "--rollout-nodes", "1", "--ranks-per-node", "2")
    slow, fast = (plan(command, model, *options, "--inter-node", speed) for speed in ("1", "4"))
    assert slow["estimated_s"] == pytest.approx(4 * fast["estimated_s"])


def test_the_text_says_what_is_minimal(command, model) -> None:
    ended = command("plan", model / "config.json", "--train", "tp=2,pp=2", "--rollout", "tp=4", "--ranks-per-node", "4")
    assert "minimal" in ended.out
    assert "is written exactly once" in ended.out
    assert "GB/s between nodes" in ended.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--train", "tp=2,xp=2"], ["--train", "'xp'", "did you mean 'tp'"]),
        (["--train", "tp:2"], ["'tp:2' is not name=number"]),
        (["--train", "tp=3"], ["heads", "parallel.tp=3"]),
        (["--train", "tp=2", "--rollout", "tp=4"], ["rollout tp=4", "2 ranks"]),
        (["--train", "tp=2", "--inter-node", "0"], ["more than 0 GB/s"]),
    ],
)
def test_impossible_clusters_are_refused(command, model, options, expected) -> None:
    ended = command("plan", model, "--ranks-per-node", "6" if "tp=3" in options else "2", *options)
    assert ended.code == 2
    for part in expected:
        assert part in ended.error


CLUSTER = """
nodes: [2, 8]
ranks_per_node: 8
megabytes: [64]
inside: {gbytes_per_s: 20}
between: {gbytes_per_s: 3, latency_us: 30}
second: {gbytes_per_s: 3}
library: ring
"""


def test_all_reduce_of_a_cluster_in_a_file(command, tmp_path) -> None:
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    ended = command("plan", "--all-reduce", tmp_path / "cluster.yaml", "--json")
    assert ended.code == 0, ended.error
    found = json.loads(ended.out)
    eight = found["cases"][1]
    assert (eight["nodes"], eight["ranks"], eight["choice"]) == (8, 64, "hierarchical + second link")
    assert eight["library"]["node_bytes"] == pytest.approx(2 * 63 / 64 * 64 * 2**20)
    assert eight["paths"][0]["node_bytes"] == pytest.approx(2 * 7 / 8 * 64 * 2**20)
    assert found["second_link_for_37_percent"][1] == [8, pytest.approx(0.41, abs=0.005)]
    table = command("plan", "--all-reduce", tmp_path / "cluster.yaml").out
    assert "hierarchical + second link" in table
    assert "8 nodes (64 ranks)" in table


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--all-reduce", "none.yaml"], "'none.yaml' does not exist"),
        (["model", "--all-reduce", "none.yaml"], "takes neither MODEL nor --train"),
        (["--all-reduce", "none.yaml", "--nodes", "1", "--dtype", "float32"], "leave out dtype, nodes"),
        ([], "give MODEL and --train"),
        (["model"], "give MODEL and --train"),
    ],
)
def test_what_is_missing_or_too_much_is_one_line(command, arguments, expected) -> None:
    ended = command("plan", *arguments)
    assert ended.code != 0
    assert expected in ended.error


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("second:", "secnd:", ("secnd", "second")),
        ("nodes: [2, 8]", "nodes: []", ("nodes",)),
        ("megabytes: [64]", "megabytes: []", ("megabytes",)),
        ("nodes: [2, 8]\nranks_per_node: 8", "nodes: [1, 2]\nranks_per_node: 1", ("one rank", "ranks_per_node")),
    ],
)
def test_a_wrong_cluster_is_one_line(command, tmp_path, right, wrong, named) -> None:
    assert right in CLUSTER
    (tmp_path / "cluster.yaml").write_text(CLUSTER.replace(right, wrong))
    ended = command("plan", "--all-reduce", tmp_path / "cluster.yaml")
    assert ended.code != 0
    assert all(part in ended.error for part in named)
    assert "Traceback" not in ended.error


def test_a_lag_is_planned_from_values_and_from_a_file(command, tmp_path) -> None:
    timing = "prompts_per_step=4,samples_per_prompt=1,slots=4,token_s=0.1,tokens_mean=20,training_s=2,push_s=0"
    ended = command("plan", "--lag", "1", "--timing", timing, "--json")
    assert ended.code == 0, ended.error
    found = json.loads(ended.out.splitlines()[-1])
    assert [(law["law"], law["lag"], round(law["step_s"], 9)) for law in found["laws"]] == [
        ("in turns", 0, 4.0),
        ("batch", 1, 2.0),
        ("windowed", 1, 2.0),
    ]
    assert found["bound_s"] == pytest.approx(2.0)
    (tmp_path / "timing.yaml").write_text(timing.replace("=", ": ").replace(",", "\n"))
    ended = command("plan", "--lag", "1", "--timing", tmp_path / "timing.yaml", "--json")
    assert json.loads(ended.out.splitlines()[-1]) == found
    assert "training_s" in command("plan", "--lag", "0", "--timing", "?").out
    assert "windowed    1" in command("plan", "--lag", "1", "--timing", timing).out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--lag", "1", "--timing", "token_s"], "'token_s' is not name=value"),
        (["--lag", "1", "--timing", "tokn_s=1"], "token_s"),
        (["--lag", "1", "--train", "tp=2"], "leave out train"),
        (["--timing", "token_s=1"], "belong to --lag L"),
        (["--lag", "1", "--buffer", "3"], "never holds the 16 groups of a step"),
    ],
)
def test_mistakes_about_a_lag_are_explained(command, options, said) -> None:
    ended = command("plan", *options)
    assert ended.code != 0
    assert said in " ".join((ended.error + ended.out).split())


OLMO = CONFIG | {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}  # has no family
OLMO_LAYER = 4 * 64 * 64 + 2 * 64 + 3 * 64 * 128 + 2 * 64  # attention, its norms, gated MLP, norms


def test_a_model_without_a_family_is_planned_from_fsdp2s_shards(command, tmp_path) -> None:
    """Two ranks have half of each tensor's rows, and each needs all of them."""
    (tmp_path / "config.json").write_text(json.dumps(OLMO))
    found = plan(command, tmp_path, "--train", "tp=1", "--ranks-per-node", "2", "--dtype", "float32")
    whole = EMBEDDINGS + 2 * OLMO_LAYER + 64
    assert found["received"] == {"bytes": 4 * whole, "minimum": 4 * whole}
    assert found["memory"]["train_bytes"] == 4 * whole // 2
    refused = command("plan", tmp_path, "--train", "tp=2", "--ranks-per-node", "2")
    assert refused.code != 0
    assert "data parallel only" in " ".join(refused.error.split())
