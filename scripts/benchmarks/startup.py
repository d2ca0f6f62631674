"""How long it takes until something happens: importing, and from a recipe to the first step."""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from . import train

IMPORT = "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer"
USE = "AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer"  # transformers imports what is used, when it is
ROOT = Path(__file__).parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(shape="small", model_type="nanogpt", mixed_precision="no", steps=1)


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Seconds of whole processes, one figure a round."""
    bases = "from transformers import GenerationMixin, PreTrainedModel"
    sides = {
        "transformers' Auto classes": f"{IMPORT}; {USE}",
        "and the base classes of its models": f"{IMPORT}; {USE}; {bases}",
        "cleangpt and them": f"import cleangpt; {IMPORT}; {USE}",
    }
    figures = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, code in sides.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
            figures[name].append(time.perf_counter() - started)
    yield "import, seconds", figures

    recipe = folder / "recipe.yaml"
    recipe.write_text(train.make_recipe(arguments, folder).to_yaml())
    first_step(recipe)  # builds the data
    yield (
        "recipe to the first step, warm cache, seconds",
        {"train.py": [first_step(recipe) for _ in range(arguments.rounds)]},
    )


def first_step(recipe: Path) -> float:
    """Seconds from starting `train.py` to the line that tells of its first step."""
    command = [sys.executable, "train.py", str(recipe), "--run.overwrite=true"]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                took = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"train.py ended with {process.returncode}")
    return took
