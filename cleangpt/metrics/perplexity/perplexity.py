"""Perplexity, bits a token and bits a byte, from the nats that a model pays for each text.

    metric = evaluate.load("cleangpt/metrics/perplexity")   # a path: nothing is downloaded
    metric.compute(nats=[31.2, 27.9], targets=[16, 16], bytes=[16, 18])

The imports stand on lines of their own because `evaluate` reads them line by line.
"""

import math

import datasets
import evaluate

DESCRIPTION = "Perplexity and its logarithms, weighted by tokens, so that the cut into texts and batches is no matter."
CITATION = ""
INPUTS = """
Args:
    nats (`list` of `float`): -ln of the probability that the model gives to the targets of each text.
    targets (`list` of `float`): how many tokens each text had to predict.
    bytes (`list` of `float`): UTF-8 bytes of each text.
Returns:
    `loss`, nats a target; `perplexity`, e^loss; `bits_per_token`, loss / ln 2; `bits_per_byte`, which compares models
    with different tokenizers: nats / ln 2 / bytes.
"""


def from_sums(nats: float, num_targets: float, num_bytes: float | None = None) -> dict[str, float]:
    """The figures of a whole split from its sums; `bits_per_byte` where there are bytes.

    A loss beyond 700 nats, whose exponential is no number, has the perplexity of 700.
    """
    loss = nats / num_targets
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "bits_per_token": loss / math.log(2)}
    if num_bytes is not None:
        figures["bits_per_byte"] = nats / math.log(2) / num_bytes
    return figures


class Perplexity(evaluate.Metric):
    """What `evaluate.load` returns."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = {name: datasets.Value("float64") for name in ("nats", "targets", "bytes")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(inputs),
        )

    def _compute(self, nats: list[float], targets: list[float], bytes: list[float]) -> dict[str, float]:
        return from_sums(math.fsum(nats), sum(targets), sum(bytes))
