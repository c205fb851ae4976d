import signal
import threading
import time

import pytest
import torch.distributed as dist

from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launch import Place
from wtn_pretrain.parallel.watch import Watch, exit_code, is_of_a_connection


def test_a_rank_alone_is_watched_within_the_context_only() -> None:
    before = threading.active_count(), signal.getsignal(signal.SIGTERM)
    idle = Watch(Place(0, 1), ["rank 0"])
    with idle.waiting(), idle.allow(5, "save"):
        assert (threading.active_count(), signal.getsignal(signal.SIGTERM)) == before
    idle.close()
    with Watch(Place(0, 1), ["rank 0"]) as watch:
        watch.at("teacher", 1)
        with watch.waiting(), watch.allow(5, "save"):
            assert threading.active_count() == before[0] + 1
        assert watch.blame() is None
    deadline = time.monotonic() + 5
    while threading.active_count() > before[0]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert signal.getsignal(signal.SIGTERM) == before[1]
    with pytest.raises(KeyError), Watch(Place(0, 1), ["rank 0"]):
        raise KeyError


def test_what_a_programmer_gets_wrong() -> None:
    with pytest.raises(ValueError, match="one name a rank"):
        Watch(Place(0, 2), ["rank 0"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (SystemExit(), 0),
        (SystemExit(3), 3),
        (SystemExit("no"), 1),
        (UserError("x"), 2),
        (KeyboardInterrupt(), 130),
        (OSError(), 1),
    ],
)
def test_exit_codes(error: BaseException | None, code: int) -> None:
    assert exit_code(error) == code


def test_errors_that_another_rank_may_have_caused() -> None:
    """The messages are those of gloo, NCCL and the store."""
    for error in (
        RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:8072. This is typically caused by a remote worker crashing."),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, unhandled system error"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
        dist.DistNetworkError("Broken pipe"),
        ConnectionResetError(),
    ):
        assert is_of_a_connection(error)
        wrapped = ValueError("the relay has failed")
        wrapped.__cause__ = error
        assert is_of_a_connection(wrapped)
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("connection"), FileNotFoundError("x"), None):
        assert not is_of_a_connection(error)
