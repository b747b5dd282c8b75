"""The planner against brute force: a layer pipeline simulated token choice by token choice."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krul_sglang.restore.cost import ComputeCost, LoadCost, Prefill, Rate
from krul_sglang.restore.planner import TRIAL, Ahead, Planner, StoredRun, Turn

LAYERS = 6


def planner(link: float = 1e-8, decode: float = 1e-5, token: float = 1e-3, **options) -> Planner:
    load = LoadCost(2, {"memory": Rate(link)}, {"c": Rate(decode)})
    return Planner(LAYERS, ComputeCost(1e-3, token, 1e-7), load, **options)


def turn(
    device: int = 4,
    runs: int = 4,
    new: int = 64,
    nbytes: int = 10**6,
    layer_bytes: Sequence[int] | None = None,
) -> Turn:
    by_layer = None if layer_bytes is None else np.array(layer_bytes)
    return Turn(device, [StoredRun(512, nbytes, "c", layer_bytes=by_layer)] * runs, new)


def simulated(p: Planner, one: Turn, choice: int) -> float:
    """When the pass ends, by event times of each stage and layer, written out."""
    fetch, decode = [0.0] * p.layers, 0.0
    begin = one.device
    for run in one.stored:
        share = min(1.0, max(0.0, (choice - begin) / run.tokens))
        by_layer = [1] * p.layers if run.layer_bytes is None else run.layer_bytes.tolist()
        for layer, nbytes in enumerate(by_layer):
            carried = share * run.nbytes * nbytes / sum(by_layer)
            fetch[layer] += carried * p.load.links["memory"].seconds
        decode += share * run.tokens * p.load.codecs["c"].seconds
        begin += run.tokens
    work = decode
    decode /= min(p.load.threads, len(one.stored))
    tokens = one.end - choice + one.new
    first = tokens if p.chunk is None else min(tokens, p.chunk)
    slower = p.compute.beside * work

    def compute(new: float, before: float) -> float:
        return float(p.compute.seconds(Prefill.of(new, before)))

    arrived = ready = ended = 0.0
    mine = compute(first, choice) + slower
    outside = min(p.compute.outside or 0.0, mine)
    ahead = np.broadcast_to(p.ahead.fetch, p.layers)
    for layer in range(p.layers):
        arrived += fetch[layer] + ahead[layer]
        ready = max(ready, arrived) + (decode + p.ahead.decode) / p.layers
        ended = max(ended, ready) + (mine - outside + p.ahead.compute) / p.layers
    ended += outside
    if p.cores is not None:
        ended = max(ended, (work + compute(first, choice) + p.ahead.cores) / p.cores)
    at = choice + first
    while at < one.end + one.new:
        size = min(p.chunk, one.end + one.new - at)
        ended += compute(size, at)
        at += size
    return ended


@settings(max_examples=60, deadline=None)
@given(
    link=st.floats(1e-10, 1e-6),
    decode=st.floats(1e-7, 1e-3),
    token=st.floats(1e-5, 1e-2),
    runs=st.integers(1, 8),
    new=st.integers(1, 900),
    cores=st.sampled_from([None, 1, 2]),
    ahead=st.floats(0, 1),
    layer_bytes=st.one_of(
        st.none(), st.lists(st.integers(0, 100), min_size=LAYERS, max_size=LAYERS).filter(any)
    ),
    beside=st.floats(0, 1),
    outside=st.floats(0, 1),
)
def test_the_choice_is_the_best_there_is(
    link, decode, token, runs, new, cores, ahead, layer_bytes, beside, outside
) -> None:
    own = planner(link, decode, token, cores=cores)
    own.compute.beside, own.compute.outside = beside, outside
    fetch = ahead * np.arange(LAYERS) / 15  # unlike the turn's own
    own.ahead = Ahead(fetch=fetch, compute=ahead / 2, cores=2 * ahead)
    one = turn(runs=runs, new=new, layer_bytes=layer_bytes)
    plan = own.plan(one)
    ends = {int(p): simulated(own, one, int(p)) for p in own.choices(one)}
    assert plan.seconds == pytest.approx(ends[plan.load], rel=1e-9)
    least = min(ends.values())
    if ends[one.end] <= least * 1.0099:
        assert plan.load == one.end, "as good as any, and computes least"
    elif ends[one.end] > least * 1.0101:
        good = [p for p, end in ends.items() if end <= least * 1.0029]
        assert ends[plan.load] <= least * 1.0031
        nothing = ends.pop(one.device)
        if nothing > least * (1 + 1e-9):
            assert plan.load >= max(good), "computes no more than it has to"
        elif min(ends.values()) > least * (1 + 1e-9):
            assert plan.load == one.device, "does not load for nothing"


def test_a_slowdown_by_decoders_is_no_work_of_its_own() -> None:
    """Two alike turns take their cores twice as long as one, however much slower they make each
    other's passes."""
    own = planner(link=1e-12, decode=1e-4, cores=2)
    own.compute.beside = 5.0
    one = own.plan(turn())
    assert one.compute > one.cores
    own.take(one, 0)
    assert own.ahead.cores == one.cores
    assert own.plan(turn()).cores == one.cores


