"""What the recipes share: how they are scored, by any metric of `evaluate`."""

import json
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from statistics import fmean

import evaluate

METRICS = Path(__file__).parent / "metrics"


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class MetricArguments:
    metric: str | None = option(
        None, "A metric on the Hub or a script for evaluate.load; default: that of recipes/metrics."
    )
    metric_config_name: str | None = option(None, "Its configuration.")
    metric_arguments: str = option("{}", 'What else it needs, as JSON: {"average": "macro"}.')


class Score:
    """A metric of `evaluate` as a function of predictions and references.

    Attributes:
        headline: the number that the run is known by. The recipe names that of its own metric. Of
            another one it is that of `--metric_for_best_model`, else that with the same name as
            the recipe's, else the first. Known after the first call.
    """

    def __init__(self, args, training_args, script, usual):
        self.is_own = args.metric is None
        self.name = Path(args.metric or script).stem
        asked = (training_args.metric_for_best_model or "").removeprefix("eval_")
        self._wanted = (usual,) if self.is_own else (asked, usual)
        self.headline = None
        try:
            self._given = dict(json.loads(args.metric_arguments))
        except (TypeError, ValueError) as error:
            raise SystemExit(
                f"--metric_arguments {args.metric_arguments} is no JSON object ({error}): write "
                '\'{"average": "macro"}\'.'
            ) from None
        try:
            self._metric = evaluate.load(
                args.metric or str(METRICS / script),
                args.metric_config_name,
                keep_in_memory=True,  # several runs share the cache and would wait for its locks
            )
        except (OSError, ImportError, LookupError, TypeError, ValueError) as error:
            shipped = ", ".join(sorted(path.name for path in METRICS.glob("*.py")))
            raise SystemExit(
                f"The metric {self.name} cannot be loaded: {' '.join(str(error).split())} --metric "
                "takes the name of a metric on the Hub, which needs a network the first time, or "
                f"the path of a script, as those in {METRICS}: {shipped}."
            ) from None

    def __call__(self, predictions, references, **more):
        """Every number of the result; of a list with a number for each prediction, the mean."""
        given = {**more, **self._given}
        try:
            found = self._metric.compute(predictions=predictions, references=references, **given)
        except (LookupError, TypeError, ValueError) as error:
            raise SystemExit(
                f"The metric {self.name} cannot score this task: {error} What else it needs goes "
                'into --metric_arguments, as \'{"average": "macro"}\'.'
            ) from error
        numbers = {}
        for key, value in found.items():
            value = value.tolist() if hasattr(value, "tolist") else value
            if isinstance(value, list) and len(value) == len(predictions):
                value = fmean(value) if all(isinstance(v, Real) for v in value) else value
            if isinstance(value, Real):
                numbers[self.name if key == "score" else key] = float(value)
        if not numbers:
            raise SystemExit(f"The metric {self.name} gave no number, only {', '.join(found)}.")
        if self.headline is None:
            self.headline = next((k for k in self._wanted if k in numbers), next(iter(numbers)))
        return numbers

    def value(self, predictions, references, **more):
        """Only the headline."""
        numbers = self(predictions, references, **more)
        return numbers[self.headline]
