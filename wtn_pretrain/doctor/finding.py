"""What a check finds."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

Verdict = Literal["ok", "warning", "fault"]
MARKS: dict[Verdict, str] = {"ok": "ok", "warning": "WARNING", "fault": "FAULT"}


FEW = 4


class Finding(NamedTuple):
    """One line of the page."""

    check: str
    """What was looked at: versions, devices, compilers, kernels, disk, memory, network, links, clocks."""
    verdict: Verdict
    text: str
    """What there is, or what is wrong."""
    remedy: str = ""
    """What to do about it."""
    ranks: tuple[int, ...] = ()
    """Where it was found; () for what concerns all of them."""


def merged(found: Sequence[Sequence[Finding]]) -> list[Finding]:
    """The findings of all ranks, in order of the checks, equal ones once."""
    where: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(found):
        for finding in findings:
            where.setdefault(finding._replace(ranks=()), []).append(rank)
    everywhere = list(range(len(found)))
    return [finding._replace(ranks=() if ranks == everywhere else tuple(ranks)) for finding, ranks in where.items()]


def page(findings: Sequence[Finding], heading: str) -> str:
    """All findings, the checks in their order, remedies below what they remedy."""
    lines = [heading, ""]
    names = list(dict.fromkeys(finding.check for finding in findings))
    width = max(map(len, names), default=0)
    for name in names:
        shown, more = _few([one for one in findings if one.check == name])
        for finding in shown:
            lines.append(f"{name.ljust(width)}  {MARKS[finding.verdict].ljust(7)}  {_where(finding)}{finding.text}")
            if finding.remedy:
                lines.append(f"{' ' * width}           -> {finding.remedy}")
        if more:
            lines.append(f"{name.ljust(width)}  {MARKS['ok'].ljust(7)}  and so on {_several(more, 'more rank')}")
    bad = [sum(finding.verdict == verdict for finding in findings) for verdict in ("fault", "warning")]
    return "\n".join([*lines, "", f"{_several(bad[0], 'fault')}, {_several(bad[1], 'warning')}"])


def _few(findings: list[Finding]) -> tuple[list[Finding], int]:
    """All that is wrong, what is well on `FEW` of those ranks that say it in words of their own, and on how many more it is."""
    found: list[Finding] = []
    well = more = 0
    for finding in findings:
        if finding.verdict == "ok" and finding.ranks:
            well += 1
            if well > FEW:
                more += len(finding.ranks)
                continue
        found.append(finding)
    return found, more


def _where(finding: Finding) -> str:
    if not finding.ranks:
        return ""
    shown = ", ".join(map(str, finding.ranks[:8])) + (" ..." if len(finding.ranks) > 8 else "")
    return f"rank{'s' if len(finding.ranks) > 1 else ''} {shown}: "


def _several(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"
