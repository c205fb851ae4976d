"""What ranks know of saves that they made together."""

import pytest
from torch.distributed import HashStore

from wtn_pretrain.checkpoint.endings import Ending, Endings


def test_failures_are_said_in_order_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    store = HashStore()
    mine, theirs = Endings(store), Endings(store)
    mine.hear()
    assert mine.last() is None
    assert [mine.begin() for _ in range(4)] == [theirs.begin() for _ in range(4)] == [1, 2, 3, 4]
    mine.tell(2, Ending("step20", "full"))
    # of the first one nothing is known yet
    theirs.hear()
    assert capsys.readouterr().err == ""
    mine.tell(1, Ending("step10", ""))
    for _ in range(2):
        theirs.hear()
    assert capsys.readouterr().err == "full, and the training goes on to the next one (the first)\n"
    mine.tell(3, Ending("step30", "broken"))
    theirs.hear()
    assert capsys.readouterr().err == "broken, and the training goes on to the next one (2 so far)\n"
    theirs.tell(4, Ending("step40", "gone"))
    # the last one is for whoever asks
    assert theirs.last() == Ending("step40", "gone")
    assert capsys.readouterr().err == ""
    assert mine.last() == Ending("step40", "gone")
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_a_checkpoint_is_lost_until_it_is_saved_after_all() -> None:
    endings = Endings(HashStore())
    for ending in (Ending("step10", ""), Ending("step20", "full"), Ending("step30", "full"), Ending("step20", "")):
        endings.tell(endings.begin(), ending)
    assert endings.lost(1) == set()
    assert endings.lost(4) == {"step20", "step30"}
    assert endings.lost(5) == {"step30"}
