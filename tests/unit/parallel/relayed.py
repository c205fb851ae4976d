"""One rank of a relay under test: the program of `test_relay`, whose first argument names one of the functions here."""

import os
import random
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist

from wtn_pretrain.imitation.plan import shares, starts
from wtn_pretrain.parallel.relay import Inbox, Link, Message, Outbox, Overlap, PeerLostError, overlaps
from wtn_pretrain.parallel.replicas import local_group

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]


def parts(rows: int, count: int) -> list[tuple[int, int]]:
    counts = shares(rows, count)
    return list(zip(starts(counts), counts, strict=True))


def link(rows: int, senders: int, receivers: int, wire: torch.dtype | None = None) -> tuple[Link, tuple[int, int], bool]:
    """This rank's link between the first `senders` ranks and the `receivers` after them, its rows, and whether it sends."""
    rank = dist.get_rank()
    below, above = list(range(senders)), list(range(senders, senders + receivers))
    sending = rank in below
    others = above if sending else below
    mine = parts(rows, senders if sending else receivers)[rank if sending else rank - senders]
    peers = overlaps(mine, parts(rows, len(others)), others, sending)
    return Link(peers, local_group([*below, *above]), None, wire), mine, sending


def some_message(number: int, rows: int) -> Message:
    """A message of any tensors, the same on every rank."""
    chance, generator = random.Random(number), torch.Generator().manual_seed(number)

    def some_tensor(shape: list[int]) -> torch.Tensor:
        dtype = chance.choice(DTYPES)
        value = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=generator)
        value = (value / 7 if dtype.is_floating_point else value).to(dtype)
        if value.dim() == 4 and chance.random() < 0.7:
            value = value.to(memory_format=torch.channels_last)
        return value

    def some_shape() -> list[int]:
        return [chance.choice([0, 1, 2, 3, 7]) for _ in range(chance.choice([0, 1, 2, 3, 3, 3]))]

    named = {f"field {n}": some_tensor([rows, *some_shape()]) for n in range(chance.randint(1, 5))}
    whole = {f"whole {n}": some_tensor(some_shape()) for n in range(chance.randint(0, 2))}
    return Message(named, whole)


def same(mine: torch.Tensor, expected: torch.Tensor) -> None:
    assert mine.dtype == expected.dtype and mine.shape == expected.shape, (mine.dtype, mine.shape, expected.dtype, expected.shape)
    assert torch.equal(mine, expected)
    if expected.numel() and min(expected.shape, default=2) > 1:
        # where an axis has one element its stride says nothing
        assert mine.dim_order() == expected.dim_order()


def anything(rows: int, senders: int, receivers: int) -> None:
    """Forty messages of any shapes and dtypes arrive in order, in their memory layout, each row once."""
    wires, (first, count), sending = link(rows, senders, receivers)
    messages = [some_message(number, rows) for number in range(40)]
    if sending:
        outbox = Outbox(wires, in_flight=2)
        for message in messages:
            outbox.put(Message({name: value[first : first + count] for name, value in message.rows.items()}, message.whole))
        outbox.close()
        return
    inbox = Inbox(wires, len(messages), in_flight=2)
    for message in messages:
        found = inbox.take()
        assert found.rows.keys() == message.rows.keys()
        for name, value in message.rows.items():
            same(found.rows[name], value[first : first + count])
        assert found.whole.keys() == message.whole.keys()
        for name, value in message.whole.items():
            same(found.whole[name], value)


def wire() -> None:
    """bf16 on the wire rounds float32 rows and leaves all else as it is."""
    wires, _, sending = link(4, 1, 1, torch.bfloat16)
    rows = {"a": torch.linspace(0, 1, 20).view(4, 5), "b": torch.linspace(0, 1, 4).double(), "c": torch.arange(4)}
    whole = {"e": torch.linspace(0, 1, 7)}
    if sending:
        outbox = Outbox(wires, 2)
        outbox.put(Message(rows, whole))
        outbox.close()
        return
    found = Inbox(wires, 1, 2).take()
    same(found.rows["a"], rows["a"].bfloat16().float())
    assert not torch.equal(found.rows["a"], rows["a"])
    for name in "bc":
        same(found.rows[name], rows[name])
    same(found.whole["e"], whole["e"])


