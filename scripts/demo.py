"""A page to talk to a trained model: `python scripts/demo.py outputs/shakespeare_cpu/final`.

A model of text continues a prompt, streamed, with sliders for the sampling. A model of arithmetic gets two numbers as
well, and its answer is checked. Needs `pip install -e ".[demo]"`.

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
from huggingface_hub import hf_hub_download
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
    data = find_arithmetic(source)
    with gradio.Blocks(title=source, analytics_enabled=False) as page:
        gradio.Markdown(f"# {source}\n{model.config.model_type}, {model.num_parameters():,} parameters")
        if data is not None:
            with gradio.Row(equal_height=True):
                a = gradio.Textbox("85"[: data.num_digits], label="First number")
                b = gradio.Textbox("50"[: data.num_digits], label=f"{OPERATORS[data.path]} second number")
                answer = gradio.Textbox(label="The model's answer", interactive=False)
            ask = gradio.Button("Solve", variant="primary")
            ask.click(lambda *numbers: solve(model, tokenizer, data, *numbers), [a, b], answer)
        prompt = gradio.Textbox("The " if data is None else write_problem(data, 1, 2), label="Prompt", lines=3)
        with gradio.Row():
            length = gradio.Slider(1, 1000, value=200, step=1, label="Tokens", info="at most")
            temperature = gradio.Slider(0, 2, value=0.8 if data is None else 0, step=0.05, label="Temperature")
            top_k = gradio.Slider(0, len(tokenizer), value=0, step=1, label="Top k", info="0: all")
            seed = gradio.Number(42, label="Seed", precision=0, minimum=0)
        write = gradio.Button("Write", variant="primary" if data is None else "secondary")
        text = gradio.Textbox(label="Text", lines=12, interactive=False)

        def stream(*values) -> Iterator[str]:
            yield from continue_text(model, tokenizer, *values)

        write.click(stream, [prompt, length, temperature, top_k, seed], text)
    return page


def load(source: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A saved model, on the accelerator where there is one, and its tokenizer."""
    return load_model(source, key="model").to(default_device()).eval(), load_tokenizer(source, "model")


def find_arithmetic(source: str) -> Data | None:
    """The `data` section of a model's recipe where it is arithmetic: beside the model, or one folder up as in a run."""
    files = [Path(source) / "recipe.yaml", Path(source).resolve().parent / "recipe.yaml"]
    if not Path(source).exists():
        try:
            files = [Path(hf_hub_download(source, "recipe.yaml"))]
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):  # a model without a recipe
            return None
    file = next((file for file in files if file.is_file()), None)
    data = yaml.safe_load(file.read_text())["data"] if file else {"path": "text"}
    return Data(**data) if data["path"] in ARITHMETIC else None


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
