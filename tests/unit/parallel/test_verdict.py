import os
import signal
import subprocess
import sys
import time

import pytest

from wtn_pretrain.parallel.verdict import ALL, Beat, Ledger, Pace, of_lost_link, of_silence, state_of, stuck_sentence, this_process

NAMES = [f"rank {rank} (units {rank})" for rank in range(4)]
PATIENCE = 30.0


def after(pace: Pace, beat: Beat, seconds: float, allowance: float = 0.0, look: float = 0.5) -> tuple[float, str] | None:
    """When `beat`, unchanged, is complained of within `seconds`, and how."""
    for count in range(round(seconds / look)):
        finding = pace.tick(look, beat, allowance)
        if finding:
            return count * look, finding
    return None


def test_a_rank_without_a_mark_hangs_when_patience_is_over() -> None:
    pace = Pace(PATIENCE)
    found = after(pace, Beat(5, 17, "teacher"), 100)
    assert found is not None and PATIENCE < found[0] <= PATIENCE + 1
    assert found[1].startswith("hangs: no progress for") and "'teacher' of step 17" in found[1]


def test_waiting_is_not_hanging() -> None:
    pace = Pace(PATIENCE)
    assert after(pace, Beat(5, 17, "teacher", (0,)), 1000) is None
    assert after(pace, Beat(6, 17, "teacher"), PATIENCE - 1) is None  # its time counts from the end of the wait


def test_a_rank_that_makes_long_pauses_is_given_more_time() -> None:
    pace = Pace(PATIENCE)
    for marks in range(4):
        assert after(pace, Beat(marks, 1, "teacher"), 25) is None
    found = after(pace, Beat(9, 1, "teacher"), 100)
    assert found is not None and 49 <= found[0] <= 51


def test_what_is_allowed_may_take_as_long_and_sets_no_measure() -> None:
    pace = Pace(PATIENCE)
    after(pace, Beat(1, 1, "teacher"), 1)
    assert after(pace, Beat(2, 1, "save"), 299, allowance=300) is None
    found = after(pace, Beat(3, 1, "teacher"), 300)
    assert found is not None and found[0] <= PATIENCE + 1
    over = after(Pace(PATIENCE), Beat(2, 1, "save"), 400, allowance=300)
    assert over is not None and 300 < over[0] <= 301


def test_a_rank_falls_behind_by_its_own_measure() -> None:
    pace = Pace(PATIENCE)
    marks = 0

    def step(number: int, seconds: float) -> tuple[float, str] | None:
        """A step with a mark every second."""
        nonlocal marks
        for second in range(round(seconds)):
            marks += 1
            found = after(pace, Beat(marks, number, "teacher"), 1)
            if found:
                return second + found[0], found[1]
        return None

    for number in range(1, 8):
        assert step(number, 10) is None
    assert step(8, 49) is None  # five times its slowest, which is more than the patience
    marks += 1
    assert after(pace, Beat(marks, 9, "teacher", (0,)), 500) is None  # waits do not count
    found = step(10, 400)
    assert found is not None and 5 * 49 - 1 <= found[0] <= 5 * 49 + 2
    assert "has fallen behind" in found[1] and "of its own work on step 10" in found[1] and "49 s on a step before" in found[1]


def test_nothing_is_measured_by_first_steps() -> None:
    pace = Pace(PATIENCE)
    for marks in range(300):
        assert after(pace, Beat(marks, 1, "compiles"), 1) is None


def ledger(*beats: Beat, gone: tuple[int, ...] = ()) -> Ledger:
    found = Ledger(len(beats), PATIENCE)
    found.gone |= set(gone)
    for rank, beat in enumerate(beats):
        found.heard(rank, beat)
    return found


def until_stuck(known: Ledger, seconds: float) -> tuple[float, list[int]] | None:
    for count in range(round(seconds)):
        for rank, beat in enumerate(known.beats):
            if beat is not None:
                known.heard(rank, beat)
        known.tick(1)
        if known.stuck():
            return count, known.stuck()
    return None


