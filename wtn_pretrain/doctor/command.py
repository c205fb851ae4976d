"""The work of tools/doctor.py."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from wtn_pretrain.arguments import Parser, amount
from wtn_pretrain.device import device
from wtn_pretrain.doctor.compilers import check_compilers
from wtn_pretrain.doctor.disk import check_disk, check_shared_memory
from wtn_pretrain.doctor.finding import Finding, merged, page
from wtn_pretrain.doctor.kernels import check_kernels
from wtn_pretrain.doctor.machine import check_devices, check_memory
from wtn_pretrain.doctor.network import check_clocks, check_links, check_peer, check_port, join, leave
from wtn_pretrain.doctor.software import check_versions, compare_code, compare_versions, versions
from wtn_pretrain.errors import UserError
from wtn_pretrain.parallel.alike import identity
from wtn_pretrain.parallel.launchers import find_start, host_name

CHECKS = ("versions", "devices", "memory", "compilers", "kernels", "disk", "network", "links", "clocks")


def run(doc: str, argv: Sequence[str]) -> int:
    """Looks at everything, prints the page on rank 0; the exit status: 0, or 1 where a fault was found."""
    options = _parser(doc).parse_args(argv)
    start = find_start()
    own = _own(options, None if start.world_size == 1 else start.local_rank)
    hosts, facts = [host_name()], [versions()]
    if start.world_size == 1:
        own += check_port(options.port)
        return _tell(own, hosts, facts, options)
    met = join(start, options.timeout)
    if met[0].verdict == "fault":
        # nobody else may hear of it
        return _tell([*own, *met], hosts, facts, options, start.rank)
    everything: list[Any] = [None] * start.world_size
    dist.all_gather_object(everything, (own, hosts[0], facts[0], identity()))
    per_rank, hosts, facts, code = (list(column) for column in zip(*everything, strict=True))
    findings = [*merged(per_rank), *compare_versions(facts, hosts), *compare_code(code, hosts), *met]
    clocks = check_clocks(hosts) if len(hosts) > 1 else []
    links = check_links(hosts) if len(hosts) > 1 else []
    verdict: list[Any] = [_tell([*findings, *links, *clocks], hosts, facts, options) if start.rank == 0 else 0]
    dist.broadcast_object_list(verdict, 0)
    leave()
    return int(verdict[0])


def _parser(doc: str) -> Parser:
    made = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--folder", type=Path, default=Path("runs"), help="folder of runs, whose disk is tried (default runs)")
    made.add_argument("--need", type=amount, default=1.0, metavar="GB", help="space that must be free there (default 1)")
    made.add_argument("--port", type=_port, default=29500, help="without a launcher: the port that ranks would meet at (default 29500)")
    made.add_argument(
        "--peer", action="append", default=[], metavar="HOST[:PORT]", help="an address that must answer (port 22 unless given)"
    )
    made.add_argument("--timeout", type=amount, default=60.0, metavar="SECONDS", help="how long others are waited for (default 60)")
    made.add_argument("--ignore", action="append", default=[], choices=CHECKS, help="faults of a check are warnings")
    # deepspeed passes it on; the environment says the same
    made.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    made.add_argument("--json", action="store_true", help="print findings and versions as JSON")
    return made


def _own(options: argparse.Namespace, local_rank: int | None) -> list[Finding]:
    """What concerns this rank's machine; what all ranks of a host share is looked at by the first of them."""
    found = [*check_versions(versions()), *check_devices(local_rank), *check_compilers(device().type), *check_kernels(device())]
    if not local_rank:
        found += [*check_memory(), *check_shared_memory(), *check_disk(options.folder, options.need * 1e9)]
    for peer in options.peer:
        address, _, port = peer.partition(":")
        if port and not (port.isdecimal() and 0 < int(port) < 65536):
            raise UserError(f"--peer {peer}: {port!r} is no port; give HOST or HOST:PORT, up to 65535")
        found += check_peer(address, int(port or 22), options.timeout)
    return found


def _tell(
    findings: Sequence[Finding], hosts: list[str], facts: list[dict[str, str]], options: argparse.Namespace, alone: int | None = None
) -> int:
    findings = [one._replace(verdict="warning") if one.verdict == "fault" and one.check in options.ignore else one for one in findings]
    order = {name: place for place, name in enumerate(CHECKS)}
    findings = sorted(findings, key=lambda finding: order[finding.check])
    code = int(any(finding.verdict == "fault" for finding in findings))
    if options.json:
        told = {"hosts": hosts, "versions": facts, "findings": [finding._asdict() for finding in findings], "exit": code}
        print(json.dumps(told, indent=2), flush=True)
        return code
    where = f"{len(hosts)} ranks on {', '.join(dict.fromkeys(hosts))}" if len(hosts) > 1 else f"one process on {hosts[0]}"
    print(page(findings, where if alone is None else f"{hosts[0]}, rank {alone} by itself"), flush=True)
    return code


def _port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port; they go from 1 to 65535")
    return int(text)
