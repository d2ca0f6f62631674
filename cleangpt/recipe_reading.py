"""Recipes read from YAML and the command line, and checked.

    python train.py recipes/adder.yaml --training.max_steps=100 --optimizer.lr=3e-4

OmegaConf reads and merges (defaults < `base` < file < command line), pydantic checks types and ranges, `_check_*` what
concerns several keys. All mistakes are told at once.
"""

import argparse
import copy
import dataclasses
import difflib
import glob
import importlib.util
import json
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .errors import UserError
from .recipe import ARITHMETIC, FILES, Data, Recipe
from .schedules import WSD_DECAY


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and what it builds on, applies `--section.key=value` overrides, checks everything.

    Raises:
        UserError: with one problem for each mistake.
    """
    layers, problems = _read_with_bases(Path(path), ()), []
    for text in overrides:
        if not text.startswith("--") or "=" not in text:
            problems.append((text, "expected --section.key=value"))
            continue
        try:
            layers.append(OmegaConf.from_dotlist([text[2:]]))
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            problems.append((text, f"expected a value as YAML writes it: {error}"))
    try:
        model_type = OmegaConf.select(OmegaConf.merge(*layers), "model.model_type")
        for layer in layers:
            _use_standard_names(layer, model_type)
        merged = OmegaConf.merge(*layers)
    except (OmegaConfBaseException, TypeError) as error:
        raise UserError(*problems, (str(path), f"sections cannot be merged: {error}")) from error
    try:
        recipe = parse_recipe(OmegaConf.to_container(merged), default_name=Path(path).stem)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(*problems)
    return recipe


def parse_recipe(values: dict, default_name: str) -> Recipe:
    """Checks sections given as plain Python (`Recipe.to_dict` gives them back) and makes a recipe of them."""
    adapter = pydantic.TypeAdapter(Recipe)
    problems = {}
    try:
        recipe = adapter.validate_python(values)
    except pydantic.ValidationError as error:
        problems = dict(_translate(item) for item in error.errors())
        # What else is wrong is told in the same go, as far as it does not depend on what is wrong already.
        rest = _without(values, problems)
        if "data" in problems or "data.path" in problems:
            rest["data"] = {**rest.get("data", {}), "path": "text"}
        try:
            recipe = adapter.validate_python(rest)
        except (pydantic.ValidationError, TypeError):
            raise UserError(*problems.items()) from error
    if recipe.run.name is None:
        recipe.run.name = default_name
    wrong = {}
    if "model" not in problems:
        recipe.model, wrong = _check_model(recipe.model)
    for keys, message in (*_check_data(recipe), *_check_training(recipe)):
        if not any(f"{key}.".startswith(f"{known}.") for key in keys for known in problems):
            wrong.setdefault(keys[0], message)
    problems.update(wrong)
    if problems:
        raise UserError(*problems.items())
    return recipe


def _without(values: dict, keys: dict) -> dict:
    """`values` without the dotted `keys`."""
    values = copy.deepcopy(values)
    for key in keys:
        *parents, name = key.split(".")
        section = values
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(name, None)
    return values


def parse_command(arguments: Sequence[str]) -> Recipe:
    """The recipe of a command line, `recipes/adder.yaml --training.max_steps=100` say; prints help and exits on -h."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="train.py RECIPE.yaml [--section.key=value ...]",
        description="Trains the model of a recipe. Every key of the file can be set on the command line as well:",
        epilog="\n".join(_help_lines(Recipe)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help=argparse.SUPPRESS)
    parsed, overrides = parser.parse_known_args(arguments)
    if parsed.recipe is None:
        raise UserError(("RECIPE.yaml", "expected the path of a recipe; `train.py --help` lists its keys"))
    return load_recipe(parsed.recipe, overrides)


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> list:
    """The configurations of `path`'s bases, lowest first, then its own."""
    if path.resolve() in above:
        raise UserError(("base", f"{path} builds on itself"))
    try:
        config = OmegaConf.load(path)
    except OSError as error:
        raise UserError((str(path), f"expected a recipe file: {error.strerror}")) from error
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise UserError((str(path), f"expected YAML: {error}")) from error
    if not OmegaConf.is_dict(config):
        raise UserError((str(path), "expected sections with keys, such as `training:`"))
    base = OmegaConf.to_container(config).get("base")  # as written: `${...}` is text here
    if base is None:
        return [config]
    del config["base"]
    if not isinstance(base, str):
        raise UserError((f"{path}: base", f"expected the path of a recipe, got {base!r}"))
    return [*_read_with_bases(path.parent / base, (*above, path.resolve())), config]


