"""Draw the report of a run again: `python -m utils.report runs/yolact_base`."""

from __future__ import annotations

import os
import sys
from typing import List

from utils.cli import ArgumentParser, run_main
from utils.errors import UserError
from utils.report.build import build_report
from utils.run_folder import REPORT, open_run_folder


def main(argv: List[str]) -> int:
    """Command line entry."""
    parser = ArgumentParser(prog="python -m utils.report", description=(
        "Draw the plots and the report of run folders from the files in them."))
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="for example runs/yolact_base")
    args = parser.parse_args(argv)
    for path in args.folders:
        folder = open_run_folder(path.rstrip(os.sep))
        if folder is None:
            raise UserError(f"'{path}' is no run folder (it has no config.json that train.py or "
                            "eval.py wrote); give one such as runs/yolact_base")
        missing = build_report(folder)
        print("\n".join(([missing] if missing else []) + [folder.file(REPORT)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main, sys.argv[1:]))
