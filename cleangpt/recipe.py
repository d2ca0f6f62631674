"""The recipe: every knob of an experiment on one page, read from YAML and the command line.

    python train.py recipes/adder.yaml --training.max_steps=100 --optimizer.lr=3e-4

The sections come first, then how they are read, then what is checked. OmegaConf reads and merges (defaults < `base` <
file < command line), pydantic checks types and ranges, `_check_*` what concerns several keys; all mistakes are told at
once.
"""

import argparse
import dataclasses
import difflib
import glob
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BeforeValidator, ConfigDict, Field
from yaml import YAMLError, safe_dump

from .errors import UserError


def _kind(type_: type, allowed: str, **constraints):
    """A type with its range, and the words that say so in errors and in `--help`."""
    return Annotated[type_, Field(**constraints), allowed]


Count = _kind(int, "a whole number from 1", ge=1)
Natural = _kind(int, "a whole number from 0", ge=0)
Positive = _kind(float, "a number above 0", gt=0)
NonNegative = _kind(float, "a number from 0", ge=0)
Fraction = _kind(float, "a number from 0 to 1", ge=0, le=1)
BelowOne = _kind(float, "a number from 0 to below 1", ge=0, lt=1)
Text = _kind(str, "text", min_length=1, coerce_numbers_to_str=True)
Precision = Annotated[
    Literal["no", "bf16", "fp16", "auto"],
    BeforeValidator(lambda value: "no" if value is False else value),  # YAML reads a bare `no` as false
]

section = pydantic.dataclasses.dataclass(
    kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
)


@section
class Run:
    """Where the run lives."""

    name: Text | None = None
    """Folder of the run below `output_dir`; the recipe's file name when left out."""
    output_dir: Text = "outputs"
    """Folder that holds the runs."""
    seed: Natural = 42
    """Seed of initial weights, sample order, dropout and the split of arithmetic problems."""
    overwrite: bool = False
    """Delete what the run's folder holds and start anew."""


@section
class TokenizerTraining:
    """How to train a tokenizer on the train split."""

    kind: Literal["char", "bpe"] = "bpe"
    """`char`: one id for each character; `bpe`: byte-level byte-pair encoding with GPT-2's pre-tokenizer."""
    vocab_size: Count | None = None
    """Ids to learn, special tokens included (`bpe` only); 4,096 when left out."""


@section
class Tokenizer:
    """Text to ids. Arithmetic brings its own tokenizer and needs neither key."""

    path: Text | None = None
    """A saved tokenizer's folder, or a Hub id."""
    train: TokenizerTraining | None = None
    """Train one on this recipe's own text instead."""


@section
class Data:
    """What to train on."""

    path: Text
    """`text`, `json`, `parquet` or `csv` for files, a Hub id, or `addition` or `multiplication` (generated)."""
    name: Text | None = None
    """Configuration of the Hub dataset."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub dataset."""
    data_files: Text | list[Text] | dict[str, Text | list[Text]] | None = None
    """A file, pattern or URL, a list of them, or a mapping from split to them."""
    split: dict[str, Positive] | None = None
    """Fractions cut from the train split in order (text by characters, tables by rows, problems by place); null means
    train 0.9 and validation 0.1, or for arithmetic 0.7, 0.15 and test 0.15. Text that brings a validation split is
    not cut."""
    text_column: Text = "text"
    """Column that holds the text."""
    block_size: Count | None = None
    """Targets a sequence, in tokens; `model.max_position_embeddings` when left out. Arithmetic: one problem a sequence."""
    packing: Literal["windows", "blocks", "documents"] = "windows"
    """`windows`: any offset of the token stream; `blocks`: cut end to end; `documents`: `blocks` in which no document
    sees another."""
    num_proc: Count | None = None
    """Processes that tokenize; null leaves it to the tokenizer's own threads."""
    num_digits: Annotated[int, Field(ge=1, le=9), "a whole number from 1 to 9"] = 3
    """Arithmetic: digits of each operand."""
    signs: bool = True
    """Arithmetic: write the operator and the equals sign, `85+50=531` rather than `8550531`."""
    reverse_answer: bool = True
    """Arithmetic: write the answer's last digit first, the order in which carries are known."""
    zero_pad: bool = True
    """Arithmetic: pad operands and answer with zeros to a fixed width."""


@section
class EarlyStopping:
    """When to stop before `max_steps`."""

    patience: Count | None = None
    """Evaluations without a better `checkpoint.metric` before training stops; null never stops early."""
    min_delta: NonNegative = 0.0
    """Smallest change that counts as better."""