def _use_standard_names(layer, model_type: str | None) -> None:
    """Renames model keys such as `n_embd` in place, so that a layer above overrides a layer below under any name."""
    from transformers import CONFIG_MAPPING

    model = layer.get("model")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    names = CONFIG_MAPPING[model_type].attribute_map if known else {}
    for key in [key for key in model if key in names] if OmegaConf.is_dict(model) else []:
        if names[key] not in model:
            model[names[key]] = model.pop(key)


# What the keys are, in words


def _help_lines(cls: type, prefix: str = "") -> Iterator[str]:
    for name, field in cls.__pydantic_fields__.items():
        inner = _section_in(field.annotation)
        if inner is not None:
            if not prefix:
                yield f"\n{name}: {inner.__doc__}"
            yield from _help_lines(inner, f"{prefix}{name}.")
        elif name == "model":
            yield "\nmodel: The network."
            yield from _entry("--model.KEY", field.description)
        else:
            default = json.dumps(field.get_default(call_default_factory=True), default=str)
            shown = "" if field.is_required() else f"  [{default}]"
            yield from _entry(
                f"--{prefix}{name}{shown}", f"{field.description} ({_allowed(field.annotation, field.metadata)})"
            )


def _entry(head: str, text: str) -> Iterator[str]:
    yield f"  {head}"
    yield textwrap.fill(" ".join(text.split()), 110, initial_indent=" " * 6, subsequent_indent=" " * 6)


def _section_in(annotation) -> type | None:
    """The section class in `Section` or `Section | None`."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((option for option in options if dataclasses.is_dataclass(option)), None)


def _allowed(annotation, metadata: Sequence = ()) -> str:
    """What a key may hold, in words."""
    for text in (*metadata, *getattr(annotation, "__metadata__", ())):
        if isinstance(text, str):
            return text
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _allowed(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(_allowed(option) for option in arguments))
    if origin is list:
        return f"a list of {_allowed(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {_allowed(arguments[0])} each"
    if origin is dict:
        return f"a mapping from names to {_allowed(arguments[1])}"
    if dataclasses.is_dataclass(annotation):
        return "keys: " + ", ".join(annotation.__pydantic_fields__)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", types.NoneType: "null"}
    return words.get(annotation, str(annotation))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]}?" if close else f"expected one of {', '.join(known)}"


def _translate(error: dict) -> tuple[str, str]:
    """pydantic's error as (dotted key, what was expected and what was there)."""
    cls, keys, field = Recipe, [], None
    for part in error["loc"]:
        inner = cls if field is None else _section_in(field.annotation)
        if inner is None or (
            inner.__pydantic_fields__.get(part) is None and error["type"] != "unexpected_keyword_argument"
        ):
            break  # inside a list, a mapping or a union: the key above it is what the user wrote
        keys.append(str(part))
        if part not in inner.__pydantic_fields__:
            return ".".join(keys), f"unknown key, {_nearest(part, list(inner.__pydantic_fields__))}"
        field = inner.__pydantic_fields__[part]
    if field is None:
        return ".".join(map(str, error["loc"])) or "recipe", f"expected {_allowed(Recipe)}, got {error['input']!r}"
    key = ".".join(keys)
    if error["type"] == "missing":
        return key, f"missing, expected {_allowed(field.annotation, field.metadata)}"
    return key, f"expected {_allowed(field.annotation, field.metadata)}, got {error['input']!r}"


# What concerns several keys


