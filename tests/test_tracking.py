"""Trackers get what `metrics.jsonl` gets, over the run's own step; a Hub out of reach changes nothing."""

import json
import os
import signal
import struct
import time
from pathlib import Path

import faults
import numpy as np
import pytest
import wandb
from conftest import needs, raising, read_metrics
from wandb.proto.wandb_internal_pb2 import Record

from cleangpt import UserError, load_recipe, train
from cleangpt.models.build import load_model
from cleangpt.models.statistics import flops_per_token
from cleangpt.training.setup import load_data

PROMPT = ['--evaluation.prompts=["The "]']


def wandb_records(file: Path) -> list[Record]:
    """The records of an offline run: LevelDB's log format after a header of 7 bytes, blocks of 32 KB."""
    content, place, parts, records = file.read_bytes(), 7, [], []
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)  # kind: 1 whole, 2 first, 3 middle, 4 last
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4) and place <= len(content):  # of a run that was killed, the last one may be cut
            records.append(Record.FromString(b"".join(parts)))
            parts = []
    return records


def wandb_runs(folder: Path) -> list[list[Record]]:
    """The records of each part of an offline run; wandb's own process writes the last one a moment after the run."""
    for _ in range(100):
        files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda file: file.stat().st_mtime)
        runs = [wandb_records(file) for file in files]
        if runs and any(record.HasField("exit") for record in runs[-1]):
            return runs
        time.sleep(0.1)
    raise AssertionError(f"no finished run in {folder}")


def wandb_lines(folder: Path) -> list[dict]:
    """What was logged to wandb, in order, over all parts of a run."""
    lines = []
    for record in [record for run in wandb_runs(folder) for record in run if record.HasField("history")]:
        items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        lines.append({key: json.loads(value) for key, value in items.items() if not key.startswith("_")})
    return lines


def test_wandb_gets_every_line_without_an_account(tiny_text):
    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[wandb]", *PROMPT]))
    logged = [line for line in wandb_lines(recipe.folder) if "tokens" in line]
    assert logged == read_metrics(recipe.folder)


def test_wandb_gets_recipe_samples_and_picture_over_our_step(tiny_text):
    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[wandb]", *PROMPT]))
    lines = wandb_lines(recipe.folder)
    assert [line["step"] for line in lines if "samples/_type" in line or "samples" in line] == [0, 3, 6]
    assert any("curves" in key for line in lines for key in line)
    (records,) = wandb_runs(recipe.folder)
    (run,) = [record.run for record in records if record.HasField("run")]
    config = {item.key: item.value_json for item in run.config.update}
    for record in records:
        if record.HasField("config"):
            config |= {item.key: item.value_json for item in record.config.update}
    assert config["optimizer.lr"] == "0.001"
    steps = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert steps["*"] == "step"


def test_a_resumed_run_is_the_same_run_to_wandb(tiny_text):
    flat = ["--schedule.lr.style=constant", "--schedule.lr.warmup_ratio=0", "--tracking.trackers=[wandb]"]
    train(load_recipe(tiny_text, flat))
    train(recipe := load_recipe(tiny_text, [*flat, "--training.max_steps=9"]))
    files = list(recipe.folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({file.name for file in files}) == 1
    assert [line["step"] for line in wandb_lines(recipe.folder) if "train/loss" in line] == list(range(1, 10))


def kill_in_step(recipe: str, overrides: list[str], step: int) -> int:
    """`faults.run`, killed in its `step`-th step."""
    os.environ.pop("WANDB_SERVICE", None)  # that of the tests' own process would survive
    import cleangpt.training.loop

    inner, calls = cleangpt.training.loop.accumulate, 0

    def outer(*arguments):
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(*arguments)

    cleangpt.training.loop.accumulate = outer
    return faults.run(recipe, overrides)


def logged_by(tracker: str, folder: Path) -> list[dict]:
    """The lines that a tracker holds of a run."""
    if tracker == "wandb":
        return wandb_lines(folder)
    if tracker == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        return SQLiteStorage.get_logs("cleangpt", folder.name)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "cleangpt"), size_guidance={"scalars": 0})
    events.Reload()
    return [{"step": event.step, key: event.value} for key in events.Tags()["scalars"] for event in events.Scalars(key)]


@pytest.mark.parametrize(
    "tracker",
    [
        "wandb",
        pytest.param("trackio", marks=needs("trackio", extra="trackers")),
        pytest.param("tensorboard", marks=needs("tensorboard", extra="trackers")),
    ],
)
def test_after_kills_each_point_is_there_once(tiny_text, tracker):
    """Killed in step 3, before its first checkpoint, then in steps 26 and 60, between two, and then run to its end."""
    overrides = ["--training.max_steps=61", "--training.macro_batch=20", f"--tracking.trackers=[{tracker}]"]
    overrides.append(f"--run.name=killed-{tracker}")
    for step in (3, 26, 40):
        process = faults.start(kill_in_step, str(tiny_text), overrides, step)
        process.join(300)
        assert process.exitcode == -signal.SIGKILL
        time.sleep(1.1)  # tensorboard orders its files by the second in which they begin
    train(recipe := load_recipe(tiny_text, overrides))
    logged = logged_by(tracker, recipe.folder)
    for key, steps in (("train/loss", range(1, 62)), ("eval/loss", (0, 20, 40, 60, 61))):
        lines = [(line["step"], line[key]) for line in read_metrics(recipe.folder) if key in line]
        assert [step for step, _ in lines] == list(steps)
        assert sorted((line["step"], pytest.approx(line[key])) for line in logged if key in line) == lines


