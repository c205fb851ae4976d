"""The command line that all entry scripts share: `--config FILE`, `--section.key=value`, one line for a mistake."""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wtn_pretrain.again import AGAIN, mark, unmark
from wtn_pretrain.config import describe
from wtn_pretrain.errors import Preempted, UserError

if TYPE_CHECKING:
    from wtn_pretrain.stages import Stages

USAGE_ERROR = 2


def split_arguments(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The configuration's path and the `section.key=value` assignments; both `--key value` and `--key=value` are taken."""
    config: str | None = None
    assignments: list[str] = []
    waiting = list(argv)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--"):
            raise UserError(f"argument {argument!r}: expected --config FILE or --section.key=value")
        name, equals, value = argument[2:].partition("=")
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                raise UserError(f"argument --{name}: has no value")
            value = waiting.pop(0)
        if name == "config":
            config = value
        elif name in ("local_rank", "local-rank"):
            continue  # launchers pass it; the environment says the same
        elif name == "teacher":
            # a path, whatever it would mean in YAML
            assignments.append(f"wide.teacher={json.dumps(value)}")
        elif "." in name:
            assignments.append(f"{name}={value}")
        else:
            raise UserError(f"argument --{name}: unknown; there are --config, --teacher, --dry-run, --help and --section.key=value")
    return config, assignments


def main(work: Callable[["Stages"], object], purpose: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Reads the recipe, starts the ranks, does `work` and exits: 0, or 2 with one line on standard error for a user's mistake."""
    argv = sys.argv[1:] if argv is None else argv
    code = 0
    folder: Path | None = None
    # a job may be told to end while its ranks still import: kept for the notice
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        if any(argument in ("-h", "--help") for argument in argv):
            print(_help(purpose))
            sys.exit(0)
        from wtn_pretrain.parallel.launchers import find_start

        # first of all, so that of many ranks one alone says what is wrong
        start = find_start()
        dry_run = "--dry-run" in argv
        config, assignments = split_arguments([argument for argument in argv if argument != "--dry-run"])
        if config is None:
            raise UserError("argument --config: missing; give a recipe such as configs/quickstart/resnet.yaml, or --help for every key")
        if dry_run:
            from wtn_pretrain.planning.command import dry_run as shown

            if start.rank == 0:
                print(shown(config, assignments, start.world_size))
            sys.exit(0)
        from wtn_pretrain.recipe import load_recipe

        recipe = load_recipe(config, assignments)
        from wtn_pretrain.parallel.launch import describe_ranks, start_ranks
        from wtn_pretrain.parallel.preemption import Notice
        from wtn_pretrain.stages import Stages

        with contextlib.closing(Notice(60 * recipe.run.time_limit)) as notice:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            place = start_ranks(start)
            if place.rank == 0:
                print(describe_ranks(), flush=True)
            stages = Stages(recipe, place, notice)
            folder = stages.folder.path
            if place.rank == 0:
                unmark(folder)
            work(stages)
    except UserError as error:
        from wtn_pretrain.parallel.launch import first_to_fail

        # most mistakes are met by every rank, and some by one alone: the first says it
        if first_to_fail():
            print(f"error: {error}", file=sys.stderr)
        code = USAGE_ERROR
    except Preempted as reason:
        from wtn_pretrain.parallel.launch import after_the_first

        if os.environ.get("RANK", "0") == "0":
            print(f"{reason}; the same command continues", file=sys.stderr)
            if folder is not None:
                mark(folder, str(reason))
        # some launchers end the others as soon as one has left
        after_the_first()
        code = AGAIN
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the newest checkpoint", file=sys.stderr)
        code = 130
    except Exception:
        from wtn_pretrain.parallel.launch import another_failed

        # who waits for a rank that has given up sees a broken connection
        if not another_failed():
            raise
        code = USAGE_ERROR
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    from wtn_pretrain.parallel.launch import stop_ranks

    stop_ranks()
    sys.exit(code)


def _help(purpose: str) -> str:
    from wtn_pretrain.models.base import preset_names
    from wtn_pretrain.recipe import Recipe

    return (
        f"{purpose.strip()}\n\nusage: SCRIPT --config FILE [--teacher PATH] [--dry-run] [--section.key=value ...]\n\n"
        "--teacher takes a wide network from elsewhere in the place of stage 1 (wide.teacher)\n"
        "--dry-run shows the plan of stage 2 on these ranks and starts nothing\n\n"
        f"model.preset may name a shape, and keys beside it override: {', '.join(preset_names())}\n\nkeys [default]:\n{describe(Recipe)}"
    )
