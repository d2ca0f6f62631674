"""The recipe: every knob of an experiment on one page. A recipe and its sections are immutable."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from transformers.utils.generic import flatten_dict
from yaml import safe_dump

from .sources import Origin, Source
from .values import (
    BareNo,
    BelowOne,
    Count,
    Decay,
    Fraction,
    Metric,
    Natural,
    NonNegative,
    Positive,
    ReadOnly,
    Section,
    Text,
)

ARITHMETIC = ("addition", "multiplication")
FILES = ("text", "json", "parquet", "csv")


class Run(Section):
    """Where the run lives."""

    name: Text | None = None
    """Name of the run's folder in `output_dir`; by default the recipe's file name."""
    output_dir: Text = "outputs"
    """Folder that holds the runs."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), "a whole number from 0 to 2^63 - 1"] = 42
    """Seed of initial weights, sample order, dropout and the split of arithmetic problems."""
    seeds: Annotated[tuple[Natural, ...], Field(min_length=1), "a list of whole numbers from 0"] | None = None
    """Train once with each of these seeds, one run after another: `NAME-seed1`, `NAME-seed2`, ..."""
    overwrite: bool = False
    """Delete the run in this folder and start again."""


class TokenizerTraining(Section):  # on the train split
    kind: Literal["char", "bpe"] = "bpe"
    """`char`: one id per character; `bpe`: byte-level byte-pair encoding with GPT-2's pre-tokenizer."""
    vocab_size: Count | None = None
    """Number of ids, special tokens included (`bpe` only); 4,096 by default."""
    chat: bool = False
    """Give it the tokens and the chat template of conversations (ChatML)."""


class Tokenizer(Section):
    """Text to ids. Arithmetic and datasets that `prepare_data.py` pushed bring their own and need neither key."""

    path: Text | None = None
    """A saved tokenizer's folder, or a Hub id."""
    train: TokenizerTraining | None = None
    """Train one on this recipe's text instead."""


class Data(Origin):
    """What to train on."""

    sources: tuple[Source, ...] = ()
    """A mixture instead of one text: a list with, for each source, the keys above, a `label` for its metrics (by
    default its first file's or its dataset's name) and a `weight`, its share of the sequences relative to the others':
    a number (by default 1), or `{begin: 3, end: 1}` for one that changes evenly over the run."""
    block_size: Count | None = None
    """Targets per sequence, in tokens; by default `model.max_position_embeddings`. Arithmetic has its own length."""
    packing: Literal["windows", "blocks", "documents"] = "windows"
    """`windows`: any offset of the stream; `blocks`: end to end; `documents`: blocks where no document sees another."""
    num_proc: Count | None = None
    """Processes that tokenize; null leaves it to the tokenizer's own threads."""
    fingerprint: Text | None = None
    """Hash of the built data (version of arithmetic splits), written by a run, which then refuses any other."""
    num_digits: Count = 3
    """Arithmetic: the most digits of an operand; every pair of numbers is equally likely."""
    min_digits: Count | None = None
    """Arithmetic: operands have `min_digits` to `num_digits`; training draws each pair of lengths equally often."""
    signs: bool = True
    """Arithmetic: write the operator and the equals sign, `85+50=531` rather than `8550531`."""
    reverse_answer: bool = True
    """Arithmetic: write the answer's last digit first, the order in which carries are known."""
    zero_pad: bool = True
    """Arithmetic: pad operands and answer with zeros to a fixed width."""

    @model_validator(mode="before")
    @classmethod
    def _pack_conversations(cls, values: Any) -> Any:
        """Conversations are documents, unless `packing` is given, which the recipe's checks refuse."""
        parts = [values, *(values.get("sources") or ())] if isinstance(values, dict) else []
        is_chat = any(isinstance(part, dict) and part.get("messages_column") for part in parts)
        return {"packing": "documents", **values} if is_chat else values

    @property
    def parts(self) -> dict[str, "Data"]:
        """For each source, by its label, the section as if it were the only one; without sources, itself as ""."""
        return {source.name_in_metrics: self.alone(source) for source in self.sources} or {"": self}

    def alone(self, source: Source) -> "Data":
        """The section as if `source` were the only one."""
        return self.model_copy(update={"sources": (), **{key: getattr(source, key) for key in Origin.model_fields}})


