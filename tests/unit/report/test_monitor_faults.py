"""What a stage says where its disk is full, and where it goes back."""

from pathlib import Path

import pytest

from tests.running import no_room, records
from wtn_pretrain.errors import UserError
from wtn_pretrain.training.monitor import METRICS, ROLLBACK, Monitor


def monitor(folder: Path, start: int = 0, tensorboard: bool = False) -> Monitor:
    return Monitor(folder, "wide", 100, start=start, log_every=1, tensorboard=tensorboard)


def take(made: Monitor, *steps: int) -> None:
    for step in steps:
        made.step(step, {"loss": float(step)}, samples=1)


def steps(folder: Path) -> list[int]:
    return [record["step"] for record in records(folder)]


def test_records_wait_for_room(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = monitor(tmp_path)
    take(made, 1)
    size = (tmp_path / METRICS).stat().st_size
    with no_room(size + 10):
        take(made, 2, 3, 4)
        # what fits is there, and is no line yet
        assert (tmp_path / METRICS).stat().st_size == size + 10
        assert steps(tmp_path) == [1]
    said = [line for line in capsys.readouterr().err.splitlines() if "cannot be written" in line]
    assert len(said) == 1 and said[0].endswith("; its records wait in memory, and the training goes on")
    take(made, 5)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    # told again when it is full again
    with no_room(0):
        take(made, 6)
    assert "wait in memory" in capsys.readouterr().err
    with no_room(0), pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written"):
        made.close()


def test_charts_that_cannot_be_written_end_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = monitor(tmp_path, tensorboard=True)
    take(made, 1)
    made._events.flush()
    with no_room(0):
        for step in range(2, 40):
            take(made, step)
            if made._events is not None:
                try:
                    made._events.flush()
                except OSError:
                    # its thread has ended, and the next chart hears of it
                    continue
    take(made, 40)
    made.close()
    assert steps(tmp_path) == list(range(1, 41))
    assert "TensorBoard gets no more of this start" in capsys.readouterr().err


def test_it_goes_back(tmp_path: Path) -> None:
    made = monitor(tmp_path, tensorboard=True)
    take(made, 1, 2, 3, 4, 5)
    made.event("checkpoint", step=3)
    made.rewind(3)
    made.event(ROLLBACK, step=3, number=1)
    assert steps(tmp_path) == [1, 2, 3]
    take(made, 4, 5, 6)
    made.rewind(3)
    made.event(ROLLBACK, step=3, number=2)
    take(made, 4, 5)
    made.close()
    assert [record["loss"] for record in records(tmp_path)] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [event.get("number") for event in records(tmp_path, "event")] == [None, 1, 2]
    # a start from step 3 has yet to go back itself; one from step 4 has
    monitor(tmp_path, 4).close()
    assert [event.get("number") for event in records(tmp_path, "event")] == [None, 1, 2]
    monitor(tmp_path, 3).close()
    assert [event.get("number") for event in records(tmp_path, "event")] == [None]
