"""Fine-tune a language model on worked answers by LoRA, with TRL's SFTTrainer.

    python recipes/sft_lora.py

teaches the model of pretrain_causal_lm.py (which runs first, if outputs/pretrain_causal_lm is not
there) to predict worked answers to school problems (recipes/data/gsm8k), in 2 minutes on two CPU
cores. The flags are those of TRL's own scripts, `--config FILE.yaml` included. Other models and
data:

    python recipes/sft_lora.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/Capybara --learning_rate 5e-4 --output_dir outputs/capybara
    python recipes/sft_lora.py --train_file pairs.jsonl --prompt_column ask --completion_column say
"""

import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import torch
from transformers import AutoConfig, set_seed
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

import hf_normopt
from common import MetricArguments, Score, option

# peft 0.21 asks transformers 5.23 for a property's old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

GSM8K = Path(__file__).parent / "data" / "gsm8k"
ABOUT_GSM8K = (
    "School problems with worked answers, every 6th, 4th and 6th row for training, validation and "
    "test of [openai/grade-school-math](https://github.com/openai/grade-school-math) "
    "([Cobbe et al. 2021](https://arxiv.org/abs/2110.14168)), MIT; of its training rows the last "
    "500 are for validation"
)
TOO_SMALL = (
    "It cannot solve the problems, nor write a whole answer: a model of a million parameters that "
    "has read only Shakespeare learns the words and signs of worked answers, and repeats them. "
)
PRETRAINED = Path("outputs/pretrain_causal_lm")
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class Arguments(MetricArguments):
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(None, "A json, csv, parquet or txt file; default: GSM8K.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
    prompt_column: str = option("prompt", "The prompts; `messages` or `text` go without.")
    completion_column: str = option("completion", "The completions.")


def load_data(args):
    """Train, validation and test splits, with the columns that TRL knows."""
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    files = {split: path for split, path in files.items() if path}
    if files and (args.dataset_name or "train" not in files):
        raise SystemExit(
            "Name --train_file, with --validation_file and --test_file, or --dataset_name."
        )
    for path in files.values():
        if Path(path).is_file() and not Path(path).stat().st_size:
            raise SystemExit(f"{path} is empty: it needs at least two rows.")
    splits = ("train", "validation", "test")
    if args.dataset_name:
        data = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        data = datasets.DatasetDict({s: data[s] for s in splits if s in data})
    elif args.train_file:
        suffix = Path(args.train_file.removesuffix(".gz")).suffix
        if suffix not in LOADERS:
            raise SystemExit(f"{args.train_file} is none of {', '.join(LOADERS)}.")
        options = {"keep_default_na": False} if suffix == ".csv" else {}  # "null" is a word too
        data = datasets.load_dataset(LOADERS[suffix], data_files=files, **options)
    else:
        files = {s: str(GSM8K / f"{s}.jsonl.gz") for s in splits}
        data = datasets.load_dataset("json", data_files=files)
        return data.map(
            lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]},
            remove_columns=["question", "answer"],
        )
    columns = data["train"].column_names
    pair = [args.prompt_column, args.completion_column]
    named = pair != [Arguments.prompt_column, Arguments.completion_column]
    kinds = (pair,) if named else (pair, ["messages"], ["text"])
    known = next((c for c in kinds if {*c} <= {*columns}), None)
    if known is None:
        raise SystemExit(
            f"The data has the columns {', '.join(columns)}, and neither {' and '.join(pair)}, nor "
            "messages, nor text. Name yours with --prompt_column and --completion_column."
        )
    if "validation" not in data:
        parts = data["train"].train_test_split(test_size=0.1, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]
    data = data.select_columns(known)
    names = dict(zip(pair, ("prompt", "completion"), strict=True)) if known == pair else {}
    return data.rename_columns({old: new for old, new in names.items() if old != new})


def most_frequent_token(trainer, train, test, score):
    """What it reaches to say always the most frequent token, in the batches that TRL averages."""
    counts = Counter(token for row in train["labels"] for token in row if token != -100)
    token = counts.most_common(1)[0][0]
    batches = (batch["labels"][:, 1:] for batch in trainer.get_eval_dataloader(test))
    true = [labels[labels != -100].tolist() for labels in batches]
    if not score.is_own:
        true = [*chain.from_iterable(true)]
        return score.value([token] * len(true), true)
    return score.value([[token] * len(batch) for batch in true], true)


def best_guesses(logits, labels):
    """What is kept of a batch's logits: of each token but the last the guess for the next one."""
    return (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].argmax(-1)


