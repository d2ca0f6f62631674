"""The model card: what the model is, what it was trained on, how to load it."""

import json

from huggingface_hub import EvalResult, ModelCardData

TEMPLATE = """---
{metadata}
---

# {name}

A `{model_type}` with {parameters:,} parameters, trained from scratch with CleanGPT on {data}:
{steps:,} steps, {tokens:,} tokens, {seconds:,.0f} seconds.

{results}

## Load it

```python
import cleangpt  # registers the model; without it, pass trust_remote_code=True below
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{location}")
tokenizer = AutoTokenizer.from_pretrained("{location}")
{example}
```

## Recipe

```yaml
{recipe}
```
"""

TEXT_EXAMPLE = """
inputs = tokenizer({prompt}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, do_sample=True)[0]))"""

ARITHMETIC_EXAMPLE = """
inputs = tokenizer({prompt}, return_tensors="pt")
text = tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True)
print(text[len({prompt}):]{order})  # the answer"""


def model_card(recipe, location: str, parameters: int, progress, metrics: dict[str, float], prompt: str) -> str:
    """The card's text.

    Args:
        recipe: as resolved. location: folder or repository to load from. parameters: their number.
        progress: of the run. metrics: the latest `eval/` values, and `test/` values where there are any.
        prompt: a text to continue in the example.
    """
    arithmetic = recipe.data.path in ("addition", "multiplication")
    data = f"{recipe.data.num_digits}-digit {recipe.data.path}" if arithmetic else _dataset_name(recipe.data)
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=recipe.data.path,
            dataset_name=data,
            dataset_split="test" if name.startswith("test/") else "validation",
            metric_type=name.split("/")[1],
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cleangpt", recipe.model.get("model_type", "finetuned")],
        datasets=[recipe.data.path] if "/" in recipe.data.path else None,
        model_name=recipe.run.name,
        eval_results=results or None,
    )
    example = ARITHMETIC_EXAMPLE if arithmetic else TEXT_EXAMPLE
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
    return TEMPLATE.format(
        metadata=metadata.to_yaml(),
        name=recipe.run.name,
        model_type=recipe.model.get("model_type", "model"),
        parameters=parameters,
        data=data,
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.elapsed_s,
        results=f"| metric | value |\n|---|---|\n{rows}" if rows else "",
        location=location,
        example=example.format(
            prompt=json.dumps(prompt, ensure_ascii=False), order="[::-1]" if recipe.data.reverse_answer else ""
        ),
        recipe=recipe.to_yaml().strip(),
    )


def _dataset_name(data) -> str:
    if data.data_files is None:
        return data.path
    files = data.data_files.values() if isinstance(data.data_files, dict) else [data.data_files]
    names = [file for value in files for file in ([value] if isinstance(value, str) else value)]
    return ", ".join(name.rsplit("/", 1)[-1] for name in names)
