"""Mixtures: sources take turns by weight, a pure function of the place, and are measured each and together."""

import json
import math
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LINES, ROOT, read_metrics, write_split
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt import UserError, load_recipe, train
from cleangpt.data.loader import Loader, Share
from cleangpt.data.mixture import Mixture, Turns
from cleangpt.data.packing import TextSplit
from cleangpt.data.splits import IGNORED
from cleangpt.plan import make_plan
from cleangpt.recipe.schedules import source_shares
from cleangpt.training.checkpoint import list_checkpoints
from cleangpt.training.setup import build_run, find_run, load_data


def shares_of(weights: list[int], steps: int) -> np.ndarray:
    return np.tile(np.array(weights) / sum(weights), (steps, 1))


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=1, max_size=5), sizes=st.lists(st.integers(0, 30), min_size=1))
def test_sources_take_the_places_that_earlier_ones_leave(weights, sizes):
    """Any steps give the same order, in which a source takes a place once half of its next row is due."""
    ends = np.cumsum([0, *sizes])
    turns = Turns(shares_of(weights, len(sizes)), ends)
    places, expected = [*range(sum(sizes))], {}
    for source, weight in enumerate(weights):
        share = Fraction(weight, sum(weights[source:]))
        due = [math.floor(share * count + Fraction(1, 2)) for count in range(len(places) + 1)]
        mine = [place for i, place in enumerate(places) if due[i + 1] > due[i]]
        expected |= {place: (source, row) for row, place in enumerate(mine)}
        places = [place for place in places if place not in expected]
    parts = [turns.between(*ends[i : i + 2]) for i in range(len(sizes))]
    drawn = [pair for sources, rows in parts for pair in zip(sources.tolist(), rows.tolist(), strict=True)]
    assert drawn == [expected[place] for place in range(sum(sizes))]


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=5),
    steps=st.integers(1, 60),
    batch_size=st.integers(1, 100),
)
def test_shares_follow_weights_that_change(weights, steps, batch_size):
    """Never is a source more than its two rows from the sum of its shares; every row comes once and in order."""
    begin, end = np.array(weights).T
    progress = np.arange(1, steps + 1)[:, None] / steps
    changing = begin + (end - begin) * progress + 1e-3
    shares = changing / changing.sum(axis=1, keepdims=True)
    ends = np.arange(steps + 1) * batch_size
    turns = Turns(shares, ends)
    due = np.cumsum(shares * batch_size, axis=0)
    for step in range(1, steps + 1):
        drawn = turns.drawn(int(ends[step]))
        assert drawn.sum() == ends[step]
        assert abs(drawn - due[step - 1]).max() < 2
    sources, rows = turns.between(0, int(ends[-1]))
    for source in range(len(weights)):
        assert rows[sources == source].tolist() == list(range((sources == source).sum()))


def test_shares_over_any_thousand_places_are_the_weights():
    weights = [61, 23, 10, 5, 1]
    sources, _ = Turns(shares_of(weights, 1), np.array([0, 20_000])).between(0, 20_000)
    for start in range(0, 19_000, 7):
        counts = np.bincount(sources[start : start + 1000], minlength=5)
        assert abs(counts / 1000 - np.array(weights) / 100).max() < 0.01


def mixture_of(folder: Path, lengths: list[int], packing: str = "blocks") -> Mixture:
    """A mixture of streams that count up from 0, 1,000, 2,000, ..."""
    sources = {}
    for i, length in enumerate(lengths):
        write_split(folder / str(i), "train", np.split(np.arange(length, dtype=np.uint16) + 1000 * i, [5]))
        sources[str(i)] = TextSplit(folder / str(i), "train", 4, packing, i)
    return Mixture(sources)


def test_rows_of_a_mixture_are_those_of_its_sources(tmp_path):
    mixture = mixture_of(tmp_path, [30, 9, 60])
    assert len(mixture) == mixture.num_sequences == 8 + 2 + 15
    rows = np.array([24, 0, 9, 8, 25 + 9])
    ids = mixture[rows]["input_ids"]
    assert ids[:4, 0].tolist() == [2056, 0, 1004, 1000]
    assert np.array_equal(ids[4], mixture.sources["1"][np.array([3])]["input_ids"][0])  # its second epoch
    assert mixture.count_targets(rows) == (mixture[rows]["targets"] != IGNORED).sum()
    for source in range(3):
        numbers = np.arange(40)
        _, back = mixture._locate(mixture.number(source, numbers))
        assert back.tolist() == numbers.tolist()


