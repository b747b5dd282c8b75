"""What a restored cache costs in quality, and what it saves: policies and baselines.

    python benchmarks/quality.py --collect held_out.jsonl --prose DIR
    python benchmarks/quality.py --model DIR --collect-unlike unlike.jsonl
    python benchmarks/quality.py --model DIR --conversations held_out.jsonl \
        --policies predictive,predictive@0.002,lossless,int4,raw_share --json out.json

Takes the options of `krul quality` and writes the same JSON. To its policies come
``paper_predictive`` (the paper's selection with the predictive codec, also with
``@budget``) and the baselines of baselines.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # also where PYTHONSAFEPATH is set

from baselines import BASELINES
from texts import ROUNDS, collect, collect_unlike

from krul_sglang.codec.base import KVRun, KVSpec
from krul_sglang.codec.predictive import PredictiveCodec
from krul_sglang.config import POLICIES
from krul_sglang.profile.base import Profile
from krul_sglang.quality.command import run
from krul_sglang.quality.measure import (
    Policy,
    budget_of,
    package_policies,
    selecting_policy,
)
from krul_sglang.strategy.base import Strategy
from krul_sglang.strategy.fixed import fixed_pairs

PAPER_PREDICTIVE = "paper_predictive"


class _Unguarded(PredictiveCodec):
    """The guard sees what shared layers cost and refuses them; here that cost is measured."""

    def encode(self, run: KVRun, strategy: Strategy) -> bytes:
        return self.encode_at(run, strategy, self.profile.step_for(strategy.budget))[0]


def paper_predictive(spec: KVSpec, profile: Profile | None, budget: float) -> Policy:
    """The paper's pairs, each upper layer stored as nothing but its calibrated prediction.

    The prediction starts from the layer just below, whichever layer it is paired with.
    """
    if profile is None:
        raise ValueError(f"{PAPER_PREDICTIVE} needs a profile: run `krul calibrate`")
    return selecting_policy(
        _Unguarded(spec, profile),
        len(fixed_pairs(spec.layers)),
        lambda pairs: Strategy("predictive", budget, shared=tuple(upper for _, upper in pairs)),
    )


def policies_of(
    names: Sequence[str], spec: KVSpec, profile: Profile | None, budget: float
) -> dict[str, Policy]:
    """Every policy that ``--policies`` names, in that order."""
    out: dict[str, Policy] = {}
    for name in names:
        if name in BASELINES:
            out[name] = BASELINES[name]
        elif name.partition("@")[0] == PAPER_PREDICTIVE:
            out[name] = paper_predictive(spec, profile, budget_of(name, budget))
        else:
            out |= package_policies([name], spec, profile, budget)
    return out


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--collect", type=Path, metavar="OUT", help="write held-out conversations")
    parser.add_argument(
        "--collect-unlike", type=Path, metavar="OUT", help="write texts unlike any calibration"
    )
    parser.add_argument("--prose", type=Path, help="directory of .txt files for --collect")
    parser.add_argument("--per-source", type=int, default=8)
    parser.add_argument(
        "--round", type=int, choices=ROUNDS, default=2, help="of texts; see texts.py"
    )
    parser.add_argument("--model", type=Path)
    parser.add_argument("--conversations", type=Path)
    parser.add_argument("--policies", default="predictive,lossless," + ",".join(BASELINES))
    parser.add_argument("--budget", type=float, default=0.01, help="nats of mean KL")
    parser.add_argument("--profile", type=Path, help="by default the model's own, made if missing")
    parser.add_argument("--history", type=int, default=1000)
    parser.add_argument("--continuation", type=int, default=120)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, options.prose, options.per_source, options.round)
        return 0
    if options.collect_unlike and options.model:
        collect_unlike(options.collect_unlike, options.model, options.round)
        return 0
    if not options.model or not options.conversations:
        parser.error("--model and --conversations are needed")
    try:
        run(
            options.model,
            options.conversations,
            options.policies.split(","),
            history=options.history,
            continuation=options.continuation,
            budget=options.budget,
            profile=options.profile,
            out=options.json,
            build=policies_of,
            known=(*POLICIES, PAPER_PREDICTIVE, *BASELINES),
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
