"""What the assistant says is the target, special ids come from the template alone, and TRL makes the same labels."""

import json
import re

import numpy as np
import pytest
import yaml
from conftest import needs, read_metrics, run_python
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tokenizers
from cleangpt import UserError, load_recipe, train
from cleangpt.data.conversations import encode_conversations, end_of_turn, message_texts, write_conversation
from cleangpt.data.splits import IGNORED
from cleangpt.data.tokenization import CHAT, END, bpe_tokenizer, character_tokenizer
from cleangpt.training.setup import load_data

BPE = bpe_tokenizer(["What is 85 + 50? 135. user assistant"] * 10, 300, chat=True)
ROWS = [
    [{"role": "user", "content": "What is 85 + 50?"}, {"role": "assistant", "content": "135."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi 👋 "},
        {"role": "assistant", "content": "Hello  👋\n\n"},
        {"role": "user", "content": "\n2 + 2?"},
        {"role": "assistant", "content": ""},
    ],
    [{"role": "user", "content": "Nobody answers."}],
]


def encode(rows: list, tokenizer: PreTrainedTokenizerFast) -> list[tuple[np.ndarray, np.ndarray]]:
    return encode_conversations([write_conversation(row) for row in rows], tokenizer)


# As Llama 2's: text begins with a space, the end token takes spaces after it, and turns have no line breaks.
TEMPLATE = """{% for message in messages %}{% if message.role == 'assistant' %}\
{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}\
{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% endfor %}"""


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of another make: SentencePiece's spaces, a special token that strips, and a template of its own."""
    letters = [(letter, -2.0) for letter in "[]/INSTabcdefghijklmnopqrstuvwxyz?.+0123456789HWBN👋\n"]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("▁", -1.0), *letters], unk_id=0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    end = tokenizers.AddedToken("</s>", rstrip=True, special=True)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, unk_token="<unk>", chat_template=TEMPLATE)


@pytest.mark.parametrize("tokenizer", [BPE, words_tokenizer()], ids=["chatml", "llama"])
def test_ids_and_targets_are_those_of_transformers(tokenizer):
    for row, (ids, labels) in zip(ROWS, encode(ROWS, tokenizer), strict=True):
        theirs = tokenizer.apply_chat_template(row, return_dict=True, return_assistant_tokens_mask=True)
        assert ids.tolist() == theirs["input_ids"]
        assert (labels != IGNORED).tolist() == np.array(theirs["assistant_masks"], bool).tolist()
        assert (labels[labels != IGNORED] == ids[labels != IGNORED]).all()


def test_the_assistant_s_words_and_the_end_of_its_turn_are_the_targets():
    (_, labels), *_ = encode(ROWS, BPE)
    assert BPE.decode(labels[labels != IGNORED]) == "135.<|im_end|>"
    assert end_of_turn(BPE) == BPE.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turn(words_tokenizer()) == words_tokenizer().eos_token_id
    assert end_of_turn(bpe_tokenizer(["no chat"], 257)) is None


