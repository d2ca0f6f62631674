"""Schedules against factors written out by hand."""

import pytest

from cleangpt.recipe.keys import LrSchedule, Optimizer, Schedule, Schedules
from cleangpt.recipe.schedules import at, is_flat, steps_for


def lr_factors(max_steps: int = 10, **options) -> list[float]:
    schedule, optimizer = Schedules(lr=LrSchedule(**options)), Optimizer(lr=2.0)
    return [round(at(schedule, optimizer, step, max_steps).lr / 2, 4) for step in range(1, max_steps + 1)]


def test_linear_with_warmup():
    assert lr_factors(style="linear", warmup_ratio=0.2, end=0.2) == [0.5, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]


def test_cosine():
    assert lr_factors(4, style="cosine", warmup_ratio=0, end=0) == [0.8536, 0.5, 0.1464, 0.0]


def test_a_decay_that_ends_before_the_run_stays_at_its_end():
    assert lr_factors(style="linear", warmup_ratio=0, decay_ratio=0.5, end=0.5) == [0.9, 0.8, 0.7, 0.6, 0.5] + [0.5] * 5


def test_warmup_stable_decay():
    assert lr_factors(style="wsd", warmup_ratio=0.2, decay_ratio=0.4, end=0) == (
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    )


def test_power_multiplies():
    assert lr_factors(4, style="power", warmup_ratio=0, end=0.0625) == [0.5, 0.25, 0.125, 0.0625]


def test_constant_with_warmup():
    assert lr_factors(4, style="constant", warmup_ratio=0.5, begin=0.2) == [0.6, 1.0, 1.0, 1.0]


def test_weight_decay_goes_from_begin_to_end():
    schedule = Schedules(weight_decay=Schedule(style="linear", begin=1, end=0, warmup_ratio=0.5))
    optimizer = Optimizer(weight_decay=0.1)
    assert [round(at(schedule, optimizer, step, 4).weight_decay, 4) for step in range(1, 5)] == [0.1, 0.1, 0.05, 0.0]


@pytest.mark.parametrize(
    ("style", "expected"), [("linear", [2, 2, 3, 3, 4, 4]), ("power", [1, 2, 2, 3, 3, 4]), ("constant", [1] * 6)]
)
def test_accumulation_grows_in_whole_numbers(style, expected):
    schedule = Schedules(accumulation=Schedule(style=style, begin=1, end=4))
    assert [at(schedule, Optimizer(), step, 6).accumulation for step in range(1, 7)] == expected


def test_steps_that_make_an_epoch():
    assert steps_for(1000, 10, Schedules(), Optimizer()) == 100
    growing = Schedules(accumulation=Schedule(style="linear", begin=1, end=3))
    assert steps_for(1000, 10, growing, Optimizer()) == pytest.approx(50, abs=1)


def test_only_constant_factors_are_flat():
    assert is_flat(Schedule())
    assert not is_flat(LrSchedule())
