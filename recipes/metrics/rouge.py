"""ROUGE in percent: words in common with a reference, of each text the best over its own."""

import datasets
import evaluate
import numpy as np
from rouge_score.rouge_scorer import RougeScorer

NAMES = ("rouge1", "rouge2", "rougeL")


class Rouge(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                predictions=datasets.Value("string"),
                references=datasets.List(datasets.Value("string")),
            ),
        )

    def _compute(self, predictions, references):
        scorer = RougeScorer(NAMES, use_stemmer=True)
        pairs = zip(references, predictions, strict=True)
        found = [scorer.score_multi(several, text) for several, text in pairs]
        return {name: 100 * float(np.mean([row[name].fmeasure for row in found])) for name in NAMES}
