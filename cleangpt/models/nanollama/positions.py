"""Positions of tokens: in order or, with `coupled_digits`, by the place of a digit in its number (arXiv 2405.20671)."""

import torch
from transformers.cache_utils import Cache

from .configuration_nanollama import NanoLlamaConfig


def find_positions(
    config: NanoLlamaConfig, input_ids: torch.LongTensor | None, embeddings: torch.Tensor, past: Cache | None
) -> torch.LongTensor:
    """The positions of tokens after the `past`, (1, time), or (batch, time) if coupled."""
    length = 0 if past is None else past.get_seq_length()
    if config.coupled_digits is None:
        return torch.arange(length, length + embeddings.shape[1], device=embeddings.device).unsqueeze(0)
    if input_ids is None or length:
        raise ValueError("position_ids: expected with coupled_digits, unless all input_ids are given at once")
    return couple_positions(input_ids, *config.coupled_digits)


def couple_positions(input_ids: torch.LongTensor, digits: list[int], equals: int) -> torch.LongTensor:
    """Positions (batch, time) of `input_ids`: digits of one place have the same, ones 1, tens 2; all else has 0.

        8  5  +  5  0  =  5  3  1  <end>
        2  1  0  2  1  0  1  2  3  0

    Numbers are written as usual before `equals`, and last digit first after it, so that a digit's place is known when
    it is written.
    """
    is_digit = torch.isin(input_ids, torch.tensor(digits, device=input_ids.device))
    time = input_ids.shape[1]
    places = torch.arange(time, device=input_ids.device).expand(input_ids.shape)
    before = places.masked_fill(is_digit, -1).cummax(dim=-1).values  # the last token that is no digit, -1 for none
    after = places.masked_fill(is_digit, time).flip(-1).cummin(dim=-1).values.flip(-1)  # and the next one
    is_answer = (input_ids == equals).cumsum(dim=-1) > 0
    return torch.where(is_answer, places - before, after - places).masked_fill(~is_digit, 0)
