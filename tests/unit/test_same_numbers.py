"""Processes that are numbered alike, as in containers on several nodes, write to one folder; threads stand in, which share a number."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wtn_pretrain.files import write_beside, write_text
from wtn_pretrain.recipe import check_writable

TIMES, RANKS = 100, 4


def test_ranks_of_one_number_look_at_a_folder(tmp_path: Path) -> None:
    with ThreadPoolExecutor(RANKS) as pool:
        list(pool.map(lambda _: check_writable(tmp_path), range(TIMES * RANKS)))
    assert not list(tmp_path.iterdir())


def test_ranks_of_one_number_write_a_file(tmp_path: Path) -> None:
    texts = [f"{number}\n" * 1000 for number in range(TIMES * RANKS // 4)]
    for name, write in (
        ("text", lambda text: write_text(tmp_path / "text", text)),
        ("beside", lambda text: write_beside(tmp_path / "beside", lambda path: path.write_text(text))),
    ):
        with ThreadPoolExecutor(RANKS) as pool:
            list(pool.map(write, texts))
        assert (tmp_path / name).read_text() in texts
    assert {path.name for path in tmp_path.iterdir()} == {"text", "beside"}
