"""Multi-turn conversations that evict each other."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from krul_sglang.live_server import LiveServer

CONVERSATIONS, TURNS = 3, 4
FIRST, NEXT, ANSWER = 70, 24, 8
# Holds one conversation and a bit: every other one is evicted by its turn.
SMALL_POOL = ("--max-total-tokens", "224")
LARGE_POOL = ("--max-total-tokens", "4096")
KRUL = ("--enable-krul", "--krul-policy", "lossless", "--krul-recompute", "never")


@dataclass
class Turn:
    """One turn's prompt, answer and the server's account of it."""

    prompt: list[int]
    output: list[int]
    meta: dict[str, Any]
    cached_before: int
    """Tokens of this conversation whose KV had been computed before the turn."""

    def hits(self, where: str) -> int:
        """Cached tokens by source: device, host, lossy."""
        return (self.meta.get("cached_tokens_details") or {}).get(where, 0)


@dataclass
class Dialogue:
    """Token-level conversations, always the same ones."""

    server: LiveServer
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int = 11

    def run(self, turns: int = TURNS) -> list[list[Turn]]:
        """All conversations, interleaved turn by turn; ``[conversation][turn]``."""
        rng = random.Random(self.seed)
        news = [
            [[rng.randrange(500, 40000) for _ in range(NEXT if t else FIRST)] for t in range(turns)]
            for _ in range(CONVERSATIONS)
        ]
        done: list[list[Turn]] = [[] for _ in range(CONVERSATIONS)]
        for t in range(turns):
            for c in range(CONVERSATIONS):
                past = done[c][-1] if done[c] else None
                history = past.prompt + past.output if past else []
                answer = self.server.generate(history + news[c][t], ANSWER, **self.sampling)
                done[c].append(
                    Turn(
                        prompt=history + news[c][t],
                        output=answer["output_ids"],
                        meta=answer["meta_info"],
                        # The last token of an answer is sampled, its KV never computed.
                        cached_before=max(0, len(history) - 1),
                    )
                )
        return done


def outputs(done: list[list[Turn]]) -> list[list[list[int]]]:
    """Output token ids, ``[conversation][turn]``."""
    return [[turn.output for turn in turns] for turns in done]