PARTS = st.sampled_from(["a", " ", "\n", "<", "|>", "é", *CHAT, END, "<|im_", "end|>"]) | st.text(max_size=3)
CONTENT = st.lists(PARTS).map("".join)


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), CONTENT), min_size=1, max_size=4))
def test_text_in_a_message_never_becomes_a_special_token(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ((ids, labels),) = encode([messages], BPE)
    special = ids[np.isin(ids, BPE.all_special_ids)].tolist()
    assert special == BPE.convert_tokens_to_ids(CHAT) * len(turns)
    assert BPE.decode(ids) == BPE.apply_chat_template(messages, tokenize=False)
    said = "".join(f"{content}<|im_end|>" for role, content in turns if role == "assistant")
    assert BPE.decode(labels[labels != IGNORED]) == said


CHARACTERS = character_tokenizer("What is 85 + 50?135.", chat=True)


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["char", "bpe"])
def test_a_saved_tokenizer_keeps_chat_tokens_and_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    prompt = loaded.apply_chat_template(ROWS[0][:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nWhat is 85 + 50?<|im_end|>\n<|im_start|>assistant\n"
    assert [labels.tolist() for _, labels in encode(ROWS[:1], loaded)] == [
        labels.tolist() for _, labels in encode(ROWS[:1], tokenizer)
    ]
    assert loaded.decode(loaded(prompt)["input_ids"], skip_special_tokens=True) == "user\nWhat is 85 + 50?\nassistant\n"
    assert loaded.unk_token_id not in loaded(prompt)["input_ids"]


def test_a_tokenizer_learns_from_roles_and_words():
    assert message_texts(json.dumps(ROWS[0])) == ["user\nWhat is 85 + 50?", "assistant\n135."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Hello", "expected conversations such as .* got 'Hello'"),
        (None, "got None"),
        ([], r"got \[\]"),
        (["Hello"], r"got \['Hello'\]"),
        ([{"from": "human", "value": "Hello"}], r"got \[{'from': 'human', 'value': 'Hello'}\]"),
        ([{"role": "user", "content": None}], r"got \[{'role': 'user', 'content': None}\]"),
        ([{"role": "user", "content": 5}], "chat template refuses"),
    ],
)
def test_rows_that_are_no_conversations_are_refused(row, message):
    with pytest.raises(UserError, match=f"data.messages_column: .*{message}"):
        encode([ROWS[0], row], BPE)


def test_a_template_without_marks_is_refused():
    with pytest.raises(UserError, match=r"tokenizer.path: .* {% generation %} and {% endgeneration %} around"):
        encode(ROWS, bpe_tokenizer(["no chat"], 257))


def test_made_conversations_hold_sums_out(made_conversations):
    pairs = {}
    for split in ("train", "validation", "test"):
        text = made_conversations.with_name(f"{split}.jsonl").read_text()
        sums = re.findall(r"(\d+) \+ (\d+)", text)
        pairs[split] = {tuple(sorted(map(int, pair))) for pair in sums}
    assert all(len(found) > 400 for found in pairs.values())
    assert sum(map(len, pairs.values())) == len(set.union(*pairs.values()))


@needs("trl")
def test_labels_are_those_of_trl(conversations_file, tmp_path):
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = character_tokenizer(conversations_file.read_text(), chat=True)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_head=1, n_layer=1, n_positions=512)
    options = SFTConfig(tmp_path, assistant_only_loss=True, max_length=None, use_cpu=True, report_to=[], bf16=False)
    rows = load_dataset("json", data_files=str(conversations_file))["train"]
    trainer = SFTTrainer(GPT2LMHeadModel(config), options, train_dataset=rows, processing_class=tokenizer)
    ours = encode(rows["messages"], tokenizer)
    assert len(ours) == 60
    for theirs, (ids, labels) in zip(trainer.train_dataset, ours, strict=True):
        batch = trainer.data_collator([theirs])  # (1, tokens)
        assert batch["input_ids"][0].tolist() == ids.tolist()
        assert batch["labels"][0].tolist() == labels.tolist()