@pytest.mark.parametrize("packing", ["windows", "blocks", "documents"])
def test_a_loader_draws_each_source_in_its_own_endless_order(tmp_path, packing):
    mixture, sizes = mixture_of(tmp_path, [30, 14, 60], packing), np.full(12, 10)
    options = {"split": mixture, "batch_sizes": sizes, "seed": 3, "shares": shares_of([5, 3, 2], 12)}
    loader = Loader(**options, share=Share(device=torch.device("cpu")))
    drawn = np.concatenate([loader.indices(step) for step in range(1, 13)])
    source, rows = mixture._locate(drawn)
    assert np.bincount(source).tolist() == [60, 36, 24]
    for number, split in enumerate(mixture.sources.values()):
        alone = Loader(split, [100], 3 + number, Share(device=torch.device("cpu")))
        mine = rows[source == number]
        assert mine.tolist() == alone.indices(1)[: len(mine)].tolist()
    for step in (1, 12):  # and two processes share what one has
        whole = loader.batch(step).micro_batches[0]["input_ids"].tolist()
        halves = [
            Loader(**options, share=Share(device=torch.device("cpu"), process=i, num_processes=2)) for i in (0, 1)
        ]
        assert [row for half in halves for row in half.batch(step).micro_batches[0]["input_ids"].tolist()] == whole
    coverage = loader.coverage(12)
    assert coverage["data/coverage/0"] == 1.0
    assert coverage["data/coverage/2"] == min(1, 24 / len(mixture.sources["2"]))
    seen = len({(s, r % len(mixture.sources[str(s)])) for s, r in zip(source, rows, strict=True)})
    assert coverage["data/coverage"] == seen / len(mixture)
    assert coverage["data/visits"] == 120 / len(mixture)


@pytest.fixture
def sources(tmp_path) -> list[dict]:
    """A text file and a table."""
    (tmp_path / "plain.txt").write_text("".join(f"{LINES[i % 4]} {i}\n" for i in range(60)))
    rows = [{"story": f"{LINES[i % 4]} {i} again"} for i in range(80)]
    (tmp_path / "tales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        {"path": "text", "data_files": str(tmp_path / "plain.txt"), "weight": 3},
        {"path": "json", "data_files": str(tmp_path / "tales.jsonl"), "text_column": "story", "label": "stories"},
    ]


@pytest.fixture
def mixed(write_recipe, sources) -> Path:
    return write_recipe(
        data={"sources": sources, "block_size": 16, "packing": "documents"},
        tokenizer={"train": {"kind": "bpe", "vocab_size": 300}},
        model={"model_type": "nanogpt", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1},
        training={"max_steps": 6, "batch_size": 8, "macro_batch": 3},
        evaluation={"max_batches": 2, "batch_size": 4},
        tracking={"log_every": 1},
    )


def test_each_source_is_measured_beside_the_whole(mixed, capsys):
    final = train(load_recipe(mixed))
    assert "data: plain, stories, " in capsys.readouterr().out
    lines = [line for line in read_metrics(final.parent) if "eval/loss" in line]
    for line in lines:
        assert {"eval/loss/plain", "eval/loss/stories", "data/coverage/plain", "data/coverage/stories"} <= line.keys()
    last = lines[-1]
    assert min(last["eval/loss/plain"], last["eval/loss/stories"]) < last["eval/loss"]
    assert max(last["eval/loss/plain"], last["eval/loss/stories"]) > last["eval/loss"]
    assert "stories" in (final / "README.md").read_text()


