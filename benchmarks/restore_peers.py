"""The servers that benchmarks/restore.py compares, and what one answer of theirs shows.

A peer is a policy: how SGLang keeps a conversation that left the device. All serve the same
model in the same number format, from a pool that holds one history and its turn. A peer's link
can be held to another rate while it is up.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hicache_cpu
import krul_link

from krul_sglang.config import KrulConfig
from krul_sglang.live_server import LiveServer, has_gpu

PAGE = 16
"""Tokens a page, of every server: HiCache stores whole pages."""
SLACK = 3 * PAGE
"""Tokens the pool holds beyond a history, its turn and the answer."""
SETTLE_SECONDS = 600
MEMORY = 1e12
"""Bytes a second of a link that is not throttled; a server started without one has none to
throttle."""

FILE_TIER = (
    *("--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete"),
    # Host memory is a staging buffer only, so what returns can only have come from files.
    *("--hicache-host-memory-mode", "buffer_only", "--hicache-ratio", "1.5"),
)
HICACHE = {
    "hicache_host": hicache_cpu.FLAGS,
    "hicache_file": (*hicache_cpu.FLAGS, *FILE_TIER),
}
KRUL = {
    # policy: --krul-policy, and whether part of a history may be recomputed instead of loaded
    "lossless": ("lossless", False),
    "partial": ("lossless", True),
    "fixed": ("fixed", False),
    "paper": ("paper", True),
    "predictive": ("predictive", True),
    "lossless_disk": ("lossless", False),
    "predictive_disk": ("predictive", False),
}
DISK = ("lossless_disk", "predictive_disk")
"""Those whose conversations come from files: before each measured request the server forgets
what it has in memory."""
RECOMPUTE = "recompute"
POLICIES = (RECOMPUTE, *HICACHE, *KRUL)


@dataclass(frozen=True)
class Shape:
    """What every request of a history has in common, in tokens. turns: how many a server is
    asked at most, of all conversations together."""

    history: int
    turn: int
    answer: int
    turns: int

    @property
    def pages(self) -> int:
        """Tokens of the history in whole pages: what can be kept."""
        return self.history // PAGE * PAGE

    @property
    def pool(self) -> int:
        """Tokens the KV pool holds."""
        return -(-(self.history + self.turn + self.answer + SLACK) // PAGE) * PAGE

    @property
    def kept(self) -> int:
        """Tokens of two conversations and all their turns, in whole pages."""
        turn = -(-(self.turn + self.answer) // PAGE) * PAGE
        return 2 * (self.history + PAGE) + self.turns * (turn + PAGE)


@dataclass(frozen=True)
class Answer:
    """One answer. ttft: seconds until the first token reached the client; device, host,
    storage: prompt tokens by where their KV was; recomputed: tokens that were stored but
    computed again; output: token ids."""

    ttft: float
    device: int
    host: int
    storage: int
    recomputed: int
    output: list[int]

    def problem(self, policy: str, shape: Shape) -> str | None:
        """Why this is not a measurement of ``policy``, or None."""
        source = {"hicache_file": "storage", RECOMPUTE: None}.get(policy, "host")
        if self.device:
            return f"{self.device} tokens of the history were still on the device"
        for tier in ("host", "storage"):
            if tier != source and getattr(self, tier):
                return f"{getattr(self, tier)} tokens came from the {tier} tier"
        if self.recomputed and not may_recompute(policy):
            return f"{self.recomputed} tokens were computed again: a load failed or was given up"
        found = self.host + self.storage + self.recomputed
        if source and found < shape.pages:
            return f"only {found} of {shape.pages} tokens had been kept"
        return None


class Peer:
    """A live server of one policy.

    asked: the number of its last request, see Prompts.of. cached: whole pages' tokens that it left
    on the device. kept: the krul block when both conversations had been stored. failure:
    why it can't be measured.
    """

    asked: int | None = None
    cached: int = 0
    kept: dict[str, Any] | None = None
    failure: str | None = None

    def __init__(
        self,
        policy: str,
        model: Path,
        shape: Shape,
        dtype: str,
        *,
        recompute: str,
        profile: Path | None,
        plugin: Mapping[str, str],
        page: int = PAGE,
    ) -> None:
        """recompute: --krul-recompute where the policy may. plugin: hicache_cpu or krul_link as
        one, see :mod:`server_plugin`."""
        self.policy = policy
        self.shape = shape
        self._files = TemporaryDirectory(prefix="kept-kv-")
        self._orders = TemporaryDirectory(prefix="restore-link-")
        self._link = Path(self._orders.name, "link.json")
        self._put_rate(None)
        env = dict(plugin)
        flags = ["--dtype", dtype, "--page-size", str(page), "--sleep-on-idle"]
        flags += ["--max-total-tokens", str(shape.pool), "--chunked-prefill-size", "8192"]
        flags += ["--watchdog-timeout", "7200"]  # a throttled load takes minutes
        if policy in HICACHE:
            flags += HICACHE[policy]
            env[hicache_cpu.LINK_FILE] = str(self._link)
            if policy == "hicache_file":
                env[hicache_cpu.STORAGE] = self._files.name
            else:
                flags += ["--hicache-ratio", f"{shape.kept / shape.pool + 0.1:.2f}"]
        if policy in KRUL:
            flags.append("--enable-krul")
            env[krul_link.LINK_FILE] = str(self._link)
            for name, value in krul_settings(policy, recompute, profile).items():
                flags += [f"--krul-{name.replace('_', '-')}", str(value)]
        if policy in DISK:
            flags += ["--krul-dir", self._files.name]
        self.server = LiveServer(model, flags, env=env, ready_seconds=600)

    def start(self) -> None:
        """Raises ServerFailedError."""
        self.server.start()

    def stop(self) -> None:
        """Idempotent."""
        self.server.stop()
        self.server.discard_log()
        self._files.cleanup()
        self._orders.cleanup()

    def krul(self) -> dict[str, Any]:
        """The krul block of /server_info; empty for peers without Krul."""
        return self.server.krul() if self.policy in KRUL else {}

    def settle(self) -> None:
        """Wait until everything evicted is encoded or written. Raises OSError if it never is."""
        deadline, before = time.monotonic() + SETTLE_SECONDS, -1
        while time.monotonic() < deadline:
            if self.policy in KRUL:
                state = self.krul()
                disk = state.get("tiers", {}).get("disk", {})
                quiet = state["memory"]["staging"] == 0 and not disk.get("unwritten")
            else:
                pages = sum(1 for _ in Path(self._files.name).iterdir())
                quiet = self.policy != "hicache_file" or pages == before
                before = pages
            if quiet:
                return
            time.sleep(0.3)  # between two looks
        raise OSError("the server does not finish storing")

    def throttle(self, rate: float | None) -> None:
        """From now on its link carries so many bytes a second, None for memory itself. Raises
        OSError."""
        self._put_rate(rate)
        if self.krul() and self._link.exists():
            raise OSError("the server's link can't be throttled")

    def leave_device(self, keep: int | None = None) -> None:
        """Evict all but ``keep`` tokens, or what its last request left. Raises OSError."""
        self._put({"keep": self.cached if keep is None else keep})
        if self.krul() and self._link.exists():
            raise OSError("the server does not evict")
        self.settle()

    def _put_rate(self, rate: float | None) -> None:
        self._put(rate if self.policy in HICACHE else {"rate": rate})

    def _put(self, order: Any) -> None:
        """Leave an order for the server's plugin, which finds all of it or nothing."""
        draft = self._link.with_suffix(".draft")
        draft.write_text(json.dumps(order))
        draft.replace(self._link)

    def leave_memory(self) -> None:
        """Everything lies in files only, where the policy is about those. Raises OSError."""
        if self.policy in DISK:
            self.leave_device(0)  # what a flush finds on the device is stored nowhere
            self.server.flush()

    def ask(self, ids: Sequence[int], answer: int) -> Answer:
        """One greedy request over streaming HTTP. Raises OSError (requests' errors are)."""
        import requests

        before = self.krul().get("recomputed_tokens", 0)
        sampling = {"temperature": 0, "max_new_tokens": answer, "ignore_eos": True}
        body = {"input_ids": list(ids), "sampling_params": sampling, "stream": True}
        last: dict[str, Any] = {}
        began = time.perf_counter()
        ttft = 0.0
        url = f"{self.server.url}/generate"
        with requests.post(url, json=body, stream=True, timeout=7200) as stream:
            stream.raise_for_status()
            for line in stream.iter_lines():
                if line.startswith(b"data: {"):
                    ttft = ttft or time.perf_counter() - began
                    last = json.loads(line.removeprefix(b"data: "))
        if "meta_info" not in last:
            raise OSError(f"the server did not answer: {last or 'nothing'}")
        self.settle()
        found = last["meta_info"].get("cached_tokens_details") or {}
        return Answer(
            ttft=ttft,
            device=found.get("device", 0),
            host=found.get("host", 0),
            storage=found.get("storage", 0),
            recomputed=self.krul().get("recomputed_tokens", 0) - before,
            output=last["output_ids"],
        )


def may_recompute(policy: str) -> bool:
    """Whether it plans how much of a history to load."""
    return KRUL.get(policy, (policy, False))[1]


def krul_settings(policy: str, recompute: str, profile: Path | None) -> dict[str, Any]:
    """Krul's settings for one of :data:`KRUL`. Raises KrulConfigError."""
    codec, _ = KRUL[policy]
    settings: dict[str, Any] = {"policy": codec, "link_bandwidth": MEMORY}
    settings["recompute"] = recompute if may_recompute(policy) else "never"
    if KrulConfig.from_values(settings).needs_profile and profile is not None:
        settings["profile"] = profile.absolute()
    return settings


def token_bytes(model: Path, dtype: str) -> int:
    """Bytes of one token's KV in the pool."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    scalars = 2 * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * size
    return scalars * {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]


def usual_dtype() -> str:
    """The format a server computes and keeps KV in, on this machine."""
    from krul_sglang.live_server import faster_cpu_dtype

    return "bfloat16" if has_gpu() else faster_cpu_dtype()