@section
class Training:
    """How long, how much at a time, and in which precision."""

    max_steps: Count | None = None
    """Optimizer steps."""
    max_epochs: Positive | None = None
    """Passes over the train split instead of `max_steps`: as many steps as it takes to draw its number of targets."""
    batch_size: Count = 64
    """Sequences in one optimizer step, over all processes."""
    micro_batch_size: Count | None = None
    """Sequences in one forward pass of one process; micro-steps follow. All of a process's share when left out."""
    macro_batch: Count = 250
    """Optimizer steps between two boundaries, where evaluation and checkpoints happen."""
    mixed_precision: Precision = "auto"
    """`auto` takes bf16 where the hardware has it and the model is wide enough to gain, else fp16 on a GPU, else no."""
    compile: bool = False
    """Compile the model: half a minute before the first step, faster steps after it."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null leaves them alone."""
    early_stopping: EarlyStopping = Field(default_factory=EarlyStopping)
    """When to stop before `max_steps`."""
    resume: Text = "auto"
    """`auto` continues the run that the folder holds, `never` refuses to, a checkpoint's folder continues from there."""


@section
class Optimizer:
    """How weights follow gradients."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw` (arXiv 1711.05101), or `muon` for the hidden matrices with `adamw` for the rest."""
    lr: Positive = 1e-3
    """The peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay of AdamW's running means of gradient and squared gradient."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""


@section
class LrSchedule:
    """Factor on `optimizer.lr`."""

    style: Literal["constant", "linear", "cosine", "power", "wsd"] = "cosine"
    """Shape of the decay; `wsd` stays at the peak and decays at the very end."""
    warmup_ratio: Fraction = 0.05
    """Share of the steps that rises linearly from `begin` to the peak."""
    decay_ratio: Fraction | None = None
    """Share of the steps that decays to `end`; null means all after the warm-up (`wsd`: the last fifth)."""
    begin: NonNegative = 0.0
    """Factor before the warm-up."""
    end: NonNegative = 0.1
    """Factor after the decay."""


@section
class Schedule:
    """A factor that goes from `begin` to `end`."""

    style: Literal["constant", "linear", "cosine", "power"] = "constant"
    """Shape of the way."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps that stays at `begin` first."""
    decay_ratio: Fraction | None = None
    """Share of the steps on the way; null means all the rest."""
    begin: NonNegative = 1.0
    """Factor at the start."""
    end: NonNegative = 1.0
    """Factor at the end."""


@section
class Schedules:
    """Factors that change over the run, as functions of step / `max_steps`."""

    lr: LrSchedule = Field(default_factory=LrSchedule)
    """Factor on `optimizer.lr`."""
    weight_decay: Schedule = Field(default_factory=Schedule)
    """Factor on `optimizer.weight_decay`."""
    accumulation: Schedule = Field(default_factory=Schedule)
    """Whole-number factor on `training.batch_size`."""


@section
class Evaluation:
    """What is measured on the validation split at boundaries."""

    every: Count = 1
    """Macro-batches between two evaluations."""
    batch_size: Count = 64
    """Sequences in one forward pass of one process."""
    max_batches: Count | None = None
    """Batches, over all processes; null means the whole split."""
    prompts: list[Text] = Field(default_factory=list)
    """Texts to continue at each evaluation, always with the same seed."""
    num_problems: Count | None = None
    """Arithmetic: problems to grade at each evaluation; null means all. The end of a run grades the whole test split."""


@section
class Checkpoint:
    """What is kept of the run."""

    every: Count = 1
    """Macro-batches between two checkpoints."""
    keep_last: Count = 1
    """Newest checkpoints kept."""
    keep_best: Natural = 0
    """Best checkpoints kept besides; the best model itself is always in `best/`."""
    metric: Literal["eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy"] = "eval/loss"
    """What is best: `eval/accuracy` counts upwards, the others downwards."""


@section
class Tracking:
    """Where metrics go besides `metrics.jsonl`."""

    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = Field(default_factory=list)
    """Trackers to write to."""
    project: Text = "cleangpt"
    """Name of the project there."""
    log_every: Count = 10
    """Steps between two lines of training metrics."""


@section
class Hub:
    """Publishing on the Hugging Face Hub."""

    push: bool = False
    """Push the model: each new best, and the end."""
    repo_id: Text | None = None
    """`user/name`; `run.name` in the token's namespace when left out."""
    private: bool = True
    """Visible to its owner only."""
    every: Count | None = None
    """Macro-batches between two pushes; null means only a new best and the end."""