@pytest.fixture
def tiny_chat(write_recipe, conversations_file):
    """A recipe that trains a tiny NanoLlama on conversations."""
    return write_recipe(
        data={"path": "json", "data_files": str(conversations_file), "messages_column": "messages", "block_size": 48},
        tokenizer={"train": {"kind": "char", "chat": True}},
        model={"model_type": "nanollama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        training={"max_steps": 2, "batch_size": 4, "macro_batch": 2},
        evaluation={"prompts": ["What is 4 + 5?"]},
    )


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_built_rows_are_the_conversations_with_their_labels(tiny_chat, conversations_file, kind):
    _, data = load_data(load_recipe(tiny_chat, [f"--tokenizer.train.kind={kind}", "--data.num_proc=2"]))
    rows = [json.loads(line)["messages"] for line in conversations_file.read_text().splitlines()]
    built = load_from_disk(data.folder)
    assert [built[name].num_rows for name in ("train", "validation")] == [54, 6]
    for row, (ids, labels) in zip([*built["train"], *built["validation"]], encode(rows, data.tokenizer), strict=True):
        assert row["input_ids"] == ids.tolist()
        assert row["labels"] == labels.tolist()

    split = data.splits["train"]
    batch = split[np.arange(split.num_sequences)]
    ids, labels = (np.concatenate([row[name] for row in built["train"]]) for name in ("input_ids", "labels"))
    assert batch["input_ids"].ravel()[: len(ids) - 1].tolist() == ids[:-1].tolist()
    assert batch["targets"].ravel()[: len(ids) - 1].tolist() == labels[1:].tolist()
    assert (batch["targets"].ravel()[len(ids) - 1 :] == IGNORED).all()
    counted = [split.count_targets(np.array([place])) for place in range(split.num_sequences)]
    assert counted == (batch["targets"] != IGNORED).sum(1).tolist()
    assert sum(counted) == split.num_targets
    said = [message["content"] for row in rows[:54] for message in row if message["role"] == "assistant"]
    assert split.num_bytes == len("".join(said).encode())


def test_a_run_answers_in_turn(tiny_chat):
    final = train(load_recipe(tiny_chat))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in (END, "<|im_end|>")]
    assert model.generation_config.eos_token_id == ends
    assert "<|im_start|>user\\nWhat is 4 + 5?<|im_end|>\\n<|im_start|>assistant\\n" in (final / "README.md").read_text()


def test_another_model_is_tuned_through_its_own_template(tiny_chat, tmp_path):
    theirs = bpe_tokenizer(["What is 85 + 50?"], 300)
    theirs.chat_template = """{% for message in messages %}{{ message.role[0] | upper + ': ' }}\
{% if message.role == 'assistant' %}{% generation %}{{ message.content + eos_token }}{% endgeneration %}\
{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"""
    theirs.save_pretrained(tmp_path / "qwen3")
    config = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 16, "max_position_embeddings": 64}
    Qwen3ForCausalLM(Qwen3Config(**config)).save_pretrained(tmp_path / "qwen3")
    path = f"{tmp_path / 'qwen3'}"
    values = yaml.safe_load(tiny_chat.read_text()) | {"model": {"init_from": path}, "tokenizer": {"path": path}}
    tiny_chat.write_text(yaml.safe_dump(values))
    final = train(load_recipe(tiny_chat))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.config.model_type == "qwen3"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.chat_template == theirs.chat_template


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"from": "human", "value": "Hi"}]}', "data.messages_column: expected conversations such as"),
        ('{"messages": []}', r"data.messages_column: .* got \[\]"),
        ('{"messages": "Hi"}', "data.messages_column: .* got 'Hi'"),
        ('{"chat": []}', "data.messages_column: expected one of chat, got 'messages'"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "data.split: expected something that the assistant says"),
    ],
)
def test_rows_that_teach_nothing_are_refused(tiny_chat, tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text(f"{line}\n" * 10)
    with pytest.raises(UserError, match=message):
        load_data(load_recipe(tiny_chat, [f"--data.data_files={tmp_path / 'rows.jsonl'}"]))


def test_a_tokenizer_without_marks_ends_the_command_with_one_line(tiny_chat, tmp_path):
    bpe_tokenizer(["no chat"], 257).save_pretrained(tmp_path / "plain")
    options = ["--tokenizer.train=null", f"--tokenizer.path={tmp_path / 'plain'}"]
    ended = run_python("train.py", tiny_chat, *options)
    assert ended.returncode == 2
    assert re.fullmatch(r"error: tokenizer\.path: [^\n]*\{% generation %\}[^\n]*\n", ended.stderr)


def test_a_step_in_which_the_assistant_is_silent_counts_nothing(tiny_chat, tmp_path):
    options = ["--data.block_size=8", "--training.batch_size=1", "--training.max_steps=12", "--training.macro_batch=12"]
    recipe = load_recipe(tiny_chat, [*options, "--tracking.log_every=1", "--training.max_skipped=1"])
    train(recipe)
    losses = [line["train/loss"] for line in read_metrics(recipe.folder) if "train/loss" in line]
    assert len(losses) == 12
    assert 0 in losses
    assert all(0 <= loss < 10 for loss in losses)
