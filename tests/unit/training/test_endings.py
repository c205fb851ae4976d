"""What ranks know of saves that they made together."""

from torch.distributed import HashStore

from wtn_pretrain.training.checkpoint.endings import Ending, Endings


def test_news_come_in_order_and_once() -> None:
    store = HashStore()
    mine, theirs = Endings(store), Endings(store)
    assert mine.news() == [] and mine.last(print) is None
    assert [mine.begin() for _ in range(3)] == [theirs.begin() for _ in range(3)] == [1, 2, 3]
    mine.tell(2, Ending(20, "full"))
    # of the first one nothing is known yet
    assert theirs.news() == []
    mine.tell(1, Ending(10, ""))
    assert theirs.news() == [Ending(10, ""), Ending(20, "full")] and theirs.failed == 1
    assert theirs.news() == []
    theirs.tell(3, Ending(30, "broken"))
    heard: list[Ending] = []
    assert theirs.last(heard.append) == Ending(30, "broken") and heard == []
    assert mine.last(heard.append) == Ending(30, "broken") and heard == [Ending(10, ""), Ending(20, "full")]


def test_a_step_is_lost_until_it_is_saved_after_all() -> None:
    endings = Endings(HashStore())
    for ending in (Ending(10, ""), Ending(20, "full"), Ending(30, "full"), Ending(20, "")):
        endings.tell(endings.begin(), ending)
    assert endings.lost(1) == set()
    assert endings.lost(4) == {20, 30}
    assert endings.lost(5) == {30}