def test_a_killed_run_goes_on_to_the_same_bytes(mixed):
    options = ["--training.max_steps=60", "--training.macro_batch=5"]
    hurt, whole = (load_recipe(mixed, [*options, f"--run.name={name}"]) for name in ("hurt", "whole"))
    command = [sys.executable, "train.py", str(mixed), *options, "--run.name=hurt"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list_checkpoints(hurt.folder):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (hurt.folder / "final").exists()
    train(whole)
    train(hurt)
    for file in ("final/model.safetensors", "checkpoints/step-00000060/optimizer.safetensors"):
        assert (hurt.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file


def test_two_builders_of_one_mixture_build_it_once(mixed, tmp_path):
    command = [sys.executable, "scripts/prepare_data.py", str(mixed)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "text": True}
    said = [process.communicate()[0] for process in [subprocess.Popen(command, **options) for _ in range(2)]]
    opened = [[line for line in text.splitlines() if "load_from_disk" in line] for text in said]
    assert opened[0] == opened[1] and len(opened[0]) == 2
    left = [path for path in (tmp_path / "cache" / "cleangpt").iterdir() if path.is_dir()]
    assert len(left) == 3  # two sources and their tokenizer


def test_a_branch_enters_the_order_where_the_run_was(mixed):
    recipe = load_recipe(mixed, ["--checkpoint.keep_last=9"])
    train(recipe)
    first = list_checkpoints(recipe.folder)[0]
    expected = build_run(*find_run(load_recipe(mixed, ["--run.name=whole"]))).loader.indices(4)
    for batch_size in (8, 4):
        options = [f"--training.resume={first}", f"--run.name=of-{batch_size}", f"--training.batch_size={batch_size}"]
        run = build_run(*find_run(load_recipe(mixed, options)))
        assert run.loader.indices(4)[:4].tolist() == expected[:4].tolist()


def test_a_plan_says_how_often_each_source_is_read(mixed):
    recipe = load_recipe(mixed, ["--training.max_steps=100"])
    plan, train = make_plan(recipe), load_data(recipe)[1].splits["train"]
    expected = {
        "plain": 600 / train.sources["plain"].num_sequences,
        "stories": 200 / train.sources["stories"].num_sequences,
    }
    assert plan.source_epochs == pytest.approx(expected)


def test_weights_can_follow_a_schedule(mixed, sources):
    sources[0]["weight"] = {"begin": 3, "end": 1}
    recipe = load_recipe(mixed, [f"--data.sources={json.dumps(sources)}", "--training.max_steps=4"])
    shares = source_shares(recipe)
    assert shares[:, 0].tolist() == pytest.approx([2.5 / 3.5, 2 / 3, 1.5 / 2.5, 1 / 2])
    assert (shares.sum(axis=1) == 1).all()


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_one_tokenizer_knows_all_sources(mixed, sources, tmp_path, kind):
    (tmp_path / "plain.txt").write_text("zq " * 2000)
    (tmp_path / "tales.jsonl").write_text(f'{{"story": "{"wx " * 2000}"}}\n' * 40)
    vocab_size = "258" if kind == "bpe" else "null"
    tokens = {}
    for weight in (0.001, 1000):
        sources[0]["weight"] = weight
        options = [
            f"--data.sources={json.dumps(sources)}",
            f"--tokenizer.train={{kind: {kind}, vocab_size: {vocab_size}}}",
        ]
        data = load_data(load_recipe(mixed, options))[1]
        tokens[weight] = set(data.tokenizer.get_vocab())
    assert {*"zqwx"} <= tokens[0.001] & tokens[1000]
    if kind == "bpe":  # its one merge is of the text that weighs more
        merged = [next(token for token in tokens[weight] if len(token) == 2) for weight in (0.001, 1000)]
        assert set(merged[0]) & {*"wx"} and set(merged[1]) & {*"zq"}


def test_what_is_built_is_found_again(mixed, sources):
    first = load_data(load_recipe(mixed))[1]
    again = load_data(load_recipe(mixed))[1]
    assert first.fingerprint == again.fingerprint and first.folders == again.folders
    turned = load_data(load_recipe(mixed, [f"--data.sources={json.dumps(sources[:1])}"]))[1]
    assert turned.fingerprint != first.fingerprint


def problems_of(recipe: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(UserError) as error:
        load_data(load_recipe(recipe, overrides))
    return dict(error.value.problems)


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"weight": 0}, "data.sources.1.weight", "expected a number above 0"),
        ({"weight": -1}, "data.sources.1.weight", "expected a number above 0"),
        ({"weight": {"begin": 0, "end": 0}}, "data.sources.1.weight", "expected a weight above 0"),
        ({"weight": {"begin": -1}}, "data.sources.1.weight", "expected a number above 0"),
        ({"wieght": 1}, "data.sources.1.wieght", "did you mean weight?"),
        ({"label": "plain"}, "data.sources.1.label", "expected another label, got 'plain' again"),
        ({"text_column": "text"}, "data.sources.1.text_column", "expected one of story, got 'text'"),
        ({"data_files": "missing.jsonl"}, "data.sources.1.data_files", "expected an existing file"),
        ({"path": "addition", "data_files": None}, "data.sources.1.path", "expected text"),
        ({"path": None}, "data.sources.1.path", "missing"),
        ({"split": {"train": 2}}, "data.sources.1.split", "at most 1"),
    ],
)
def test_a_mistake_in_a_source_is_reported_under_its_key(mixed, sources, change, key, expected):
    sources[1].update(change)
    found = problems_of(mixed, f"--data.sources={json.dumps(sources)}")
    assert list(found) == [key]
    assert expected in found[key]


def test_an_empty_source_is_refused(mixed, sources, tmp_path):
    (tmp_path / "tales.jsonl").write_text('{"story": ""}\n' * 20)
    assert "no text" in problems_of(mixed, f"--data.sources={json.dumps(sources)}")["data.sources.1.data_files"]


def test_a_text_beside_sources_is_refused(mixed):
    assert set(problems_of(mixed, "--data.path=text", "--data.split={train: 0.5}")) == {"data.path", "data.split"}
