"""A script as transformers' examples are (`run_glue.py`), for `find-rate`; with a habit or two.

Run in a folder with `train.csv` and `dev.csv`, columns `text` and `label`.
"""

import logging
import os
import sys
from dataclasses import dataclass, field

import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

logger = logging.getLogger(__name__)
LETTERS = "abcdefgh"


@dataclass
class ModelArguments:
    hidden_size: int = field(default=16)
    final_folder: str = field(default="final")


@dataclass
class DataTrainingArguments:
    train_file: str | None = field(default=None)
    validation_file: str | None = field(default=None)
    max_train_samples: int | None = field(default=None)


class SaveFinal(TrainerCallback):
    """What many scripts have: something that is saved beside `output_dir`."""

    def __init__(self, folder):
        self.folder = folder

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        model.save_pretrained(self.folder)

    on_train_end = on_epoch_end


def read(path, count):
    with open(path) as file:
        rows = [line.strip().split(",") for line in file][1:]
    return [
        {"input_ids": torch.tensor([LETTERS.index(c) for c in text]), "labels": int(label)}
        for text, label in rows[:count]
    ]


def compute_metrics(prediction: EvalPrediction):
    guesses = prediction.predictions.argmax(-1)
    return {"accuracy": float((guesses == prediction.label_ids).mean())}


def main():
    parser = HfArgumentParser((ModelArguments, DataTrainingArguments, TrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(handlers=[logging.StreamHandler(sys.stdout)])
    if training_args.should_log:
        transformers.utils.logging.set_verbosity_info()

    last_checkpoint = None
    if os.path.isdir(training_args.output_dir) and training_args.do_train:
        last_checkpoint = get_last_checkpoint(training_args.output_dir)
        if last_checkpoint is None and os.listdir(training_args.output_dir):
            raise ValueError(f"Output directory ({training_args.output_dir}) is not empty.")
    set_seed(training_args.seed)

    config = BertConfig(
        vocab_size=len(LETTERS),
        hidden_size=model_args.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * model_args.hidden_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with training_args.main_process_first(desc="read the data"):
        train_dataset = read(data_args.train_file, data_args.max_train_samples)
        eval_dataset = read(data_args.validation_file, None)
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=training_args,
        train_dataset=train_dataset if training_args.do_train else None,
        eval_dataset=eval_dataset if training_args.do_eval else None,
        compute_metrics=compute_metrics,
        data_collator=default_data_collator,
        callbacks=[EarlyStoppingCallback(1), SaveFinal(model_args.final_folder)],
    )
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint or last_checkpoint
        result = trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.log_metrics("train", result.metrics)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if training_args.push_to_hub:
        trainer.push_to_hub(tasks="text-classification")
    else:
        trainer.create_model_card()


if __name__ == "__main__":
    main()
