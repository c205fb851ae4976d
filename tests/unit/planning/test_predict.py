"""Predictions against a plan played through packet by packet, and what play must never do."""

import random
from itertools import pairwise

import numpy as np
import pytest

from wtn_pretrain.errors import UserError
from wtn_pretrain.imitation.plan import Span
from wtn_pretrain.planning.predict import Prediction, Stage, predict
from wtn_pretrain.planning.simulate import simulate
from wtn_pretrain.planning.spans import Flow, Memory


def prediction(seed: int, in_flight: int = 2) -> Prediction:
    """Spans and links of random speed, some links slower than any span."""
    draw = random.Random(seed)
    count = draw.randint(1, 7)
    stages = []
    for number in range(count):
        teacher, student, reduce = (draw.uniform(0.1, 2) for _ in range(3))
        leaves = draw.choice([teacher, teacher + draw.uniform(0, 1) * student])
        stages.append(
            Stage(
                Span(number, number),
                range(number, number + 1),
                1,
                4,
                teacher,
                student,
                reduce,
                0.0,
                leaves,
                draw.uniform(0, 6) if number else 0.0,
                draw.uniform(0, 1) if number < count - 1 else 0.0,
                Memory(*[np.zeros(())] * 8),
            )
        )
    return Prediction(tuple(stages), Flow(4, in_flight=in_flight))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("packets", [1, 2, 7, 40])
def test_the_predicted_time_is_that_of_the_play(seed: int, packets: int) -> None:
    made = prediction(seed)
    events = simulate(made, packets)
    assert max(event.end for event in events) == pytest.approx(made.seconds(packets), rel=1e-9)
    first = min(event.start for event in events if event.kind == "teacher" and event.span == len(made.stages) - 1)
    assert first == pytest.approx(made.fill, rel=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_steady_state_has_the_predicted_period_and_idle_time(seed: int) -> None:
    made = prediction(seed)
    events = simulate(made, 1000)
    for number, stage in enumerate(made.stages):
        began = [event.start for event in events if event.span == number and event.kind == "teacher"]
        # once all that may be in flight is, those below the slowest are held back to its pace
        assert (began[950] - began[900]) / 50 == pytest.approx(made.micro_batch, rel=1e-9)
        work = sum(event.end - event.start for event in events if event.span == number and event.packet == 920 and event.kind in WORK)
        assert 1 - work / made.micro_batch == pytest.approx(made.idle(stage), abs=1e-9)


WORK = ("teacher", "student", "reduce")


@pytest.mark.parametrize("in_flight", [2, 3])
def test_a_span_does_one_thing_at_a_time_and_no_more_is_in_flight_than_allowed(in_flight: int) -> None:
    full = 0
    for seed in range(30):
        made = prediction(seed, in_flight)
        events = simulate(made, 30)
        for number in range(len(made.stages)):
            mine = sorted((event for event in events if event.span == number and event.kind in WORK), key=lambda event: event.start)
            assert all(before.end <= after.start + 1e-9 for before, after in pairwise(mine))
        for below in range(len(made.stages) - 1):
            arrived = [event.end for event in events if event.span == below and event.kind == "send"]
            taken = [event.start for event in events if event.span == below + 1 and event.kind == "teacher"]
            waiting = [sum(a <= moment for a in arrived) - sum(t <= moment for t in taken) for moment in arrived]
            assert max(waiting, default=0) <= in_flight
            full += max(waiting, default=0) == in_flight
    assert full > 10


def test_a_span_of_more_replicas_than_rows_is_refused() -> None:
    from wtn_pretrain.imitation.plan import Plan
    from wtn_pretrain.planning.cluster import cores

    with pytest.raises(UserError, match=r"0-0x5 has 5 replicas for micro-batches of 4 rows"):
        predict(Plan((Span(0, 0, 5),)), [], cores(5), Flow(4))
