"""Perplexity, bits per token and bits per byte, from the nats that a model needs for each text.

    metric = evaluate.load("cleangpt/evaluation/metrics/perplexity")   # a path: nothing is downloaded
    metric.compute(nats=[31.2, 27.9], targets=[16, 16], bytes=[16, 18])

`evaluate` reads the imports line by line, so each has its own.
"""

import math

import datasets
import evaluate

from cleangpt.evaluation.evaluate import from_sums

DESCRIPTION = "Perplexity and its logarithms, weighted by tokens, however the text is cut into rows and batches."
INPUTS = """
Args:
    nats (`list` of `float`): -ln of the probability that the model gives to the targets of each text.
    targets (`list` of `float`): number of tokens to predict in each text.
    bytes (`list` of `float`): UTF-8 bytes of each text.
Returns:
    `loss`, nats per target; `perplexity`, e^loss; `bits_per_token`, loss / ln 2; `bits_per_byte`, nats / ln 2 / bytes,
    which compares models with different tokenizers.
"""


class Perplexity(evaluate.Metric):
    """What `evaluate.load` returns."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("float64") for name in ("nats", "targets", "bytes")})
        return evaluate.MetricInfo(DESCRIPTION, citation="", features=features, inputs_description=INPUTS)

    def _compute(self, nats: list[float], targets: list[float], bytes: list[float]) -> dict[str, float]:
        figures = from_sums(math.fsum(nats), sum(targets), sum(bytes))
        return figures | {"bits_per_token": figures["loss"] / math.log(2)}