def test_bytes_that_lower_layers_need_are_waited_for_first() -> None:
    """Of as many bytes, the pass can begin the later the further down they lie."""
    own = planner(link=3e-7, decode=1e-7)
    whole, lower, even, upper = (
        own.plan(turn(layer_bytes=by_layer))
        for by_layer in ([1, 0, 0, 0, 0, 0], [6, 5, 4, 3, 2, 1], [7] * 6, [1, 2, 3, 4, 5, 6])
    )
    assert even.load == own.plan(turn()).load
    assert whole.seconds > 1.1 * lower.seconds > 1.1 * 1.1 * even.seconds
    assert upper.seconds < even.seconds
    assert len({plan.load for plan in (whole, lower, even, upper)}) == 4
    own.take(own.plan(turn(layer_bytes=[1, 0, 0, 0, 0, 0])), 0)
    after_a_low_one = own.plan(turn()).seconds
    own.next_batch()
    own.take(own.plan(turn(layer_bytes=[0, 0, 0, 0, 0, 1])), 0)
    assert own.plan(turn()).seconds < after_a_low_one, "what is ahead lies by layers as well"


def test_chunks_after_the_first_overlap_with_nothing() -> None:
    own = planner(link=1e-6, token=1e-3, chunk=512)
    one = turn(runs=8)
    for choice in (4, 1000, 3000, one.end):
        (end,), _ = own.ends(one, np.array([choice]))
        assert end == pytest.approx(simulated(own, one, choice), rel=0.02)


def test_the_extremes() -> None:
    assert planner(link=1e-12, decode=1e-9).plan(turn()).load == turn().end, "nothing is free"
    assert planner(link=1.0).plan(turn()).load == turn().device, "a dead link carries nothing"


def test_whole_pages() -> None:
    own = planner(link=2e-7, page=48)
    for choice in own.choices(turn(device=0))[:-1]:
        assert choice % 48 == 0


def test_what_the_batch_has_already_been_given_pushes_work_to_the_other_stream() -> None:
    own = planner(link=3e-7, decode=1e-7)
    alone = own.plan(turn()).load
    own.ahead = Ahead(fetch=np.full(LAYERS, 2.0 / LAYERS))
    busy_link = own.plan(turn()).load
    own.ahead = Ahead(compute=2.0)
    busy_pass = own.plan(turn()).load
    assert busy_link <= alone <= busy_pass
    assert busy_link < busy_pass
    plan = own.plan(turn())
    own.take(plan, 100)
    assert own.ahead.tokens == 100
    assert own.ahead.cores == plan.cores
    own.next_batch()
    assert own.ahead == Ahead()


def test_a_link_that_slows_down_tenfold_moves_the_plan_within_three_restores() -> None:
    own = planner(link=2e-8, decode=1e-7)
    before = own.plan(turn()).load
    right = planner(link=2e-7, decode=1e-7).plan(turn()).load
    assert right < before == turn().end
    own.load.links["memory"].observations = 20
    loads = []
    for _ in range(3):
        own.load.links["memory"].observe(10**6, 0.2)
        loads.append(own.plan(turn()).load)
    assert loads == sorted(loads, reverse=True)
    slow = planner(link=2e-7, decode=1e-7)
    chosen = float(slow.ends(turn(), np.array([loads[-1]]))[0][0])
    best = slow.plan(turn()).seconds
    stale = float(slow.ends(turn(), np.array([before]))[0][0])
    assert chosen < best + (stale - best) / 3


def test_estimates_are_within_a_fifth_after_five_observations() -> None:
    """From first values wrong by a factor of ten, with 10 % of noise."""
    noise = np.random.default_rng(3).uniform(0.9, 1.1, 64)
    rate, compute = Rate(1e-7), ComputeCost(1e-2, 1e-2, 1e-6)
    shape = Prefill(64.0, 64.0 * 4000, True)
    for n in range(5):
        rate.observe(1000, 1000 * 1e-6 * noise[n])
        compute.observe(shape, 0.05 * noise[n + 8])
    assert rate.seconds == pytest.approx(1e-6, rel=0.2)
    assert float(compute.seconds(shape)) == pytest.approx(0.05, rel=0.2)


