"""The search against brute force, with a cost formula of its own; its limits and refusals."""

import itertools
import math
import random
import time
from functools import cache, partial
from itertools import starmap

import numpy as np
import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.plan import Plan, Span, check, shares
from wtn_pretrain.planning.cluster import Cluster, Link
from wtn_pretrain.planning.costs import Curve, UnitCost
from wtn_pretrain.planning.predict import predict
from wtn_pretrain.planning.search import fewest, search
from wtn_pretrain.planning.spans import Flow


def unit(draw: random.Random, first: bool, rows: int) -> UnitCost:
    """A unit of random costs; times are not proportional to rows."""

    def curve(scale: float) -> Curve:
        return Curve.through((some, scale * (draw.uniform(0, 3) + some / rows * 10)) for some in sorted({1, -(-rows // 3), rows}))

    trained = draw.choice([0, 10, 100, 1000])
    return UnitCost(
        teacher=curve(draw.choice([0.1, 1, 3])),
        student=curve(draw.choice([0.1, 1])),
        step=draw.uniform(0, 1),
        learns=not first or draw.random() < 0.5,
        teacher_weights=draw.randrange(500),
        student_weights=draw.randrange(200),
        trained=trained,
        states=2 * trained,
        step_work=draw.randrange(50),
        teacher_work=curve(20),
        student_work=curve(20),
        student_held=curve(10),
        student_graph=curve(5),
        hidden=draw.choice([1, 50, 400]),
        context=draw.choice([0, 5]),
        student_hidden=draw.choice([1, 40]),
        bridge=draw.choice([0, 30]),
        inputs=20 if first else 0,
        syncs=draw.choice([1, 5]),
    )


def at(curve: Curve, rows: int) -> float:
    return float(curve.at(np.array([rows]))[0])


def ring(cluster: Cluster, size: float, replicas: int, far: bool) -> float:
    link = cluster.between if far else cluster.inside
    return 2 * (replicas - 1) / replicas * size / (link.bandwidth * cluster.reduce) + 2 * (replicas - 1) * link.latency


def stage_time(costs: list[UnitCost], cluster: Cluster, flow: Flow, span: Span, start: int) -> float:
    """The seconds that a span on ranks from `start` needs, written out rank by rank."""
    rows = shares(flow.rows, span.replicas)[0]
    nodes = [rank // cluster.per_node for rank in range(start, start + span.replicas)]
    student_fed = flow.fed == "student"
    busy = 0.0
    for index in span.units:
        cost = costs[index]
        busy += at(cost.teacher, rows)
        if cost.learns or student_fed:
            busy += at(cost.student, rows)
        busy += cost.step / (span.replicas if flow.zero else 1) / flow.accumulation
        if cost.learns:
            busy += ring(cluster, cost.trained, span.replicas, len(set(nodes)) > 1) / flow.accumulation
            busy += cost.syncs * (ring(cluster, 0, span.replicas, len(set(nodes)) > 1) + (cluster.meeting if span.replicas > 1 else 0))

    def relay(cost: UnitCost, far: bool) -> float:
        link = cluster.between if far else cluster.inside
        size = rows * (cost.hidden + cost.context + (cost.student_hidden if student_fed else 0)) + cost.bridge
        return link.latency + flow.wire * size / link.bandwidth

    links = [0.0, 0.0]
    if span.first:
        # contiguous rows meet: my last replica hears from the last one below
        links[0] = relay(costs[span.first - 1], nodes[-1] != (start - 1) // cluster.per_node)
    if span.last < len(costs) - 1:
        links[1] = relay(costs[span.last], nodes[0] != (start + span.replicas) // cluster.per_node)
    return max(busy + (1 - cluster.hidden) * sum(links), *links)


def memory(costs: list[UnitCost], cluster: Cluster, flow: Flow, span: Span) -> float:
    """The bytes of one rank of a span, unit by unit."""
    top, bottom = span.last == len(costs) - 1, span.first == 0
    rows = shares(flow.rows, span.replicas)[0]
    held = [costs[index] for index in span.units]
    student_fed = flow.fed == "student"

    def leaving(cost: UnitCost) -> int:
        return rows * (cost.hidden + cost.context + (cost.student_hidden if student_fed else 0)) + cost.bridge

    trained = sum(cost.trained for cost in held)
    total = cluster.base + sum(cost.teacher_weights + cost.student_weights for cost in held)
    total += (sum(cost.states for cost in held) + (trained if flow.zero else 0)) / (span.replicas if flow.zero else 1)
    total += (flow.in_flight + 1) * (rows * costs[0].inputs if bottom else leaving(costs[span.first - 1]))
    total += 0 if top else flow.in_flight * leaving(held[-1])
    if student_fed or top:
        total += rows * max(cost.hidden + (held[place - 1].hidden if place else 0) for place, cost in enumerate(held))
        total += rows * max(cost.student_hidden for cost in held) if student_fed else 0
    else:
        total += rows * sum(cost.hidden for cost in held)
    part = span.replicas if flow.zero == 2 else 1
    moments, so_far = [], 0 if flow.accumulation == 1 else trained
    for cost in held:
        works = [at(cost.teacher_work, rows)] + ([at(cost.student_work, rows)] if cost.learns or student_fed else [])
        moments.append(so_far / part + max(works))
        so_far += cost.trained if flow.accumulation == 1 else 0
        moments.append(so_far / part + cost.step_work / part)
    total += max(trained / part, *moments) + (max(cost.trained for cost in held) if span.replicas > 1 else 0)
    return total


def plans(units: int, ranks: int, rows: int) -> list[Plan]:
    """Every split of `units` and every distribution of exactly `ranks` over its spans."""
    found = []
    for count in range(1, min(units, ranks) + 1):
        for cuts in itertools.combinations(range(1, units), count - 1):
            edges = [0, *cuts, units]
            for bars in itertools.combinations(range(1, ranks), count - 1):
                replicas = [after - before for before, after in itertools.pairwise([0, *bars, ranks])]
                if max(replicas) <= rows:
                    found.append(Plan(tuple(Span(edges[n], edges[n + 1] - 1, replicas[n]) for n in range(count))))
    return found


def placed(plan: Plan) -> list[tuple[Span, int]]:
    """The spans of a plan, each with its first rank."""
    return [(span, plan.ranks_of(number)[0]) for number, span in enumerate(plan.spans)]


def case(seed: int, units: int, ranks: int) -> tuple[list[UnitCost], Cluster, Flow]:
    draw = random.Random(seed)
    rows = draw.choice([3, 8, 17, 64])
    flow = Flow(
        rows,
        draw.choice(["teacher", "student"]),
        draw.choice([0, 1, 2]),
        accumulation=draw.choice([1, 1, 4]),
        wire=draw.choice([1.0, 0.5]),
    )
    slow = draw.choice([2.0, 10.0, 100.0])
    inside = Link(draw.choice([30.0, 1000.0, 1e5]), draw.choice([0.0, 0.02]))
    cluster = Cluster(
        ranks,
        draw.choice([1, 2, 3, 4, 100]),
        inside,
        Link(inside.bandwidth / slow, inside.latency * slow),
        base=10,
        reduce=draw.choice([1.0, 0.5]),
        meeting=draw.choice([0.0, 0.05]),
        hidden=draw.choice([1.0, 0.7]),
    )
    return [unit(draw, index == 0, rows) for index in range(units)], cluster, flow


SMALL = [(seed, 1 + seed % 7, 1 + seed * 5 % 8) for seed in range(150)]


@pytest.mark.parametrize(("seed", "units", "ranks"), SMALL + [(seed, 12, 8) for seed in range(1000, 1006)])
def test_no_plan_is_faster_than_the_one_that_is_found(seed: int, units: int, ranks: int) -> None:
    costs, cluster, flow = case(seed, units, ranks)
    everything = plans(units, ranks, flow.rows)
    if not everything:
        with pytest.raises(UserError, match="ranks"):
            search(costs, cluster, flow)
        return
    seconds = cache(partial(stage_time, costs, cluster, flow))
    size = cache(partial(memory, costs, cluster, flow))
    times = [max(starmap(seconds, placed(plan))) for plan in everything]
    sizes = [max(map(size, plan.spans)) for plan in everything]
    by_plan = dict(zip(map(str, everything), zip(times, sizes, strict=True), strict=True))
    # without a limit, then with ones that rule out more and more plans
    for share in (1.0, 0.5, 0.1):
        limit = float(np.quantile(sizes, share)) * (1 + 1e-9)
        best = min(time for time, needed in zip(times, sizes, strict=True) if needed <= limit)
        found = check(search(costs, cluster._replace(memory=limit), flow), units, ranks)
        assert by_plan[str(found)][0] == pytest.approx(best, rel=1e-9)
        assert by_plan[str(found)][1] <= limit * (1 + 1e-9)
    with pytest.raises(UserError, match=r"lack .* needs .* narrow.micro_batch_size"):
        search(costs, cluster._replace(memory=min(sizes) * 0.999), flow)


@pytest.mark.parametrize(("seed", "units", "ranks"), SMALL[::10])
def test_prediction_and_search_use_the_same_figures(seed: int, units: int, ranks: int) -> None:
    costs, cluster, flow = case(seed, units, ranks)
    for plan in plans(units, ranks, flow.rows)[::17]:
        prediction = predict(plan, costs, cluster, flow)
        assert prediction.micro_batch == pytest.approx(max(stage_time(costs, cluster, flow, *place) for place in placed(plan)), rel=1e-9)
        for stage in prediction.stages:
            assert float(stage.memory.total) == pytest.approx(memory(costs, cluster, flow, stage.span), rel=1e-9)


def test_slack_buys_memory_and_no_more_time_than_it_says() -> None:
    leaner = 0
    for seed, units, ranks in SMALL[:60]:
        costs, cluster, flow = case(seed, units, ranks)
        if ranks > units * flow.rows:
            continue
        fast, lean = search(costs, cluster, flow), search(costs, cluster, flow, slack=0.2)
        times = [max(stage_time(costs, cluster, flow, *place) for place in placed(plan)) for plan in (fast, lean)]
        sizes = [max(memory(costs, cluster, flow, span) for span in plan.spans) for plan in (fast, lean)]
        assert times[1] <= 1.2 * times[0] * (1 + 1e-9)
        assert sizes[1] <= sizes[0] * (1 + 1e-9)
        leaner += sizes[1] < sizes[0]
    assert leaner > 5


def test_the_fewest_ranks_for_a_time_are_those_of_brute_force() -> None:
    for seed in range(20):
        costs, cluster, flow = case(seed, 4, 6)
        best = {
            ranks: min(
                (max(stage_time(costs, cluster, flow, *place) for place in placed(plan)) for plan in plans(4, ranks, flow.rows)),
                default=math.inf,
            )
            for ranks in range(1, 7)
        }
        for seconds in np.linspace(0.5 * min(best.values()), 1.5 * best[1], 5):
            enough = [ranks for ranks, time in best.items() if time <= seconds]
            assert fewest(costs, cluster, flow, float(seconds)) == min(enough, default=0)


def test_every_case_of_the_brute_force_tells_plans_apart() -> None:
    """A guard of the test above: the memory limits and node borders that it draws change the answer."""
    changed = 0
    for seed, units, ranks in SMALL:
        costs, cluster, flow = case(seed, units, ranks)
        if ranks <= units * flow.rows and cluster.per_node < ranks:
            changed += search(costs, cluster, flow) != search(costs, cluster._replace(per_node=100), flow)
    assert changed > 10


def test_more_ranks_than_rows_are_refused_and_as_many_are_not() -> None:
    costs, cluster, flow = case(5, 2, 6)
    flow = flow._replace(rows=3)
    assert search(costs, cluster, flow) == Plan((Span(0, 0, 3), Span(1, 1, 3)))
    with pytest.raises(UserError, match=r"7 ranks: 2 units and micro-batches of 3 rows have work for 6"):
        search(costs, cluster.sized(7), flow)


@pytest.mark.parametrize("ranks", [1024, 4096])
def test_large_clusters_are_planned_to_the_same_balance(ranks: int) -> None:
    """96 units: the found plan is near the bound that perfect division of the work would reach."""
    draw = random.Random(3)
    rows = 4096
    costs = []
    for index in range(96):
        cost = unit(draw, index == 0, rows)
        weight = draw.uniform(0.5, 2)
        line = Curve(((1, weight / rows), (rows, weight)))
        costs.append(cost._replace(teacher=line, student=line, step=0.0, trained=10**6, learns=True, syncs=1))
    cluster = Cluster(ranks, 8, Link(200e9, 1e-7), Link(25e9, 2e-7))
    began = time.perf_counter()
    plan = search(costs, cluster, Flow(rows))
    print(f"{ranks} ranks: {time.perf_counter() - began:.1f} s, {plan}")
    work = sum(at(cost.teacher, rows) + at(cost.student, rows) for cost in costs)
    slowest = max(stage_time(costs, cluster, Flow(rows), *place) for place in placed(plan))
    assert plan.ranks == ranks and math.isfinite(slowest)
    assert slowest < 1.25 * work / ranks
