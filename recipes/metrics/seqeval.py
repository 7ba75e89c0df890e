"""F1 of whole spans: a span counts if its kind and both of its ends are right."""

import datasets
import evaluate
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score


class Spans(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            features=datasets.Features(
                predictions=datasets.List(datasets.Value("string")),
                references=datasets.List(datasets.Value("string")),
            ),
        )

    def _compute(self, predictions, references):
        return {
            "precision": precision_score(references, predictions, zero_division=0),
            "recall": recall_score(references, predictions, zero_division=0),
            "f1": f1_score(references, predictions, zero_division=0),
            "accuracy": accuracy_score(references, predictions),
        }