def pressure(in_flight: int) -> None:
    """Who sends to one that does not take waits after a bounded number of messages, and loses none of them."""
    wires, _, sending = link(1, 1, 1)
    size, count = 500_000, 12 + 2 * in_flight
    store = dist.distributed_c10d._get_default_store()
    if sending:
        outbox = Outbox(wires, in_flight)
        for number in range(count):
            outbox.put(Message({"n": torch.full((1, size), float(number))}, {}))
            store.set("put", str(number + 1))
        store.wait(["taken"])
        outbox.close()
        return
    inbox = Inbox(wires, count, in_flight)
    put = -1
    while True:  # until nothing moves any more
        time.sleep(0.5)
        before, put = put, int(store.get("put"))
        if put == before:
            break
    # in the boxes, one in either thread's hands and one in the sender's
    assert in_flight <= put <= 2 * in_flight + 1, put
    for number in range(count):
        assert float(inbox.take().rows["n"][0, 0]) == number
    store.set("taken", "yes")


def flush() -> None:
    """`close` returns when everything has been received, not before."""
    wires, _, sending = link(1, 1, 1)
    store = dist.distributed_c10d._get_default_store()
    if sending:
        outbox = Outbox(wires, 3)
        outbox.put(Message({"n": torch.ones(1, 4_000_000)}, {}))
        closing = threading.Thread(target=outbox.close)
        closing.start()
        closing.join(0.5)
        assert closing.is_alive(), "nobody receives yet"
        store.set("receive", "now")
        closing.join(30)
        assert not closing.is_alive()
        outbox.close()  # again: nothing
        return
    store.wait(["receive"])
    assert Inbox(wires, 1, 2).take().rows["n"].sum() == 4_000_000


def open_end() -> None:
    """A receiver that was not told how many takes until a message has no rows."""
    wires, _, sending = link(3, 1, 1)
    if sending:
        outbox = Outbox(wires, 2)
        for number in range(5):
            outbox.put(Message({"n": torch.full((3,), number)}, {}))
        outbox.put(Message({}, {}))
        outbox.close()
        return
    inbox = Inbox(wires, None, 2)
    assert [int(inbox.take().rows["n"][0]) for _ in range(5)] == list(range(5))
    assert not inbox.take().rows
    inbox._thread.join(10)
    assert not inbox._thread.is_alive()


def leader() -> None:
    """A link of whole messages from one rank to one, however many rows they have."""
    rank = dist.get_rank()
    wires = Link([Overlap(1 - rank, 0, None, whole=True)], local_group([0, 1]), None, None)
    if rank == 0:
        outbox = Outbox(wires, 2)
        for rows in (5, 1, 9):
            outbox.put(Message({"n": torch.arange(rows)}, {"e": torch.ones(2)}))
        outbox.close()
        return
    inbox = Inbox(wires, 3, 2)
    assert [len(inbox.take().rows["n"]) for _ in range(3)] == [5, 1, 9]


def death(culprit: int) -> None:
    """The end of a peer reaches who sends to it or receives from it as one error that names it."""
    wires, _, sending = link(1, 1, 1)
    message = Message({"n": torch.ones(1, 1_000_000)}, {})
    box = Outbox(wires, 2) if sending else Inbox(wires, 1000, 2)
    try:
        for number in range(1000):
            if number == 5 and dist.get_rank() == culprit:
                os._exit(9)
            if isinstance(box, Outbox):
                box.put(message)
            else:
                box.take()
    except PeerLostError as error:
        said = [error]
    # whoever asks again hears the same
    for again in (box.close, lambda: box.put(message)) if isinstance(box, Outbox) else (box.take,):
        try:
            again()
        except PeerLostError as error:
            said.append(error)
    assert len(said) == (3 if sending else 2)
    assert all(error.ranks == [culprit] and f"lost rank {culprit}: " in str(error) for error in said)
    Path("told").write_text("")
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    globals()[sys.argv[1]](*map(int, sys.argv[2:]))
    dist.barrier()
    dist.destroy_process_group()
