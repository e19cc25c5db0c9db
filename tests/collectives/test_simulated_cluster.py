"""Two nodes with shaped links: the bytes that leave a node, the choice, links throttled and cut in mid-run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
from simulated_cluster import Cluster, why_not

RANKS = ROOT / "tools" / "allreduce_ranks.py"
TRAINING = Path(__file__).with_name("training_program.py")
CUT = Path(__file__).with_name("cut_program.py")

pytestmark = [pytest.mark.network, pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")]


def outputs(ranks: list) -> list[tuple[int, str, str]]:
    found = [process.communicate(timeout=400) for process in ranks]
    return [(process.returncode, *texts) for process, texts in zip(ranks, found, strict=True)]


def test_half_as_many_ranks_of_a_node_send_and_bytes_are_the_least():
    """A ring over 4 ranks sends 2 * 3/4 of the data from each node, the hierarchical exchange 2 * 1/2."""
    command = [sys.executable, str(RANKS), "--sizes-mb", "4", "--rounds", "1"]
    with Cluster(2, {"eth0": "200mbit"}) as cluster:
        results = outputs(cluster.start(command, 2))
    assert [code for code, _, _ in results] == [0] * 4, results[0][2][-2000:]
    report = json.loads(results[0][1].splitlines()[-1])
    assert report["topology"] == "2x2"
    assert report["error"] < 1e-6
    size = 4 * 2**20
    assert 1.5 <= report["flat_bytes"] / size < 1.5 * 1.1
    if report["path"] == "hierarchical":  # a busy machine may have measured otherwise
        assert 1.0 <= report["hybrid_bytes"] / size < 1.06
    else:
        assert report["predicted_ms"] > 0


@pytest.mark.parametrize("links", [("eth0", "eth1"), ("eth0",)])
def test_a_link_cut_in_mid_run_is_left_out_or_ends_all_ranks(links):
    command = [sys.executable, str(CUT), *links]
    with Cluster(2, dict.fromkeys(links, "200mbit")) as cluster:
        ranks = cluster.start(command, 2)
        assert ranks[0].stdout.readline().strip() == "running"
        cluster.cut(1, links[-1])
        results = outputs(ranks)
    if len(links) == 2:
        assert [code for code, _, _ in results] == [0] * 4, results[0][2][-3000:]
        assert "left: eth0" in results[0][1]
    else:
        assert [code for code, _, _ in results] == [3] * 4
        assert all("no link between the 2 nodes is left" in out for _, out, _ in results)


def test_training_over_a_link_throttled_to_a_tenth_in_mid_run_makes_the_same_steps():
    """One rank a node. After the first steps the link is slow; what follows equals the library's steps to the bit."""
    with Cluster(2, {"eth0": "200mbit"}) as cluster:
        ranks = cluster.start([sys.executable, str(TRAINING)], 1)
        first = ranks[0].stdout.readline()
        assert first.startswith("RESULT "), first + ranks[0].stderr.read()[-2000:]
        for node in (0, 1):
            cluster.shape(node, "eth0", "20mbit")
        results = outputs(ranks)
    assert [code for code, _, _ in results] == [0, 0], results[0][2][-2000:]
    lines = [first, *results[0][1].splitlines()]
    found = [json.loads(line.removeprefix("RESULT ")) for line in lines if line.startswith("RESULT ")]
    for job in ("plain", "sharded"):
        by_way = {way: steps for name, way, steps in found if name == job}
        assert set(by_way) == {"library", "hybrid", "deterministic", "large pieces"}
        assert all(steps == by_way["library"] for steps in by_way.values())


def test_training_on_two_nodes_of_two_ranks_has_the_same_losses_over_hybrid_groups(capsys):
    """Bit for bit where pieces differ; the library adds in another order. Step times are printed."""
    with Cluster(2, {"eth0": "200mbit"}) as cluster:
        results = outputs(cluster.start([sys.executable, str(TRAINING), "wide"], 2))
    assert [code for code, _, _ in results] == [0] * 4, results[0][2][-2000:]
    lines = [line.partition(" ") for line in results[0][1].splitlines()]
    steps = {way: found for word, _, text in lines if word == "RESULT" for _, way, found in [json.loads(text)]}
    seconds = dict(json.loads(text) for word, _, text in lines if word == "SECONDS")
    assert steps["deterministic"] == steps["large pieces"]
    for mine, librarys in zip(steps["hybrid"], steps["library"], strict=True):
        assert mine == pytest.approx(librarys, rel=2e-3, abs=1e-5)
    with capsys.disabled():
        times = ", ".join(f"{way} {value * 1e3:.0f} ms" for way, value in seconds.items())
        print(f"\nsteps on 2 x 2 ranks: {times}; ratio {seconds['library'] / seconds['hybrid']:.2f}")
