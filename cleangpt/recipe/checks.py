"""Checks of a recipe that concern several keys, the model's own configuration, or this machine's files and packages."""

import dataclasses
import difflib
import glob
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .keys import ARITHMETIC, FILES, Data, Recipe
from .schedules import decay_ratio, source_weights
from .sources import Origin
from .wording import allowed, nearest

MOMENTS = np.arange(1, 1001) / 1000  # of a run
Mistakes = Iterator[tuple[list[str], str]]  # the keys concerned, the one to report first; what is wrong


def check_keys(recipe: Recipe) -> Mistakes:
    """What is wrong with any section but `model`."""
    data, train = recipe.data, recipe.tokenizer.train
    yield from _check_arithmetic(recipe) if data.path in ARITHMETIC and not data.sources else _check_text(recipe)
    yield from _check_sources(data) if data.sources else _check_origin(data)
    if train is not None and train.kind == "char" and train.vocab_size is not None:
        yield ["tokenizer.train.vocab_size", "tokenizer.train.kind"], "char takes one id per character, remove the key"
    yield from _check_training(recipe)
    yield from _check_schedules(recipe)
    for package in recipe.tracking.trackers:
        if importlib.util.find_spec(package) is None:
            yield ["tracking.trackers"], f"{package} is not installed: pip install {package}"
    if recipe.evaluation.lm_eval is not None and importlib.util.find_spec("lm_eval") is None:
        yield ["evaluation.lm_eval"], "lm-eval is not installed: pip install lm-eval"
    if recipe.tracking.histograms and not recipe.tracking.trackers:
        yield ["tracking.histograms", "tracking.trackers"], "expected a tracker that shows them in tracking.trackers"
    if recipe.hub.push or recipe.hub.repo_id is not None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(recipe.repo_id)
        except HFValidationError as error:
            yield ["hub.repo_id", "hub.push", "run.name"], str(error)


