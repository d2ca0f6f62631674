"""Measures our code beside its peers: alternating in one run, medians, and what the machine itself can do.

    python scripts/benchmark.py train --shape baby --nanogpt NANOGPT     # a step of training
    python scripts/benchmark.py loss-race --nanogpt NANOGPT              # to the same loss
    python scripts/benchmark.py generate --nanogpt NANOGPT               # writing text
    python scripts/benchmark.py data --text TEXT                         # building, loading, memory
    python scripts/benchmark.py startup                                  # importing, first step
    python scripts/benchmark.py growth                                   # cost against size, a picture
    python scripts/benchmark.py checkpoint                               # what a checkpoint costs training
    python scripts/benchmark.py grade --model outputs/adder/final        # grading arithmetic
    python scripts/benchmark.py records                                  # a picture of the records

NANOGPT is a clone of nanoGPT. docs/performance.md has figures.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks import checkpoint, data, generate, grade, growth, loss_race, records, startup, train

WHAT = {
    "train": train,
    "loss-race": loss_race,
    "generate": generate,
    "data": data,
    "startup": startup,
    "growth": growth,
    "checkpoint": checkpoint,
    "grade": grade,
    "records": records,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    subparsers = parser.add_subparsers(dest="what", required=True)
    for name, module in WHAT.items():
        sub = subparsers.add_parser(name, help=module.__doc__.split("\n")[0])
        module.add_arguments(sub)
        sub.add_argument("--rounds", type=int, default=7, help="runs of each side, in turn [7]")
        sub.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = {}
        for title, sides in WHAT[arguments.what].measure(arguments, Path(folder)):
            figures[title] = sides
            report(title, sides)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0


def report(title: str, sides: dict[str, list[float]]) -> None:
    """A table: median, spread, and the median of the ratios of each round to the first side's."""
    first = next(iter(sides.values()))
    print(f"{title:44}  {'median':>9}  {'min':>9}  {'max':>9}  {'ratio':>6}")
    for name, values in sides.items():
        ratio = statistics.median(value / base for value, base in zip(values, first, strict=True))
        print(f"  {name:42}  {statistics.median(values):9.3f}  {min(values):9.3f}  {max(values):9.3f}  {ratio:6.3f}")
    print(flush=True)


if __name__ == "__main__":
    sys.exit(main())
