"""Recipes read from YAML and the command line, and checked.

    python train.py recipes/adder.yaml --training.max_steps=100 --optimizer.lr=3e-4

OmegaConf merges (defaults < `base` < file < command line), pydantic checks types and ranges, `checks.py` what concerns
several keys. All mistakes are reported at once.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..errors import UserError
from .checks import check_keys, check_model
from .keys import Recipe
from .values import ReadOnly
from .wording import help_text, translate


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and its bases, applies `--section.key=value` overrides; one `UserError` has all mistakes."""
    layers, problems = _read_with_bases(Path(path), ()), []
    for text in overrides:
        if not text.startswith("--") or "=" not in text:
            problems.append((text, "expected --section.key=value"))
            continue
        try:
            layers.append(OmegaConf.from_dotlist([_quote_template(text[2:])]))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            problems.append((text, f"expected a value as YAML writes it: {error}"))
    try:
        _use_standard_names(layers, OmegaConf.select(OmegaConf.merge(*layers), "model.model_type"))
        merged = OmegaConf.to_container(OmegaConf.merge(*layers))
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(*problems, (str(path), f"sections cannot be merged: {error}")) from error
    return parse_recipe(merged, Path(path).stem, problems)


def _quote_template(assignment: str) -> str:
    """`data.template={question}` as YAML reads it: text, where braces would make a mapping."""
    key, _, value = assignment.partition("=")
    is_yaml = key != "data.template" or value == "null" or value[:1] in ("'", '"')
    return assignment if is_yaml else f"{key}={json.dumps(value)}"


def parse_command(arguments: Sequence[str]) -> Recipe:
    """The recipe of a command line such as `recipes/adder.yaml --training.max_steps=100`; `--help` prints and exits."""
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        raise SystemExit(0)
    path = next((argument for argument in arguments if not argument.startswith("-")), None)
    if path is None:
        raise UserError(("RECIPE.yaml", "expected the path of a recipe; `train.py --help` lists its keys"))
    place = arguments.index(path)
    return load_recipe(path, [*arguments[:place], *arguments[place + 1 :]])


def parse_recipe(values: Any, default_name: str, known: Iterable[tuple[str, str]] = (), check: bool = True) -> Recipe:
    """Makes a recipe of plain Python, the inverse of `Recipe.to_dict`; one `UserError` has all mistakes.

    Args:
        default_name: of the run.
        known: problems found before, to be reported with the others.
        check: whether to check what concerns several keys or this machine.
    """
    problems: dict[str, str] = {}
    try:
        recipe = Recipe.model_validate(values)
    except pydantic.ValidationError as error:
        problems = dict(translate(item) for item in error.errors())
        # Mistakes that do not depend on these are reported with them.
        rest = functools.reduce(_without, problems, values)
        try:
            if problems.keys() & {"data", "data.path"}:
                rest = {**rest, "data": {**rest.get("data", {}), "path": "text"}}
            recipe = Recipe.model_validate(rest)
        except pydantic.ValidationError:
            raise UserError(*known, *problems.items()) from error
    if recipe.run.name is None:
        recipe = recipe.changed(run={"name": default_name})
    if check:
        model, wrong = check_model(recipe.model) if "model" not in problems else (recipe.model, {})
        recipe = recipe.model_copy(update={"model": ReadOnly(model)})
        for keys, message in check_keys(recipe):
            if not any(f"{key}.".startswith(f"{wrong_key}.") for key in keys for wrong_key in problems):
                wrong.setdefault(keys[0], message)
        problems.update(wrong)
    if found := [*known, *problems.items()]:
        raise UserError(*found)
    return recipe


def _without(values: Any, key: str) -> Any:
    """`values` without a dotted key."""
    name, _, rest = key.partition(".")
    if isinstance(values, list) and name.isdigit():
        return [_without(old, rest) if str(i) == name else old for i, old in enumerate(values)]
    if not isinstance(values, dict) or name not in values:
        return values
    return {one: _without(old, rest) if one == name else old for one, old in values.items() if rest or one != name}


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> list[DictConfig]:
    """The configurations of `path`'s bases, lowest first, then its own."""
    if path.resolve() in above:
        raise UserError(("base", f"{path} builds on itself"))
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise UserError((str(path), f"expected a recipe file: {error.strerror}")) from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError((str(path), f"expected YAML: {error}")) from error
    if not isinstance(config, DictConfig):
        raise UserError((str(path), "expected sections with keys, such as `training:`"))
    as_written: Any = OmegaConf.to_container(config)  # `${...}` is plain text here
    base = as_written.get("base")
    if base is None:
        return [config]
    del config["base"]
    if not isinstance(base, str):
        raise UserError((f"{path}: base", f"expected the path of a recipe, got {base!r}"))
    return [*_read_with_bases(path.parent / base, (*above, path.resolve())), config]


def _use_standard_names(layers: list[DictConfig], model_type: Any) -> None:
    """Renames model keys such as `n_embd` in place, so that a layer overrides those below it under any name."""
    from transformers import CONFIG_MAPPING

    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    names = CONFIG_MAPPING[model_type].attribute_map if known else {}
    for model in [layer.model for layer in layers if isinstance(layer.get("model"), DictConfig)]:
        for key in [key for key in model if key in names]:
            if names[key] not in model:
                model[names[key]] = model.pop(key)
