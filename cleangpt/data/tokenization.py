"""Tokenizers as `PreTrainedTokenizerFast`: characters, arithmetic, byte-level BPE.

All have one special token, `<|endoftext|>`, which ends a document, starts one for clients that want a start, and pads a
batch. Characters and arithmetic also have `<unk>`; byte-level BPE knows every byte. Those for conversations have
`<|im_start|>` and `<|im_end|>` around each message.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import UserError
from ..files import hint_at_model
from ..recipe.keys import TokenizerTraining

VERSION = 3  # of what `train_tokenizer` makes of a text: part of the data's fingerprint
END, UNKNOWN = "<|endoftext|>", "<unk>"
CHAT = ("<|im_start|>", "<|im_end|>")
ROLES = "system user assistant\n"  # what the template below writes
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
# Joins the messages of a chat with line breaks, so that `transformers chat` and `serve` can talk to a base model.
BASE_TEMPLATE = "{{ messages | map(attribute='content') | join('\n') }}"
# ChatML, which every client knows, with marks around what the assistant says.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def _wrap(backend: tokenizers.Tokenizer, chat: bool = False, **special_tokens: str) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = BYTE_LEVEL
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
        padding_side="left",  # generation continues prompts at their right end
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE if chat else BASE_TEMPLATE,
        **({"extra_special_tokens": list(CHAT)} if chat else {}),
        **special_tokens,
    )


def character_tokenizer(characters: Iterable[str], chat: bool = False) -> PreTrainedTokenizerFast:
    """One id per character, in code point order, then the special tokens, those of a `chat` first."""
    return _characters(sorted({*characters, *(ROLES if chat else "")}), chat)


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """The digits, operators and equals sign of problems such as `85+50=531`; digit d has id d."""
    return _characters("0123456789+x=")


def _characters(characters: Sequence[str], chat: bool = False) -> PreTrainedTokenizerFast:
    """One id per character, in order.

    This is GPT-2's byte-level BPE, which every client knows. Its only merges join the bytes of a character; the tokens
    between byte and character come after the special tokens and never occur in known text.
    """
    written = [BYTE_LEVEL.pre_tokenize_str(character)[0][0] for character in characters]  # in letters for bytes
    vocabulary = {token: index for index, token in enumerate([*written, *(CHAT if chat else ()), UNKNOWN, END])}
    merges = list(dict.fromkeys((token[:end], token[end]) for token in written for end in range(1, len(token))))
    for part in itertools.chain(*merges):
        vocabulary.setdefault(part, len(vocabulary))
    return _wrap(tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN)), chat, unk_token=UNKNOWN)


def has_unknown(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> bool:
    """Whether some `ids` stand for unknown text: `<unk>` and, in a character tokenizer, those after the special tokens.

    GPT-2's own tokenizer has its end token as `unk_token`, and knows everything.
    """
    unknown, end = tokenizer.unk_token_id, tokenizer.eos_token_id
    if unknown is None or unknown == end:
        return False
    is_character = (tokenizer.unk_token, tokenizer.eos_token, end) == (UNKNOWN, END, unknown + 1)
    return bool((ids == unknown).any() or (is_character and (ids > end).any()))


def bpe_tokenizer(texts: Iterable[str], vocab_size: int, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; GPT-2's bytes and pre-tokenizer)."""
    special = [END, *(CHAT if chat else ())]
    if vocab_size < 256 + len(special):
        expected = f"expected at least {256 + len(special)} (256 bytes, {', '.join(special)})"
        raise UserError(("tokenizer.train.vocab_size", f"{expected}, got {vocab_size}"))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = BYTE_LEVEL
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    trainer.initial_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend, chat)


def train_tokenizer(training: TokenizerTraining, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """The tokenizer that `recipe.tokenizer.train` asks for."""
    if training.kind == "char":
        return character_tokenizer(itertools.chain.from_iterable(map(set, texts)), training.chat)
    return bpe_tokenizer(texts, training.vocab_size or 4096, training.chat)


def load_tokenizer(path: str | Path, key: str = "tokenizer.path") -> PreTrainedTokenizerFast:
    """A tokenizer from a saved folder or the Hub; a `UserError` under `key` if there is no fast one to load."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # a broken file can raise anything
        reason = hint_at_model(path) or f": {error}"
        raise UserError((key, f"expected a tokenizer's folder or Hub id, got {str(path)!r}{reason}")) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError((key, f"expected a fast tokenizer, got {type(tokenizer).__name__} in {str(path)!r}"))
    for where in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(where, None)  # these say where it was found, and would be saved with it
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
