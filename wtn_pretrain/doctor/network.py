"""Addresses and ports before ranks meet; links and clocks between ranks that have met."""

import contextlib
import errno
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from operator import itemgetter

import torch
import torch.distributed as dist

from wtn_pretrain.device import backend, device
from wtn_pretrain.doctor.finding import Finding
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.launchers import Start, device_index
from wtn_pretrain.parallel.meeting import meet
from wtn_pretrain.planning.cluster import Link, measure_link, measure_pair

SKEW = 1.0
"""Seconds by which clocks may differ before logs of several nodes mislead."""

SLOW = {"gloo": (5e7, 5e7), "nccl": (2e10, 5e9)}
"""Bytes a second, within a host and between hosts, below which the fast network is probably not in use."""
USED = "is the fast network used? see NCCL_SOCKET_IFNAME, NCCL_IB_HCA and GLOO_SOCKET_IFNAME"


def check_port(port: int, address: str = "") -> list[Finding]:
    """Whether rank 0 could listen there."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                remedy = f"end what listens there (ss -ltnp 'sport = :{port}'), or start with another --master_port"
                return [Finding("network", "fault", f"port {port} is taken on {socket.gethostname()}", remedy)]
            remedy = "give ranks an address of rank 0's machine (--master_addr) and a port above 1023"
            return [Finding("network", "fault", f"port {port}: {error.strerror}", remedy)]
    return [Finding("network", "ok", f"port {port} is free")]


def check_peer(address: str, port: int, timeout: float) -> list[Finding]:
    """Whether somebody answers there within `timeout` seconds."""
    began, reason = time.monotonic(), "no answer"
    while (left := timeout - (time.monotonic() - began)) > 0:
        try:
            with socket.create_connection((address, port), timeout=left):
                spent = time.monotonic() - began
                return [Finding("network", "ok", f"{address}:{port} answers after {1e3 * spent:.3g} ms")]
        except socket.gaierror as error:
            reason = f"no such name ({error.strerror})"
            break
        except TimeoutError:
            reason = "no answer"
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            # whoever listens there may still be starting
            time.sleep(min(0.5, max(left, 0)))
    remedy = f"check the address, the firewall and the route: ping {address}; is rank 0 running there, with the same --master_port?"
    return [Finding("network", "fault", f"peer {address}:{port} is not reached in {timeout:g} s: {reason}", remedy)]


def join(start: Start, timeout: float) -> list[Finding]:
    """Brings the ranks of this launch together, over gloo and, on accelerators, their own backend; a fault where that takes too long."""
    try:
        store = meet(start, timeout)
        if torch.accelerator.is_available():
            torch.accelerator.set_device_index(device_index(start, torch.accelerator.device_count()))
    except UserError as error:
        text, _, remedy = str(error).rpartition("; ")
        return [Finding("network", "fault", text, remedy)]
    try:
        kind = "gloo" if backend() == "gloo" else f"cpu:gloo,{device().type}:{backend()}"
        dist.init_process_group(
            kind, store=store, rank=start.rank, world_size=start.world_size, timeout=timedelta(seconds=max(timeout, 30.0))
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        text = f"{start.world_size} ranks met at {start.master} and do not connect with one another ({' '.join(str(error).split())[:160]})"
        return [
            Finding(
                "network", "fault", text, "see the firewalls between all hosts; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network"
            )
        ]
    return [Finding("network", "ok", f"{start.world_size} ranks met at {start.master}, started by {start.launcher}")]


def check_links(hosts: list[str]) -> list[Finding]:
    """Bandwidth and latency of what a run sends over: between ranks 0 and 1, and from rank 0 to every other host; every rank calls it."""
    kind = backend()
    first = {host: rank for rank, host in reversed(list(enumerate(hosts))) if host != hosts[0]}
    try:
        connection = measure_link()
        away = {host: connection.link if rank == 1 else measure_pair(rank) for host, rank in sorted(first.items(), key=itemgetter(1))}
    except (dist.DistError, RuntimeError) as error:
        text = f"{kind} fails between these ranks ({' '.join(str(error).split())[:160]})"
        remedy = "run again with NCCL_DEBUG=INFO (TORCH_DISTRIBUTED_DEBUG=DETAIL for gloo); name the interface with NCCL_SOCKET_IFNAME"
        return [Finding("links", "fault", text, remedy)]
    found = []
    if hosts[1] == hosts[0]:
        text = f"{kind} between rank 0 and 1{' of one host' if away else ''}: {_figures(connection.link)}"
        slow = connection.link.bandwidth < SLOW[kind][0]
        found.append(Finding("links", "warning" if slow else "ok", text, USED if slow else ""))
    found += compare_hosts(kind, hosts[0], away, first)
    text = f"; an all-reduce over {len(hosts)} ranks reaches {connection.reduce:.0%} of what rank 0 and 1 do"
    found[0] = found[0]._replace(text=found[0].text + text)
    return found


def compare_hosts(kind: str, here: str, away: Mapping[str, Link], ranks: Mapping[str, int]) -> list[Finding]:
    """What is said of the links from host `here` to the others, by host; `ranks`: the rank of each that has answered."""
    if not away:
        return []
    usual = sorted(link.bandwidth for link in away.values())[len(away) // 2]
    slow = [host for host, link in away.items() if link.bandwidth < max(SLOW[kind][1], usual / 4)]
    worst = min(away, key=lambda host: away[host].bandwidth)
    if len(slow) == len(away):
        # no host is to blame
        text = f"{kind} from {here} to each of {len(away)} other hosts is slow" if len(away) > 1 else f"{kind} between {here} and {worst}"
        return [Finding("links", "warning", f"{text}: {_figures(away[worst])}", USED)]
    text = f"{kind} from {here} to {len(away)} other host{'s' if len(away) > 1 else ''}, slowest {worst}: {_figures(away[worst])}"
    found = [Finding("links", "ok", text)]
    for host in slow:
        text = f"{kind} from {here} to {host}: {_figures(away[host])}, where the middle of all is {usual / 1e9:.3g} GB/s"
        found.append(Finding("links", "warning", text, f"look at the adapter and cable of {host}, or leave it out", (ranks[host],)))
    return found


def _figures(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.3g} GB/s, {1e6 * link.latency:.3g} us"


def check_clocks(hosts: list[str], clock: Callable[[], float] = time.time, rounds: int = 10) -> list[Finding]:
    """By how much the ranks' clocks differ from rank 0's (the quickest of `rounds` exchanges counts); every rank calls it.

    The offset of a clock is what it shows less the middle of question and answer (Mills 1991).
    """
    rank, ranks, found = dist.get_rank(), dist.get_world_size(), []
    for other in range(1, ranks):
        offset, quickest = 0.0, float("inf")
        for _ in range(rounds if rank in (0, other) else 0):
            told = torch.zeros(1, dtype=torch.float64)
            if rank == 0:
                asked = clock()
                dist.send(told, other)
                dist.recv(told, other)
                heard = clock()
                if heard - asked < quickest:
                    quickest, offset = heard - asked, float(told) - (asked + heard) / 2
            else:
                dist.recv(told, 0)
                told[0] = clock()
                dist.send(told, 0)
        if rank == 0 and abs(offset) > SKEW:
            text = f"the clock of {hosts[other]} is {abs(offset):.3g} s {'ahead' if offset > 0 else 'behind'}; times in logs do not compare"
            found.append(Finding("clocks", "warning", text, "switch on time synchronisation there (chrony, ntpd)", (other,)))
    return found if found or rank else [Finding("clocks", "ok", f"within {SKEW:g} s of each other")]


def leave() -> None:
    with contextlib.suppress(RuntimeError, ValueError):
        dist.destroy_process_group()
