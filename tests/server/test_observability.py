"""What an operator sees of a live server: /metrics and its documentation, the dashboard, the log,
and `krul top`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from dialogue import KRUL, SMALL_POOL, Dialogue

from krul_sglang.cli import BEGIN, END
from krul_sglang.live_server import LiveServer
from krul_sglang.runtime import metrics

DOCS = Path(__file__).resolve().parents[2] / "docs"
DASHBOARD = json.loads((DOCS / "grafana_dashboard.json").read_text())
MINE = [metric for metric in metrics.METRICS if metric.tier in (None, "disk")]
"""What a server with a disk tier and no remote one has."""


@pytest.fixture(scope="module")
def live(serve, tmp_path_factory) -> Iterator[LiveServer]:
    """Conversations that evicted each other, also to a disk."""
    disk = ("--krul-dir", str(tmp_path_factory.mktemp("disk")))
    with serve(*KRUL, *SMALL_POOL, *disk, "--enable-metrics") as server:
        Dialogue(server).run(turns=3)
        until = time.monotonic() + 20
        while server.krul()["tiers"]["disk"]["unwritten"] and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(2)  # figures may be a second old, and an idle scheduler looks once a second
        yield server


def exposed(server: LiveServer) -> dict[str, float]:
    """Samples of /metrics by name and labels, as they are written there."""
    text = requests.get(f"{server.url}/metrics", timeout=60).text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def names(samples: dict[str, float]) -> set[str]:
    return {sample.partition("{")[0] for sample in samples}


def documented() -> set[str]:
    table = (DOCS / "metrics.md").read_text().partition(BEGIN)[2].partition(END)[0]
    return set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


@pytest.mark.server
def test_every_metric_is_documented_and_there(live: LiveServer) -> None:
    found = {name for name in names(exposed(live)) if name.startswith(metrics.PREFIX)}
    parts = {f"{metrics.PASS_SECONDS}_{part}" for part in ("bucket", "sum", "count")}
    assert found == {metric.exposed for metric in MINE} | parts
    everything = {metric.exposed for metric in metrics.METRICS}
    assert documented() == everything | {metrics.PASS_SECONDS}


@pytest.mark.server
def test_metrics_say_what_server_info_says(live: LiveServer) -> None:
    samples, figures = exposed(live), live.krul()
    for metric in MINE:
        value = metric.read(figures)
        for label, number in value.items() if metric.label else (("", value),):
            own = f'{metric.label}="{label}"'
            (sample,) = [
                number
                for name, number in samples.items()
                if name.startswith(metric.exposed + "{") and (not metric.label or own in name)
            ]
            assert sample == pytest.approx(number, abs=1e-5), metric.name
    assert figures["restored_tokens"] > 0
    assert figures["tiers"]["disk"]["stored"] > 0
    count = next(v for k, v in samples.items() if k.startswith(f"{metrics.PASS_SECONDS}_count"))
    assert count == figures["restore"]["passes"] > 0


@pytest.mark.server
def test_every_expression_of_the_dashboard_has_its_metric(live: LiveServer) -> None:
    there = names(exposed(live))
    asked = {name for text in expressions() for name in re.findall(r"sglang:\w+", text)}
    others = {metric.exposed for metric in metrics.METRICS if metric not in MINE}
    assert asked - there - others == set()
    shown = {name.removesuffix("_bucket") for name in asked}
    left_out = {metric.exposed for metric in metrics.METRICS} - shown
    assert left_out <= {
        "sglang:krul_measured_requests_total",
        "sglang:krul_memory_limit_bytes",
        "sglang:krul_restore_passes_total",
        "sglang:krul_restore_seconds_total",
    }


@pytest.mark.server
def test_the_log_accounts_for_every_token(live: LiveServer) -> None:
    figures = live.krul()
    wanted = {"evict": figures["evicted_tokens"], "restore": figures["restored_tokens"]}
    until = time.monotonic() + 20
    while (found := {kind: sum(tokens(live, kind)) for kind in wanted}) != wanted:
        assert time.monotonic() < until, f"{found} in the log, {wanted} in /server_info"
        time.sleep(0.2)
    assert len(tokens(live, "restore")) == figures["restore"]["passes"]


def tokens(server: LiveServer, kind: str) -> list[int]:
    """Of each line of one kind."""
    pattern = rf"krul {kind} tokens=(\d+) .* tier=\S+ codec=\S+ "
    return [int(found) for found in re.findall(pattern, server.log.read_text(errors="replace"))]


@pytest.mark.server
def test_top_prints_the_server(live: LiveServer) -> None:
    top = [sys.executable, "-m", "krul_sglang.cli", "top", "--once", "--url", live.url]
    done = subprocess.run(top, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line.split() for line in done.stdout.splitlines()}
    assert lines["device"][-3:-1] == ["224", "tokens"]
    assert lines["disk"][-3:-1] == ["10", "GB"]
    figures = live.krul()
    assert lines["stored tokens"][2] == str(figures["stored_tokens"])
    assert f" {figures['restored_tokens']}" in done.stdout


# ---- without a server ----------------------------------------------------------------


def test_the_table_is_current() -> None:
    page = (DOCS / "metrics.md").read_text()
    generated = page.partition(BEGIN)[2].partition(END)[0]
    assert generated.strip() == metrics.table().strip(), "run `make docs`"
    assert "prometheus.yml" in page
    assert "grafana_dashboard.json" in page


def test_the_dashboard_is_one() -> None:
    """What Grafana needs to show it: ids, places that do not overlap, queries it can parse."""
    assert {"title", "uid", "schemaVersion", "templating", "time", "panels"} <= DASHBOARD.keys()
    every = DASHBOARD["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & own, panel["title"]
        cells |= own
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == variables == {"datasource", "model"}


def test_prometheus_understands_every_expression() -> None:
    parser = pytest.importorskip("promql_parser", reason="pip install promql-parser")
    for text in expressions():
        parser.parse(text.replace("$__rate_interval", "1m").replace("$model", ".*"))
    with pytest.raises(ValueError, match="parenthesis"):
        parser.parse("sum(rate(x[1m])")
