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
    ResNetConfig,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
)

from common import (
    DATA,
    FolderArguments,
    Score,
    about_data,
    count_rows,
    finish,
    is_own,
    most_likely,
    option,
    parse,
    read_labelled,
    some_rows,
    train,
)

ABOUT_FASHION_MNIST = (
    "Grey images of clothes, 28 x 28, ten kinds, a balanced part of "
    "[Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist) "
    "([Xiao et al. 2017](https://arxiv.org/abs/1708.07747)), MIT"
)


@dataclass
class Arguments(FolderArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: from scratch.")
    image_column_name: str = option("image", "The column of the images.")
    label_column_name: str = option("label", "The column of the labels.")
    image_size: int = option(56, "Height and width for the model from scratch.")
    flip: bool = option(True, "Mirror half of the training images, left to right.")


def load_data(args):
    """Train, validation and test splits of images and of labels' numbers, and the labels' names."""
    image = args.image_column_name
    own = DATA / "fashion_mnist" / "{split}.parquet"
    data, names = read_labelled(args, image, own, read_folder)
    return {s: rows.cast_column(image, datasets.Image()) for s, rows in data.items()}, names


def read_folder(path):
    return datasets.load_dataset("imagefolder", data_dir=path, split="train")


def simple_methods(rows, test, image, score):
    """What the most frequent label reaches on the test data, and a linear model of pixels."""

    def pixels(rows):
        images = [row.convert("L").resize((28, 28)) for row in rows[image]]
        return np.stack([np.asarray(small).ravel() / 255 for small in images])

    most_frequent = Counter(rows["labels"]).most_common(1)[0][0]
    rows, some = some_rows(rows)
    linear = LogisticRegression(C=0.1, max_iter=1000).fit(pixels(rows), rows["labels"][:])
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


def main():
    args, training_args, push = parse(
        (Arguments, TrainingArguments),
        output_dir="outputs/image_classification",
        learning_rate=1e-3,
        per_device_train_batch_size=50,
        per_device_eval_batch_size=100,
        max_steps=200,
        logging_steps=20,
        remove_unused_columns=False,
    )
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
    results = train(trainer, ready, final)
    is_default = is_own(args) and not args.model_name_or_path
    about = about_data(args, "Fashion-MNIST", ABOUT_FASHION_MNIST, count_rows(data))
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'ResNet').name} on {about['dataset']}",
        task="image-classification",
        baselines=baselines,
        limits="It knows the labels of its training data only, and takes every image for one of "
        f"them: {', '.join(names)}.",
        base_model=args.model_name_or_path,
        license="apache-2.0" if is_default else None,
    )


if __name__ == "__main__":
    sys.exit(main())
