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

from transformers import AutoConfig
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from common import (
    DATA,
    LOADERS,
    DataArguments,
    Score,
    about_data,
    count_rows,
    finish,
    is_own,
    option,
    parse,
    read_data,
    train,
    with_validation,
)

# peft 0.21 asks transformers 5.23 for a property's old name
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

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


@dataclass
class Arguments(DataArguments):
    prompt_column: str = option("prompt", "The prompts; `messages` or `text` go without.")
    completion_column: str = option("completion", "The completions.")


def load_data(args):
    """Train, validation and test splits, with the columns that TRL knows."""
    loaders = {**LOADERS, ".txt": ("text", {})}
    data = read_data(args, DATA / "gsm8k" / "{split}.jsonl.gz", loaders)
    if is_own(args):
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
    data = with_validation(data).select_columns(known)
    names = dict(zip(pair, ("prompt", "completion"), strict=True)) if known == pair else {}
    return data.rename_columns({old: new for old, new in names.items() if old != new})


def most_frequent_token(trainer, test, score):
    """What it reaches to say always the most frequent token, in the batches that TRL averages."""
    known = chain.from_iterable(trainer.train_dataset["labels"])
    counts = Counter(token for token in known if token != -100)
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
    args, training_args, model_args, push = parse(
        (Arguments, SFTConfig, ModelConfig),
        TrlParser,
        output_dir="outputs/sft_lora",
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=32,
        max_steps=50,
        max_length=512,
        logging_steps=5,
        bf16=False,
        activation_checkpointing=False,
        use_peft=True,
        lora_target_modules=["all-linear"],
    )
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
    trainer.eval_dataset = prepared[final]

    def evaluate(prefix):
        """TRL gives its own metrics the prefix eval, whatever was asked for."""
        metrics = trainer.evaluate(metric_key_prefix=prefix)
        return {
            f"{prefix}_{key.removeprefix('eval_')}" if key.startswith("eval_") else key: value
            for key, value in metrics.items()
        }

    usual = most_frequent_token(trainer, prepared[final], score)
    baselines = {
        "most frequent token": usual,
        "the model before": evaluate("before")[f"before_{score.headline}"],
    }
    trainer.eval_dataset = prepared["validation"]
    results = train(trainer, prepared, final, evaluate)
    row = data[final][0]
    if isinstance(row.get("prompt"), str):  # one answer, to look at
        tokenizer, model = trainer.processing_class, trainer.model
        inputs = tokenizer(row["prompt"], return_tensors="pt").to(model.device)
        answer = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        print(tokenizer.decode(answer[0], skip_special_tokens=True))
    how = ", by LoRA" if model_args.use_peft else ""
    is_default = is_own(args) and not model_args.model_name_or_path
    about = about_data(args, "GSM8K", ABOUT_GSM8K, count_rows(data))
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(checkpoint).name} on {about['dataset']}{how}",
        task="text-generation",
        baselines=baselines,
        limits=(TOO_SMALL if is_default else "")
        + (
            "mean_token_accuracy is the share of the tokens to be learned that are the model's "
            "first guess, given the true ones before them, averaged over batches; it"
            if score.is_own
            else "The metric compares the model's first guess for each token, given the true ones "
            "before it, with the true one; it"
        )
        + " does not say that an answer is right.",
        base_model=checkpoint,
        language="en" if is_own(args) else None,
        license="apache-2.0" if is_default else None,
        library_name="peft" if model_args.use_peft else "transformers",
    )


if __name__ == "__main__":
    sys.exit(main())
