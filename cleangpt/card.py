"""The model card, which is the run's report: what the model is, how to load it, what it was trained on and how it went.

README.md with the Hub's metadata on top, and beside it curves.png, drawn from the run's metrics.jsonl.
"""

import json
import platform
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from huggingface_hub import EvalResult, HfApi, ModelCardData

from .recipe import ARITHMETIC, FILES

TEMPLATE = """---
{metadata}
---

# {name}

{summary}

## Load it

{load}

## How it went

{results}

{curves}

{samples}

## Data

{data}

## Training

| | |
|---|---|
{facts}

```bash
{command}
```

<details><summary>recipe.yaml, as resolved</summary>

```yaml
{recipe}
```

</details>

## Limits

{limits}
"""

OURS = """With `cleangpt` installed:

```python
import cleangpt  # registers the model
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")
{example}
```

Without it, with the code that the model brings along:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{location}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{location}", trust_remote_code=True)
```

Exported, as a plain {native}, in every client of that:

```bash
python scripts/export.py {location} exported
python -c "import transformers; print(transformers.pipeline('text-generation', 'exported')({prompt_in_shell}))"
```"""

THEIRS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")
{example}
```

Or in one line: `transformers.pipeline("text-generation", "{location}")`. It is a plain {native}, so every client of
that loads it too."""

TEXT_EXAMPLE = """
inputs = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True)[0]))"""

ARITHMETIC_EXAMPLE = """
inputs = tokenizer({prompt}, return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)
print(text[len({prompt}):]{order})  # the answer"""


def write_card(folder: Path, run, samples: list[str] | None) -> None:
    """Writes README.md into a saved model's folder, and for the final one curves.png.

    Args:
        folder: where to write. run: see `run.py`, its progress with the metrics to show.
        samples: texts that the final model wrote; None while the run is not over.
    """
    curves = samples is not None and draw_curves(run.recipe.folder / "metrics.jsonl", folder / "curves.png")
    (folder / "README.md").write_text(model_card(run, samples, curves), encoding="utf-8")


def model_card(run, samples: list[str] | None, curves: bool) -> str:
    """The card's text; `curves` says whether there is a picture, the rest is as in `write_card`."""
    recipe, data, progress = run.recipe, run.recipe.data, run.progress
    metrics, final = progress.metrics, samples is not None
    network = run.accelerator.unwrap_model(run.model)
    kind = network.config.model_type
    arithmetic = data.path in ARITHMETIC
    name = f"{data.num_digits}-digit {data.path}" if arithmetic else dataset_name(data)
    location = str(recipe.folder / ("final" if final else "best"))  # `hub.py` puts the repository in its place
    prompt = json.dumps(run.data.example, ensure_ascii=False)
    example = (ARITHMETIC_EXAMPLE if arithmetic else TEXT_EXAMPLE).format(
        prompt=prompt, order="[::-1]" if data.reverse_answer else ""
    )
    native = {"nanogpt": "gpt2", "nanollama": "qwen3" if getattr(network.config, "use_qk_norm", False) else "llama"}
    load = (OURS if kind in native else THEIRS).format(
        location=location, example=example, native=native.get(kind, kind), prompt_in_shell=_quoted(run.data.example)
    )
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    origin = f"fine-tuned from `{recipe.model['init_from']}`" if "init_from" in recipe.model else "trained from scratch"
    return TEMPLATE.format(
        metadata=_metadata(recipe, kind, name, metrics).to_yaml(),
        name=recipe.run.name,
        summary=f"A `{kind}` with {network.num_parameters():,} parameters, {origin} with CleanGPT on {name}: "
        f"{progress.step:,} steps, {progress.tokens:,} tokens, {progress.elapsed_s:,.0f} seconds.",
        load=load,
        results=f"| metric | value |\n|---|---|\n{rows}" if rows else "Nothing was measured.",
        curves="![Loss, learning rate and accuracy over the run](curves.png)" if curves else "",
        samples=_samples(samples or []),
        data=_data(run, name, final),
        facts="\n".join(f"| {key} | {value} |" for key, value in _facts(run).items()),
        command=_command(run.accelerator.num_processes),
        recipe=recipe.to_yaml().strip(),
        limits=_limits(run, arithmetic),
    )


def _metadata(recipe, kind: str, name: str, metrics: dict[str, float]) -> ModelCardData:
    data = recipe.data
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.path,
            dataset_name=name,
            dataset_split="test" if metric.startswith("test/") else "validation",
            metric_type=metric.split("/")[1],
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cleangpt", kind],
        datasets=[data.path] if data.path not in (*ARITHMETIC, *FILES) else None,
        base_model=recipe.model.get("init_from") if _is_hub_id(recipe.model.get("init_from")) else None,
        model_name=recipe.run.name,
        eval_results=results or None,
    )


def _is_hub_id(source: str | None) -> bool:
    return source is not None and not Path(source).exists()


def dataset_name(data) -> str:
    """What the training data is called: the Hub id, or the files' names."""
    if data.data_files is None:
        return data.path
    files = data.data_files.values() if isinstance(data.data_files, dict) else [data.data_files]
    names = [file for value in files for file in ([value] if isinstance(value, str) else value)]
    return ", ".join(name.rsplit("/", 1)[-1] for name in names)


def dataset_license(path: str) -> str | None:
    """The licence that the Hub names for a dataset; None when it names none or cannot be asked."""
    try:
        return HfApi().dataset_info(path, timeout=5).card_data.license
    except Exception:  # offline, gated, no card: whatever it is, the card says that nothing is known
        return None


def _data(run, name: str, final: bool) -> str:
    data, splits = run.recipe.data, run.data.splits
    if data.path in ARITHMETIC:
        sizes = ", ".join(f"{len(split):,} to {purpose}" for purpose, split in splits.items())
        return (
            f"{name.capitalize()}, generated; all ordered pairs, cut into disjoint splits: {sizes}. No licence applies."
        )
    sizes = ", ".join(f"{split.num_targets + 1:,} tokens to {purpose}" for purpose, split in splits.items())
    if data.path in FILES:
        return f"{name}: {sizes}. Its licence is unstated."
    licence = dataset_license(data.path) if final else None  # asked once
    source = f"[{data.path}](https://huggingface.co/datasets/{data.path})"
    return f"{source}: {sizes}. Its licence is {f'`{licence}`' if licence else 'unstated'}."


def _facts(run) -> dict[str, str]:
    recipe, progress = run.recipe, run.progress
    section = recipe.optimizer
    return {
        "hardware": hardware(run.accelerator),
        "seconds": f"{progress.elapsed_s:,.0f}",
        "steps": f"{progress.step:,} of {run.max_steps:,}" + (", stopped early" if progress.stopped_early else ""),
        "tokens": f"{progress.tokens:,}",
        "sequences in a step": f"{recipe.training.batch_size:,}",
        "optimizer": section.name,
        "learning rate": f"{section.lr:g} at the peak, {recipe.schedule.lr.style}",
        "weight decay": f"{section.weight_decay:g}",
        "precision": recipe.training.mixed_precision,
        "seed": str(recipe.run.seed),
        "versions": ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "accelerate")),
    }


def hardware(accelerator) -> str:
    """What the run trained on, "2 × NVIDIA H100" or a CPU's name with its threads."""
    number = f"{accelerator.num_processes} × " if accelerator.num_processes > 1 else ""
    if accelerator.device.type == "cuda":
        return number + torch.cuda.get_device_name(accelerator.device)
    if accelerator.device.type != "cpu":
        return f"{number}{accelerator.device.type} of {platform.machine()}"
    name = platform.processor() or platform.machine()
    file = Path("/proc/cpuinfo")
    if file.exists():
        lines = [line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if "model name" in line]
        name = lines[0] if lines else name
    return f"{number}{name}, {torch.get_num_threads()} threads"


def _command(num_processes: int) -> str:
    """What was typed; for a run started from Python, what would do the same."""
    launcher = "python" if num_processes == 1 else f"torchrun --nproc_per_node={num_processes}"
    typed = sys.argv if Path(sys.argv[0]).name == "train.py" else ["train.py", "recipe.yaml"]
    return f"{launcher} {shlex.join(typed)}"


def _samples(samples: list[str]) -> str:
    if not samples:
        return ""
    ticks = max((len(run) for run in re.findall("`+", "".join(samples))), default=0)
    fence = "`" * max(3, ticks + 1)
    return "What it writes:\n\n" + "\n\n".join(f"{fence}text\n{sample.strip(chr(10))}\n{fence}" for sample in samples)


