"""What /metrics says of one rank: one table of metrics, each read from the figures that
/server_info shows (:func:`krul_sglang.runtime.state.block`).

docs/metrics.md is generated from this table. Names begin with ``sglang:krul_``, and every sample
has the labels ``model_name``, ``tp_rank`` and ``dp_rank`` beside its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from krul_sglang.store.ledger import KINDS

PREFIX = "sglang:krul_"
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Buckets of the histogram."""
PUBLISH_SECONDS = 0.5
"""Least time between two looks at the figures."""

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric. read: its value, or one by value of ``label`` where it has one."""

    name: str
    kind: str
    """gauge or counter."""
    unit: str
    meaning: str
    read: Callable[[Figures], Any]
    label: str | None = None
    tier: str | None = None
    """Only on servers that have this tier."""

    @property
    def exposed(self) -> str:
        """Its name in /metrics."""
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


def _of(name: str, *parents: str) -> Callable[[Figures], Any]:
    """Reads ``figures[parent]...[name]``."""

    def read(figures: Figures) -> Any:
        for parent in parents:
            figures = figures[parent]
        return figures[name]

    return read


def _gauge(name: str, unit: str, meaning: str, read: Callable | None = None, **more: Any) -> Metric:
    return Metric(name, "gauge", unit, meaning, read or _of(name), **more)


def _counter(
    name: str, unit: str, meaning: str, read: Callable | None = None, **more: Any
) -> Metric:
    return Metric(name, "counter", unit, meaning, read or _of(name), **more)


def _tiers(name: str) -> Callable[[Figures], dict[str, float]]:
    """That figure of every tier that has it."""

    def read(figures: Figures) -> dict[str, float]:
        return {tier: own[name] for tier, own in figures["tiers"].items() if own.get(name)}

    return read


DISK_EVENTS = (
    "stored", "present", "no_room", "failed", "opened", "vanished", "foreign", "unreadable",
    "damaged", "evicted",
)  # fmt: skip
"""What the disk tier counts, see :class:`krul_sglang.store.disk.tier.DiskStats`."""


def _disk_events(figures: Figures) -> dict[str, float]:
    disk = figures["tiers"]["disk"]
    return {name: disk[name] for name in DISK_EVENTS}


REMOTE_EVENTS = (
    "sent", "present", "unsent", "asked", "found", "declined", "no_room", "pulled", "late",
    "vanished", "damaged", "foreign", "failed",
)  # fmt: skip
"""What the remote tier counts, see :class:`krul_sglang.store.remote.stats.RemoteStats`."""


def _remote_events(figures: Figures) -> dict[str, float]:
    return {name: figures["remote"][name] for name in REMOTE_EVENTS}


METRICS = (
    _gauge("stored_tokens", "tokens", "Tokens whose KV Krul stores."),
    _gauge("stored_bytes", "bytes", "Bytes of sealed segments, wherever they are."),
    _gauge("raw_bytes", "bytes", "Bytes the sealed segments take uncompressed; by `stored_bytes` "
           "it is the ratio."),
    _gauge("segments", "segments", "Stored segments."),
    _gauge("waiting_segments", "segments", "Segments that wait to be encoded.",
           lambda figures: figures["segments"] - figures["sealed_segments"]),
    _gauge("memory_bytes", "bytes", "Host memory Krul holds, by `kind`: sealed payloads (tier), "
           "raw rows that wait to be encoded (staging), rows decoded ahead (prefetch), payloads "
           "on their way from the disk (loading) or to and from the remote tier (remote), records "
           "(index), the model's profile, sampled queries (taps).",
           lambda figures: {kind: figures["memory"][kind] for kind in KINDS}, label="kind"),
    _gauge("memory_limit_bytes", "bytes", "Host memory it may hold, all kinds together.",
           _of("limit", "memory")),
    _gauge("tier_bytes", "bytes", "Bytes of stored segments in each `tier`.",
           lambda figures: {name: own["bytes"] for name, own in figures["tiers"].items()},
           label="tier"),
    _gauge("tier_limit_bytes", "bytes", "What each `tier` may hold; memory shares its budget with "
           "the other kinds of `memory_bytes`.", _tiers("limit"), label="tier"),
    _counter("evicted_tokens", "tokens", "Tokens evicted from the device into the store."),
    _counter("dropped_tokens", "tokens", "Tokens evicted without being stored: no room."),
    _counter("unstored_tokens", "tokens", "Tokens evicted and not stored, as a restore would "
             "recompute them anyway."),
    _counter("adopted_tokens", "tokens", "Tokens found on the disk that the prefix tree did not "
             "know."),
    _counter("evict_seconds", "seconds", "Time the scheduler spent evicting."),
    _counter("encode_seconds", "seconds", "Time spent encoding, off the critical path."),
    _counter("fallbacks", "segments", "Segments stored losslessly because their codec could not."),
    _counter("measured_requests", "requests", "Finished requests whose attention was measured."),
    _counter("restores", "restores", "Paths restored."),
    _counter("restored_tokens", "tokens", "Tokens restored."),
    _counter("recomputed_tokens", "tokens", "Stored tokens that were computed instead, by plan or "
             "because they could not be used."),
    _counter("restore_seconds", "seconds", "Time from a load's begin to its last layer, summed "
             "over restores."),
    _counter("restore_passes", "passes", "Forward passes that waited for restores.",
             _of("passes", "restore")),
    _counter("restore_makespan_seconds", "seconds", "From the first load to the end of the "
             "forward pass, summed over passes.", _of("makespan_seconds", "restore")),
    _counter("restore_wait_seconds", "seconds", "Time forward passes stood waiting for layers.",
             _of("wait_seconds", "restore")),
    _counter("bubble_seconds", "seconds", "Time in which one `stream`, load or compute, stood "
             "idle while a restore went on.", _of("bubble_seconds", "restore"), label="stream"),
    _counter("fetch_seconds", "seconds", "Time links were busy with restores.",
             _of("fetch_seconds", "restore")),
    _counter("decode_seconds", "seconds", "Time spent decoding, all threads together.",
             _of("decode_seconds", "restore")),
    _counter("restore_failures", "restores", "Restores that ended in a recompute.",
             _of("failed", "restore")),
    _counter("late_restores", "restores", "Restores given up because they took too long.",
             _of("late", "restore")),
    _counter("requeued_requests", "requests", "Requests that started anew after a failed restore.",
             _of("requeued", "restore")),
    _counter("prefetches", "requests", "Requests loaded ahead while they waited in the queue.",
             _of("prefetches", "restore")),
    _counter("prefetches_used", "requests", "Of these, the ones that were admitted in time.",
             _of("prefetches_used", "restore")),
    _counter("misses", "matches", "Matches whose stored part could not be used."),
    _counter("lost_segments", "segments", "Segments found damaged or missing."),
    _counter("demoted_segments", "segments", "Segments that left memory because the disk has them.",
             _of("demoted_segments", "tiers", "memory")),
    _gauge("unwritten_segments", "segments", "Segments that wait to be written to the disk.",
           _of("unwritten", "tiers", "disk"), tier="disk"),
    _gauge("disk_degraded", "0 or 1", "Whether the disk takes no writes now.",
           lambda figures: float(bool(figures["tiers"]["disk"]["degraded"])), tier="disk"),
    _counter("disk_events", "segments", "What became of segments on the disk, by `event`: stored, "
             "present, no_room, failed; opened, vanished, foreign, unreadable, damaged; evicted.",
             _disk_events, label="event", tier="disk"),
    _counter("pulled_tokens", "tokens", "Tokens brought from the remote tier while their request "
             "waited in the queue.", tier="remote"),
    _gauge("unsent_segments", "segments", "Segments that wait to be sent to the remote tier.",
           _of("waiting", "remote"), tier="remote"),
    _gauge("remote_degraded", "0 or 1", "Whether the remote tier does not answer now, or takes "
           "nothing.", lambda figures: float(bool(figures["remote"]["degraded"])), tier="remote"),
    _counter("remote_sent_bytes", "bytes", "Bytes sent to the remote tier.",
             _of("sent_bytes", "remote"), tier="remote"),
    _counter("remote_pulled_bytes", "bytes", "Bytes brought from it.",
             _of("pulled_bytes", "remote"), tier="remote"),
    _counter("remote_events", "segments", "What became of segments and conversations there, by "
             "`event`: sent, present, unsent; asked, found, declined, no_room; pulled, late, "
             "vanished, damaged, foreign; failed.", _remote_events, label="event", tier="remote"),
)  # fmt: skip
PASS_SECONDS = f"{PREFIX}restore_pass_seconds"
_PASS_MEANING = (
    "From the first load to the end of the forward pass that needed it, one a pass: what a "
    "restore adds to the time to first token."
)


def table() -> str:
    """The Markdown table that docs/metrics.md carries."""
    rows = ["| metric | type | unit | own label | meaning |", "|---|---|---|---|---|"]
    for one in METRICS:
        label = f"`{one.label}`" if one.label else ""
        only = f" With the {one.tier} tier." if one.tier else ""
        rows.append(
            f"| `{one.exposed}` | {one.kind} | {one.unit} | {label} | {one.meaning}{only} |"
        )
    rows.append(f"| `{PASS_SECONDS}` | histogram | seconds | | {_PASS_MEANING} |")
    return "\n".join(rows) + "\n"


def _settled(cache: Any) -> tuple[int, int]:
    """What changes when background threads have done something."""
    store = cache.krul.store
    unwritten = 0 if store.disk is None else store.disk.unwritten
    return store.stats.encoded_segments, unwritten + (store.remote.unsent if store.remote else 0)


class Metrics:
    """Prometheus objects of one rank; :meth:`publish` brings them up to date, which
    :meth:`step` does when something has changed. Scheduler thread only."""

    def __init__(self, labels: dict[str, str], tiers: Iterable[str] = ("memory",)) -> None:
        """tiers: those this server has."""
        # Imported here: prometheus_client reads its multiprocess directory at import,
        # and the scheduler has set it by now.
        from prometheus_client import Counter, Gauge, Histogram

        self._labels = labels
        self._objects: list[tuple[Metric, Any]] = []
        self._children: dict[tuple[str, str], Any] = {}
        self._published: dict[tuple[str, str], float] = {}
        have = set(tiers)
        for metric in METRICS:
            if metric.tier is not None and metric.tier not in have:
                continue
            names = [*labels, *([metric.label] if metric.label else [])]
            if metric.kind == "gauge":
                found: Any = Gauge(
                    metric.exposed, metric.meaning, names, multiprocess_mode="mostrecent"
                )
            else:
                found = Counter(metric.exposed, metric.meaning, names)
            self._objects.append((metric, found))
        self._passes = Histogram(PASS_SECONDS, _PASS_MEANING, list(labels), buckets=SECONDS)
        self._seen = 0
        self._stale = True
        self._settled = (0, 0)
        self._published_at = float("-inf")
        self._passes.labels(**labels)

    def publish(self, cache: Any) -> None:
        """Copy the rank's figures into the Prometheus objects."""
        from krul_sglang.runtime.state import block

        figures = block(cache)
        self._stale, self._settled = False, _settled(cache)
        self._published_at = time.monotonic()
        # New weights take the tiers below memory away.
        have = {*figures["tiers"], *(["remote"] if figures["remote"] else [])}
        for metric, found in self._objects:
            if metric.tier is not None and metric.tier not in have:
                continue
            value = metric.read(figures)
            for label, number in value.items() if metric.label else (("", value),):
                self._set(metric, found, label, number)
        self._observe(cache.restores)

    def touch(self) -> None:
        """Something has changed: the next step may publish it."""
        self._stale = True

    def step(self, cache: Any) -> None:
        """Between two steps of the scheduler: publish what changed, here or in the background,
        at most once in :data:`PUBLISH_SECONDS`: a decoding step may evict."""
        news = self._stale or _settled(cache) != self._settled
        if news and time.monotonic() - self._published_at > PUBLISH_SECONDS:
            self.publish(cache)

    def _set(self, metric: Metric, found: Any, label: str, number: float) -> None:
        key = metric.name, label
        child = self._children.get(key)
        if child is None:
            own = {metric.label: label} if metric.label else {}
            child = self._children[key] = found.labels(**self._labels, **own)
        # A counter that never counted is exposed as 0 all the same: rates begin there.
        before = self._published.get(key)
        if number == before:
            return
        if metric.kind == "gauge":
            child.set(number)
        elif number > (before or 0.0):
            child.inc(number - (before or 0.0))
        self._published[key] = number

    def _observe(self, restores: Any) -> None:
        """The passes since the last time, as far as their traces are kept."""
        fresh, self._seen = restores.totals.passes - self._seen, restores.totals.passes
        if fresh > 0:
            for trace in list(restores.traces)[-fresh:]:
                self._passes.labels(**self._labels).observe(trace.makespan)