@section
class Recipe:
    """One experiment."""

    data: Data
    """What to train on."""
    run: Run = Field(default_factory=Run)
    """Where the run lives."""
    model: dict[str, Any] = Field(default_factory=dict)
    """`model_type` (`nanogpt`, `nanollama`, or any causal language model of transformers, `qwen3` say), any key of that
    model's configuration (null leaves it out), `attn_implementation`, and `init_from` (a folder or Hub id whose weights to
    start from)."""
    tokenizer: Tokenizer = Field(default_factory=Tokenizer)
    """Text to ids."""
    training: Training = Field(default_factory=Training)
    """How long, how much at a time, in which precision."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """How weights follow gradients."""
    schedule: Schedules = Field(default_factory=Schedules)
    """Factors that change over the run."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """What is measured at boundaries."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """What is kept of the run."""
    tracking: Tracking = Field(default_factory=Tracking)
    """Where metrics go besides `metrics.jsonl`."""
    hub: Hub = Field(default_factory=Hub)
    """Publishing on the Hub."""

    @property
    def folder(self) -> Path:
        """The run's folder, `outputs/adder` say."""
        return Path(self.run.output_dir) / self.run.name

    def to_dict(self) -> dict:
        """Sections, keys and values as plain Python."""
        return pydantic.TypeAdapter(Recipe).dump_python(self, mode="json")

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads back to an equal one."""
        return safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


ARITHMETIC = ("addition", "multiplication")
FILES = ("text", "json", "parquet", "csv")


# Reading


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file and what it builds on, applies `--section.key=value` overrides, checks everything.

    Raises:
        UserError: with one problem for each mistake.
    """
    overrides = list(overrides)
    if wrong := [text for text in overrides if not text.startswith("--") or "=" not in text]:
        raise UserError(*((text, "expected --section.key=value") for text in wrong))
    try:
        layers = [*_read_with_bases(Path(path), ()), OmegaConf.from_dotlist([text[2:] for text in overrides])]
        model_type = OmegaConf.select(OmegaConf.merge(*layers), "model.model_type")
        for layer in layers:
            _use_standard_names(layer, model_type)
        merged = OmegaConf.merge(*layers)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError((" ".join(overrides) or str(path), f"cannot be read: {error}")) from error
    return parse_recipe(OmegaConf.to_container(merged), default_name=Path(path).stem)


def parse_recipe(values: dict, default_name: str) -> Recipe:
    """Checks sections given as plain Python (`Recipe.to_dict` gives them back) and makes a recipe of them."""
    adapter = pydantic.TypeAdapter(Recipe)
    problems = {}
    try:
        recipe = adapter.validate_python(values)
    except pydantic.ValidationError as error:
        problems = dict(_translate(item) for item in error.errors())
        try:  # what is wrong in the other sections is told in the same go
            recipe = adapter.validate_python(_without(values, problems))
        except pydantic.ValidationError:
            raise UserError(*problems.items()) from error
    sections = {key.split(".")[0] for key in problems}
    if "model" not in sections:
        recipe.model, wrong = _check_model(recipe.model)
        problems.update(wrong)
    if not sections & {"data", "tokenizer"}:
        problems.update(_check_data(recipe))
    if not sections & {"data", "training", "schedule", "checkpoint", "hub"}:
        problems.update(_check_training(recipe))
    if problems:
        raise UserError(*problems.items())
    if recipe.run.name is None:
        recipe.run.name = default_name
    return recipe


def _without(values: dict, keys: dict) -> dict:
    """`values` without the dotted `keys`."""
    config = OmegaConf.create(values)
    for key in keys:
        parent, _, name = key.rpartition(".")
        (OmegaConf.select(config, parent) if parent else config).pop(name, None)
    return OmegaConf.to_container(config)


def parse_command(arguments: Sequence[str]) -> Recipe:
    """The recipe of a command line such as `recipes/adder.yaml --training.max_steps=100`; prints help and exits on -h."""
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
    base = config.pop("base", None)
    if base is None:
        return [config]
    if not isinstance(base, str):
        raise UserError((f"{path}: base", f"expected the path of a recipe, got {base!r}"))
    return [*_read_with_bases(path.parent / base, (*above, path.resolve())), config]


def _use_standard_names(layer, model_type: str | None) -> None:
    """Renames model keys such as `n_embd` in place, so that a layer above overrides a layer below under any name."""
    from transformers import CONFIG_MAPPING

    model = layer.get("model")
    names = CONFIG_MAPPING[model_type].attribute_map if model_type in CONFIG_MAPPING else {}
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
        else:
            default = field.get_default(call_default_factory=True)
            default = "" if field.is_required() else f" [{'null' if default is None else default}]"
            yield f"  --{prefix}{name}{'.KEY' if name == 'model' else ''}{default}"
            yield f"      {' '.join(field.description.split())}"


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
        if (
            inner is None
            or inner.__pydantic_fields__.get(part) is None
            and error["type"] != "unexpected_keyword_argument"
        ):
            break  # inside a list, a mapping or a union: the key above it is what the user wrote
        keys.append(str(part))
        if part not in inner.__pydantic_fields__:
            return ".".join(keys), f"unknown key, {_nearest(part, list(inner.__pydantic_fields__))}"
        field = inner.__pydantic_fields__[part]
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

    ours = {key: model[key] for key in ("model_type", "init_from", "attn_implementation") if key in model}
    for key, value in ours.items():
        if value is not None and not isinstance(value, str):
            return model, {f"model.{key}": f"expected text, got {value!r}"}
    options = {key: value for key, value in model.items() if key not in ours and value is not None}
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


