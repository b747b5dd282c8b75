"""Is the planner's choice the best one? How much of a history to load, tried exhaustively.

    python benchmarks/plan_choice.py --model DIR --profile FILE --json plan.json --png plan.png

One live server stores conversations and lets them return with a new turn over a throttled link.
A return loads the first p tokens of its history while it recomputes the rest. At each setting
(a history and a bandwidth) p is forced to evenly spaced points and to four around what the planner
has chosen, in turns with the planner's own choice, and the time to first token is taken at the
client, over streaming HTTP. Reported for each setting:

- ratio: the planner's median time over the best point's, with the ratios of single rounds as
  their spread. The claim is at most 1.05. A ratio below 1 is noise, or the best p lies between
  two points.
- prediction_error: the largest relative error, among the planner's restores after the warm-up,
  of the cost model's time to the end of the pass. The claim is at most 20 %.
- bubble_share: the part of a restore in which loading, or computing, stood idle.

Then the link is cut to a tenth in mid-run and later restored: which p does the planner choose,
restore by restore? The claim is that it moves within 3 restores.

Unlike in a server that is left alone, a conversation is evicted by order and not because
another wants its place, and histories are stored whole. What forced restores take is not shown
to the cost model, which would otherwise know more than one that follows its own choices
(--teach shows it). Points at which the link alone takes 3 times the best time known are not
measured; the file says what it takes.

The file is written after every setting. The same command continues it, also with another
--policy; settings that are in it are not measured again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from plan_cells import CLAIM
from plan_plot import plot
from plan_returns import ANSWER, Plan
from plan_run import Benchmark
from restore import machine, read_prompts, versions
from restore_cells import Bandwidth, Results
from restore_peers import KRUL, usual_dtype
from restore_plan import Prompts
from rich.console import Console

from krul_sglang.live_server import ServerFailedError
from krul_sglang.profile.base import ProfileError
from krul_sglang.profile.locate import ensure

HISTORIES = "512,1024,2048,4096"
BANDWIDTHS = {
    # With k the time of loading everything over that of recomputing everything, the best share
    # to load is about 1 / (1 + k): here k is 16 or more, about 1, and 1/16 or less. Lossy bytes
    # are 15 to 26 times fewer than raw ones, but those of the exact opening lie in front, and
    # have to be loaded for any p.
    "predictive": "balanced/400,balanced/16,balanced",
    "paper": "balanced/64,balanced/4,4*balanced",
    "partial": "balanced/16,balanced,16*balanced",
}
CUT_HISTORY = 2048


def read_plan(options: argparse.Namespace) -> Plan:
    """Checked options. Raises ValueError (ProfileError) with one line."""
    if not (options.model / "config.json").is_file():
        raise ValueError(f"no model in {options.model}; run `make model`")
    if options.policy not in BANDWIDTHS:
        raise ValueError(f"--policy {options.policy}: expected one of {', '.join(BANDWIDTHS)}")
    least = {"repeats": 1, "warm_up": 1, "turn": 1, "points": 2}
    for name, number in least.items():
        if getattr(options, name) < number:
            flag = f"--{name.replace('_', '-')} {getattr(options, name)}"
            raise ValueError(f"{flag}: expected at least {number}")
    histories = _histories(options)
    if options.points > 1 + min(histories) // 16:
        raise ValueError(
            f"--points {options.points}: a history of {min(histories)} has fewer pages"
        )
    names = options.bandwidths or BANDWIDTHS[options.policy]
    bandwidths = [Bandwidth.parse(text.strip()) for text in names.split(",")]
    profile = options.profile
    if profile is not None and not profile.is_file():
        raise ValueError(f"--profile {profile}: no such file")
    if KRUL[options.policy][0] == "predictive" and profile is None:
        profile = ensure(options.model, 1, print)
    cut = options.cut_history
    if cut is None:
        cut = CUT_HISTORY if CUT_HISTORY in histories else max(histories)
    if cut and cut not in histories:
        raise ValueError(f"--cut-history {cut}: not among --histories; 0 for none")
    from_ = options.cut_bandwidth and Bandwidth.parse(options.cut_bandwidth)
    return Plan(
        model=options.model,
        policy=options.policy,
        dtype=options.dtype or usual_dtype(),
        profile=profile,
        histories=histories,
        bandwidths=bandwidths,
        points=options.points,
        repeats=options.repeats,
        warm_up=options.warm_up,
        turn=options.turn,
        teach=options.teach,
        cut_history=cut or None,
        cut_bandwidth=from_ or bandwidths[-1],
    )


def _histories(options: argparse.Namespace) -> list[int]:
    try:
        histories = [int(text) for text in options.histories.split(",")]
    except ValueError:
        raise ValueError(f"--histories {options.histories}: expected numbers of tokens") from None
    longest = _longest(options.model) - options.turn - ANSWER
    for history in histories:
        if not 64 <= history <= longest:
            raise ValueError(f"history {history}: expected 64 to {longest} tokens for this model")
    return histories


def _longest(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["max_position_embeddings"]


def prompts_of(plan: Plan) -> Prompts:
    """The conversations of benchmarks/restore.py, and as many new turns as are needed."""
    return read_prompts(plan.model, max(plan.histories), plan.turn, plan.turns)


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """How many settings bear the claims out."""
    choices = [row for row in rows if "points" in row]
    if not choices:
        return []
    good = sum(row["within"] for row in choices)
    open_ = sum(row["undecided"] for row in choices)
    near = sum(abs(row["prediction_error"]) <= 0.2 for row in choices)
    said = [
        f"planner within {CLAIM - 1:.0%} of the best point: {good} of {len(choices)} settings "
        f"(in {open_} the middle half of the rounds lies on both sides)",
        f"predicted within 20%: {near} of {len(choices)} settings",
    ]
    for row in rows:
        if "phases" in row:
            told = _moved(row["moved_after"], row["settled_after"])
            back = _moved(row["moved_back_after"], row["settled_back_after"])
            said.append(
                f"{row['policy']}, {row['history']} tokens, link cut to a tenth: the choice "
                f"{told}; when it was mended, it {back}"
            )
    return said


def _moved(after: int | None, settled: int) -> str:
    if after is None:
        return "never changed"
    return f"changed at restore {after} and stayed from {settled} on"


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="written, or continued")
    parser.add_argument("--png", type=Path, help="a plot of everything in the file")
    parser.add_argument(
        "--policy",
        default="predictive",
        help="how histories are stored: predictive (the default policy), paper, or partial "
        "(bit-exact)",
    )
    parser.add_argument("--histories", default=HISTORIES, help=f"tokens; default {HISTORIES}")
    parser.add_argument(
        "--bandwidths",
        help="a rate such as 16MB/s, unthrottled, or balanced, balanced/4, 4*balanced, where "
        "balanced is the rate at which a history's raw KV arrives in this run's median time of "
        "recomputing it; default, for a best p near 0, inside and at the end: "
        + "; ".join(f"{text} ({policy})" for policy, text in BANDWIDTHS.items()),
    )
    parser.add_argument(
        "--points",
        type=int,
        default=9,
        help="forced p, from 0 to the whole history; default 9; four more lie around the planner's",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="rounds of a setting, more of them below 2,048 tokens, up to 4 times; default 3",
    )
    parser.add_argument(
        "--warm-up",
        type=int,
        default=5,
        help="returns that the planner decides before the rounds begin; default 5",
    )
    parser.add_argument(
        "--cut-history",
        type=int,
        help=f"where the link is cut in mid-run; default {CUT_HISTORY} or the longest; 0 for "
        "nowhere",
    )
    parser.add_argument(
        "--cut-bandwidth", help="what it is cut from; default the last of the bandwidths"
    )
    parser.add_argument(
        "--teach", action="store_true", help="the cost model learns from forced restores too"
    )
    parser.add_argument("--profile", type=Path, help="default: the one in the user's cache folder")
    parser.add_argument("--dtype", help="of model and KV; default: what this machine does faster")
    parser.add_argument("--turn", type=int, default=64, help="new tokens; default 64")
    return parser.parse_args()


def main() -> int:
    """Command line; returns the exit code."""
    options = read_options()
    console = Console(stderr=True)
    try:
        plan = read_plan(options)
        facts = {"machine": machine(), "versions": versions(), "settings": plan.settings()}
        results = Results(options.json, facts)
        benchmark = Benchmark(plan, results, prompts_of(plan), console)
        benchmark.run()
        if options.png:
            plot(results.data, options.png)
    except (ValueError, OSError, ProfileError, ServerFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for said in summary([row for row in results.data["rows"] if "error" not in row]):
        print(said)
    if benchmark.failures:
        print(f"error: {benchmark.failures} rows failed; run again for them", file=sys.stderr)
    return 1 if benchmark.failures else 0


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    for name in (signal.SIGINT, signal.SIGTERM):  # a background shell ignores the first
        signal.signal(name, _stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