class EarlyStopping(Section):  # when to stop before `max_steps`
    patience: Count | None = None
    """Evaluations without a better `checkpoint.metric` after which training stops; null never stops early."""
    min_delta: NonNegative = 0.0
    """Smallest change that counts as better."""


class Training(Section):
    """How long, how much at a time, and in which precision."""

    max_steps: Count | None = None
    """Optimizer steps."""
    max_epochs: Positive | None = None
    """Passes over the train split, instead of `max_steps`: as many steps as it takes to draw that many targets."""
    batch_size: Count = 64
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Sequences per forward pass of one process, which sets the number of micro-steps; by default its whole share.
    `auto` halves that until a step fits into the memory there is, and keeps what it chose."""
    macro_batch: Count = 250
    """Optimizer steps between two boundaries, where evaluation and checkpoints happen."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16", "auto"], BareNo] = "auto"
    """`auto` takes bf16 where the hardware has it and the model is wide enough to gain, else fp16 on a GPU, else no."""
    compile: bool = False
    """Compile the model: half a minute before the first step, faster steps after it."""
    max_grad_norm: Positive | None = 1.0
    """Gradients are scaled down to this norm; null leaves them alone."""
    max_skipped: Natural = 3
    """Updates in a row that may be skipped, because loss or gradient are not finite, before the run stops."""
    ema: Decay | None = None
    """Decay in a step of averaged weights (0.995, say), which are evaluated beside the others as `eval/ema/...`; `best`
    takes the better. Null for none."""
    early_stopping: EarlyStopping = EarlyStopping()
    resume: Text = "auto"
    """`auto`: resume; `never`: refuse to; a checkpoint's folder: rewind its run or, under a new `run.name`, branch."""


class Optimizer(Section):
    """How weights follow gradients."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw` (arXiv 1711.05101), or `muon` for the hidden matrices with `adamw` for the rest."""
    lr: Positive = 1e-3
    """The peak learning rate."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.95)
    """Decay rates of AdamW's running means of gradient and squared gradient."""
    momentum: BelowOne = 0.95
    """Decay rate of Muon's running mean of the gradient; a run of a few hundred steps may want 0.8."""
    eps: Positive = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices and embeddings; biases and norms have none."""
    reference_width: Count | None = None
    """The `hidden_size` at which `lr` was found: initial weights and rates are scaled so that it suits the model's own
    (muP, arXiv 2203.03466). Null scales nothing."""


class Schedule(Section):
    """A factor that goes from `begin` to `end`."""

    style: Literal["constant", "linear", "cosine", "power"] = "constant"
    """Shape of the decay."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps that stays at `begin` first."""
    decay_ratio: Fraction | None = None
    """Share of the steps that goes from `begin` to `end`; null means all the rest."""
    begin: NonNegative = 1.0
    """Factor at the start."""
    end: NonNegative = 1.0
    """Factor at the end."""


class LrSchedule(Section):
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


class Schedules(Section):
    """Factors that change over the run, as functions of step / `max_steps`."""

    lr: LrSchedule = LrSchedule()
    weight_decay: Schedule = Schedule()
    """Factor on `optimizer.weight_decay`."""
    accumulation: Schedule = Schedule()
    """Whole-number factor on `training.batch_size`: more sequences per step, at the same memory."""


class LmEval(Section):  # lm-eval's tasks at each evaluation
    tasks: Annotated[tuple[Text, ...], Field(min_length=1), "a list of names of lm-eval's tasks"]
    """Names of tasks or groups, `hellaswag` say; those in `lm_eval_tasks/` measure the recipe's validation split."""
    limit: Count | None = None
    """Documents of each task, from its start; null means all."""


class Evaluation(Section):
    """What is measured on the validation split at boundaries."""

    every: Count = 1
    """Macro-batches between two evaluations."""
    at_start: bool = True
    """Also evaluate before training."""
    batch_size: Count = 64
    """Sequences per forward pass of one process."""
    max_batches: Count | None = None
    """Batches per evaluation, over all processes; null means the whole split."""
    prompts: tuple[Text, ...] | None = None
    """Texts to continue at each evaluation, always with the same seed; an unknown character is read as `<unk>`. Null
    takes the beginning of the text's validation split."""
    num_problems: Count | None = None
    """Arithmetic: problems per evaluation; null means all. The end grades the test split, at most 200,000 problems."""
    lm_eval: LmEval | None = None
    """Also run tasks of lm-eval at each evaluation; null for none."""


