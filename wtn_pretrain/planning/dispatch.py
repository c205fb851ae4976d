"""Which planner a stage belongs to."""

import argparse

from wtn_pretrain.planning import command as imitation
from wtn_pretrain.planning.training import command as training


def run(doc: str, argv: list[str]) -> str:
    """What tools/plan.py prints.

    Raises:
        UserError: one line that names the argument or key, what is wrong and the remedy.
    """
    stage = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    stage.add_argument("--stage", default="narrow")
    found, _ = stage.parse_known_args([argument for argument in argv if argument != "--stage"] if argv[-1:] == ["--stage"] else argv)
    # an unknown stage is refused by the parser that lists them
    return (training if found.stage in ("wide", "finetune", "scratch") else imitation).run(doc, argv)