@needs("tensorboard", extra="trackers")
def test_tensorboard_gets_every_metric(tiny_text):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[tensorboard]", *PROMPT]))
    events = EventAccumulator(str(recipe.folder / "cleangpt"))
    events.Reload()
    for key in {key for line in read_metrics(recipe.folder) for key in line}:
        expected = [
            (line["step"], pytest.approx(line[key], rel=1e-6)) for line in read_metrics(recipe.folder) if key in line
        ]
        assert [(event.step, event.value) for event in events.Scalars(key)] == expected, key
    assert events.Tags()["images"] == ["curves"]
    assert "sample/0/text_summary" in events.Tags()["tensors"]


@needs("trackio", extra="trackers")
def test_trackio_gets_every_metric(tiny_text):
    from trackio.sqlite_storage import SQLiteStorage

    train(
        recipe := load_recipe(tiny_text, ["--tracking.trackers=[trackio, wandb]", "--tracking.project=mine", *PROMPT])
    )
    logged = SQLiteStorage.get_logs("mine", "tiny")
    keys = {key for line in read_metrics(recipe.folder) for key in line}
    assert keys - {"step"} <= {key for line in logged for key in line}
    assert [line["step"] for line in logged if "train/loss" in line] == list(range(1, 7))
    assert [line["step"] for line in logged if "samples" in line] == [0, 3, 6]
    assert [line["step"] for line in logged if "curves" in line] == [6]
    assert wandb_lines(recipe.folder)


def test_wandb_gets_group_tags_and_name(tiny_text):
    named = ["--tracking.group=widths", "--tracking.tags=[small, first]", "--tracking.name=narrow"]
    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[wandb]", *named]))
    (records,) = wandb_runs(recipe.folder)
    (run,) = [record.run for record in records if record.HasField("run")]
    assert (run.run_group, list(run.tags), run.display_name) == ("widths", ["small", "first"], "narrow")


def test_histograms_count_every_weight_and_gradient_at_boundaries(tiny_text):
    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[wandb]", "--tracking.histograms=true"]))
    lines = [line for line in wandb_lines(recipe.folder) if "weights/transformer.h.0/bins" in line]
    assert [line["step"] for line in lines] == [3, 6]
    block = load_model(recipe.folder / "final").transformer.h[0]
    count = sum(weight.numel() for weight in block.parameters())
    assert [sum(lines[-1][f"{kind}/transformer.h.0/values"]) for kind in ("weights", "gradients")] == [count, count]
    lowest = min(weight.min().item() for weight in block.parameters())
    assert lines[-1]["weights/transformer.h.0/bins"][0] == pytest.approx(lowest)


def test_histograms_without_a_tracker_are_refused(tiny_text):
    with pytest.raises(UserError, match=r"tracking\.histograms: expected a tracker"):
        load_recipe(tiny_text, ["--tracking.histograms=true"])


def test_wandb_is_offline_where_nobody_is_logged_in(tiny_text, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[wandb]"]))
    assert wandb_lines(recipe.folder)


def test_wandb_is_offline_where_it_cannot_be_reached(tiny_text, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr("wandb.login", raising(wandb.errors.AuthenticationError("no answer")))
    train(recipe := load_recipe(tiny_text, ["--tracking.trackers=[wandb]"]))
    assert wandb_lines(recipe.folder)


def test_a_tracker_that_is_not_installed_is_told(tiny_adder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.trackers: tensorboard is not installed: pip install tensorboard"):
        load_recipe(tiny_adder, ["--tracking.trackers=[tensorboard]"])


def test_a_hub_out_of_reach_does_not_end_a_run(tiny_adder, capsys):
    final = train(recipe := load_recipe(tiny_adder, ["--hub.push=true", "--hub.repo_id=me/tiny"]))
    assert (final / "model.safetensors").exists()
    assert read_metrics(recipe.folder)[-1]["step"] == 4
    assert f"push_to_hub.py {final} me/tiny" in capsys.readouterr().out


def test_mfu_counts_every_token_and_speed_the_targets(tiny_adder, monkeypatch):
    monkeypatch.setattr("cleangpt.reporting.tracking.peak_flops", lambda *_: 1e12)
    recipe = load_recipe(tiny_adder)
    model, (_, data) = load_model(train(recipe)), load_data(recipe)
    split = data.splits["train"]
    per_target = flops_per_token(model) * split.sequence_length / split.count_targets(np.arange(1))
    lines = [line for line in read_metrics(recipe.folder) if "mfu" in line]
    assert lines
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * per_target / 1e12)


def test_the_loss_is_the_mean_since_the_last_line(tiny_text):
    losses = {}
    for every in (1, 3):
        recipe = load_recipe(tiny_text, [f"--tracking.log_every={every}", f"--run.name=every{every}"])
        train(recipe)
        losses[every] = {m["step"]: m["train/loss"] for m in read_metrics(recipe.folder) if "train/loss" in m}
    each = losses[1]
    expected = {1: each[1], 3: (each[2] + each[3]) / 2, 6: (each[4] + each[5] + each[6]) / 3}
    assert losses[3] == pytest.approx(expected, rel=1e-6)
