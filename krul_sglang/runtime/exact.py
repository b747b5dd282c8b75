"""Which requests demand exact KV.

A request says so with ``custom_params={"krul": "exact"}`` in its sampling
parameters (the OpenAI routes take ``custom_params`` too).
"""

from __future__ import annotations

from typing import Any

PARAMETER = "krul"
EXACT = "exact"
# Set on a request: how many tokens of its prefix come from lossy KV.
LOSSY_TOKENS = "krul_lossy_tokens"
# Set on a request: stored tokens it recomputes, counted once when it first inserts.
RECOMPUTED = "krul_recomputed"
# Set on a request: whether stored tokens could not be used (lost, or lossy for an exact
# request), as opposed to being recomputed by plan.
MISSED = "krul_missed"


def demands_exact(req: Any) -> bool:
    """Whether lossy KV is a miss for this request.

    A request that is resumed in the middle of its answer stays exact when it began
    exact: half an answer on exact KV and half on lossy would be neither.
    """
    if req is None:
        return False
    params = getattr(req.sampling_params, "custom_params", None)
    if isinstance(params, dict) and params.get(PARAMETER) == EXACT:
        return True
    return len(req.output_ids) > 0 and getattr(req, LOSSY_TOKENS, 0) == 0