def _limits(run, arithmetic: bool) -> str:
    data, positions = run.recipe.data, run.data.splits["train"].sequence_length
    if arithmetic:
        return (
            f"It knows {data.path} of {data.num_digits}-digit numbers, written exactly as above, and nothing else: "
            "other lengths, spaces or words get an answer too, a meaningless one. Accuracy is measured on problems "
            "that it was not trained on, drawn from the same numbers."
        )
    return (
        f"A small language model that reads at most {positions:,} tokens. It writes in the manner of its training text "
        "and has seen no other: it follows no instructions, what it says is no source of facts, and what is wrong or "
        "offensive in the text can come back. The figures above are for text of the same kind."
    )


def _quoted(text: str) -> str:
    """A Python string inside a shell's double quotes."""
    return "".join(f"\\{character}" if character in '\\"`$' else character for character in repr(text))


def draw_curves(metrics: Path, path: Path) -> bool:
    """Draws loss, learning rate and, where there is one, accuracy over the steps, as a PNG file.

    Returns:
        Whether there was anything to draw.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    panels = [
        ("loss, nats a token", {"train/loss": "train", "eval/loss": "validation"}),
        ("learning rate", {"lr": "learning rate"}),
        ("accuracy", {"eval/accuracy": "validation"}),
    ]
    panels = [
        (title, keys) for title, keys in panels if any(line.get(key) is not None for line in lines for key in keys)
    ]
    if not panels:
        return False
    figure, row = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3), layout="constrained", squeeze=False)
    for axes, (title, keys) in zip(row[0], panels, strict=True):
        for key, label in keys.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=label, marker="." if key.startswith("eval/") else "")
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if len(keys) > 1:
            axes.legend(frameon=False)
        if title == "accuracy":
            axes.set_ylim(-0.02, 1.02)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
