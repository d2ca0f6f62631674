"""The model card, which is also the run's report: README.md from the template card.md, and curves.png."""

import io
import json
import re
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from ..files import digest
from ..recipe.keys import ARITHMETIC, FILES, Data, Recipe
from .progress import Progress

HOME = "https://github.com/wxc971231/CleanGPT"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a card says, as plain values: a background thread writes it while training goes on."""

    recipe: Recipe  # as resolved
    model_type: str
    native: str | None  # the plain architecture it exports to (gpt2, llama, qwen3); None if it is transformers' own
    parameters: int
    progress: Progress  # `metrics` may hold those of the test split too
    split_sizes: dict[str, int]  # problems (arithmetic) or tokens (text) in each split
    example: str  # a prompt
    num_processes: int
    hardware: str  # `describe_hardware`
    samples: tuple[str, ...] | None = None  # texts written by the final model; None while training


def write_card(folder: Path, report: Report) -> None:
    """Writes the README.md of a saved model and, for the final model, curves.png."""
    folder_of_run, data, final = report.recipe.folder, report.recipe.data, report.samples is not None
    recipe = Recipe.model_validate(without_paths(report.recipe.to_dict()))
    if final:
        draw_curves(folder_of_run / "metrics.jsonl", folder / "curves.png")
    prompt = json.dumps(report.example, ensure_ascii=False)  # a Python literal too
    pipeline = f'import transformers; print(transformers.pipeline("text-generation", "exported")({prompt}))'
    backticks = re.findall("`+", "".join(report.samples or ()))
    card = ModelCard.from_template(
        card_metadata(report),
        str(Path(__file__).with_name("card.md")),
        report=report,
        recipe=recipe,
        final=final,
        location=str(folder_of_run / ("final" if final else "best")),  # see `published_files`
        dataset=dataset_name(data),
        arithmetic=data.path in ARITHMETIC,
        on_hub=is_on_hub(data),
        licence=dataset_license(data.path) if final and is_on_hub(data) else None,  # asks the Hub only once a run
        prompt=prompt,
        pipeline=shlex.quote(pipeline),
        home=HOME,
        fence=max(["``", *backticks], key=len) + "`",
        versions=", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate")),
        command=train_command(report.num_processes),
    )
    card.save(folder / "README.md")


def published_files(files: dict[str, Path], repo_id: str) -> dict[str, bytes]:
    """Those of a model's files that are published otherwise than they are here: README.md, recipes, manifests.

    `from_pretrained("outputs/adder/final")` becomes `from_pretrained("me/adder")`, and so does the folder wherever else
    it appears. Recipes lose the paths of this machine, and manifests get the changed files' digests.
    """
    changed: dict[str, bytes] = {}
    for name, file in files.items():
        if Path(name).name == "recipe.yaml":
            recipe = without_paths(yaml.safe_load(file.read_text(encoding="utf-8")))
            changed[name] = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
    if "README.md" in files:
        text = files["README.md"].read_text(encoding="utf-8")
        if location := re.search(r'from_pretrained\("([^"]+)"', text):
            changed["README.md"] = text.replace(location[1], repo_id).encode()
    for name in [name for name in files if Path(name).name == "manifest.json"]:
        manifest, folder = json.loads(files[name].read_text()), Path(name).parent
        for entry in manifest:
            if content := changed.get((folder / entry).as_posix()):
                manifest[entry] = digest(io.BytesIO(content))
        changed[name] = json.dumps(manifest, indent=1).encode()
    return changed


def without_paths(value: Any, key: str = "") -> Any:
    """A recipe's value without paths of this machine: one that leaves the working directory becomes its last name."""
    if isinstance(value, dict):
        return {name: without_paths(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one, key) for one in value]
    if not isinstance(value, str) or not value.startswith(("/", "~", "..")) or key in ("prompts", "template"):
        return value
    path = Path(value)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def card_metadata(report: Report) -> ModelCardData:
    """The card's YAML header, with the metrics as evaluation results."""
    data, source = report.recipe.data, report.recipe.model.get("init_from")
    results = []
    for metric, value in report.progress.metrics.items():
        split, kind, *label = metric.split("/", 2)
        result = EvalResult(
            task_type="text-generation",
            dataset_type=without_paths(data.path) or "mixture",
            dataset_name="".join(label) or dataset_name(data),
            dataset_config="".join(label) or None,  # without it, results of all labels get the first one's name
            dataset_split="test" if split == "test" else "validation",
            metric_type=kind,
            metric_value=value,
        )
        results.append(result)
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cleangpt", report.model_type],
        datasets=[part.path for part in data.parts.values() if is_on_hub(part)] or None,
        base_model=source if source is not None and not Path(source).exists() else None,
        model_name=report.recipe.run.name,
        eval_results=results or None,
    )


def is_on_hub(data: Data) -> bool:
    """Whether the training data is a dataset on the Hub."""
    return data.path not in (*ARITHMETIC, *FILES, "") and not Path(data.path).exists()


def dataset_name(data: Data) -> str:
    """The training data's name: the kind of problem, the Hub id, or the file names."""
    if data.path in ARITHMETIC:
        return f"{data.num_digits}-digit {data.path}"
    if data.sources:
        return ", ".join(dataset_name(part) for part in data.parts.values())
    names = [file.rsplit("/", 1)[-1] for files in data.files.values() for file in files]
    return ", ".join(names) or without_paths(data.path)


def dataset_license(path: str) -> str | None:
    """The licence of a dataset on the Hub; None if it states none or the Hub does not answer."""
    try:
        card = HfApi().dataset_info(path, timeout=5).card_data
    except Exception:  # offline, gated, ...
        return None
    return card.get("license") if card is not None else None


def train_command(num_processes: int) -> str:
    """The command that was typed or, for a run started from Python, an equivalent one."""
    launcher = "python" if num_processes == 1 else f"torchrun --nproc_per_node={num_processes}"
    typed = sys.argv[1:] if Path(sys.argv[0]).name == "train.py" else ["recipe.yaml"]
    return f"{launcher} train.py {shlex.join(map(_argument_without_paths, typed))}"


def _argument_without_paths(argument: str) -> str:
    key, equals, text = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    value = yaml.safe_load(text)
    shared = without_paths(value, key.split(".")[-1])
    if shared == value:
        return argument
    flow = shared if isinstance(shared, str) else yaml.safe_dump(shared, default_flow_style=True, width=10**6).strip()
    return f"{key}{equals}{flow}"


def draw_curves(metrics: Path, picture: Path) -> None:
    """Draws loss, learning rate and, for arithmetic, accuracy of a `metrics.jsonl` over the steps as a PNG file."""
    from matplotlib.figure import Figure  # half a second that only a picture needs

    points: dict[str, list[tuple[int, float]]] = {}
    for line in map(json.loads, metrics.read_text().splitlines()):
        for key, value in line.items():
            if value is not None:
                points.setdefault(key, []).append((line["step"], value))
    panels = {
        "loss (nats per token)": ["train/loss", "eval/loss"],
        "learning rate": ["lr"],
        "accuracy": ["eval/accuracy"],
    }
    panels = {title: found for title, keys in panels.items() if (found := [key for key in keys if key in points])}
    # Not `DataFrame.plot`: it imports pyplot, which picks a backend for the whole process.
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for key in keys:
            axes.plot(*zip(*points[key], strict=True), label=key, marker="." if key.startswith("eval/") else "")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(frameon=False)
        if title == "accuracy":
            axes.set_ylim(-0.02, 1.02)
    figure.savefig(picture, dpi=120)
