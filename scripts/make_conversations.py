"""Makes up the conversations of recipes/chat_adder.yaml: sums of numbers up to 99, asked and answered in a few ways.

    python scripts/make_conversations.py data/chat_adder

Writes test.jsonl, validation.jsonl and train.jsonl, a conversation a line, the same ones each time. a + b and b + a are
in one split, so what the validation and test splits ask for, training never has.
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

CONVERSATIONS = {"train": 16_000, "validation": 500, "test": 1_000}
PAIRS = {"train": 0.8, "validation": 0.1, "test": 0.1}  # shares of the 5,050 unordered pairs
GREETINGS = {"Hello!": "Hello!", "Hi!": "Hi!", "Good morning!": "Good morning!"}
# No answer is "135.", which to Markdown, as `transformers chat` shows it, begins a list.
FIRST = {"What is {a} + {b}?": "{c}", "How much is {a} + {b}?": "{a} + {b} is {c}.", "{a} + {b}?": "{c}"}
LATER = FIRST | {"And {a} + {b}?": "{c}", "Thanks! And {a} + {b}?": "You are welcome. {c}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder to write")
    out = parser.parse_args().out
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, conversations in reversed(make_conversations().items()):  # train last: make looks for it
            lines = (json.dumps({"messages": messages}) + "\n" for messages in conversations)
            (out / f"{split}.jsonl").write_text("".join(lines))
    except OSError as error:
        parser.error(f"out: {out} cannot be written: {error.strerror}")
    print(f"written: {', '.join(str(out / f'{split}.jsonl') for split in CONVERSATIONS)}")


def make_conversations() -> dict[str, list[list[dict[str, str]]]]:
    """The conversations of each split."""
    draw = random.Random(56)  # has 50 + 85 in test
    pairs = list(itertools.combinations_with_replacement(range(100), 2))
    draw.shuffle(pairs)
    splits, start = {}, 0
    for split, share in PAIRS.items():
        stop = start + round(share * len(pairs))
        splits[split] = [list(converse(pairs[start:stop], draw)) for _ in range(CONVERSATIONS[split])]
        start = stop
    return splits


def converse(pairs: list[tuple[int, int]], draw: random.Random) -> Iterator[dict[str, str]]:
    """The messages of a conversation: a greeting, perhaps, and one to four sums."""
    for turn in range(draw.choice((1, 1, 2, 2, 3, 4))):
        a, b = draw.sample(draw.choice(pairs), 2)  # in either order
        question, answer = draw.choice(list((LATER if turn else FIRST).items()))
        if turn == 0 and draw.random() < 0.3:
            hello, back = draw.choice(list(GREETINGS.items()))
            if draw.random() < 0.5:
                question, answer = f"{hello} {question}", f"{back} {answer}"
            else:
                yield {"role": "user", "content": hello}
                yield {"role": "assistant", "content": f"{back} Ask me a sum."}
        yield {"role": "user", "content": question.format(a=a, b=b)}
        yield {"role": "assistant", "content": answer.format(a=a, b=b, c=a + b)}


if __name__ == "__main__":
    main()
