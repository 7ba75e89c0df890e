"""Train an image classifier, with an operator norm for each tensor by its role.

    python recipes/image_classification.py

trains a small ResNet from scratch on 1,700 images of Fashion-MNIST (recipes/data/fashion_mnist) in
one minute on two CPU cores. `--optim adamw_torch` is the same run with AdamW. Other models and
data:

    python recipes/image_classification.py --model_name_or_path microsoft/resnet-18 \
        --dataset_name AI-Lab-Makerere/beans --image_column_name image --label_column_name labels \
        --learning_rate 1e-3 --output_dir outputs/beans
    python recipes/image_classification.py --train_dir photos --image_size 64   # photos/LABEL/*.jpg
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import ImageOps
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    ResNetConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

import hf_normopt
from common import MetricArguments, Score, option

SPLITS = ("train", "validation", "test")
FASHION_MNIST = Path(__file__).parent / "data" / "fashion_mnist"
ABOUT_FASHION_MNIST = (
    "Grey images of clothes, 28 x 28, ten kinds, a balanced part of "
    "[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) "
    "([Xiao et al. 2017](https://arxiv.org/abs/1708.07747)), MIT"
)
MOST = 20_000  # rows that the simple methods learn from


@dataclass
class Arguments(MetricArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: from scratch.")
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_dir: str | None = option(None, "A folder with a folder of images for each label.")
    validation_dir: str | None = option(None, "The same, for validation.")
    test_dir: str | None = option(None, "The same, for the test.")
    train_file: str | None = option(None, "A parquet, csv or json file of images or their paths.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
    image_column_name: str = option("image", "The column of the images.")
    label_column_name: str = option("label", "The column of the labels.")
    image_size: int = option(56, "Height and width for the model from scratch.")
    flip: bool = option(True, "Mirror half of the training images, left to right.")


def load_data(args):
    """Train, validation and test splits of images and of labels' numbers, and the labels' names."""
    image, label, data = args.image_column_name, args.label_column_name, {}
    paths = {s: getattr(args, f"{s}_file") or getattr(args, f"{s}_dir") for s in SPLITS}
    if any(paths.values()) and (args.dataset_name or not paths["train"]):
        raise SystemExit(
            "Name --train_dir or --train_file, with the same for validation and test, or "
            "--dataset_name."
        )
    if args.dataset_name:
        found = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        data = {split: found[split] for split in SPLITS if split in found}
    elif not paths["train"]:
        paths = {split: FASHION_MNIST / f"{split}.parquet" for split in SPLITS}
    for split, path in paths.items():
        if path:
            if not Path(path).exists():
                raise SystemExit(f"There is no {path}, given for the {split} data.")
            kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(path).suffix, "json")
            source = {"path": kind, "data_files": str(path)}
            if kind == "csv":
                source["keep_default_na"] = False  # "null" is a label too
            if Path(path).is_dir():
                source = {"path": "imagefolder", "data_dir": path}
            try:
                data[split] = datasets.load_dataset(**source, split="train")
            except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
                why = f"{error.__cause__ or error}"
                raise SystemExit(f"No {split} data can be read from {path}: {why}") from None
    for split, rows in data.items():
        if {image, label} - set(rows.column_names) or not len(rows):
            raise SystemExit(
                f"The {split} data needs rows with the columns {image} and {label}; it has "
                f"{len(rows)} rows with {', '.join(rows.column_names)}. Name your columns with "
                "--image_column_name and --label_column_name; a folder needs one for each label."
            )
    if "validation" not in data:
        parts = data["train"].train_test_split(test_size=0.1, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]

    feature = data["train"].features[label]
    if "test" in data and hasattr(feature, "names") and -1 in data["test"][label]:
        del data["test"]  # its labels are kept secret
    names = getattr(feature, "names", None) or sorted(
        {str(value) for value in data["train"][label]}
    )
    for split, rows in data.items():  # by name: a label's number may differ between files
        to_text = getattr(rows.features[label], "int2str", str)
        texts = [to_text(value) for value in rows[label]]
        if unknown := set(texts) - set(names):
            raise SystemExit(
                f"The {split} data has the labels {', '.join(sorted(unknown))}, and the training "
                f"data has only {', '.join(names)}: train with all labels, or leave these out."
            )
        images = rows.select_columns(image).cast_column(image, datasets.Image())
        data[split] = images.add_column("labels", [names.index(text) for text in texts])
    return data, names


def simple_methods(train, test, image, score):
    """What the most frequent label reaches on the test data, and a linear model of pixels."""

    def pixels(rows):
        images = [row.convert("L").resize((28, 28)) for row in rows[image]]
        return np.stack([np.asarray(small).ravel() / 255 for small in images])

    most_frequent = Counter(train["labels"]).most_common(1)[0][0]
    some = ""
    if len(train) > MOST:
        train, some = train.shuffle(seed=0).select(range(MOST)), f", {MOST:,} rows"
    linear = LogisticRegression(C=0.1, max_iter=1000).fit(pixels(train), train["labels"][:])
    found = {
        "most frequent label": [most_frequent] * len(test),
        f"logistic regression on pixels{some}": linear.predict(pixels(test)),
    }
    return {name: score.value(labels, test["labels"][:]) for name, labels in found.items()}


def small_resnet(names, size):
    """A ResNet from scratch and its image processor."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[2, 2, 2], layer_type="basic", **names
    )
    processor = ViTImageProcessorPil(
        size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return AutoModelForImageClassification.from_config(config), processor


def most_likely(logits, labels):
    """What is kept of a batch's predictions; some models give more than their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/image_classification",
        optim="normopt",
        learning_rate=1e-3,
        weight_decay=0.01,
        per_device_train_batch_size=50,
        per_device_eval_batch_size=100,
        max_steps=200,
        num_train_epochs=0.0,
        warmup_steps=0.1,
        logging_steps=20,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.5,
        save_total_limit=1,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    args, training_args = parser.parse_args_into_dataclasses()
    push, training_args.push_to_hub = training_args.push_to_hub, False  # trained first, pushed last
    if training_args.num_train_epochs:  # asked for, in place of the steps
        training_args.max_steps = -1
    set_seed(training_args.seed)

    data, names = load_data(args)
    final = "test" if "test" in data else "validation"
    score = Score(args, training_args, "accuracy.py", "accuracy")
    baselines = simple_methods(data["train"], data[final], args.image_column_name, score)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    if args.model_name_or_path:
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path, ignore_mismatched_sizes=True, dtype="float32", **labels
        )
    else:
        model, processor = small_resnet(labels, args.image_size)

    def prepare(batch, flip):
        images = [image.convert("RGB") for image in batch[args.image_column_name]]
        if flip:
            mirrored = torch.rand(len(images)) < 0.5
            images = [
                ImageOps.mirror(image) if is_mirrored else image
                for image, is_mirrored in zip(images, mirrored, strict=True)
            ]
        return {**processor(images, return_tensors="pt"), "labels": batch["labels"]}

    ready = {
        split: rows.with_transform(partial(prepare, flip=args.flip and split == "train"))
        for split, rows in data.items()
    }
    trainer = Trainer(
        model,
        training_args,
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        processing_class=processor,
        compute_metrics=lambda p: score(p.predictions, p.label_ids),
        preprocess_logits_for_metrics=most_likely,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the image processor too
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        metrics = trainer.evaluate(ready[split], metric_key_prefix=split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    given = args.dataset_name or args.train_file or args.train_dir
    name = Path(given).name if given else "Fashion-MNIST"
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'ResNet').name} on {name}",
        task="image-classification",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{name if given else ABOUT_FASHION_MNIST}. Rows: {rows}.",
        baselines=baselines,
        limits="It knows the labels of its training data only, and takes every image for one of "
        f"them: {', '.join(names)}.",
        base_model=args.model_name_or_path,
        license=None if given or args.model_name_or_path else "apache-2.0",
    )
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
