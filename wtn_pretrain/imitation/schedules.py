"""The schedules of imitation, each a list of phases that one engine runs."""

from dataclasses import dataclass, field

from wtn_pretrain.imitation.config import ImitateSection

SLOW = 0.1
"""Rate of the blocks below under `below: slow`, as MobileBERT's earlier layers keep learning at a tenth."""


@dataclass(frozen=True)
class Phase:
    """A run of steps in which the same units learn in the same way."""

    name: str
    steps: int
    losses: tuple[int, ...]
    """Units whose loss counts; unit 0 is the stem."""
    rates: dict[int, float] = field(default_factory=dict)
    """Unit -> share of the learning rate; units not named do not learn."""
    fed: str = "student"
    """Whose activations enter the units: `teacher` or `student`."""
    local: bool = True
    """Gradients stay inside a unit; else they run down through all units below."""
    cached: bool = False
    """Inputs come from stored activations instead of a pass from the bottom."""


def phases(section: ImitateSection, units: int, learns_stem: bool) -> list[Phase]:
    """The phases of a schedule for `units` units above the stem; the stem (unit 0) takes part unless it is already equal."""
    first = 0 if learns_stem else 1
    everyone = tuple(range(first, units + 1))
    all_rates = dict.fromkeys(everyone, 1.0)
    if section.schedule == "parallel":
        fed = "student" if section.feed == "student" else "teacher"
        return [Phase(f"{fed}-fed", section.steps, everyone, all_rates, fed)]
    if section.schedule == "hybrid":
        warm = round(section.steps * section.teacher_fed_share)
        plan = [
            Phase("teacher-fed", warm, everyone, all_rates, "teacher"),
            Phase("student-fed", section.steps - warm, everyone, all_rates, "student"),
        ]
        return [phase for phase in plan if phase.steps]
    if section.schedule == "joint":
        return [Phase("joint", section.steps, everyone, all_rates, local=False)]
    fed = "teacher" if section.feed == "teacher" else "student"
    plan = []
    for unit in everyone:
        name = "stem" if unit == 0 else f"unit {unit}"
        below = {lower: SLOW if section.below == "slow" else 1.0 for lower in everyone if lower < unit}
        if section.below == "frozen":
            plan.append(Phase(name, section.steps, (unit,), {unit: 1.0}, fed, cached=True))
        elif section.below == "slow":
            plan.append(Phase(name, section.steps, (*below, unit), {**below, unit: 1.0}))
        else:
            plan.append(Phase(name, section.steps, (unit,), {**below, unit: 1.0}, local=False))
    return plan
