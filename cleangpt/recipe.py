"""The recipe: every knob of an experiment on one page. `recipe_reading.py` reads it from YAML and the command line."""

import string
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BeforeValidator, ConfigDict, Field
from yaml import safe_dump


def _kind(type_: type, allowed: str, **constraints):
    """A type with its range, and the words that say so in errors and in `--help`."""
    return Annotated[type_, Field(**constraints), allowed]


Count = _kind(int, "a whole number from 1", ge=1)
Natural = _kind(int, "a whole number from 0", ge=0)
Seed = _kind(int, "a whole number from 0 to 2^63 - 1", ge=0, le=2**63 - 1)
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
    seed: Seed = 42
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
    template: Text | None = None
    """Text of a row from several columns, in place of `text_column`: `{question} {answer}`, say."""
    block_size: Count | None = None
    """Targets a sequence, in tokens; `model.max_position_embeddings` when left out. Arithmetic has its own length."""
    packing: Literal["windows", "blocks", "documents"] = "windows"
    """`windows`: any offset of the token stream; `blocks`: cut end to end; `documents`: `blocks` in which no document
    sees another."""
    num_proc: Count | None = None
    """Processes that tokenize; null leaves it to the tokenizer's own threads."""
    fingerprint: Text | None = None
    """Hash of the built data, set in the recipe that a run writes: other text, tokenizer or cut is refused then."""
    num_digits: Count = 3
    """Arithmetic: digits of each operand, at most; every pair of numbers is equally likely."""
    min_digits: Count | None = None
    """Arithmetic: operands of `min_digits` to `num_digits` digits, every pair of lengths equally often in training."""
    signs: bool = True
    """Arithmetic: write the operator and the equals sign, `85+50=531` rather than `8550531`."""
    reverse_answer: bool = True
    """Arithmetic: write the answer's last digit first, the order in which carries are known."""
    zero_pad: bool = True
    """Arithmetic: pad operands and answer with zeros to a fixed width."""

    @property
    def columns(self) -> list[str]:
        """The columns that hold the text."""
        if self.template is None:
            return [self.text_column]
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]


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
    max_skipped: Natural = 3
    """Updates in a row that may be left out, because loss or gradient are not finite, before the run stops."""
    early_stopping: EarlyStopping = Field(default_factory=EarlyStopping)
    """When to stop before `max_steps`."""
    resume: Text = "auto"
    """`auto` goes on with the run that the folder holds, `never` refuses to, a checkpoint's folder is gone on from."""


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
    """Texts to continue at each evaluation, always with the same seed; an unknown character is read as `<unk>`."""
    num_problems: Count | None = None
    """Arithmetic: problems to grade at each evaluation; null means all. The end of a run grades all of test, at most
    200,000."""


@section
class Checkpoint:
    """What is kept of the run."""

    every: Count = 1
    """Macro-batches between two checkpoints."""
    keep_last: Count = 1
    """Newest checkpoints kept."""
    keep_best: Natural = 0
    """Best checkpoints kept besides; the best model itself is always in `best/`."""
    metric: Literal[
        "eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "train/loss", "grad_norm"
    ] = "eval/loss"
    """What is best, and what early stopping waits for: `eval/accuracy` counts upwards, the others downwards."""


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
    """`user/name`; the last part of `run.name` in the token's namespace when left out."""
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
    model's configuration (null leaves it out; without `num_key_value_heads` each head has keys and values of its own),
    `attn_implementation` (chosen by hardware and length where it is not given), and `init_from` (a folder or Hub id
    whose weights to start from)."""
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

    @property
    def repo_id(self) -> str:
        """The repository on the Hub, `user/name`, or `name` in the token's namespace."""
        return self.hub.repo_id or self.folder.name

    def to_dict(self) -> dict:
        """Sections, keys and values as plain Python."""
        return pydantic.TypeAdapter(Recipe).dump_python(self, mode="json")

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads back to an equal one."""
        return safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


ARITHMETIC = ("addition", "multiplication")
FILES = ("text", "json", "parquet", "csv")
