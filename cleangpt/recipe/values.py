"""What keys of a recipe may hold, and the base of its sections."""

from typing import Annotated, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class ReadOnly(dict):  # a mapping inside a recipe
    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a recipe is immutable")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple:
        return ReadOnly, (dict(self),)  # pickle and copy would fill an empty one


# The text in each annotation says in errors and in `--help` what the key may hold.
Count = Annotated[int, Field(ge=1), "a whole number from 1"]
Natural = Annotated[int, Field(ge=0), "a whole number from 0"]
Positive = Annotated[float, Field(gt=0), "a number above 0"]
NonNegative = Annotated[float, Field(ge=0), "a number from 0"]
Fraction = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Decay = Annotated[float, Field(gt=0, lt=1), "a number between 0 and 1"]
BelowOne = Annotated[float, Field(ge=0, lt=1), "a number from 0 to below 1"]
Text = Annotated[str, Field(min_length=1, coerce_numbers_to_str=True), "text"]
BareNo = BeforeValidator(lambda value: "no" if value is False else value)  # YAML reads an unquoted `no` as false
Files = Text | tuple[Text, ...]
Metric = Literal["eval/loss", "eval/perplexity", "eval/bits_per_byte", "eval/accuracy", "train/loss", "grad_norm"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
