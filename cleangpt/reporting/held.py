"""What `metrics.jsonl` and the trackers hold of a run that was killed, so that nothing is told twice or left out."""

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Holds = Callable[[int, str], bool]  # whether a line of this step with a metric of this name is there


def in_lines(lines: Iterable[Mapping[str, Any]]) -> Holds:
    """What `lines` hold, each with its `step`."""
    held = {(line["step"], name) for line in lines for name in line}
    return lambda step, name: (step, name) in held


def in_wandb(run: Any, folder: Path) -> Holds:
    """What a wandb run holds: offline what its files in `folder` say, online all up to the server's latest step."""
    if run.offline:
        return in_lines(line for file in folder.glob(f"*run-*/run-{run.id}.wandb") for line in _wandb_lines(file))
    last = run.summary.get("step", -1)  # the server gets lines in order; of this step, surely the first
    return lambda step, name: step < last or (step == last and name == "train/loss")


def in_trackio(run: Any) -> Holds | None:
    """What trackio's database on this machine holds of a run; None if its data go to another machine."""
    from trackio import context_vars
    from trackio.sqlite_storage import SQLiteStorage

    if context_vars.current_server.get() is not None:
        return None
    return in_lines(SQLiteStorage.get_logs(run.project, run.name, run_id=run.id))


def in_tensorboard(folder: Path, lines: Iterable[Mapping[str, Any]]) -> Holds:
    """What tensorboard's event files in `folder` hold, if any: all `lines`, as each is flushed to the disk."""
    return in_lines(lines if any(folder.glob("events.*")) else ())


def _wandb_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Step and names of each line in a file of wandb, which a kill may have cut anywhere.

    The format is that of LevelDB's log after a header of 7 bytes: blocks of 32 KB, with records cut at their ends.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # made at import

    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)  # kind: 1 whole, 2 first, 3 middle, 4 last
        parts, place = parts + content[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4) and place <= len(content):
            record, parts = Record.FromString(parts), b""
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "step" in items:
                yield {**items, "step": int(items["step"])}
