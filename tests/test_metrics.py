"""The metric modules, as `evaluate` loads them by path without a network, beside sums written by hand."""

import math

import evaluate
import pytest
from conftest import ROOT

METRICS = ROOT / "cleangpt" / "evaluation" / "metrics"


def test_perplexity_is_the_sum_written_by_hand():
    """Two texts: three tokens of probabilities 1/2, 1/4, 1/8 in 4 bytes, one token of 1/16 in 2."""
    nats = [-math.log(1 / 2) - math.log(1 / 4) - math.log(1 / 8), -math.log(1 / 16)]
    metric = evaluate.load(str(METRICS / "perplexity"))
    figures = metric.compute(nats=nats, targets=[3, 1], bytes=[4, 2])
    assert figures["bits_per_token"] == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert figures["bits_per_byte"] == pytest.approx((1 + 2 + 3 + 4) / 6)
    assert figures["loss"] == pytest.approx(2.5 * math.log(2))
    assert figures["perplexity"] == pytest.approx((2 * 4 * 8 * 16) ** (1 / 4))


def test_perplexity_does_not_depend_on_how_texts_come():
    metric = evaluate.load(str(METRICS / "perplexity"))
    for nats, targets, size in ((31.2, 16, 20), (27.9, 12, 9), (1.5, 3, 7)):
        metric.add(nats=nats, targets=targets, bytes=size)
    one_by_one = metric.compute()
    assert one_by_one == pytest.approx(metric.compute(nats=[60.6], targets=[31], bytes=[36]))


def test_exact_match_is_the_count_written_by_hand():
    """135, 136 and 999 last digit first: one right, one with a wrong ten, one that is no number."""
    metric = evaluate.load(str(METRICS / "arithmetic_exact_match"))
    figures = metric.compute(predictions=["531", "641", "9+9"], references=["531", "631", "999"])
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["accuracy_by_digit"] == pytest.approx([1, 1 / 3, 1])
    assert figures["no_number"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("answer", "right", "reverse", "accuracy", "by_digit"),
    [
        ("135", "135", False, 1, [1, 1, 1]),
        ("35", "135", False, 0, [1, 1, 0]),  # the ones stand below the ones
        ("53", "531", True, 0, [1, 1, 0]),
        ("5310", "531", True, 0, [1, 1, 1]),  # right digits, yet not the right text
        ("", "0", True, 0, [0]),
    ],
)
def test_digits_are_laid_side_by_side_from_the_ones(answer, right, reverse, accuracy, by_digit):
    metric = evaluate.load(str(METRICS / "arithmetic_exact_match"))
    figures = metric.compute(predictions=[answer], references=[right], reverse_answer=reverse)
    assert figures["accuracy"] == accuracy
    assert figures["accuracy_by_digit"] == by_digit


def test_a_place_that_some_answers_lack_counts_where_it_is():
    metric = evaluate.load(str(METRICS / "arithmetic_exact_match"))
    figures = metric.compute(predictions=["5", "53"], references=["5", "52"])
    assert figures["accuracy_by_digit"] == [1, 0]
