"""Text is cut exactly, tokenized as in one piece, and packed into rows with every token in its place."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LINES, write_split
from datasets import Dataset, DatasetDict, List, Value, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt import (
    NanoGPTConfig,
    NanoGPTForCausalLM,
    NanoLlamaConfig,
    NanoLlamaForCausalLM,
    UserError,
    load_recipe,
)
from cleangpt.data.packing import TextSplit, document_lengths
from cleangpt.data.prepare import PreparedData, prepare_data
from cleangpt.data.splits import IGNORED, cut_points
from cleangpt.data.stream import summarize
from cleangpt.training.setup import resolve


def prepare(path: Path, *overrides: str) -> PreparedData:
    return resolve(load_recipe(path, overrides))[1]


def tokens_of(data: PreparedData, name: str) -> np.ndarray:
    """All tokens of a split, in order."""
    return np.concatenate([*data.splits[name].stream])


def test_a_text_is_cut_by_characters_and_comes_back(tiny_text, text_file):
    data = prepare(tiny_text)
    text = text_file.read_text()
    cut = int(len(text) * 0.9)
    assert data.tokenizer.decode(tokens_of(data, "train")) == text[:cut]
    assert data.tokenizer.decode(tokens_of(data, "validation")) == text[cut:]
    assert data.splits["train"].num_bytes == len(text[:cut].encode())


def test_long_text_is_tokenized_as_if_in_one_piece(write_recipe, tmp_path):
    text = "".join(f"{LINES[i % 4]} {i}\n" * (1 + i % 3) for i in range(6000))  # several pieces
    (tmp_path / "long.txt").write_text(text)
    recipe = write_recipe(
        data={"path": "text", "data_files": str(tmp_path / "long.txt"), "block_size": 8},
        tokenizer={"train": {"kind": "bpe", "vocab_size": 400}},
        model={"model_type": "nanogpt"},
        training={"max_steps": 1},
    )
    data = prepare(recipe)
    whole = data.tokenizer(text[: int(len(text) * 0.9)], add_special_tokens=False)["input_ids"]
    assert tokens_of(data, "train").tolist() == whole


@pytest.fixture
def stories(write_recipe, stories_file):
    return write_recipe(
        data={"path": "json", "data_files": str(stories_file), "block_size": 16},
        tokenizer={"train": {"kind": "bpe", "vocab_size": 300}},
        model={"model_type": "nanogpt"},
        training={"max_steps": 1},
    )


def test_documents_end_with_the_end_token(stories, stories_file):
    data = prepare(stories)
    texts = [json.loads(line)["text"] for line in stories_file.read_text().splitlines()]
    assert data.tokenizer.decode(tokens_of(data, "train")) == "".join(f"{text}<|endoftext|>" for text in texts[:36])
    assert summarize(data.folder)["train"]["documents"] == 36


def test_a_mapping_of_files_gives_the_splits(stories, stories_file):
    files = f"--data.data_files={{train: {stories_file}, validation: {stories_file}}}"
    counts = summarize(prepare(stories, files).folder)
    assert counts["train"] == counts["validation"]


def test_ids_take_two_bytes(stories):
    assert next(iter(prepare(stories).splits["train"].stream)).dtype == np.uint16


def split_of(
    tokens: list[int], starts: list[int], block_size: int, packing: str, folder: Path, seed: int = 0
) -> TextSplit:
    """A split of the given tokens and documents."""
    write_split(folder, "train", np.split(np.array(tokens, np.uint16), starts[1:]))
    return TextSplit(folder, "train", block_size, packing, seed)


def test_windows_start_anywhere(tmp_path):
    split = split_of(list(range(10)), [0], 4, "windows", tmp_path)
    assert len(split) == 6
    batch = split[np.array([0, 5])]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch["targets"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 60), block_size=st.integers(1, 20))
def test_in_blocks_every_token_but_the_first_is_a_target_once(tmp_path_factory, length, block_size):
    split = split_of(list(range(length)), [0], block_size, "blocks", tmp_path_factory.mktemp("split"))
    batch = split[np.arange(len(split))]
    assert sorted(batch["targets"][batch["targets"] != IGNORED].tolist()) == list(range(1, length))
    known = batch["targets"] != IGNORED
    assert (batch["input_ids"][known] + 1 == batch["targets"][known]).all()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8), block_size=st.integers(1, 12))
def test_packed_documents_restart_and_lose_no_target_but_seams(tmp_path_factory, lengths, block_size):
    document = np.repeat(np.arange(len(lengths)), lengths)
    if max(lengths) < 2:
        return
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    tokens = list(range(len(document)))
    split = split_of(tokens, starts, block_size, "documents", tmp_path_factory.mktemp("split"))
    batch = split[np.arange(len(split))]
    targets = batch["targets"][batch["targets"] != IGNORED]
    assert len(targets) == split.num_targets == split.count_targets(np.arange(len(split)))
    assert sorted(targets.tolist()) == [t for t in tokens[1:] if document[t] == document[t - 1]]
    for row, (inputs, positions) in enumerate(zip(batch["input_ids"], batch["position_ids"], strict=True)):
        real = len(tokens) - 1 - row * block_size  # the rest of the last row is padding
        for place, (token, position) in enumerate(zip(inputs[:real], positions[:real], strict=True)):
            if place and token == inputs[place - 1] + 1 and document[token] == document[token - 1]:
                assert position == positions[place - 1] + 1
            else:
                assert position == 0


def pad(rows: list[list[int]], width: int, filler: int) -> list[list[int]]:
    return [row + [filler] * (width - len(row)) for row in rows]


@settings(max_examples=100, deadline=None)
@given(length=st.integers(2, 40), block_size=st.integers(1, 12), epoch=st.integers(0, 20), seed=st.integers(0, 3))
def test_blocks_of_an_epoch_go_round_from_its_offset(tmp_path_factory, length, block_size, epoch, seed):
    split = split_of(list(range(length)), [0], block_size, "blocks", tmp_path_factory.mktemp("split"), seed)
    numbers = epoch * len(split) + np.arange(len(split))
    batch = split[numbers]
    offset = int(batch["input_ids"][0, 0])
    assert (offset < block_size) and (epoch > 0 or offset == 0)
    pairs = [(token, token + 1) for token in range(length - 1)]  # all there is to learn
    pairs = pairs[offset % len(pairs) :] + pairs[: offset % len(pairs)]
    rows = [pairs[start : start + block_size] for start in range(0, len(pairs), block_size)]
    assert batch["input_ids"].tolist() == pad([[one for one, _ in row] for row in rows], block_size, length - 1)
    assert batch["targets"].tolist() == pad([[other for _, other in row] for row in rows], block_size, IGNORED)
    assert split.count_targets(numbers) == length - 1


@given(block_size=st.integers(1, 30), seed=st.integers(0, 2**63 - 1))
def test_blocks_take_each_offset_once_before_one_comes_again(tmp_path_factory, block_size, seed):
    split = split_of(list(range(100)), [0], block_size, "blocks", tmp_path_factory.mktemp("split"), seed)
    firsts = split[np.arange(2 * block_size) * len(split)]["input_ids"][:, 0].tolist()
    assert sorted(firsts[:block_size]) == list(range(block_size))
    assert firsts[block_size:] == firsts[:block_size] and firsts[0] == 0


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    block_size=st.integers(1, 12),
    epoch=st.integers(0, 20),
    seed=st.integers(0, 3),
)
def test_an_epoch_has_all_documents_end_to_end_in_an_order_of_its_own(
    tmp_path_factory, lengths, block_size, epoch, seed
):
    if max(lengths) < 2:  # nothing to learn
        return
    texts, tokens = [], itertools.count()
    for length in lengths:
        texts.append(list(itertools.islice(tokens, length)))
    flat, starts = list(itertools.chain(*texts)), [text[0] for text in texts]
    split = split_of(flat, starts, block_size, "documents", tmp_path_factory.mktemp("split"), seed)
    numbers = epoch * len(split) + np.arange(len(split))
    batch = split[numbers]
    drawn = batch["input_ids"].flatten().tolist()
    order = sorted(texts, key=lambda text: drawn.index(text[0]) if text[0] in drawn else len(drawn))
    assert epoch > 0 or order == texts

    tokens = [token for text in order for token in text]
    targets = [token if token not in starts else IGNORED for token in tokens[1:]]
    places = [place for text in order for place in range(len(text))]
    rows = range(0, len(targets), block_size)
    inputs = [tokens[row : row + block_size] for row in rows]
    inputs[-1] = inputs[-1][: len(targets) - rows[-1]]
    assert batch["input_ids"].tolist() == pad(inputs, block_size, flat[-1])
    assert batch["targets"].tolist() == pad([targets[row : row + block_size] for row in rows], block_size, IGNORED)
    assert split.count_targets(numbers) == len(flat) - len(texts)
    for row, positions in zip(rows, batch["position_ids"].tolist(), strict=True):
        for place in range(min(block_size, len(targets) - row)):  # counted from the document's, or the row's, start
            assert positions[place] == min(places[row + place], place)


def test_orders_of_documents_differ_from_epoch_to_epoch_and_seed_to_seed(tmp_path):
    orders = set()
    for seed in range(3):
        split = split_of(list(range(100)), list(range(0, 100, 5)), 5, "documents", tmp_path, seed)
        for epoch in range(4):
            ids = split[epoch * len(split) + np.arange(len(split))]["input_ids"]
            orders.add(tuple(ids[:, 0].tolist()))
    assert len(orders) == 1 + 3 * 3  # the first epoch is always in the text's order


@settings(max_examples=50, deadline=None)
@given(data=st.data(), packing=st.sampled_from(["windows", "blocks", "documents"]), block_size=st.integers(1, 12))
def test_any_rows_of_any_epochs_are_read_as_one_by_one(tmp_path_factory, data, packing, block_size):
    split = split_of(list(range(40)), [0, 7, 8, 20, 31], block_size, packing, tmp_path_factory.mktemp("split"), 3)
    numbers = np.array(data.draw(st.lists(st.integers(0, 5 * len(split) - 1), min_size=1, max_size=9)), np.int64)
    alone = [split[np.array([number])] for number in numbers]
    together = split[numbers]
    for name, values in together.items():
        assert values.tolist() == [row[name][0].tolist() for row in alone]
    assert split.count_targets(numbers) == (together["targets"] != IGNORED).sum()


@pytest.mark.parametrize("packing", ["windows", "blocks", "documents"])
def test_labels_are_the_targets_where_there_are_any(tmp_path, packing):
    starts, tokens = [0, 7, 8, 20, 31], np.arange(40, dtype=np.uint16)
    labels = np.where(tokens % 3, tokens.astype(np.int32), IGNORED)
    write_split(tmp_path, "train", np.split(tokens, starts[1:]), np.split(labels, starts[1:]))
    split = TextSplit(tmp_path, "train", 6, packing, 3)
    write_split(tmp_path, "plain", np.split(tokens, starts[1:]))
    plain, numbers = TextSplit(tmp_path, "plain", 6, packing, 3), np.arange(3 * len(split))
    ids, targets = split[numbers]["input_ids"], plain[numbers]["targets"]
    assert np.array_equal(ids, plain[numbers]["input_ids"])
    is_label = (targets % 3 > 0) & ~np.isin(targets, starts)  # a row's first token is no target, whatever its label
    assert np.array_equal(split[numbers]["targets"], np.where(is_label, targets, IGNORED))
    assert split.count_targets(numbers) == (split[numbers]["targets"] != IGNORED).sum()


@given(total=st.integers(0, 10**12), parts=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_cuts_are_in_order_without_gaps(total, parts):
    fractions = {str(i): round(part / 300, 3) for i, part in enumerate(parts)}
    bounds = list(cut_points(total, fractions).values())
    assert bounds[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(bounds))
    assert bounds[-1][1] <= total


def test_cuts_are_exact():
    assert cut_points(10**6, {"train": 0.7, "validation": 0.15, "test": 0.15}) == {
        "train": (0, 700_000), "validation": (700_000, 850_000), "test": (850_000, 1_000_000)
    }  # fmt: skip


def test_the_same_text_is_built_once_and_a_changed_one_again(tiny_text, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("abcdefgh " * 100)
    first = prepare(tiny_text, f"--data.data_files={file}").folder
    assert prepare(tiny_text, f"--data.data_files={file}", "--data.num_proc=2").folder == first
    file.write_text("hgfedcba " * 100)
    assert prepare(tiny_text, f"--data.data_files={file}").folder != first


def problems_of(path: Path, *overrides: str) -> dict[str, str]:
    with pytest.raises(UserError) as error:
        prepare(path, *overrides)
    return dict(error.value.problems)


@pytest.mark.parametrize("num_proc", ["null", "2"])
def test_a_character_unknown_to_the_tokenizer_is_refused(tiny_text, tmp_path, num_proc):
    saved = prepare(tiny_text).folder / "tokenizer"
    (tmp_path / "odd.txt").write_text("The fox, " * 30 + "naïve")
    options = [f"--data.data_files={tmp_path / 'odd.txt'}", "--tokenizer.train=null", f"--tokenizer.path={saved}"]
    problem = problems_of(tiny_text, *options, f"--data.num_proc={num_proc}")["tokenizer"]
    assert problem == "expected one that knows all of the text, has no id for 'ï' in the validation split"


def test_a_missing_column_is_reported_with_the_existing_ones(stories):
    assert "expected one of text, got 'story'" in problems_of(stories, "--data.text_column=story")["data.text_column"]


def test_a_text_shorter_than_a_sequence_is_refused(tiny_text):
    assert "got 100000" in problems_of(tiny_text, "--data.block_size=100000", "--data.num_proc=null")["data.block_size"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "bad.jsonl, line 2: expected JSON"),
        ("late.jsonl", b'{"text": "fine"}\n' * 3000 + b"[1", "late.jsonl, line 3001: expected JSON"),
        ("latin.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "latin.jsonl, line 2: expected UTF-8"),
        ("numbers.jsonl", b'{"text": 1}\n' * 20, "text is int64"),
        ("binary.txt", bytes(range(256)) * 20, "binary.txt, line 2: expected UTF-8, got the byte 0x80"),
        ("mixed.txt", "naïve\n".encode() * 9 + "naïve\n".encode("latin-1"), "mixed.txt, line 10: expected UTF-8"),
    ],
)
def test_unreadable_data_is_reported_with_file_and_line(stories, tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    path = "text" if name.endswith(".txt") else "json"
    problems = problems_of(stories, f"--data.path={path}", f"--data.data_files={tmp_path / name}")
    assert expected in next(iter(problems.values()))


def test_rows_without_text_are_counted_and_reported(stories, tmp_path, caplog):
    rows = [{"text": "Once upon a time"}, {"text": ""}, {"text": None}] * 10
    (tmp_path / "holes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(stories, f"--data.data_files={tmp_path / 'holes.jsonl'}")
    counts = summarize(data.folder)
    assert (counts["train"]["documents"], counts["train"]["empty"]) == (9, 18)
    assert "18 rows of the train split have no text and were skipped" in caplog.text


def test_a_template_joins_columns_into_a_text(stories, tmp_path):
    rows = [{"question": f"{i}+1?", "answer": i + 1, "note": None} for i in range(20)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(stories, f"--data.data_files={tmp_path / 'qa.jsonl'}", "--data.template='{question} {answer}{note}'")
    assert data.tokenizer.decode(tokens_of(data, "train")[:40]).startswith("0+1? 1<|endoftext|>1+1? 2<|endoftext|>")


@pytest.mark.parametrize("template", ["no column", "{", "{}", "{text.__class__}", "{text[0]}"])
def test_a_template_without_columns_is_refused(stories, template):
    with pytest.raises(UserError, match=r"data.template: expected columns in braces"):
        load_recipe(stories, [f"--data.template='{template}'"])


def test_a_template_with_a_missing_column_is_refused(stories):
    assert (
        "expected one of text, got 'answer'"
        in problems_of(stories, "--data.template='{text}{answer}'")["data.template"]
    )


def test_nul_bytes_and_every_other_character_come_back(tiny_text, tmp_path):
    text = "".join(map(chr, [*range(0x80), 0x2028, 0xFEFF, 0x1F600])).replace("\r", "") * 30
    (tmp_path / "odd.txt").write_text(text)
    data = prepare(tiny_text, f"--data.data_files={tmp_path / 'odd.txt'}")
    ids = np.concatenate([tokens_of(data, name) for name in ("train", "validation")])
    assert data.tokenizer.decode(ids) == text


def test_documents_of_one_token_and_of_a_million(stories, tmp_path):
    rows = [{"text": "a"}, {"text": "ab " * 350_000}, {"text": "b"}] * 4
    (tmp_path / "sizes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(stories, f"--data.data_files={tmp_path / 'sizes.jsonl'}", "--tokenizer.train.vocab_size=257")
    assert document_lengths(data.folder, "train")[:3].tolist() == [2, 1_050_001, 2]


def test_any_number_of_processes_tokenizes_the_same(stories, tmp_path, monkeypatch):
    alone = prepare(stories)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    together = prepare(stories, "--data.num_proc=2")
    assert together.folder != alone.folder and together.fingerprint == alone.fingerprint
    assert np.array_equal(tokens_of(together, "train"), tokens_of(alone, "train"))


def test_packed_documents_see_no_other(stories):
    """A row of several documents has the logits of each document alone."""
    data = prepare(stories, "--data.packing=documents", "--data.block_size=64")
    config = {"vocab_size": len(data.tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    split = data.splits["train"]
    for model in (NanoGPTForCausalLM(NanoGPTConfig(**config)), NanoLlamaForCausalLM(NanoLlamaConfig(**config))):
        for row in range(3):
            batch = {name: torch.from_numpy(array) for name, array in split[np.array([row])].items()}
            ids, positions = batch["input_ids"], batch["position_ids"]
            with torch.no_grad():
                packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
                starts = [*(positions[0] == 0).nonzero().flatten().tolist(), 64]
                alone = torch.cat([model(ids[:, i:j]).logits[0] for i, j in itertools.pairwise(starts)])
            assert len(starts) > 2
            assert (packed - alone).abs().max() < 1e-5


def test_documents_are_kept_apart_in_validation_too(stories):
    packings = {name: prepare(stories, f"--data.packing={name}").splits for name in ("windows", "blocks", "documents")}
    assert {name: splits["validation"].packing for name, splits in packings.items()} == {
        **dict.fromkeys(("windows", "blocks"), "blocks"),
        "documents": "documents",
    }


def test_one_text_is_no_documents(tiny_text):
    assert "one document" in problems_of(tiny_text, "--data.packing=documents")["data.packing"]


def test_a_table_without_text_is_refused(stories, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 20)
    assert "no text" in problems_of(stories, f"--data.data_files={tmp_path / 'empty.jsonl'}")["data.data_files"]


def test_characters_of_all_splits_are_known(tiny_text, tmp_path):
    (tmp_path / "odd.txt").write_text("plain text, " * 30 + "naïve")
    data = prepare(tiny_text, f"--data.data_files={tmp_path / 'odd.txt'}")
    assert data.tokenizer.decode(tokens_of(data, "validation")).endswith("naïve")


@pytest.mark.parametrize("kind", ["{kind: char, vocab_size: null}", "{kind: bpe}"])
@pytest.mark.parametrize("saved", [False, True])
def test_special_tokens_written_out_are_text(stories, tmp_path, kind, saved):
    rows = [f"one <|endoftext|> two <unk> {i}" for i in range(100)]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = [f"--data.data_files={tmp_path / 'odd.jsonl'}", f"--tokenizer.train={kind}"]
    data = prepare(stories, *options)
    if saved:
        path = data.folder / "tokenizer"
        data = prepare(stories, options[0], "--tokenizer.train=null", f"--tokenizer.path={path}", "--data.num_proc=2")
    ids = tokens_of(data, "train")
    assert data.tokenizer.decode(ids) == "".join(f"{row}<|endoftext|>" for row in rows[:90])
    assert (ids == data.tokenizer.eos_token_id).sum() == summarize(data.folder)["train"]["documents"] == 90
    assert data.tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a.txt", "some words\n"),
        ("b.jsonl", '{"text": "some words"}\n'),
        ("c.csv", "text\nsome words\n"),
    ],
)
def test_a_byte_order_mark_is_not_text(stories, tmp_path, name, written):
    (tmp_path / name).write_text(written + written.splitlines(keepends=True)[-1] * 20, encoding="utf-8-sig")
    path = {".txt": "text", ".jsonl": "json", ".csv": "csv"}[Path(name).suffix]
    data = prepare(stories, f"--data.path={path}", f"--data.data_files={tmp_path / name}", "--data.block_size=4")
    assert data.tokenizer.decode(tokens_of(data, "train")[:8]).startswith("some")


def test_the_order_of_the_cut_is_part_of_the_data(tiny_text):
    one = prepare(tiny_text, "--data.split={train: 0.5, validation: 0.5}")
    other = prepare(tiny_text, "--data.split={validation: 0.5, train: 0.5}")
    assert one.folder != other.folder
    assert tokens_of(one, "train")[:20].tolist() == tokens_of(other, "validation")[:20].tolist()


@pytest.mark.parametrize("encoding", ["latin1", "utf-16"])
def test_other_encodings_are_refused_with_how_to_convert_them(stories, tmp_path, encoding):
    (tmp_path / "mine.csv").write_text("naïve\n", encoding=encoding)
    for path in ("text", "csv"):
        problems = problems_of(stories, f"--data.path={path}", f"--data.data_files={tmp_path / 'mine.csv'}")
        assert problems["data.data_files"].endswith(f"convert it: iconv -f {encoding} -t utf-8")


def test_words_and_numbers_of_a_table_are_text(stories, tmp_path):
    words = ["NA", "null", "None", "nan", "007", "1.50"] * 5
    (tmp_path / "words.csv").write_text("id,text\n" + "".join(f"{i},{word}\n" for i, word in enumerate(words)))
    options = [
        "--data.path=csv",
        f"--data.data_files={tmp_path / 'words.csv'}",
        "--tokenizer.train={kind: char, vocab_size: null}",
    ]
    data = prepare(stories, *options, "--data.block_size=4")
    assert data.tokenizer.decode(tokens_of(data, "train")) == "".join(f"{word}<|endoftext|>" for word in words[:27])


@pytest.mark.parametrize("name", ["a[1].txt", "b*.txt", "c (copy) [x].txt"])
def test_files_are_found_by_their_names(tiny_text, text_file, tmp_path, name):
    (tmp_path / name).write_text(text_file.read_text())
    assert prepare(tiny_text, f"--data.data_files={tmp_path / name}").folder == prepare(tiny_text).folder


def test_a_format_that_does_not_fit_the_column_is_the_templates_mistake(stories):
    assert "cannot be filled in" in problems_of(stories, "--data.template={text:d}")["data.template"]


def test_data_with_its_own_validation_split_is_used_in_part(stories, stories_file):
    files = f"--data.data_files={{train: {stories_file}, validation: {stories_file}}}"
    counts = summarize(prepare(stories, files, "--data.split={train: 0.1}").folder)
    assert (counts["train"]["documents"], counts["validation"]["documents"]) == (4, 40)
    problems = problems_of(stories, files, "--data.split={train: 0.5, validation: 0.5}")
    assert "the data brings its own validation" in problems["data.split"]


@pytest.fixture
def ready(stories):
    """Options that read the built data of `stories`, a folder as `save_to_disk` writes them."""
    folder = prepare(stories).folder
    return [f"--data.path={folder}", "--data.data_files=null", "--tokenizer.train=null"], folder


def test_built_data_opens_with_datasets(stories, stories_file):
    data = prepare(stories)
    saved = load_from_disk(str(data.folder))
    texts = [json.loads(line)["text"] for line in stories_file.read_text().splitlines()]
    rows = [row for name in ("train", "validation") for row in saved[name]["input_ids"]]
    assert [data.tokenizer.decode(row) for row in rows] == [f"{text}<|endoftext|>" for text in texts]
    assert saved["train"].features["input_ids"] == List(Value("uint16"))


def test_data_that_brings_ids_is_taken_as_it_is(stories, ready):
    options, folder = ready
    data = prepare(stories, *options)
    assert data.folder != folder and summarize(data.folder) == summarize(folder)
    assert tokens_of(data, "train").tolist() == tokens_of(prepare(stories), "train").tolist()
    assert data.tokenizer.get_vocab() == prepare(stories).tokenizer.get_vocab()


@pytest.mark.parametrize(("path", "write"), [("parquet", "to_parquet"), ("json", "to_json")])
def test_files_that_bring_ids_and_labels_are_taken_as_they_are(stories, ready, tmp_path, path, write):
    rows = [{"input_ids": [1, 2, i], "labels": [-100, -100, i]} for i in range(20)]
    getattr(Dataset.from_list(rows), write)(str(tmp_path / "rows"))
    options = [
        f"--data.path={path}",
        f"--data.data_files={tmp_path / 'rows'}",
        f"--tokenizer.path={ready[1] / 'tokenizer'}",
    ]
    stream = prepare(stories, "--tokenizer.train=null", *options, "--data.block_size=4").splits["train"].stream
    assert np.concatenate([*stream])[:6].tolist() == [1, 2, 0, 1, 2, 1]
    assert np.concatenate([*stream.labels])[:6].tolist() == [-100, -100, 0, -100, -100, 1]
    assert stream.starts.tolist() == list(range(0, 54, 3))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 300]}, "expected input_ids below the tokenizer's 300, got 300 in the train split"),
        ({"input_ids": [-1]}, "expected input_ids below the tokenizer's 300, got -1 in the train split"),
        ({"input_ids": [1], "labels": [-1]}, "expected labels below the tokenizer's 300, got -1 in the train split"),
        ({"input_ids": [1], "labels": [1, 2]}, "expected as many labels as input_ids, got 2 and 1"),
        ({"input_ids": ["a"]}, "cannot be loaded"),
        ({"input_ids": [], "labels": []}, "no text for the train split"),
    ],
)  # fmt: skip
def test_ids_that_do_not_fit_are_refused(stories, ready, tmp_path, row, message):
    Dataset.from_list([row] * 20).to_json(str(tmp_path / "rows"))
    options = [f"--data.data_files={tmp_path / 'rows'}", f"--tokenizer.path={ready[1] / 'tokenizer'}"]
    assert message in next(iter(problems_of(stories, "--tokenizer.train=null", *options).values()))


def test_broken_files_are_told_with_a_saved_tokenizer_too(stories, ready, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input_ids": \n')
    options = [f"--data.data_files={tmp_path / 'bad.jsonl'}", f"--tokenizer.path={ready[1] / 'tokenizer'}"]
    assert "line 1: expected JSON" in problems_of(stories, "--tokenizer.train=null", *options)["data.data_files"]


def test_a_dataset_without_tokenizer_is_told(stories, tmp_path):
    DatasetDict({"train": Dataset.from_dict({"text": ["a"] * 20})}).save_to_disk(tmp_path / "saved")
    options = [f"--data.path={tmp_path / 'saved'}", "--data.data_files=null", "--tokenizer.train=null"]
    assert "or a dataset that brings its tokenizer" in problems_of(stories, *options)["tokenizer"]


def test_a_download_that_fails_says_where_a_copy_may_lie(tiny_text, tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    url = "https://nowhere.invalid/tinyshakespeare/input.txt"
    recipe = load_recipe(tiny_text, [f"--data.data_files={url}", "--run.output_dir=outputs"])
    with pytest.raises(UserError, match=r"put it at data/tinyshakespeare/input\.txt"):
        prepare_data(recipe)
    (tmp_path / "data" / "tinyshakespeare").mkdir(parents=True)
    (tmp_path / "data" / "tinyshakespeare" / "input.txt").write_bytes(text_file.read_bytes())
    assert prepare_data(recipe).tokenizer is not None