def _check_data(recipe: Recipe) -> Iterator[tuple[str, str]]:
    data, tokenizer = recipe.data, recipe.tokenizer
    if data.path in ARITHMETIC:
        if data.data_files is not None:
            yield "data.data_files", f"{data.path} is generated and reads no file, got {data.data_files!r}"
        if tokenizer.path is not None or tokenizer.train is not None:
            yield "tokenizer", f"{data.path} brings its own tokenizer, leave the section out"
        if data.block_size is not None:
            yield "data.block_size", f"one problem of {data.path} is one sequence, leave it out, got {data.block_size}"
        if not data.zero_pad and not data.signs:
            yield "data.signs", "without signs only zero_pad tells the operands apart, set one of them to true"
    else:
        if (tokenizer.path is None) == (tokenizer.train is None):
            yield "tokenizer", "expected one of path and train, with the other null"
        if data.path in FILES and data.data_files is None:
            yield "data.data_files", f"data.path {data.path} needs files, got null"
        elif data.path not in FILES and Path(data.path).suffix and Path(data.path).is_file():
            yield (
                "data.path",
                f"expected text, json, parquet, csv or a Hub id, got the file {data.path!r}: "
                f"use --data.path=text --data.data_files={data.path}",
            )
        for file in local_files(data):
            if not glob.glob(file, recursive=True):
                yield "data.data_files", f"expected an existing file, got {file!r}"
            for match in glob.glob(file, recursive=True):
                if Path(match).is_dir():
                    yield "data.data_files", f"expected a file, got the folder {match!r}"
                elif Path(match).stat().st_size == 0:
                    yield "data.data_files", f"expected text, got the empty file {match!r}"
    split = data.split or {}
    if split and ("train" not in split or sum(split.values()) > 1 + 1e-9):
        yield "data.split", f"expected fractions that add up to at most 1, train among them, got {split}"
    if tokenizer.train is not None and tokenizer.train.kind == "char" and tokenizer.train.vocab_size is not None:
        yield "tokenizer.train.vocab_size", "char takes as many ids as there are characters, leave it out"


def local_files(data: Data) -> list[str]:
    """The files, or patterns of files, on this machine that `data.data_files` names."""
    if data.path not in FILES or data.data_files is None:
        return []
    values = data.data_files.values() if isinstance(data.data_files, dict) else [data.data_files]
    files = [file for value in values for file in ([value] if isinstance(value, str) else value)]
    return [file for file in files if "://" not in file]


def _check_training(recipe: Recipe) -> Iterator[tuple[str, str]]:
    training = recipe.training
    if (training.max_steps is None) == (training.max_epochs is None):
        yield "training.max_steps", "expected one of max_steps and max_epochs, with the other null"
    if training.micro_batch_size is not None and training.micro_batch_size > training.batch_size:
        yield (
            "training.micro_batch_size",
            f"expected at most batch_size {training.batch_size}, got {training.micro_batch_size}",
        )
    if recipe.checkpoint.metric == "eval/accuracy" and recipe.data.path not in ARITHMETIC:
        yield (
            "checkpoint.metric",
            f"only arithmetic has an accuracy, got eval/accuracy for data.path {recipe.data.path}",
        )
    for name in ("lr", "weight_decay", "accumulation"):
        schedule = getattr(recipe.schedule, name)
        if schedule.warmup_ratio + (schedule.decay_ratio or 0) > 1 + 1e-9:
            yield (
                f"schedule.{name}.decay_ratio",
                f"expected at most 1 - warmup_ratio {schedule.warmup_ratio}, got {schedule.decay_ratio}",
            )
        if schedule.style == "power" and (schedule.end == 0 or name != "lr" and schedule.begin == 0):
            yield f"schedule.{name}.end", "the power style multiplies its way from begin to end and needs both above 0"
        if name == "accumulation" and min(schedule.begin, schedule.end) < 1:
            yield (
                "schedule.accumulation.begin",
                f"expected factors from 1, got begin {schedule.begin} and end {schedule.end}",
            )
    if recipe.hub.repo_id is not None and not recipe.hub.push:
        return
    if recipe.hub.repo_id is not None:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(recipe.hub.repo_id)
        except HFValidationError as error:
            yield "hub.repo_id", str(error)
