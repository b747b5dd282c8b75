"""What rides on the prefix cache: KV events, grammars, adapters."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest

from krul_sglang.live_server import free_port

pytestmark = [pytest.mark.server, pytest.mark.long]

KRUL = ("--enable-krul", "--krul-policy", "lossless")
BARE = ("--skip-tokenizer-init",)
SMALL, LARGE = ("--max-total-tokens", "192"), ("--max-total-tokens", "4096")


def test_kv_events(serve, tiny, talk, ids, host_hits):
    """The publisher reports blocks that go to the host and come back; hashes are consistent."""
    import msgspec
    import zmq

    port = free_port()
    config = {"publisher": "zmq", "endpoint": f"tcp://*:{port}", "topic": "kv"}
    socket = zmq.Context.instance().socket(zmq.SUB)
    socket.setsockopt_string(zmq.SUBSCRIBE, "kv")
    socket.connect(f"tcp://127.0.0.1:{port}")
    events: list[dict[str, Any]] = []
    flags = (*BARE, *KRUL, *SMALL, "--kv-events-config", json.dumps(config))
    with serve(*flags, model=tiny("qwen3", 64, 4, "yarn")) as server:
        done = talk(server)
        assert host_hits(done) > 0
        while socket.poll(3000):
            batch = msgspec.msgpack.decode(socket.recv_multipart()[-1])
            events += batch[1]
        assert server.krul()["protected_tokens"] == 0
    socket.close(0)
    seen = {(event["type"], event.get("medium")) for event in events}
    assert ("BlockStored", "GPU") in seen
    assert ("BlockRemoved", "GPU") in seen
    assert ("BlockStored", "CPU_PINNED") in seen
    on_device: set[int] = set()
    for event in events:
        if event.get("medium") != "GPU":
            continue
        hashes = set(event["block_hashes"])
        if event["type"] == "BlockStored":
            on_device |= hashes
        else:
            assert hashes <= on_device, "a block is removed that was never stored"
            on_device -= hashes
    assert on_device


def test_structured_output(serve):
    """Regex and JSON schema on restored prefixes: valid, and equal to a fresh prefill."""
    rng = random.Random(6)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    grammars = (
        {"regex": r"(yes|no), [a-z]{3,6}\."},
        {"json_schema": json.dumps(schema)},
    )
    with serve(*KRUL, "--max-total-tokens", "224") as server:
        pasts = [[rng.randrange(500, 40000) for _ in range(90)] for _ in range(3)]
        for past in pasts:
            past += server.generate(past, 8)["output_ids"]
        answers = []
        for grammar in grammars:
            for past in pasts:
                answer = server.generate(past, 24, **grammar)
                assert answer["meta_info"]["cached_tokens_details"]["host"] > 0
                answers.append(answer)
        for answer in answers[:3]:
            assert re.fullmatch(grammars[0]["regex"], answer["text"])
        for answer in answers[3:]:
            assert answer["text"].lstrip().startswith("{")
        server.flush()
        for grammar in grammars:
            for past in pasts:
                fresh = server.generate(past, 24, **grammar)
                assert fresh["output_ids"] == answers.pop(0)["output_ids"]
                server.flush()


def save_adapter(model: Any, folder: Any) -> str:
    """A random LoRA adapter of rank 8 on q and v, written as peft writes it."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    torch.manual_seed(1)
    weights = {}
    with safe_open(model / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                out, hidden = file.get_tensor(name).shape
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                weights[f"{stem}.lora_A.weight"] = torch.randn(8, hidden) / hidden**0.5
                weights[f"{stem}.lora_B.weight"] = torch.randn(out, 8) / 8**0.5
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_lora(serve, tiny, talk, ids, host_hits, tmp_path):
    """The same conversations with and without an adapter: each gets its own KV back."""
    model = tiny("qwen3", 64, 4, "yarn")
    flags = (
        *BARE,
        *("--enable-lora", "--max-lora-rank", "8", "--lora-backend", "torch_native"),
        *("--lora-paths", f"adapter={save_adapter(model, tmp_path / 'adapter')}"),
    )
    adapted = {"lora_path": "adapter"}
    with serve(*flags, *LARGE, model=model) as server:
        base, other = talk(server), talk(server, body=adapted)
    assert ids(base) != ids(other)
    with serve(*flags, *SMALL, *KRUL, model=model) as server:
        for body, expected in ((None, base), (adapted, other)):
            done = talk(server, body=body)
            assert ids(done) == ids(expected)
            assert host_hits(done) > 0
        assert server.krul()["protected_tokens"] == 0
