"""Train a model to translate, with an operator norm for each tensor by its role.

    python recipes/translation.py

trains a tokenizer and a small encoder-decoder from scratch on short English sentences and their
Swedish translations (recipes/data/tatoeba) in 2 minutes on two CPU cores. `--optim adamw_torch` is
the same run with AdamW. Other models and data:

    python recipes/translation.py --model_name_or_path google-t5/t5-small --target_lang de \
        --source_prefix "translate English to German: " --dataset_name wmt/wmt16 \
        --dataset_config_name de-en --learning_rate 5e-4
    python recipes/translation.py --train_file pairs.csv --source_lang en --target_lang fr
"""

import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    M2M100Config,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import hf_normopt
from common import MetricArguments, Score, option

SPLITS = ("train", "validation", "test")
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
TATOEBA = Path(__file__).parent / "data" / "tatoeba"
ABOUT_TATOEBA = (
    "Sentences of at most five English words and their Swedish translations, from the "
    "[Tatoeba Project](https://tatoeba.org), paired by "
    "[manythings.org](https://www.manythings.org/anki), CC BY 2.0 FR; every row names its authors"
)
MOST = 20_000  # rows that the simple methods learn from


@dataclass
class Arguments(MetricArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: from scratch.")
    vocab_size: int = option(1500, "Of the tokenizer that is trained, without a model.")
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(None, "A csv, json or parquet file; default: Tatoeba.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
    source_lang: str = option("en", "The column to translate, or a multilingual model's code.")
    target_lang: str = option("sv", "The same for the translations.")
    source_prefix: str = option("", "Put before every source, as T5 wants it.")
    max_source_length: int = option(32, "In tokens; longer sources are cut.")
    max_target_length: int = option(32, "The same for targets.")
    max_eval_samples: int = option(128, "Validation rows during training; all at the end.")


def load_data(args):
    """Train, validation and test splits, and the names of the two columns."""
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
            files = {split: str(TATOEBA / f"{split}.csv.gz") for split in SPLITS}
        files = {split: path for split, path in files.items() if path}
        kind = LOADERS.get(Path(files["train"].removesuffix(".gz")).suffix)
        if kind is None:
            raise SystemExit(f"{files['train']} is none of {', '.join(LOADERS)}, .gz or not.")
        options = {"keep_default_na": False} if kind == "csv" else {}  # "null" is a word too
        data = datasets.load_dataset(kind, data_files=files, **options)
    found = data["train"].column_names
    columns = [args.source_lang, args.target_lang]
    if not set(columns) <= set(found):  # en_XX and eng_Latn are codes of models
        columns = [code.split("_")[0] for code in columns]
    if "translation" in data["train"].column_names:  # dictionaries, as on the Hub
        data, columns = data.flatten(), [f"translation.{name}" for name in columns]
        found = data["train"].column_names
    if missing := set(columns) - set(found):
        raise SystemExit(
            f"There is no column {', '.join(sorted(missing))}; the data has {', '.join(found)}. "
            "Name yours with --source_lang and --target_lang."
        )
    for split, rows in data.items():
        if any(rows.data.column(column).null_count for column in columns):
            raise SystemExit(f"The {split} data has rows without a translation: remove them.")
    if "validation" not in data:
        parts = data["train"].train_test_split(test_size=0.1, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]
    return data.select_columns(columns), columns


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer that ends every text with </s>."""
    bpe = ByteLevelBPETokenizer()
    end, padding = special = ["</s>", "<pad>"]
    bpe.train_from_iterator(texts, vocab_size, show_progress=False, special_tokens=special)
    ending = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, bpe.token_to_id(end))])
    bpe._tokenizer.post_processor = ending
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=end, pad_token=padding, model_input_names=names
    )


def load_model(args, texts):
    """The model and its tokenizer: those named, or new ones."""
    if not args.model_name_or_path:
        tokenizer = train_tokenizer(texts, args.vocab_size)
        config = M2M100Config(
            vocab_size=len(tokenizer),
            d_model=128,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=512,
            decoder_ffn_dim=512,
            max_position_embeddings=max(args.max_source_length, args.max_target_length, 128),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0),
            **dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop"), 0.0),
        )
        return AutoModelForSeq2SeqLM.from_config(config), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, dtype="float32")
    if hasattr(tokenizer, "tgt_lang"):  # NLLB, mBART, M2M100: a code begins every translation
        tokenizer.src_lang, tokenizer.tgt_lang = args.source_lang, args.target_lang
        number = getattr(tokenizer, "get_lang_id", tokenizer.convert_tokens_to_ids)
        model.generation_config.forced_bos_token_id = number(args.target_lang)
        if tokenizer.unk_token_id in map(number, (args.source_lang, args.target_lang)):
            raise SystemExit(
                f"{args.source_lang} and {args.target_lang} are not both languages of the model: "
                f"it has {', '.join(map(str, tokenizer.additional_special_tokens))}."
            )
    return model, tokenizer


def simple_methods(train, test, source, target, score):
    """What copies reach: of the source, and of the translation of the nearest training source."""
    some = ""
    if len(train) > MOST:
        train, some = train.shuffle(seed=0).select(range(MOST)), f", {MOST:,} rows"
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    known = NearestNeighbors(n_neighbors=1, metric="cosine")
    known.fit(vectorizer.fit_transform(train[source]))
    nearest = known.kneighbors(vectorizer.transform(test[source]), return_distance=False)[:, 0]
    written = {
        "copy of the source": test[source][:],
        f"translation of the nearest training source{some}": train[nearest][target],
    }
    return {name: score.value(texts, test[target][:]) for name, texts in written.items()}


def main():
    parser = HfArgumentParser((Arguments, Seq2SeqTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/translation",
        optim="normopt",
        learning_rate=1e-3,
        weight_decay=0.01,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        predict_with_generate=True,
        max_steps=400,
        num_train_epochs=0.0,
        warmup_steps=0.1,
        logging_steps=20,
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
    set_seed(training_args.seed)

    raw, (source, target) = load_data(args)
    final = "test" if "test" in raw else "validation"
    score = Score(args, training_args, "chrf.py", "chrf")
    baselines = simple_methods(raw["train"], raw[final], source, target, score)
    model, tokenizer = load_model(args, chain(raw["train"][source], raw["train"][target]))

    def encode(batch):
        sources = tokenizer(
            [args.source_prefix + text for text in batch[source]],
            truncation=True,
            max_length=args.max_source_length,
        )
        targets = tokenizer(
            text_target=batch[target], truncation=True, max_length=args.max_target_length
        )
        return {**sources, "labels": targets["input_ids"]}

    def compute_metrics(p):
        ids = np.where(p.predictions < 0, tokenizer.pad_token_id, p.predictions)
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return score(written, trainer.eval_dataset[target][:])  # whole, also where cut

    data = raw.map(encode, batched=True)
    shown = range(min(args.max_eval_samples, len(data["validation"])))
    trainer = Seq2SeqTrainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"].select(shown),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the tokenizer too
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        trainer.eval_dataset = data[split]  # compute_metrics takes its translations
        metrics = trainer.evaluate(metric_key_prefix=split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    given = args.dataset_name or args.train_file
    name = Path(given).name if given else "Tatoeba, English to Swedish"
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    rows += f". During training the first {len(shown):,} for validation were scored"
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'A small M2M100').name} on {name}",
        task="translation",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{name if given else ABOUT_TATOEBA}. Rows: {rows}.",
        baselines=baselines,
        limits="It translates sentences like those that it was trained on, and others badly: what "
        "it writes may be fluent and mean something else.",
        base_model=args.model_name_or_path,
        language=None if given else ["en", "sv"],
        license=None if given or args.model_name_or_path else "apache-2.0",
    )
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
