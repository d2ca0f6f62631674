"""Asks a model what was asked in conversations, and counts the answers that are the same, to the letter.

    python scripts/export.py outputs/chat_adder/final exported/chat_adder
    python scripts/grade_conversations.py exported/chat_adder data/chat_adder/test.jsonl

Each answer follows the right messages before it and is written greedily. Plain transformers does it all: this script
needs nothing of CleanGPT for a model that is exported.
"""

import argparse
import json
from pathlib import Path

from transformers import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="a folder or Hub id that plain transformers loads")
    parser.add_argument("file", type=Path, help="JSON lines with a list of `messages` in each")
    parser.add_argument("--limit", type=int, help="answers to grade, from the start [all]")
    parser.add_argument("--batch_size", type=int, default=100, help="answers written at once [100]")
    arguments = parser.parse_args()
    try:
        rows = [json.loads(line)["messages"] for line in arguments.file.read_text(encoding="utf-8").splitlines()]
        turns = [(row[:i], row[i]["content"]) for row in rows for i in range(len(row)) if row[i]["role"] == "assistant"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"file: expected JSON lines with messages, got {str(arguments.file)!r}: {error!r}")
    questions, answers = zip(*turns[: arguments.limit], strict=True)
    write = pipeline("text-generation", arguments.model)
    most = max(len(write.tokenizer(answer)["input_ids"]) for answer in answers) + 1  # and the end of the turn
    written = write(
        list(questions), batch_size=arguments.batch_size, max_new_tokens=most, do_sample=False, return_full_text=False
    )
    texts = [one[0]["generated_text"] for one in written]
    wrong = [turn for turn in zip(questions, texts, answers, strict=True) if turn[1] != turn[2]]
    for question, text, answer in wrong[:5]:
        print(f"{question[-1]['content']!r}: expected {answer!r}, got {text!r}")
    print(f"{len(answers) - len(wrong):,} of {len(answers):,} answers are right: {1 - len(wrong) / len(answers):.4f}")


if __name__ == "__main__":
    main()
