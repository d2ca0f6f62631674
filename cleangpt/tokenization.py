"""Tokenizers, made and saved as `PreTrainedTokenizerFast` folders: characters, arithmetic, byte-level BPE.

All share one special token, `<|endoftext|>`: it ends a document, starts one where a client wants a start, and pads a
batch. Characters and arithmetic have `<unk>` besides, for what they do not know; byte-level BPE knows every byte.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from .errors import UserError

VERSION = 2  # of what `train_tokenizer` makes from the same text; another version is another dataset in the cache

END, UNKNOWN = "<|endoftext|>", "<unk>"

# Joins the messages of a chat with line breaks, so that `transformers chat` and `serve` can talk to a base model.
CHAT_TEMPLATE = "{{ messages | map(attribute='content') | join('\n') }}"


def _wrap(backend: tokenizers.Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        padding_side="left",  # prompts of several lengths are continued at their right end
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        **special_tokens,
    )


def character_tokenizer(characters: Iterable[str]) -> PreTrainedTokenizerFast:
    """One id for each character, in code point order, the special tokens last."""
    return _characters(sorted(set(characters)))


def arithmetic_tokenizer() -> PreTrainedTokenizerFast:
    """The ten digits, the operators and the equals sign of a problem such as `85+50=531`; digit d has the id d."""
    return _characters("0123456789+x=")


def _characters(characters: Sequence[str]) -> PreTrainedTokenizerFast:
    """One id for each character, in order.

    To a client this is byte-level BPE as GPT-2 has it, which all of them know, with no other merges than those that
    put the bytes of a character together. What stands between a byte and its character gets ids after the special
    tokens, and is never seen.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    written = [byte_level.pre_tokenize_str(character)[0][0] for character in characters]  # GPT-2's letters for bytes
    vocabulary = {token: index for index, token in enumerate([*written, UNKNOWN, END])}
    merges = []
    for token in written:
        for end in range(1, len(token)):
            for part in (token[:end], token[end]):
                vocabulary.setdefault(part, len(vocabulary))
            if (token[:end], token[end]) not in merges:
                merges.append((token[:end], token[end]))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN))
    backend.pre_tokenizer = byte_level
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend, unk_token=UNKNOWN)


def unknown_test(tokenizer) -> Callable[[np.ndarray], bool]:
    """From a tokenizer to a function that says whether ids hold one for something that the tokenizer does not know.

    That is `<unk>`, and in a tokenizer of characters what it has for the bytes of one that it does not know.
    """
    unknown, last = tokenizer.unk_token_id, len(tokenizer)
    if (tokenizer.unk_token, tokenizer.eos_token) == (UNKNOWN, END) and tokenizer.eos_token_id == unknown + 1:
        last = tokenizer.eos_token_id
    return functools.partial(_has_unknown, unknown, last)


def _has_unknown(unknown: int | None, last: int, ids: np.ndarray) -> bool:
    return bool((ids > last).any() or (unknown is not None and (ids == unknown).any()))


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding (Sennrich et al., arXiv 1508.07909; GPT-2's bytes and pre-tokenizer).

    Raises:
        UserError: when `vocab_size` has no room for the 256 bytes and the special token.
    """
    if vocab_size < 257:
        raise UserError(("tokenizer.train.vocab_size", f"expected at least 257 (256 bytes, {END}), got {vocab_size}"))
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _wrap(backend)


def train_tokenizer(section, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """What `recipe.tokenizer.train` asks for, trained on `texts`."""
    if section.kind == "char":
        return character_tokenizer(character for text in texts for character in set(text))
    return bpe_tokenizer(texts, section.vocab_size or 4096)


def load_tokenizer(path: str | Path, key: str = "tokenizer.path"):
    """A saved tokenizer's folder, or a Hub id.

    Raises:
        UserError: under the name `key`, when there is no tokenizer to load.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the loader raises whatever a broken file makes it raise
        raise UserError((key, f"expected a tokenizer's folder or Hub id, got {str(path)!r}: {error}")) from error
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError((key, f"expected a fast tokenizer, got {type(tokenizer).__name__} in {str(path)!r}"))
    for where in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(where, None)  # where it was found is no part of it, yet would be saved with it
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
