"""chrF: character n-grams in common with the reference, in percent."""

import datasets
import evaluate
from sacrebleu import corpus_chrf


class Chrf(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                predictions=datasets.Value("string"), references=datasets.Value("string")
            ),
        )

    def _compute(self, predictions, references):
        return {"chrf": corpus_chrf(predictions, [references]).score}
