"""Tokenizers give every text back, and saved ones load with AutoTokenizer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cleangpt import UserError
from cleangpt.data.tokenization import (
    END,
    arithmetic_tokenizer,
    bpe_tokenizer,
    character_tokenizer,
    has_unknown,
    load_tokenizer,
)

TEXT = "To be, or not to be: that is the question.\n\n  Whether 'tis nobler — \t in the mind? 12345\r\n" * 20
BPE = bpe_tokenizer([TEXT], 300)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(st.text(alphabet=sorted(set(TEXT))))
def test_characters_come_back(text):
    tokenizer = character_tokenizer(TEXT)
    assert len(ids(tokenizer, text)) == len(text)
    assert tokenizer.decode(ids(tokenizer, text)) == text


@given(st.text())
def test_bytes_come_back_from_bpe_for_any_string(text):
    assert BPE.decode(ids(BPE, text.replace(END, ""))) == text.replace(END, "")


@given(st.text(min_size=1))
def test_any_characters_get_one_id_each(text):
    tokenizer = character_tokenizer(text.replace("<", ""))
    for sample in (text.replace("<", ""), text.replace("<", "")[::-1]):
        assert len(ids(tokenizer, sample)) == len(sample)
        assert tokenizer.decode(ids(tokenizer, sample)) == sample


def test_an_unknown_character_is_unknown():
    tokenizer = character_tokenizer("abc")
    assert ids(tokenizer, "aéb")[1] == tokenizer.unk_token_id
    assert ids(tokenizer, "a")[0] == 0


def test_a_character_of_known_bytes_can_be_unknown():
    tokenizer = character_tokenizer("éĨ ab")  # è shares its first byte with é, its second with Ĩ
    assert [has_unknown(tokenizer, np.array(ids(tokenizer, text))) for text in ("è", "z", "é a")] == [True, True, False]
    bpe = bpe_tokenizer(["abc"], 300)
    assert not has_unknown(bpe, np.arange(258))
    bpe.unk_token = END  # as GPT-2 has it
    assert not has_unknown(bpe, np.arange(258))


def test_bpe_merges_frequent_pairs_and_keeps_to_its_size():
    assert len(BPE) == 300
    assert len(ids(BPE, "that is the question")) < 10


def test_digits_are_their_own_ids():
    tokenizer = arithmetic_tokenizer()
    assert ids(tokenizer, "85+50=531") == [8, 5, 10, 5, 0, 12, 5, 3, 1]
    assert (
        tokenizer.decode([8, 5, 10, 5, 0, 12, 5, 3, 1, tokenizer.eos_token_id], skip_special_tokens=True) == "85+50=531"
    )


@pytest.mark.parametrize(
    "tokenizer", [character_tokenizer(TEXT), arithmetic_tokenizer(), BPE], ids=["char", "math", "bpe"]
)
def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.padding_side == "left"
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.convert_tokens_to_ids(END)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == "1\n2"


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"tokenizer.train.vocab_size: expected at least 257"):
        bpe_tokenizer(["x"], 100)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected a tokenizer's folder"):
        load_tokenizer(tmp_path)
