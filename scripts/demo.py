"""A page to talk to a trained model: `python scripts/demo.py outputs/shakespeare_cpu/final`.

A model of text continues a prompt, streamed, with sliders for the sampling. A model of arithmetic gets two numbers as
well, and its answer is checked. The title is the card's, which is one tab away with the curves of the run. Needs
`pip install -e ".[demo]"`.

As a Hugging Face Space: this file as app.py, `MODEL` (a Hub id) among the Space's variables, and in requirements.txt
gradio, torch, transformers and, for a model that is not exported, cleangpt.
"""

import argparse
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

import cleangpt
from cleangpt.data.arithmetic import OPERATORS, read_answer
from cleangpt.data.tokenization import has_unknown, load_tokenizer
from cleangpt.errors import exit_code
from cleangpt.evaluation.writing import write
from cleangpt.hardware import default_device
from cleangpt.models.build import load_model
from cleangpt.recipe.keys import ARITHMETIC, Data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "model", nargs="?", default=os.environ.get("MODEL"), help="a saved folder, or a Hub id [$MODEL]"
    )
    parser.add_argument("--port", type=int, help="of the page [7860 or the next free one]")
    parser.add_argument("--share", action="store_true", help="also under a public address, for three days")
    arguments = parser.parse_args()
    if arguments.model is None:
        raise cleangpt.UserError(("model", "expected a saved folder or a Hub id"))
    build_page(arguments.model).launch(server_port=arguments.port, share=arguments.share)


def build_page(source: str):
    """The page for a saved folder or Hub id, a `gradio.Blocks`.

    Raises:
        UserError: when gradio is not installed, or there is no model to load.
    """
    try:
        import gradio
    except ImportError as error:
        raise cleangpt.UserError(("gradio", 'is not installed: pip install -e ".[demo]"')) from error
    model, tokenizer = load(source)
    data, (name, what, card) = find_arithmetic(source), read_card(source, model)

    def stream(*values) -> Iterator[str]:
        yield from continue_text(model, tokenizer, *values)

    quiet = {"show_progress": "hidden"}  # a box that shows progress also shows errors, in place of its text
    with gradio.Blocks(title=name, analytics_enabled=False) as page:
        gradio.Markdown(f"# {name}\n{what}")
        with gradio.Tab("Model"):
            if data is not None:
                with gradio.Row(equal_height=True):
                    a = gradio.Textbox("85"[: data.num_digits], label="First number", min_width=120)
                    sign = OPERATORS[data.path]
                    b = gradio.Textbox("50"[: data.num_digits], label=f"{sign} second number", min_width=120)
                    answer = gradio.Textbox(label="The model's answer", interactive=False, scale=2)
                ask = gradio.Button("Solve", variant="primary")
                pairs = numbers_to_try(data.num_digits)
                labels = [f" {sign} ".join(pair) for pair in pairs]
                problems = gradio.Examples(pairs, [a, b], label="Try", example_labels=labels)
                for event in (ask.click, a.submit, b.submit, problems.load_input_event.then):
                    event(lambda *numbers: solve(model, tokenizer, data, *numbers), [a, b], answer, **quiet)
            prompts = prompts_to_try(source) if data is None else [write_problem(data, 1, 2)]
            lines = 12 if data is None else 3
            with gradio.Row():
                with gradio.Column():
                    prompt = gradio.Textbox(prompts[0], label="Prompt", lines=lines)
                    texts = gradio.Examples([[text] for text in prompts], prompt, label="Try")
                    write = gradio.Button("Write", variant="primary" if data is None else "secondary")
                with gradio.Column():
                    text = gradio.Textbox(label="Text", lines=lines + 6, interactive=False)
            with gradio.Row():
                hot = 0.8 if data is None else 0
                length = gradio.Slider(1, 1000, value=200, step=1, label="Tokens", info="at most", min_width=220)
                temperature = gradio.Slider(
                    0, 2, value=hot, step=0.05, label="Temperature", info="0: the likeliest", min_width=220
                )
                top_k = gradio.Slider(0, len(tokenizer), value=0, step=1, label="Top k", info="0: all", min_width=220)
                seed = gradio.Number(42, label="Seed", info="of the sampling", precision=0, minimum=0, min_width=220)
            for event in (write.click, texts.load_input_event.then):
                event(stream, [prompt, length, temperature, top_k, seed], text, **quiet)
        with gradio.Tab("Card"):
            if curves := find_file(source, "curves.png"):
                gradio.Image(curves, show_label=False, interactive=False)
            gradio.Markdown(card)
    return page


