"""The relay between real processes: what arrives, who waits, and what is said when the other side is gone."""

from pathlib import Path

import pytest

from tests.running import Forge
from wtn_pretrain.imitation.plan import shares, starts
from wtn_pretrain.parallel.relay import overlaps

PROGRAM = Path(__file__).with_name("relayed.py")


def ranks_do(forge: Forge, folder: Path, ranks: int, what: str, *arguments: int) -> None:
    """Ranks of `relayed.py`, whose assertions must hold."""
    forge.program(PROGRAM, what, *map(str, arguments), cwd=folder, ranks=ranks).succeed(60)


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (1, 3), (3, 1), (2, 2), (3, 2), (2, 3)])
def test_any_message_arrives(senders: int, receivers: int, forge: Forge, tmp_path: Path) -> None:
    ranks_do(forge, tmp_path, senders + receivers, "anything", 7, senders, receivers)


@pytest.mark.parametrize("in_flight", [2, 4])
def test_who_is_ahead_waits(in_flight: int, forge: Forge, tmp_path: Path) -> None:
    ranks_do(forge, tmp_path, 2, "pressure", in_flight)


@pytest.mark.parametrize("what", ["wire", "flush", "open_end", "leader"])
def test_one_to_one(what: str, forge: Forge, tmp_path: Path) -> None:
    ranks_do(forge, tmp_path, 2, what)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_peer_that_dies_is_named(culprit: int, forge: Forge, tmp_path: Path) -> None:
    started = forge.program(PROGRAM, "death", str(culprit), cwd=tmp_path, ranks=2)
    assert sorted(started.codes(60)) == [0, 9], started.stderr()
    assert (tmp_path / "told").exists()


def test_overlaps_cover_every_row_once() -> None:
    """Either side sees the same pairs of ranks and rows, and every receiver gets the whole tensors from one sender."""
    for rows in (7, 12, 16, 31):
        for below in range(1, 6):
            for above in range(1, 6):
                lower, upper = (list(zip(starts(shares(rows, n)), shares(rows, n), strict=True)) for n in (below, above))
                sent, received = {}, {}
                for rank, mine in enumerate(lower):
                    for one in overlaps(mine, upper, range(above), sending=True):
                        sent[rank, one.rank] = (mine[0] + one.first, one.rows, one.whole)
                for rank, mine in enumerate(upper):
                    for one in overlaps(mine, lower, range(below), sending=False):
                        received[one.rank, rank] = (mine[0] + one.first, one.rows, one.whole)
                assert sent == received
                assert sorted(row for first, count, _ in sent.values() for row in range(first, first + count)) == list(range(rows))
                assert sorted(receiver for (_, receiver), (*_, whole) in sent.items() if whole) == list(range(above))