def main():
    parser = TrlParser((Arguments, SFTConfig, ModelConfig))
    parser.set_defaults(
        output_dir="outputs/sft_lora",
        optim="normopt",
        learning_rate=5e-3,
        weight_decay=0.01,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        max_steps=50,
        num_train_epochs=0.0,
        max_length=512,
        warmup_steps=0.1,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=0.5,
        save_strategy="steps",
        save_steps=0.5,
        save_total_limit=1,
        report_to="none",
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_peft=True,
        lora_target_modules=["all-linear"],
    )
    args, training_args, model_args = parser.parse_args_and_config()
    push, training_args.push_to_hub = training_args.push_to_hub, False  # trained first, pushed last
    if training_args.num_train_epochs:  # asked for, in place of the steps
        training_args.max_steps = -1
    set_seed(training_args.seed)

    data = load_data(args)
    final = "test" if "test" in data else "validation"
    checkpoint = model_args.model_name_or_path or str(PRETRAINED)
    if not model_args.model_name_or_path:
        if not (PRETRAINED / "model.safetensors").exists():
            if training_args.world_size > 1:
                raise SystemExit("Run recipes/pretrain_causal_lm.py first, in one process.")
            print(f"There is no model in {PRETRAINED} yet: pretrain_causal_lm.py makes it first.")
            script = Path(__file__).with_name("pretrain_causal_lm.py")
            subprocess.run([sys.executable, script, "--output_dir", PRETRAINED], check=True)
        if model_args.lora_modules_to_save is None:  # it has hardly seen a digit
            model_args.lora_modules_to_save = ["embed_tokens", "lm_head"]
    config = AutoConfig.from_pretrained(checkpoint, revision=model_args.model_revision)
    longest = getattr(config, "max_position_embeddings", None)
    if longest and training_args.max_length and training_args.max_length > longest:
        raise SystemExit(f"The model takes {longest} tokens: use --max_length {longest} or less.")
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    score = Score(args, training_args, "mean_token_accuracy.py", "mean_token_accuracy")

    def compute_metrics(p):
        predicted = p.label_ids[:, 1:] != -100
        return score(p.predictions[predicted], p.label_ids[:, 1:][predicted])

    trainer = SFTTrainer(
        checkpoint,
        training_args,
        train_dataset=data["train"],
        eval_dataset={split: data[split] for split in dict.fromkeys(("validation", final))},
        # TRL finds mean_token_accuracy with the loss; for another metric it runs the model again
        compute_metrics=None if score.is_own else compute_metrics,
        preprocess_logits_for_metrics=best_guesses,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    prepared = trainer.eval_dataset  # tokenized, with labels
    trainer.eval_dataset = prepared["validation"]

    def evaluate(split, prefix):
        """TRL gives its own metrics the prefix eval, whatever was asked for."""
        metrics = trainer.evaluate(prepared[split], metric_key_prefix=prefix)
        return {
            f"{prefix}_{key.removeprefix('eval_')}" if key.startswith("eval_") else key: value
            for key, value in metrics.items()
        }

    usual = most_frequent_token(trainer, trainer.train_dataset, prepared[final], score)
    baselines = {
        "most frequent token": usual,
        "the model before": evaluate(final, "before")[f"before_{score.headline}"],
    }
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the adapter, and the tokenizer
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        metrics = evaluate(split, split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    is_default = not (args.dataset_name or args.train_file)
    name = "GSM8K" if is_default else args.dataset_name or Path(args.train_file).name
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(checkpoint).name} on {name}{', by LoRA' if model_args.use_peft else ''}",
        task="text-generation",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{ABOUT_GSM8K if is_default else name}. Rows: {rows}.",
        baselines=baselines,
        limits=(TOO_SMALL if is_default and not model_args.model_name_or_path else "")
        + (
            "mean_token_accuracy is the share of the tokens to be learned that are the model's "
            "first guess, given the true ones before them, averaged over batches; it"
            if score.is_own
            else "The metric compares the model's first guess for each token, given the true ones "
            "before it, with the true one; it"
        )
        + " does not say that an answer is right.",
        base_model=checkpoint,
        language="en" if is_default else None,
        license="apache-2.0" if is_default and not model_args.model_name_or_path else None,
        library_name="peft" if model_args.use_peft else "transformers",
    )
    row = data[final][0]
    if isinstance(row.get("prompt"), str):  # one answer, to look at
        tokenizer, model = trainer.processing_class, trainer.model
        inputs = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        answer = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        print(tokenizer.decode(answer[0], skip_special_tokens=True))
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