def _check_model(model: dict) -> tuple[dict, dict[str, str]]:
    """Checks the model section against the model's own configuration class, which by itself would accept any key.

    Returns:
        The section with every key under its standard name, and the problems.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = {key: value for key, value in model.items() if value is not None}
    ours = {key: model[key] for key in ("model_type", "init_from", "attn_implementation") if key in model}
    for key, value in ours.items():
        if not isinstance(value, str):
            return model, {f"model.{key}": f"expected text, got {value!r}"}
    options = {key: value for key, value in model.items() if key not in ours}
    model_type = ours.get("model_type")
    if model_type is None and "init_from" in ours:
        return model, {}  # the configuration comes with the weights
    causal = ["nanogpt", "nanollama", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if model_type not in causal:
        near = difflib.get_close_matches(str(model_type), causal, n=1) or ["nanogpt"]
        return model, {
            "model.model_type": "expected nanogpt, nanollama or a causal language model of transformers, "
            f"got {model_type!r}, did you mean {near[0]}?"
        }

    config_class = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    own = sorted(known - {field.name for field in dataclasses.fields(PreTrainedConfig)})
    problems, written = {}, {}  # written: the standard name -> the name in the recipe
    for key in options:
        name = config_class.attribute_map.get(key, key)
        if key not in known:
            problems[f"model.{key}"] = f"unknown key of {model_type}, {_nearest(key, own)}"
        elif name in written:
            problems[f"model.{key}"] = f"the same as model.{written[name]}, give one of them"
        else:
            written[name] = key
    standard = {name: options[key] for name, key in written.items()}
    heads, groups = standard.get("num_attention_heads"), standard.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and (groups < 1 or heads % groups):
        allowed = f"expected a divisor of num_attention_heads {heads}, got {standard.pop('num_key_value_heads')}"
        problems[f"model.{written['num_key_value_heads']}"] = allowed
    trial = dict(standard)
    while True:
        try:
            AutoConfig.for_model(model_type, **trial)
            return {**ours, **standard}, problems
        except Exception as error:  # each configuration class raises its own kinds
            message = str(error.__cause__ or error).strip().split("\n")[0]
            name = next((name for name in trial if f"'{name}'" in str(error).split("\n")[0]), None)
            if name is None:
                name, _, rest = message.partition(": ")
                key = f"model.{written.get(name, name)}" if name in known else "model"
                return model, {**problems, key: rest if name in known else message}
            allowed = _allowed(config_class.__dataclass_fields__[name].type)
            problems[f"model.{written[name]}"] = f"expected {allowed}, got {trial.pop(name)!r}"


def _check_data(recipe: Recipe) -> Iterator[tuple[list[str], str]]:
    """The keys that a mistake concerns, the one to be told first, and what is wrong."""
    data, tokenizer = recipe.data, recipe.tokenizer
    if data.path in ARITHMETIC:
        if data.data_files is not None:
            yield (
                ["data.data_files", "data.path"],
                f"{data.path} is generated and reads no file, got {data.data_files!r}",
            )
        if tokenizer.path is not None or tokenizer.train is not None:
            yield ["tokenizer", "data.path"], f"{data.path} brings its own tokenizer, leave the section out"
        if data.block_size is not None:
            message = f"one problem of {data.path} is one sequence, leave it out, got {data.block_size}"
            yield ["data.block_size", "data.path"], message
        if data.min_digits is not None and data.min_digits > data.num_digits:
            yield (
                ["data.min_digits", "data.num_digits"],
                f"expected at most num_digits {data.num_digits}, got {data.min_digits}",
            )
        if not data.zero_pad and not data.signs:
            message = "without signs only zero_pad tells the operands apart, set one of them to true"
            yield ["data.signs", "data.zero_pad"], message
    else:
        if (tokenizer.path is None) == (tokenizer.train is None):
            keys = ["tokenizer", "tokenizer.path", "tokenizer.train", "data.path"]
            yield keys, "expected one of path and train, with the other null"
        if data.template is not None:
            yield from _check_template(data)
        if data.path in FILES and not data.data_files:
            yield ["data.data_files", "data.path"], f"data.path {data.path} needs files, got {data.data_files}"
        elif data.path not in FILES and Path(data.path).suffix and Path(data.path).is_file():
            yield (
                ["data.path"],
                f"expected text, json, parquet, csv or a Hub id, got the file {data.path!r}: "
                f"use --data.path=text --data.data_files={data.path}",
            )
        for file in local_files(data):
            if not glob.glob(file, recursive=True):
                yield ["data.data_files", "data.path"], f"expected an existing file, got {file!r}"
            for match in glob.glob(file, recursive=True):
                if Path(match).is_dir():
                    yield ["data.data_files", "data.path"], f"expected a file, got the folder {match!r}"
                elif Path(match).stat().st_size == 0:
                    yield ["data.data_files", "data.path"], f"expected text, got the empty file {match!r}"
    split = data.split or {}
    if split and ("train" not in split or sum(split.values()) > 1 + 1e-9):
        yield ["data.split"], f"expected fractions that add up to at most 1, train among them, got {split}"
    if tokenizer.train is not None and tokenizer.train.kind == "char" and tokenizer.train.vocab_size is not None:
        message = "char takes as many ids as there are characters, leave it out"
        yield ["tokenizer.train.vocab_size", "tokenizer.train.kind"], message


def _check_template(data: Data) -> Iterator[tuple[list[str], str]]:
    expected = f"expected columns in braces, as in {{question}} {{answer}}, got {data.template!r}"
    try:
        columns = data.columns
    except ValueError as error:
        yield ["data.template"], f"{expected}: {error}"
    else:
        if not columns or any(not name or set(name) & set(".[") for name in columns):
            yield ["data.template"], expected
        elif data.path == "text":
            message = "lines of text have no columns, expected json, parquet, csv or a Hub id as data.path"
            yield ["data.template", "data.path"], message


def local_files(data: Data) -> list[str]:
    """The files, or patterns of files, on this machine that `data.data_files` names."""
    if data.path not in FILES or data.data_files is None:
        return []
    values = data.data_files.values() if isinstance(data.data_files, dict) else [data.data_files]
    files = [file for value in values for file in ([value] if isinstance(value, str) else value)]
    return [file for file in files if "://" not in file]


def _check_training(recipe: Recipe) -> Iterator[tuple[list[str], str]]:
    """As `_check_data`."""
    training = recipe.training
    if (training.max_steps is None) == (training.max_epochs is None):
        keys = ["training.max_steps", "training.max_epochs"]
        yield keys, "expected one of max_steps and max_epochs, with the other null"
    if training.micro_batch_size is not None and training.micro_batch_size > training.batch_size:
        yield (
            ["training.micro_batch_size", "training.batch_size"],
            f"expected at most batch_size {training.batch_size}, got {training.micro_batch_size}",
        )
    name = recipe.run.name
    if name is not None and (Path(name).is_absolute() or ".." in Path(name).parts or name.startswith(".")):
        yield ["run.name"], f"expected a folder's name below run.output_dir, got {name!r}"
    if recipe.data.path in ARITHMETIC and recipe.data.num_digits > 4 and recipe.evaluation.num_problems is None:
        keys = ["evaluation.num_problems", "data.num_digits", "data.path"]
        yield keys, "expected a number: nobody can grade all problems of more than 4 digits"
    if recipe.checkpoint.metric == "eval/accuracy" and recipe.data.path not in ARITHMETIC:
        yield (
            ["checkpoint.metric", "data.path"],
            f"only arithmetic has an accuracy, got eval/accuracy for data.path {recipe.data.path}",
        )
    for name in ("lr", "weight_decay", "accumulation"):
        schedule = getattr(recipe.schedule, name)
        keys = [f"schedule.{name}.{key}" for key in ("decay_ratio", "warmup_ratio", "style", "begin", "end")]
        usual = WSD_DECAY if schedule.style == "wsd" else 0
        decay = usual if schedule.decay_ratio is None else schedule.decay_ratio
        if schedule.warmup_ratio + decay > 1 + 1e-9:
            yield keys[:3], f"expected at most 1 - warmup_ratio {schedule.warmup_ratio}, got {decay}"
        if schedule.style == "power" and (schedule.end == 0 or (name != "lr" and schedule.begin == 0)):
            yield [keys[4], *keys[2:]], "the power style multiplies its way from begin to end and needs both above 0"
        if name == "accumulation" and min(schedule.begin, schedule.end) < 1:
            yield (
                [keys[3], keys[4]],
                f"expected factors from 1, got begin {schedule.begin} and end {schedule.end}",
            )
    for package in recipe.tracking.trackers:
        if importlib.util.find_spec(package) is None:
            yield ["tracking.trackers"], f"{package} is not installed: pip install {package}"
    if recipe.hub.push or recipe.hub.repo_id is not None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(recipe.repo_id)
        except HFValidationError as error:
            yield ["hub.repo_id", "hub.push", "run.name"], str(error)
