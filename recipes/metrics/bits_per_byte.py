"""The loss of a language model over the bytes of the text that its tokens stand for."""

import datasets
import evaluate
import numpy as np


class BitsPerByte(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions: each token's loss in nats; references: the tokens; "
            "size: the bytes of their text",
            features=datasets.Features(
                predictions=datasets.Value("float64"), references=datasets.Value("int64")
            ),
        )

    def _compute(self, predictions, references, size):
        loss = np.array(predictions)
        return {
            "perplexity": float(np.exp(loss.mean())),
            "bits_per_byte": float(loss.sum() / np.log(2) / size),
        }
