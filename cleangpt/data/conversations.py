"""Conversations as token ids, through the tokenizer's chat template: what the assistant says is the target.

[{"role": "user", "content": "What is 85 + 50?"}, {"role": "assistant", "content": "135."}]
    | chat template
<|im_start|>user⏎What is 85 + 50?<|im_end|>⏎<|im_start|>assistant⏎135.<|im_end|>⏎
                                                                  ~~~~~~~~~~~~~~ labels, marked by {% generation %}
Between files and ids a conversation is JSON text.
"""

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import UserError
from .splits import IGNORED

KEY = "data.messages_column"


def write_conversation(messages: Any) -> str:
    """The messages of a row as JSON, without fields that only other rows have; a `UserError` if they are none."""
    is_list = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
    kept = [{key: value for key, value in one.items() if value is not None} for one in messages] if is_list else []
    if not kept or not all(isinstance(one.get("role"), str) and one.keys() & {"content", "tool_calls"} for one in kept):
        expected = 'expected conversations such as [{"role": "user", "content": "Hello"}, ...]'
        raise UserError((KEY, f"{expected}, got {messages!r:.100}"))
    return json.dumps(kept, ensure_ascii=False)


def write_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What comes before the assistant's answer to a user's `text`."""
    messages = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def message_texts(conversation: str) -> list[str]:
    """What a tokenizer learns from: role and content of each message."""
    return [f"{message['role']}\n{message.get('content', '')}" for message in json.loads(conversation)]


def said(conversation: str) -> str:
    """All that the assistant says."""
    messages = json.loads(conversation)
    return "".join(str(message.get("content", "")) for message in messages if message["role"] == "assistant")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special id with which the chat template ends what the assistant says, `<|im_end|>` say, if there is one."""
    if not _has_marks(tokenizer):
        return None
    exchange = write_conversation([{"role": role, "content": "1"} for role in ("user", "assistant")])
    ((_, labels),) = encode_conversations([exchange], tokenizer)
    return next((label for label in labels[::-1].tolist() if label in tokenizer.all_special_ids), None)


def encode_conversations(
    conversations: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The ids of each conversation, int64 (tokens,), and their labels: -100 where the assistant does not speak.

    They are those of `apply_chat_template(..., return_assistant_tokens_mask=True)`, which TRL's `assistant_only_loss`
    takes, but special ids come from the template alone. Where a message has the letters of a special token, the first
    is a lone surrogate, which no text has, while the template is rendered; after it the text is cut for the tokenizer.

    Raises:
        UserError: for a template without generation marks, or one that refuses a conversation.
    """
    if not _has_marks(tokenizer):
        expected = "expected a tokenizer whose chat template has {% generation %} and {% endgeneration %} around what"
        raise UserError(("tokenizer.path", f"{expected} the assistant says, as {KEY} needs"))
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile(f"(?={'|'.join(map(re.escape, special)) or '(?!)'}).", re.DOTALL)
    marks = {letter: chr(0xDC00 + i) for i, letter in enumerate(sorted({token[0] for token in special}))}
    letters = {ord(mark): letter for letter, mark in marks.items()}

    parts, spans = [], []
    for conversation in conversations:
        marked = pattern.sub(lambda one: marks[one[0]], conversation)
        text, places = _render(json.loads(marked), tokenizer)
        parts.append([part.translate(letters) for part in re.split("(?<=[\udc00-\udfff])", text)])
        spans.append(places)
    options = {"add_special_tokens": False, "split_special_tokens": False, "return_offsets_mapping": True}
    encoded = tokenizer([*itertools.chain(*parts)], **options, verbose=False)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_label(row, itertools.islice(tokens, len(row)), places) for row, places in zip(parts, spans, strict=True)]


def _label(parts: list[str], tokens: Iterator[tuple], spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a text, from the ids of each of its parts and their places there; `spans` are what is said."""
    ids, places, start = [], [np.empty((0, 2), int)], 0
    for part, (part_ids, offsets) in zip(parts, tokens, strict=True):
        ids += part_ids
        places.append(np.array(offsets, int).reshape(-1, 2) + start)
        start += len(part)
    (begin, end), labels = np.concatenate(places).T, np.full(len(ids), IGNORED)
    for first, stop in spans:
        inside = np.flatnonzero((begin < stop) & (end > first))
        spoken = slice(inside[0], inside[-1] + 1) if len(inside) else slice(0)
        labels[spoken] = ids[spoken]
    return np.array(ids, np.int64), labels


def _render(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """A conversation through the chat template, and where in it the assistant speaks."""
    options = {"return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
    rendered: Any  # texts and spans of each conversation; transformers declares it as text
    try:
        rendered = render_jinja_template([messages], chat_template=tokenizer.get_chat_template(), **options)  # type: ignore[arg-type]
    except Exception as error:  # a template can raise anything
        raise UserError((KEY, f"the tokenizer's chat template refuses {messages!r:.100}: {error}")) from error
    ((text,), (spans,)) = rendered
    return text, spans


def _has_marks(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.chat_template is not None and "endgeneration" in tokenizer.get_chat_template()
