"""The learning rate as a function of the step alone."""

import math

from wtn_pretrain.training.config import ScheduleSection


def scale(section: ScheduleSection, step: int, steps: int) -> float:
    """Share of the top learning rate that the update number `step` (from 0) of `steps` uses."""
    warmup = section.warmup * steps if section.warmup < 1 else section.warmup
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, steps - warmup)
    if section.name == "constant":
        return 1.0
    if section.name == "steps":
        return max(section.final, section.gamma ** sum(step >= share * steps for share in section.milestones))
    shape = {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "polynomial": (1 - done) ** section.power,
    }[section.name]
    return section.final + (1 - section.final) * shape
