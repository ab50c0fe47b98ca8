"""Time the package against its peers.

    python -m benchmarks                         all (about 17 minutes): results.json, results.md, results.png
    python -m benchmarks --only rotation peers   some sections, printed; --out FILE also writes their JSON
    python -m benchmarks --quick                 tiny shapes, to see that everything works; the numbers mean nothing
    python -m benchmarks --report                rebuild results.md and results.png from results.json

Let nothing else run meanwhile: the load before and after is written down.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # peers are built without weights; nothing is looked up


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns the exit code."""
    from benchmarks import report
    from benchmarks.run import FOLDER, SECTIONS, rounded, run, write

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time the package against its peers.")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION", help=f"some of: {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: a check, not a measurement")
    parser.add_argument("--out", type=Path, help="write the JSON here instead of benchmarks/results.json")
    parser.add_argument("--report", action="store_true", help="only rebuild the table and the figure")
    options = parser.parse_args(arguments)
    if options.report:
        report.write(json.loads((FOLDER / "results.json").read_text(encoding="utf-8")), FOLDER)
        return 0
    try:
        results = rounded(run(options.only, options.quick))
    except ValueError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    official = not options.only and not options.quick
    if options.out or official:
        write(results, options.out or FOLDER / "results.json")
    if official and not options.out:
        report.write(results, FOLDER)
    return 0


if __name__ == "__main__":
    sys.exit(main())