def load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model, on the accelerator where there is one, and its tokenizer."""
    return load_model(source, key="model").to(default_device()).eval(), load_tokenizer(source, "model")


def read_card(source: str, model) -> tuple[str, str, str]:
    """A model's name, what it is in a paragraph, and the rest of its card; where there is none, what the model says."""
    found = re.match(r"# (.+)\n+(.+)\n", text) if (text := card_text(source)) else None
    if found is None:
        what = f"A `{model.config.model_type}` with {model.num_parameters():,} parameters."
        return Path(source).name, what, text or "This model has no card."
    rest = text[found.end() :].replace("![Loss, learning rate and accuracy over the run](curves.png)", "")
    return found[1], found[2], rest


def card_text(source: str) -> str:
    """A model's card without its metadata; empty where there is none."""
    file = find_file(source, "README.md")
    return ModelCard.load(file).text.strip() if file else ""


def find_arithmetic(source: str) -> Data | None:
    """The `data` section of a model's recipe where it is arithmetic: beside the model, or one folder up as in a run."""
    data = read_recipe(source).get("data", {"path": "text"})
    return Data(**data) if data["path"] in ARITHMETIC else None


def prompts_to_try(source: str) -> list[str]:
    """Beginnings for a model of text to go on from, its recipe's first."""
    return [*read_recipe(source).get("evaluation", {}).get("prompts", ()), "The ", "What "]


def numbers_to_try(digits: int) -> list[list[str]]:
    """Pairs of numbers, from an easy one to one where every digit carries."""
    return [["1", "2"], ["85"[:digits], "50"[:digits]], ["7" * digits, "5" * digits], ["9" * digits, "9" * digits]]


def read_recipe(source: str) -> dict:
    """The recipe beside a model, or one folder up as in a run; empty where there is none."""
    file = find_file(source, "recipe.yaml", "../recipe.yaml")
    return yaml.safe_load(file.read_text()) if file else {}


def find_file(source: str, *names: str) -> Path | None:
    """The first file that there is of `names`, relative to a saved folder; on the Hub, of the first name."""
    if Path(source).exists():
        return next((path for name in names if (path := Path(source).resolve() / name).is_file()), None)
    try:
        return Path(hf_hub_download(source, names[0]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):  # the model has no such file
        return None


def continue_text(model, tokenizer, prompt: str, length: int, temperature: float, top_k: int, seed: int) -> Iterator:
    """The prompt and what the model writes after it, again and again as it grows."""
    import gradio

    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not ids.numel():
        raise gradio.Error("Type a prompt first.", print_exception=False)
    if has_unknown(tokenizer, ids.numpy()):
        raise gradio.Error("The prompt has characters that the model has never seen.", print_exception=False)
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": int(top_k)}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def generate():
        torch.manual_seed(int(seed))
        write(model, ids.to(model.device), int(length), streamer, **sampling)

    threading.Thread(target=generate, daemon=True).start()
    text = prompt
    for piece in streamer:
        text += piece
        yield text


def write_problem(data: Data, a: int, b: int) -> str:
    """A problem as the model reads it, 085+050= say."""
    pad = f"0{data.num_digits}" if data.zero_pad else ""
    operator, equals = (OPERATORS[data.path], "=") if data.signs else ("", "")
    return f"{a:{pad}}{operator}{b:{pad}}{equals}"


def solve(model, tokenizer, data: Data, a: str, b: str) -> str:
    """The model's answer to a problem, and whether it is right."""
    import gradio

    if not all(re.fullmatch(rf"[0-9]{{1,{data.num_digits}}}", number.strip()) for number in (a, b)):
        raise gradio.Error(f"Type two numbers of at most {data.num_digits} digits.", print_exception=False)
    problem = write_problem(data, int(a), int(b))
    ids = tokenizer(problem, return_tensors="pt", add_special_tokens=False).to(model.device)
    written = tokenizer.decode(model.generate(**ids, do_sample=False)[0], skip_special_tokens=True)
    answer = read_answer(written.removeprefix(problem), data)
    right = int(a) + int(b) if data.path == "addition" else int(a) * int(b)
    verdict = "right" if answer == right else f"wrong, it is {right:,}"
    return f"{'no number' if answer is None else f'{answer:,}'}: {verdict} (written {written})"


if __name__ == "__main__":
    sys.exit(exit_code(main))
