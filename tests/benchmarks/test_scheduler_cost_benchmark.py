"""The scheduler benchmark measures what it says: the caches it names, their trees, its sums."""

from __future__ import annotations

import json

import pytest
import scheduler_cost
from scheduler_steps import CACHES, EVICTING_OP, KRUL, OPS, PYTHON, RETURNING_OPS, STOCK, STORED

NODES, TOKENS, CONVERSATIONS, ROUNDS = 20, 96, 3, 2


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> dict:
    path = tmp_path_factory.mktemp("scheduler") / "out.json"
    steps = ["--nodes", str(NODES), "--repeats", "3", "--decode-ms", "10"]
    burst = ["--burst-tokens", str(TOKENS), "--burst-conversations", str(CONVERSATIONS)]
    burst += ["--burst-rounds", str(ROUNDS), "--host-memory", "64MB,24MB"]
    assert scheduler_cost.main([*steps, *burst, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_the_caches_are_what_they_are_called(result):
    cores = result["cores"]
    assert list(cores) == list(CACHES)
    assert all(cores[name].endswith(".UnifiedTreeCore") for name in (PYTHON, KRUL, STORED))
    assert cores[STOCK].rpartition(".")[2] in ("RustUnifiedTreeCore", "UnifiedTreeCore")
    assert result["decode_ms"] == 10
    assert {"sglang", "torch"} <= set(result["versions"])


def test_every_call_is_timed_on_every_cache(result):
    (size,) = result["steps"]
    found = {(row["cache"], row["op"]) for row in size["rows"]}
    expected = {(name, op) for name in CACHES for op in OPS}
    assert found == expected | {(STORED, op) for op in RETURNING_OPS}
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in size["rows"])


def test_the_trees_are_alike(result):
    (size,) = result["steps"]
    assert list(size["held"]) == [PYTHON, KRUL, STORED]
    assert len(set(size["held"].values())) == 1, "the caches hold different trees"
    assert NODES <= size["held"][PYTHON] <= 2 * NODES


def test_what_is_added_is_split_in_two(result):
    (size,) = result["steps"]
    added = {(row["cache"], row["op"]): row for row in size["added"]}
    assert len(added) == 6
    assert added[KRUL, EVICTING_OP].keys() == {
        "cache",
        "op",
        "us",
        "of_python_core_us",
        "of_krul_us",
    }


def test_a_burst_is_stored_within_its_staging(result):
    roomy, tight = result["bursts"]
    for burst in (roomy, tight):
        assert burst["evicted_tokens"] == TOKENS * CONVERSATIONS * ROUNDS
        assert burst["dropped_tokens"] == 0
        assert burst["raw_bytes"] <= burst["staging_peak"] <= burst["staging_bound"]
        assert 0 < burst["stall_ms"]["p50"] <= burst["stall_ms"]["p99"] <= burst["stall_ms"]["max"]
        assert burst["parts_ms"]["gather"] <= burst["stall_ms"]["max"]
        assert burst["burst_stalled_seconds"] <= burst["burst_encoded_seconds"] * ROUNDS
    assert roomy["staging_waits"] == 0
    assert result["burst_codec"] == "lossless"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nodes", "few"], "invalid literal"),
        (["--parts", "step"], "--parts: expected some of steps, burst"),
        (["--repeats", "0"], "--repeats: expected at least 1"),
        (["--profile", "nowhere"], "nowhere: no such file"),
    ],
)
def test_a_bad_option_is_one_line(arguments, problem, capsys):
    with pytest.raises(SystemExit):
        scheduler_cost.main(arguments)
    assert problem in capsys.readouterr().err
