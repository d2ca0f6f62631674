"""Coupled positions: digits of one place share one, whatever comes after them, in training as in generation."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cleangpt import NanoLlamaConfig, NanoLlamaForCausalLM, UserError
from cleangpt.data.tokenization import arithmetic_tokenizer
from cleangpt.models.convert import to_native
from cleangpt.models.nanollama.positions import couple_positions

TOKENIZER = arithmetic_tokenizer()
DIGITS, EQUALS = [*range(10)], TOKENIZER.convert_tokens_to_ids("=")


def ids_of(text: str) -> torch.Tensor:
    return torch.tensor([TOKENIZER(text, add_special_tokens=False)["input_ids"]])


@pytest.fixture
def model() -> NanoLlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NanoLlamaConfig(**shape, initializer_range=0.5, coupled_digits=[DIGITS, EQUALS], max_position_embeddings=9)
    return NanoLlamaForCausalLM(config).eval()


@given(st.integers(0, 10**30), st.integers(0, 10**30))
def test_digits_of_one_place_have_its_position(a, b):
    text = f"{a}+{b}={str(a + b)[::-1]}<|endoftext|>"
    places = [range(len(str(number)), 0, -1) for number in (a, b)] + [range(1, len(str(a + b)) + 1)]
    expected = [*itertools.chain(places[0], [0], places[1], [0], places[2], [0])]
    assert couple_positions(ids_of(text), DIGITS, EQUALS).tolist() == [expected]


def test_generation_sees_what_training_saw(model):
    """With a cache or without, token by token: the likeliest ones, given all positions at once."""
    question = ids_of("12345+6789=")
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    text = model.generate(question, **options)
    assert torch.equal(text, model.generate(question, use_cache=False, **options))
    assert torch.equal(text[0, 11:], model(text).logits[0, 10:-1].argmax(-1))


def test_every_digit_sees_the_whole_question(model):
    """Positions that go back do not tell of another document."""
    one, other = (model(ids_of(f"{first}1+11=2")).logits[0, -1] for first in (1, 9))
    assert not torch.allclose(one, other)


def test_no_plain_architecture_has_them(model):
    with pytest.raises(UserError, match="no plain architecture has the positions of its coupled_digits"):
        to_native(model)
