"""Draws the records of docs/results.md: what is left of nanoGPT's time."""

import argparse
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
# | date | commit | what changed | our seconds | nanoGPT's in the same run | ratio |
ROW = re.compile(r"^\| (\d{4}-\d\d-\d\d) \| [^|]+ \| ([^|]+) \| ([\d.]+ s) \| [\d.]+ s \| ([\d.]+) \|", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--picture", type=Path, default="docs/pictures/records.png", help="[docs/pictures/records.png]")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Each record as a share of nanoGPT's time."""
    records = ROW.findall((ROOT / "docs/results.md").read_text())
    names = [f"{date}  {textwrap.fill(change, 40)}" for date, change, _, _ in records]
    shares = [1 / float(ratio) for *_, ratio in records]
    figure = Figure(figsize=(8, 0.8 + 0.5 * len(records)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(records)), shares)
    axes.bar_label(bars, [f" {seconds}, {ratio} x" for *_, seconds, ratio in records])
    axes.set_yticks(range(len(records)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.3), xlabel="share of nanoGPT's time in the same run")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(arguments.picture, dpi=100)
    yield "share of nanoGPT's time", {name: [share] for name, share in zip(names, shares, strict=True)}
