"""Two ranks over gloo wait for the remote tier alike, and admit only what came on both."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from redis_server import RedisServer

pytestmark = pytest.mark.process

CHILD = Path(__file__).parent / "remote_rank_child.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What each rank reported; every collective has a timeout, so a disagreement ends."""
    folder = tmp_path_factory.mktemp("ranks")
    server = RedisServer(folder)
    path = os.pathsep.join([str(CHILD.parent), str(CHILD.parent.parent)])
    children = [
        subprocess.Popen(
            [sys.executable, str(CHILD), str(rank), str(folder / "gloo"), server.url[:-2]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for rank in range(2)
    ]
    results = []
    try:
        outputs = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
        server.kill()
    for child, (out, err) in zip(children, outputs, strict=True):
        assert child.returncode == 0, err[-3000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


def test_both_ranks_find_the_same(ranks) -> None:
    assert ranks[0] == ranks[1]


def test_what_came_on_both_is_found(ranks) -> None:
    assert ranks[0]["sound"] == {"found": [90], "pulled": 90}
    assert ranks[0]["a_burst"] == {"found": [90, 90, 90], "pulled": 90}


@pytest.mark.parametrize(
    "trouble",
    ["damage_on_one_rank", "gone_on_one_rank", "no_server_on_one_rank", "no_room_on_one_rank"],
)
def test_what_came_on_one_rank_only_is_a_miss_on_both(ranks, trouble) -> None:
    assert ranks[0][trouble] == {"found": [0], "pulled": 0}
