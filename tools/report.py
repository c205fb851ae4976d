"""Write the report of a run or of a folder of runs, and print the comparison."""

import sys
from pathlib import Path

from wtn_pretrain.arguments import Parser, command
from wtn_pretrain.errors import UserError
from wtn_pretrain.report.html import is_run, write_index, write_report
from wtn_pretrain.report.summary import collect, read_summary, write_summaries, write_summary
from wtn_pretrain.report.table import table


def main() -> str:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a run, or a folder of runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    options = parser.parse_args()
    try:
        folder: Path = options.folder
        if is_run(folder):
            page = write_report(folder)
            summaries = [read_summary(folder / "summary.json")] if (folder / "summary.json").exists() else []
            for summary in summaries if options.json else ():
                write_summary(options.json, summary)
        else:
            page = write_index(folder)
            found = collect(folder)
            for path in filter(None, (folder / "summary.json", options.json)):
                write_summaries(path, found)
            summaries = list(found.values())
    except OSError as error:
        raise UserError(f"report: {error}") from None
    return f"{table(summaries) if summaries else 'no summary.json yet: the run has not finished'}\n\n{page}"


if __name__ == "__main__":
    sys.exit(command(main))
