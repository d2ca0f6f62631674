"""The demo's page: what it writes and solves, and what it refuses."""

import runpy
import sys

import pytest
from conftest import ROOT, needs, run_python

from cleangpt import UserError, load_recipe, train
from cleangpt.data.tokenization import load_tokenizer
from cleangpt.models.build import load_model

DEMO = runpy.run_path(str(ROOT / "scripts" / "demo.py"))


@pytest.fixture
def speaker(tiny_text):
    final = train(load_recipe(tiny_text))
    return load_model(final).eval(), load_tokenizer(final)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"gradio: is not installed: pip install"):
        DEMO["build_page"]("anything")


@needs("gradio", extra="demo")
def test_without_a_model_it_says_so():
    done = run_python("scripts/demo.py", MODEL="")
    assert done.returncode == 2 and "error: model: expected" in done.stderr


def test_arithmetic_is_known_by_the_recipe(tiny_adder):
    adder = train(load_recipe(tiny_adder))
    assert DEMO["find_arithmetic"](str(adder)).num_digits == 1
    assert DEMO["find_arithmetic"](str(adder / "nothing")) is None


@needs("gradio", extra="demo")
def test_text_is_streamed_and_the_same_for_the_same_seed(speaker):
    pieces = list(DEMO["continue_text"](*speaker, "The fox", 5, 1.0, 0, 1))
    assert all(longer.startswith(shorter) for shorter, longer in zip(["The fox", *pieces], pieces, strict=False))
    assert pieces[-1] == list(DEMO["continue_text"](*speaker, "The fox", 5, 1.0, 0, 1))[-1]
    assert len(pieces[-1]) > len("The fox")


@needs("gradio", extra="demo")
@pytest.mark.parametrize("prompt", ["", "ü"])
def test_a_prompt_that_the_model_cannot_read_is_refused(speaker, prompt):
    import gradio

    with pytest.raises(gradio.Error):
        next(DEMO["continue_text"](*speaker, prompt, 5, 1.0, 0, 1))


@needs("gradio", extra="demo")
def test_an_answer_is_checked(tiny_adder):
    learn = ["--training.max_steps=300", "--training.macro_batch=300", "--optimizer.lr=0.02", "--optimizer.name=muon"]
    learn += ["--model.hidden_size=32", "--training.batch_size=32"]
    final = train(load_recipe(tiny_adder, [*learn, "--data.split={train: 0.9, validation: 0.1}"]))
    model, tokenizer, data = load_model(final).eval(), load_tokenizer(final), DEMO["find_arithmetic"](str(final))
    import gradio

    answers = [DEMO["solve"](model, tokenizer, data, str(a), str(b)) for a in range(3) for b in range(3)]
    for place, answer in enumerate(answers):
        right = place // 3 + place % 3
        assert answer.startswith(f"{right}: right") or f"wrong, it is {right}" in answer
    assert any(": right" in answer for answer in answers)
    with pytest.raises(gradio.Error):
        DEMO["solve"](model, tokenizer, data, "10", "1")


@needs("gradio", extra="demo")
def test_the_page_says_what_the_model_is_and_shows_its_card(tiny_adder):
    page = DEMO["build_page"](str(train(load_recipe(tiny_adder))))
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"Model", "Card", "Prompt", "Temperature", "The model's answer", "Text"} <= labels
    title, card = (block.value for block in page.blocks.values() if block.get_block_name() == "markdown")
    assert title.startswith("# tiny\nA `nanogpt` with ") and "1-digit addition" in title
    assert card.lstrip().startswith("## Usage") and "## Results" in card and "curves.png" not in card
    assert any(block.get_block_name() == "image" for block in page.blocks.values())
    examples = [block.samples for block in page.blocks.values() if block.get_block_name() == "dataset"]
    assert examples == [[["1", "2"], ["8", "5"], ["7", "5"], ["9", "9"]], [["1+2="]]]


def test_a_model_without_a_card_is_named_by_its_folder(speaker, tmp_path):
    speaker[0].save_pretrained(tmp_path / "mine")
    name, what, card = DEMO["read_card"](str(tmp_path / "mine"), speaker[0])
    assert name == "mine" and what.startswith("A `nanogpt` with ") and card == "This model has no card."


def test_a_model_of_text_is_tried_with_its_recipes_prompts(tiny_text):
    final = train(load_recipe(tiny_text, ["--evaluation.prompts=['A stitch']"]))
    assert DEMO["prompts_to_try"](str(final))[0] == "A stitch"
