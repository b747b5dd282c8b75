"""Tiny models, argument lists resolved in a child, and conversations that evict each other."""

from __future__ import annotations

import functools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from krul_sglang.live_server import server_environment

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def bare_configs(tmp_path_factory) -> dict[str, Path]:
    """Folders with a config.json, by name; see tiny_models.save_bare_configs."""
    return tiny_models.save_bare_configs(tmp_path_factory.mktemp("configs"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """``tiny("qwen2", 64, 4, "yarn")``: the folder of that model, made once."""
    made: dict[str, Path] = {}

    def model(kind: str, head_dim: int, gqa: int, rope: str, kv_heads: int = 1) -> Path:
        family = tiny_models.Family(kind, head_dim, gqa, rope, kv_heads)
        key = f"{family.name}-{kv_heads}"
        if key not in made:
            made[key] = tiny_models.save_model(family, tmp_path_factory.mktemp(family.name))
        return made[key]

    return model


@pytest.fixture(scope="session")
def two_ranks() -> dict[str, str]:
    """The environment in which a CPU server runs two ranks, one core each."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two ranks on a CPU need two cores")
    return {"SGLANG_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[1]}"}


@pytest.fixture(scope="session")
def resolve(bare_configs) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Resolve cases in one child process; see resolve_child.py for both formats."""
    plain = ["--model-path", str(bare_configs["llama"]), "--device", "cpu", "--skip-tokenizer-init"]

    def run(cases: list[dict[str, Any]]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, str(HERE / "resolve_child.py")],
            input=json.dumps({"warm": {"argv": plain}, "cases": cases}),
            capture_output=True,
            text=True,
            env=server_environment(),
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout)

    return run


@pytest.fixture(scope="session")
def talk() -> Callable[..., list[list[dict[str, Any]]]]:
    """``talk(server)``: conversations of random tokens, interleaved turn by turn.

    Returns ``[conversation][turn]``: the server's answer, plus its ``prompt``.
    ``before`` is how many tokens of that conversation had their KV computed earlier.
    ``together`` sends each turn of all conversations at once.
    """

    def run(
        server: Any,
        *,
        conversations: int = 3,
        turns: int = 3,
        first: int = 80,
        more: int = 20,
        answer: int = 6,
        seed: int = 3,
        body: dict[str, Any] | None = None,
        together: bool = False,
        sessions: bool = False,
    ) -> list[list[dict[str, Any]]]:
        rng = random.Random(seed)
        done: list[list[dict[str, Any]]] = [[] for _ in range(conversations)]
        for _ in range(turns):
            bodies = []
            for number, past in enumerate(done):
                history = past[-1]["prompt"] + past[-1]["output_ids"] if past else []
                size = more if past else first
                prompt = history + [rng.randrange(10, tiny_models.VOCAB) for _ in range(size)]
                session = {"session_id": f"s{number}"} if sessions else {}
                params = {"temperature": 0, "max_new_tokens": answer}
                bodies.append(
                    {"input_ids": prompt, "sampling_params": params, **session, **(body or {})}
                )
            send = functools.partial(server.post, "/generate")
            with ThreadPoolExecutor(conversations if together else 1) as pool:
                answers = list(pool.map(send, bodies))
            for past, sent, got in zip(done, bodies, answers, strict=True):
                before = len(past[-1]["prompt"] + past[-1]["output_ids"]) - 1 if past else 0
                # The last token of an answer is sampled, its KV never computed.
                past.append({**got, "prompt": sent["input_ids"], "before": before})
        return done

    return run


@pytest.fixture(scope="session")
def ids() -> Callable[..., list[list[list[int]]]]:
    """Output token ids of what ``talk`` returned, ``[conversation][turn]``."""
    return lambda done: [[turn["output_ids"] for turn in past] for past in done]


@pytest.fixture(scope="session")
def host_hits() -> Callable[..., int]:
    """Restored tokens of one answer, or of everything ``talk`` returned."""

    def count(done: Any) -> int:
        if isinstance(done, list):
            return sum(count(part) for part in done)
        return (done["meta_info"].get("cached_tokens_details") or {}).get("host", 0)

    return count
