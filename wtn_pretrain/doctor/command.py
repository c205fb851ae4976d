"""The work of tools/doctor.py."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from wtn_pretrain.device import device
from wtn_pretrain.doctor.compilers import check_compilers
from wtn_pretrain.doctor.disk import check_disk, check_shared_memory
from wtn_pretrain.doctor.finding import Finding, merged, page
from wtn_pretrain.doctor.kernels import check_kernels
from wtn_pretrain.doctor.machine import check_devices, check_memory
from wtn_pretrain.doctor.network import check_clocks, check_links, check_peer, check_port, join, leave
from wtn_pretrain.doctor.software import check_versions, compare_versions, versions
from wtn_pretrain.errors import UserError

CHECKS = ("versions", "devices", "memory", "compilers", "kernels", "disk", "network", "links", "clocks")


def run(doc: str, argv: Sequence[str]) -> int:
    """Looks at everything, prints the page on rank 0; the exit status: 0, or 1 where a fault was found."""
    options = _parser(doc).parse_args(argv)
    alone = not _placed()
    own = _own(options)
    hosts, facts = [socket.gethostname()], [versions()]
    if alone:
        own += check_port(options.port)
        return _tell(own, hosts, facts, options)
    met = join(options.timeout)
    if met[0].verdict == "fault":
        # nobody else may hear of it
        return _tell([*own, *met], hosts, facts, options, alone=True)
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (own, hosts[0], facts[0]))
    hosts, facts = [theirs[1] for theirs in everything], [theirs[2] for theirs in everything]
    findings = [*merged([theirs[0] for theirs in everything]), *compare_versions(facts, hosts), *met]
    clocks = check_clocks(hosts) if len(hosts) > 1 else []
    links = check_links(hosts) if len(hosts) > 1 else []
    rank = dist.get_rank()
    verdict: list[Any] = [_tell([*findings, *links, *clocks], hosts, facts, options) if rank == 0 else 0]
    dist.broadcast_object_list(verdict, 0)
    leave()
    return int(verdict[0])


def _parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.add_argument("--folder", type=Path, default=Path("runs"), help="folder of runs, whose disk is tried (default runs)")
    made.add_argument("--need", type=_positive, default=1.0, metavar="GB", help="space that must be free there (default 1)")
    made.add_argument("--port", type=int, default=29500, help="without a launcher: the port that ranks would meet at (default 29500)")
    made.add_argument(
        "--peer", action="append", default=[], metavar="HOST[:PORT]", help="an address that must answer (port 22 unless given)"
    )
    made.add_argument("--timeout", type=_positive, default=60.0, metavar="SECONDS", help="how long others are waited for (default 60)")
    made.add_argument("--ignore", action="append", default=[], choices=CHECKS, help="faults of a check are warnings")
    made.add_argument("--json", action="store_true", help="print findings and versions as JSON")
    return made


def _own(options: argparse.Namespace) -> list[Finding]:
    """What concerns this rank's machine."""
    found = [
        *check_versions(versions()),
        *check_devices(),
        *check_memory(),
        *check_shared_memory(),
        *check_compilers(device().type),
        *check_kernels(device()),
        *check_disk(options.folder, options.need * 1e9),
    ]
    for peer in options.peer:
        address, _, port = peer.partition(":")
        if port and not port.isdecimal():
            raise UserError(f"--peer {peer}: {port!r} is no port; give HOST or HOST:PORT")
        found += check_peer(address, int(port or 22), options.timeout)
    return found


def _tell(
    findings: Sequence[Finding], hosts: list[str], facts: list[dict[str, str]], options: argparse.Namespace, alone: bool = False
) -> int:
    findings = [one._replace(verdict="warning") if one.verdict == "fault" and one.check in options.ignore else one for one in findings]
    order = {name: place for place, name in enumerate(CHECKS)}
    findings = sorted(findings, key=lambda finding: order[finding.check])
    code = int(any(finding.verdict == "fault" for finding in findings))
    if options.json:
        told = {"hosts": hosts, "versions": facts, "findings": [finding._asdict() for finding in findings], "exit": code}
        print(json.dumps(told, indent=2), flush=True)
        return code
    where = f"{hosts[0]}, rank {os.environ['RANK']} by itself" if alone else f"{len(hosts)} ranks on {', '.join(dict.fromkeys(hosts))}"
    print(page(findings, where if alone or len(hosts) > 1 else f"one process on {hosts[0]}"), flush=True)
    return code


def _placed() -> bool:
    """Whether this process is one of several ranks; what srun says is put where torch looks for it."""
    env = os.environ
    if "RANK" not in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_NTASKS"], LOCAL_RANK=env.get("SLURM_LOCALID", "0"))
        env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]))
        env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 10_000))
    return "RANK" in env and int(env.get("WORLD_SIZE", "1")) > 1


def _first_host(nodes: str) -> str:
    """The first of a list as Slurm writes it: node[01-04,7],other."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def main(doc: str) -> int:
    """`run` on the command line."""
    try:
        return run(doc, sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