@pytest.mark.parametrize(
    ("beats", "gone", "stuck"),
    [
        ((Beat(1, 1, "a", (1,)), Beat(1, 1, "a", (2,)), Beat(1, 1, "a")), (), None),  # the last one works, or hangs by itself
        ((Beat(1, 1, "a", (1,)), Beat(1, 1, "a", (0,)), Beat(1, 1, "a")), (), [0, 1]),
        ((Beat(1, 1, "a", (1,)), Beat(1, 1, "a", (0,)), Beat(1, 1, "a", (0,))), (), [0, 1, 2]),
        ((Beat(1, 1, "a", (ALL,)), Beat(1, 1, "a", (ALL,)), Beat(1, 1, "a")), (), None),  # a collective that one has not reached
        ((Beat(1, 1, "a", (ALL,)), Beat(1, 1, "a", (ALL,)), Beat(1, 1, "a", (ALL,))), (), [0, 1, 2]),  # one that hangs
        ((Beat(1, 1, "a", (1,)), Beat(1, 1, "a"), Beat(1, 1, "a")), (1,), [0]),
        ((Beat(1, 1, "a", (1,)), Beat(1, 1, "a"), Beat(1, 1, "a")), (0, 1), None),
    ],
)
def test_ranks_that_nobody_can_set_free(beats: tuple[Beat, ...], gone: tuple[int, ...], stuck: list[int] | None) -> None:
    found = until_stuck(ledger(*beats, gone=gone), 200)
    assert (found and found[1]) == stuck
    assert found is None or PATIENCE - 1 <= found[0] <= PATIENCE + 2


def test_collectives_that_take_long_are_given_more_time() -> None:
    known = ledger(*[Beat(0, 1, "backward", (ALL,))] * 2)
    for marks in range(5):
        for rank in (0, 1):
            known.heard(rank, Beat(marks, 1, "backward", (ALL,)))
        assert until_stuck(known, 25) is None
    found = until_stuck(known, 200)
    assert found is not None and 20 <= found[0] <= 50  # twice 25 s, of which the last 25 have passed


def test_who_is_silent() -> None:
    known = ledger(Beat(), Beat(), Beat(), gone=(2,))
    for _ in range(29):
        known.heard(0, Beat())
        known.tick(1)
    assert known.silent() is None
    known.tick(2)
    assert known.silent() == 1  # and not rank 2, which has ended


def test_sentence_of_the_stuck() -> None:
    known = ledger(Beat(3, 17, "student", (1,)), Beat(3, 18, "teacher", (0, 2)), Beat(), Beat(3, 18, "teacher", (ALL,)), gone=(2,))
    assert stuck_sentence(NAMES, known, [0, 1]) == (
        "no rank can go on: rank 0 (units 0) (at 'student' of step 17) waits for rank 1 (units 1); "
        "rank 1 (units 1) (at 'teacher' of step 18) waits for rank 2 (units 2), which has ended"
    )
    assert stuck_sentence(NAMES, known, [0, 1, 3, 3]).endswith("and 1 more ranks wait")


def test_states_of_processes() -> None:
    me = this_process("here")
    assert me.place and me.pid == os.getpid() and state_of(me) in ("R", "S")
    assert state_of(me._replace(born=me.born + 1)) is None  # another process of the same number
    program = "from wtn_pretrain.parallel.verdict import this_process as p; import json, time; print(json.dumps(p('h')), flush=True); "
    for act, ends, told in [
        ("time.sleep(60)", signal.SIGKILL, "killed by SIGKILL"),
        ("time.sleep(60)", signal.SIGSEGV, "killed by SIGSEGV"),
        ("raise SystemExit(3)", None, "ended with exit code 3"),
    ]:
        with subprocess.Popen([sys.executable, "-c", program + act], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            born = int(process.stdout.readline().split(", ")[-1].rstrip("]\n"))
            child = me._replace(pid=process.pid, born=born)
            try:
                if ends is not None:
                    os.kill(process.pid, signal.SIGSTOP)
                    wait_for(child, "T")
                    assert of_lost_link("rank 1", child, me, final=False) is None
                    assert of_lost_link("rank 1", child, me, final=True) == "rank 1 has lost its link"
                    assert of_silence("rank 1", child, me, 30) == f"rank 1 has been stopped for 30 s (process {process.pid}, SIGSTOP)"
                    # and not by `send_signal`, which buries the dead
                    os.kill(process.pid, ends)
                    os.kill(process.pid, signal.SIGCONT)
                wait_for(child, told)
                assert of_lost_link("rank 1", child, me, final=False) == f"rank 1 has died ({told})"
            finally:
                process.kill()
        assert state_of(child) is None
        assert of_lost_link("rank 1", child, me, final=False) == "rank 1 has died (its process is gone)"


def wait_for(process: object, state: str) -> None:
    deadline = time.monotonic() + 20
    while state_of(process) != state:  # type: ignore[arg-type]
        assert time.monotonic() < deadline, f"{state_of(process)} instead of {state}"  # type: ignore[arg-type]
        time.sleep(0.01)


def test_of_other_machines_nothing_is_claimed_to_be_known() -> None:
    me = this_process("here")
    there = me._replace(host="there", place="elsewhere")
    assert of_lost_link("rank 1", there, me, final=False) == "rank 1 on there has died or lost its link"
    assert "on there has not answered for 30 s" in of_silence("rank 1", there, me, 30)
    assert of_silence("rank 1", None, me, 30) == "rank 1 has not arrived within 30 s"