def check_model(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The `model` section with standard names, and its problems by key: a configuration class accepts any key."""
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model = {key: value for key, value in model.items() if value is not None}
    ours = {key: value for key, value in model.items() if key in ("model_type", "init_from", "attn_implementation")}
    for key, value in ours.items():
        if not isinstance(value, str):
            return model, {f"model.{key}": f"expected text, got {value!r}"}
    model_type = ours.get("model_type")
    if model_type is None and "init_from" in ours:
        return model, {}  # the configuration comes with the weights
    causal = ["nanogpt", "nanollama", *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    if model_type not in causal:
        near = difflib.get_close_matches(str(model_type), causal, n=1) or ["nanogpt"]
        message = f"expected nanogpt, nanollama or a causal language model of transformers, got {model_type!r}"
        return model, {"model.model_type": f"{message}, did you mean {near[0]}?"}

    config_class: Any = CONFIG_MAPPING[model_type]
    fields = {field.name: field.type for field in dataclasses.fields(config_class)}
    own = sorted((fields.keys() | config_class.attribute_map) - {f.name for f in dataclasses.fields(PreTrainedConfig)})
    problems: dict[str, str] = {}
    written: dict[str, str] = {}  # standard name -> name in the recipe
    for key in [key for key in model if key not in ours]:
        name = config_class.attribute_map.get(key, key)
        if name not in fields and key not in config_class.attribute_map:
            problems[f"model.{key}"] = f"unknown key of {model_type}, {nearest(key, own)}"
        elif name in written:
            problems[f"model.{key}"] = f"the same as model.{written[name]}, give one of them"
        else:
            written[name] = key
    standard = {name: model[key] for name, key in written.items()}
    good = dict(standard)
    for name, value in standard.items():
        try:
            for validate in config_class.__validators__.get(name, ()):
                validate(value)
        except (TypeError, ValueError):
            problems[f"model.{written[name]}"] = f"expected {allowed(fields[name])}, got {good.pop(name)!r}"
    heads, groups = good.get("num_attention_heads"), good.get("num_key_value_heads")
    if heads and groups is not None and (groups < 1 or heads % groups):
        message = f"expected a divisor of num_attention_heads {heads}, got {good.pop('num_key_value_heads')}"
        problems[f"model.{written['num_key_value_heads']}"] = message
    try:
        AutoConfig.for_model(model_type, **good)
    except Exception as error:  # each configuration class raises its own kinds
        message = str(error.__cause__ or error).strip().split("\n")[0]
        name, _, rest = message.partition(": ")  # ours begin with the key: "dropout: expected a number ..."
        known = name in fields
        problems.setdefault(f"model.{written.get(name, name)}" if known else "model", rest if known else message)
    return {**ours, **standard}, problems


def _check_arithmetic(recipe: Recipe) -> Mistakes:
    data = recipe.data
    if data.data_files is not None:
        yield ["data.data_files", "data.path"], f"{data.path} is generated and reads no file, got {data.data_files!r}"
    if recipe.tokenizer.path is not None or recipe.tokenizer.train is not None:
        yield ["tokenizer", "data.path"], f"{data.path} has its own tokenizer, remove the section"
    if data.block_size is not None:
        message = f"one problem of {data.path} is one sequence, remove the key, got {data.block_size}"
        yield ["data.block_size", "data.path"], message
    if data.min_digits is not None and data.min_digits > data.num_digits:
        message = f"expected at most num_digits {data.num_digits}, got {data.min_digits}"
        yield ["data.min_digits", "data.num_digits"], message
    if not data.zero_pad and not data.signs:
        yield ["data.signs", "data.zero_pad"], "without signs only zero_pad separates operands, set one of them to true"
    if data.num_digits > 4 and recipe.evaluation.num_problems is None:
        keys = ["evaluation.num_problems", "data.num_digits", "data.path"]
        yield keys, "expected a number: there are too many problems of more than 4 digits to grade all of them"
    if recipe.checkpoint.metric == "eval/bits_per_byte":
        yield ["checkpoint.metric", "data.path"], f"{data.path} has no bytes, got eval/bits_per_byte"


def _check_text(recipe: Recipe) -> Mistakes:
    data, tokenizer = recipe.data, recipe.tokenizer
    is_built = any(part.path not in FILES for part in data.parts.values())  # or not, which is told when it is loaded
    brings_one = is_built and tokenizer.path is None
    if (tokenizer.path is None) == (tokenizer.train is None) and not brings_one:
        keys = ["tokenizer", "tokenizer.path", "tokenizer.train", "data.path"]
        yield keys, "expected one of path and train, with the other null"
    if recipe.checkpoint.metric == "eval/accuracy":
        yield ["checkpoint.metric", "data.path"], f"only arithmetic has it, got eval/accuracy for {data.path or 'text'}"
    if any(part.messages_column is not None for part in data.parts.values()):
        if data.packing != "documents":
            yield ["data.packing"], f"conversations are packed as documents, remove the key, got {data.packing}"
        if tokenizer.train is not None and not tokenizer.train.chat:
            yield ["tokenizer.train.chat"], "expected true, as data.messages_column needs a chat template"


def _check_sources(data: Data) -> Mistakes:
    for key in Origin.model_fields:
        if getattr(data, key) != Origin.model_fields[key].default:
            yield [f"data.{key}", "data.sources"], "with data.sources each of them has the key, remove it here"
    labels = [source.name_in_metrics for source in data.sources]
    for number, (source, label) in enumerate(zip(data.sources, labels, strict=True)):
        key = f"data.sources.{number}"
        if label in labels[:number]:
            yield [f"{key}.label", f"{key}.data_files", f"{key}.path"], f"expected another label, got {label!r} again"
        if not source_weights([source], MOMENTS).any():
            yield [f"{key}.weight"], f"expected a weight above 0 at some time, got {source.weight!r}"
        if source.path in ARITHMETIC:
            yield [f"{key}.path"], f"expected text, got {source.path}, which has a tokenizer of its own"
        for keys, message in _check_origin(data.alone(source)):
            yield [f"{key}.{name.removeprefix('data.')}" for name in keys], message
    if not source_weights(data.sources, MOMENTS).any(axis=1).all():
        yield ["data.sources"], "expected a source with a weight above 0 at any time of the run"


def _check_origin(data: Data) -> Mistakes:
    """What is wrong with where text comes from."""
    split = data.split
    if split is not None and ("train" not in split or sum(split.values()) > 1 + 1e-9):
        yield ["data.split"], f"expected fractions that add up to at most 1, train among them, got {dict(split)}"
    if not data.path:
        yield ["data.path"], "missing, expected text, json, parquet, csv, a Hub id, addition or multiplication"
        return
    yield from _check_columns(data)
    if data.path in FILES and not data.data_files:
        yield ["data.data_files", "data.path"], f"data.path {data.path} needs files, got {data.data_files}"
    elif data.path not in FILES and Path(data.path).suffix and Path(data.path).is_file():
        message = f"expected text, json, parquet, csv or a Hub id, got the file {data.path!r}: "
        yield ["data.path"], f"{message}use --data.path=text --data.data_files={data.path}"
    patterns = [file for files in data.files.values() for file in files if data.path in FILES and "://" not in file]
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)
        wrong = [] if matches else [f"expected an existing file, got {pattern!r}{_how_to_make(pattern)}"]
        wrong += [f"expected a file, got the folder {match!r}" for match in matches if Path(match).is_dir()]
        wrong += [f"expected text, got the empty file {match!r}" for match in matches if not Path(match).stat().st_size]
        yield from ((["data.data_files", "data.path"], message) for message in wrong)


def _how_to_make(file: str) -> str:
    """What makes a missing file, if the Makefile here does."""
    makefile = Path("Makefile")
    is_target = makefile.is_file() and f"\n{file}:" in makefile.read_text(encoding="utf-8", errors="replace")
    return f": `make {file}` writes it" if is_target else ""


def _check_columns(data: Data) -> Mistakes:
    """What is wrong with the columns that hold the text."""
    given = [f"data.{key}" for key in ("template", "messages_column") if getattr(data, key) is not None]
    if data.template is not None:
        expected = f"expected columns in braces, as in {{question}} {{answer}}, got {data.template!r}"
        try:
            columns = data.columns
        except ValueError as error:
            columns, expected = [], f"{expected}: {error}"
        if not columns or any(not name or set(name) & set(".[") for name in columns):
            yield ["data.template"], expected
    if data.path == "text":
        message = "lines of text have no columns, expected json, parquet, csv or a Hub id as data.path"
        yield from (([key, "data.path"], message) for key in given)
    if len(given) == 2:
        yield given, f"conversations have the tokenizer's, remove one of template and {given[1]}"


def _check_training(recipe: Recipe) -> Mistakes:
    training, name = recipe.training, recipe.run.name or ""
    if (training.max_steps is None) == (training.max_epochs is None):
        yield ["training.max_steps", "training.max_epochs"], "expected one of max_steps and max_epochs, the other null"
    rows = training.micro_batch_size
    if isinstance(rows, int) and rows > training.batch_size:
        message = f"expected at most batch_size {training.batch_size}, got {rows}"
        yield ["training.micro_batch_size", "training.batch_size"], message
    if Path(name).is_absolute() or ".." in Path(name).parts or name.startswith("."):
        yield ["run.name"], f"expected a folder's name inside run.output_dir, got {name!r}"


def _check_schedules(recipe: Recipe) -> Mistakes:
    for name in ("lr", "weight_decay", "accumulation"):
        schedule = getattr(recipe.schedule, name)
        keys = [f"schedule.{name}.{key}" for key in ("decay_ratio", "warmup_ratio", "style", "begin", "end")]
        if schedule.warmup_ratio + decay_ratio(schedule) > 1 + 1e-9:
            yield keys[:3], f"expected at most 1 - warmup_ratio {schedule.warmup_ratio}, got {decay_ratio(schedule)}"
        if schedule.style == "power" and (schedule.end == 0 or (name != "lr" and schedule.begin == 0)):
            yield [keys[4], *keys[2:]], "the power style multiplies its way from begin to end and needs both above 0"
        if name == "accumulation" and min(schedule.begin, schedule.end) < 1:
            yield keys[3:], f"expected factors from 1, got begin {schedule.begin} and end {schedule.end}"
