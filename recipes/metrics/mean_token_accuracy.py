"""The share of tokens that are right, averaged over batches as TRL does."""

import datasets
import evaluate
import numpy as np


class MeanTokenAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions, references: a list of tokens for each batch",
            features=datasets.Features(
                predictions=datasets.List(datasets.Value("int64")),
                references=datasets.List(datasets.Value("int64")),
            ),
        )

    def _compute(self, predictions, references):
        pairs = zip(predictions, references, strict=True)
        shares = [np.float32(np.equal(*pair).mean()) for pair in pairs]  # single, as in TRL
        return {"mean_token_accuracy": float(np.mean(shares, dtype=np.float64))}
