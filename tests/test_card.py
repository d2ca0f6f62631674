"""The model card: valid metadata, an example that runs."""

import re

import pytest
from conftest import run_python
from huggingface_hub import ModelCard

from cleangpt import load_recipe, train


@pytest.mark.parametrize("kind", ["tiny_text", "tiny_adder"])
def test_the_card_is_valid_and_its_example_runs(kind, request):
    final = train(load_recipe(request.getfixturevalue(kind)))
    card = ModelCard.load(final / "README.md")
    assert card.data.library_name == "transformers"
    assert {result.metric_type for result in card.data.eval_results} >= {"loss", "perplexity"}
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