def test_a_shape_never_seen_lies_between_those_that_were() -> None:
    """Without a jump: a jump would make a plan of what only looks cheaper."""
    compute = ComputeCost(0.0, 1e-3, 0.0)
    compute.observe(Prefill.of(1024.0, 0.0), 4.096)
    compute.observe(Prefill.of(64.0, 0.0), 0.016)
    tokens = 2.0 ** np.arange(5, 12)
    factors = compute.seconds(Prefill.of(tokens, np.zeros(7))) / (1e-3 * tokens)
    assert (np.diff(factors[1:6]) > 0).all()
    assert ((factors >= 0.25 * 0.99) & (factors <= 4.0 * 1.01)).all()
    assert factors[1] == pytest.approx(0.25, rel=0.02), "where it was seen, it is what was seen"
    assert factors[5] == pytest.approx(4.0, rel=0.02)
    assert 0.25 < factors[3] < 4.0
    assert compute.seconds(Prefill.of(np.zeros(1), np.zeros(1))) == 0


def test_a_tenfold_change_is_believed_at_once_and_noise_is_not() -> None:
    rate = Rate(1e-7, observations=20)
    rate.observe(1, 1e-6)
    assert rate.seconds > 6e-7
    rate.observe(1, 1e-6)
    assert rate.seconds == pytest.approx(1e-6, rel=0.3)
    steady = Rate(1e-7, observations=20)
    steady.observe(1, 1.8e-7)
    assert steady.seconds < 1.4e-7


def test_a_link_that_is_avoided_is_tried_again() -> None:
    """At first with a few tokens, which tell the truth: a link that is still slow is avoided again,
    one that has recovered is used."""
    own = planner(link=1e-4, decode=1e-7)
    one, rate = turn(), own.load.links["memory"]
    rate.observations = 20
    for _ in range(100):
        plan = own.plan(one)
        if plan.load > one.device:
            break
        rate.hope()
    assert one.device < plan.load <= one.device + 128
    rate.observe(10**6, 1e-4 * 10**6)
    assert own.plan(one).load == one.device
    while own.plan(one).load == one.device:
        rate.hope()
    for _ in range(3):
        rate.observe(10**6, 1e-9 * 10**6)
    assert own.plan(one).load == one.end


def test_a_link_that_stays_slow_is_tried_less_and_less() -> None:
    own, truth = planner(link=1e-4, decode=1e-7), 1e-4
    one, rate = turn(), own.load.links["memory"]
    rate.observe(10**6, truth * 10**6)

    def trials(plans: int) -> list[int]:
        at = []
        for number in range(plans):
            if own.plan(one).load > one.device:
                rate.observe(10**6, truth * 10**6)
                at.append(number)
            else:
                rate.hope()
        return at

    tried = trials(2000)
    gaps = [after - before for before, after in itertools.pairwise(tried)]
    assert gaps == sorted(gaps), "the wait between two trials only grows"
    assert gaps[-1] > 2 * gaps[0]
    truth = 1e-9
    assert len(trials(200)) > 0, "and it is still tried"
    assert own.plan(one).load == one.end


def test_a_trial_that_costs_much_is_seldom() -> None:
    """A pass that continues anything takes 60 % longer: a dozen restores, of which it may cost
    a twentieth, go before a trial of a link that is nearly worth it."""
    own = planner(link=1.1e-6, decode=1e-7)
    one, rate = turn(device=0), own.load.links["memory"]
    own.load.links["remote"] = elsewhere = Rate(1e-3)
    for _ in range(200):
        elsewhere.hope()  # its restores are not the ones that this trial may cost
    for before, factor in ((0, 1.0), (16, 1.6)):
        shape = Prefill.of(float(one.end + one.new - before), float(before))
        own.compute.observe(shape, factor * float(own.compute.seconds(shape)))
    rate.observe(10**6, rate.seconds * 10**6)
    while own.plan(one).load == one.device:
        rate.hope()
    assert own.plan(one).load == 16
    assert rate.avoided == 12


def test_nothing_is_learnt_from_nothing() -> None:
    rate, compute = Rate(2.0), ComputeCost(1.0, 1.0, 1.0)
    rate.observe(0, 1.0)
    rate.observe(5, 0.0)
    compute.observe(Prefill.of(0.0, 0.0), 1.0)
    compute.observe(Prefill.of(8.0, 0.0), 0.0)
    assert (rate.seconds, rate.observations, compute.lessons) == (2.0, 0, {})