class Checkpoint(Section):
    """What is kept of the run."""

    every: Count = 1
    """Macro-batches between two checkpoints."""
    save: bool = True
    """Save checkpoints and the best model; without them, as for a trial, a run that stops starts again."""
    keep_last: Count = 1
    """Newest checkpoints to keep."""
    keep_best: Natural = 0
    """Best checkpoints to keep besides; the best model itself is always in `best/`."""
    metric: Metric = "eval/loss"
    """Decides what is best, and when to stop early: `eval/accuracy` counts upwards, the others downwards."""


class Tracking(Section):
    """Where metrics go besides `metrics.jsonl`."""

    trackers: tuple[Literal["wandb", "trackio", "tensorboard"], ...] = ()
    """Trackers to write to."""
    project: Text = "cleangpt"
    """Name of the project there."""
    group: Text | None = None
    """Group of runs there, to be compared (`wandb`, `trackio`); with `run.seeds` the run's name."""
    tags: tuple[Text, ...] = ()
    """Tags of the run (`wandb`)."""
    name: Text | None = None
    """Name of the run there; by default `run.name`."""
    histograms: bool = False
    """Histograms of weights and gradients at boundaries; not in `metrics.jsonl`."""
    gradient_noise: bool = False
    """The gradient's noise scale in sequences (arXiv 1812.06162), from the micro-steps of all processes."""
    log_every: Count = 10
    """Steps between two lines of training metrics."""


class Hub(Section):
    """Publishing on the Hugging Face Hub."""

    push: bool = False
    """Push each new best model, and the final one."""
    repo_id: Text | None = None
    """`user/name`; by default the last part of `run.name`, in the token's namespace."""
    private: bool = True
    """Visible to its owner only."""
    every: Count | None = None
    """Macro-batches between two pushes; null pushes only a new best model and the final one."""


class Branch(Section):
    """Where a run branched from another one; runs write this section themselves."""

    checkpoint: Text
    """Folder of the checkpoint that gave weights, optimizer state and step."""
    step: Natural
    """Its step."""
    sequences: Natural
    """Sequences drawn by then: where the branch enters the order of samples. 0 if the data differs."""
    changes: Annotated[dict[str, Any], AfterValidator(ReadOnly)] = ReadOnly()
    """Each key in which the two recipes differ, with its old and its new value."""


class Recipe(Section):
    """One experiment."""

    data: Data
    run: Run = Run()
    model: Annotated[dict[str, Any], AfterValidator(ReadOnly)] = ReadOnly()
    """`model_type` (`nanogpt`, `nanollama`, or a causal language model of transformers, `qwen3` say), any key of its
    configuration (null removes it; without `num_key_value_heads` each head has its own), `attn_implementation` (by
    default chosen from hardware and length), and `init_from` (a folder or Hub id whose weights to start from)."""
    tokenizer: Tokenizer = Tokenizer()
    training: Training = Training()
    optimizer: Optimizer = Optimizer()
    schedule: Schedules = Schedules()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()
    hub: Hub = Hub()
    branched_from: Branch | None = None

    @property
    def folder(self) -> Path:
        """The run's folder, `outputs/adder` say."""
        return Path(self.run.output_dir, self.run.name or "")

    @property
    def repo_id(self) -> str:
        """The repository on the Hub, `user/name`, or `name` in the token's namespace."""
        return self.hub.repo_id or self.folder.name

    def to_dict(self) -> dict[str, Any]:
        """Sections, keys and values as plain Python."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads back to an equal one."""
        return safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def changed(self, **sections: dict[str, Any]) -> "Recipe":
        """A copy with other values: `recipe.changed(training={"max_steps": 5})`."""
        return self.model_copy(update={key: getattr(self, key).model_copy(update=new) for key, new in sections.items()})


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """Nested keys as dotted ones, without empty sections: `{"optimizer": {"lr": 1}}` becomes `{"optimizer.lr": 1}`."""
    return {key: value for key, value in flatten_dict(values).items() if value != {}}
