"""Which planner a stage belongs to."""

from collections.abc import Sequence

from wtn_pretrain.planning import command as imitation
from wtn_pretrain.planning.training import command as training


def run(doc: str, argv: list[str]) -> str:
    """What tools/plan.py prints.

    Raises:
        UserError: one line that names the argument or key, what is wrong and the remedy.
    """
    # an unknown stage is refused by the parser that lists them
    return (training if _stage(argv) in ("wide", "finetune", "scratch") else imitation).run(doc, argv)


def _stage(argv: Sequence[str]) -> str:
    for place, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name == "--stage":
            return value or "".join(argv[place + 1 : place + 2])
    return "narrow"