def test_a_few_tokens_do_not_pass_for_what_tokens_cost() -> None:
    """A load's exact head of four tokens takes as long to begin as 500."""
    load = LoadCost(2, codecs={"lossless": Rate(1e-5)})
    load.observe_decode("lossless", 4, 0.06)
    assert load.decode_seconds("lossless", 100) == pytest.approx(1e-3)
    load.observe_decode("predictive", 1000, 1.0)
    assert load.decode_seconds("predictive", 10) == pytest.approx(1e-2)
    assert load.decode_seconds("unknown", 10) == pytest.approx(1e-2), "as the slowest known"


def test_what_decoding_costs_a_pass_on_the_same_cores_is_learnt() -> None:
    """64 new tokens take 64 ms alone; each decoder's second costs them 0.7 more."""
    own = planner(link=1e-12, decode=2e-4)
    shape = Prefill.of(64.0, float(turn().end))
    decoding = 2e-4 * 2048
    alone = float(own.compute.seconds(shape))
    before = own.plan(turn())
    for _ in range(5):
        own.compute.observe(shape, alone + 0.7 * decoding, decoding)
    assert own.compute.beside == pytest.approx(0.7, rel=0.05)
    assert own.compute.seconds(shape) == pytest.approx(alone), "the pass itself costs what it did"
    after = own.plan(turn())
    assert before.load == after.load == turn().end
    assert after.seconds == pytest.approx(alone + 0.7 * decoding, rel=0.1)
    own.compute.observe(shape, 2 * alone, 0.1 * alone)
    assert own.compute.seconds(shape) > alone, "beside little decoding a pass tells of itself"
    # Faster than alone: nothing negative is learnt.
    for _ in range(9):
        own.compute.observe(shape, 0.1 * alone, decoding)
    assert 0 <= own.compute.beside < 0.01


def test_what_continues_something_is_learnt_apart() -> None:
    """What SGLang takes on a CPU for 4,160 tokens, by how many of them it had (median of two)."""
    taken = {0: 25.2, 256: 34.3, 688: 29.3, 2080: 18.3}
    p = planner(link=1e-4)  # 64 tokens take 6.4 s, all of them 410
    for before, seconds in taken.items():
        p.compute.observe(Prefill.of(4160.0 - before, float(before)), seconds)
    known = np.array(list(taken), float)
    expected = p.compute.seconds(Prefill.of(4160.0 - known, known))
    assert expected == pytest.approx(list(taken.values()), rel=0.08)
    history = Turn(0, [StoredRun(4096, 4096 * 1000, "c")], 64)
    assert p.plan(history).load == 0, "a few tokens cost more than they save"
    one = ComputeCost(0.0, 1e-3, 0.0)
    one.observe(Prefill.of(1024.0, 64.0), 2.048)
    assert one.seconds(Prefill.of(1024.0, 0.0)) == pytest.approx(2.048, rel=0.01), (
        "until it is seen"
    )


def test_what_was_seen_is_known_wherever_it_lies() -> None:
    """Between two buckets' middles, and beside another bucket that says otherwise."""
    one = ComputeCost(0.0, 1e-3, 0.0)
    one.observe(Prefill.of(768.0, 1344.0), 0.768 * 1.5)
    one.observe(Prefill.of(256.0, 1344.0), 0.256 * 3)
    assert one.seconds(Prefill.of(768.0, 1344.0)) == pytest.approx(0.768 * 1.5, rel=0.01)


def test_whoever_hopes_loads_a_few_tokens() -> None:
    """However good the link would have to be before loading anything pays."""
    p = planner(link=1e-4)
    p.compute.observe(Prefill.of(4160.0, 0.0), 24.0)
    p.compute.observe(Prefill.of(3904.0, 256.0), 34.0)
    history, rate = Turn(0, [StoredRun(4096, 4096 * 1000, "c")], 64), p.load.links["memory"]
    avoided = 0
    while p.plan(history).load == 0:
        rate.hope()
        avoided += 1
        assert avoided < 200
    assert avoided > 10
    assert p.plan(history).load == TRIAL
    rate.observe(64 * 1000.0, 6.4)
    assert p.plan(history).load == 0


def test_what_is_worth_loading_without_hope_is_loaded() -> None:
    """A short history was computed anew; the link is as it was."""
    p = planner(link=1e-8, token=1e-5)
    rate = p.load.links["memory"]
    rate.observe(10**6, 1e-2)
    short, long = Turn(0, [StoredRun(64, 10**7, "c")], 8), Turn(0, [StoredRun(8192, 10**6, "c")], 8)
    assert p.plan(short).load == 0
    rate.hope()
    assert rate.hoped_for
    assert p.plan(long).load == planner(link=1e-8, token=1e-5).plan(long).load > TRIAL
