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

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    M2M100Config,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from common import (
    DATA,
    DataArguments,
    Score,
    about_data,
    check_columns,
    check_writing,
    count_rows,
    finish,
    is_own,
    option,
    parse,
    read_data,
    some_rows,
    train,
    with_validation,
)

ABOUT_TATOEBA = (
    "Sentences of at most five English words and their Swedish translations, from the "
    "[Tatoeba Project](https://tatoeba.org), paired by "
    "[manythings.org](https://www.manythings.org/anki), CC BY 2.0 FR; every row names its authors"
)


@dataclass
class Arguments(DataArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: from scratch.")
    vocab_size: int = option(1500, "Of the tokenizer that is trained, without a model.")
    source_lang: str = option("en", "The column to translate, or a multilingual model's code.")
    target_lang: str = option("sv", "The same for the translations.")
    source_prefix: str = option("", "Put before every source, as T5 wants it.")
    max_source_length: int = option(32, "In tokens; longer sources are cut.")
    max_target_length: int = option(32, "The same for targets.")
    max_eval_samples: int = option(128, "Validation rows during training; all at the end.")


def load_data(args):
    """Train, validation and test splits, and the names of the two columns."""
    data = read_data(args, DATA / "tatoeba" / "{split}.csv.gz")
    columns = [args.source_lang, args.target_lang]
    found = data["train"].column_names
    if not set(columns) <= set(found):  # en_XX and eng_Latn are codes of models
        columns = [code.split("_")[0] for code in columns]
    if "translation" in found:  # dictionaries, as on the Hub
        data, columns = data.flatten(), [f"translation.{name}" for name in columns]
    flags = "--source_lang and --target_lang"
    check_columns(data, columns, flags, what="a translation")
    data = with_validation(data)
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


def simple_methods(rows, test, source, target, score):
    """What copies reach: of the source, and of the translation of the nearest training source."""
    rows, some = some_rows(rows)
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4))
    known = NearestNeighbors(n_neighbors=1, metric="cosine")
    known.fit(vectorizer.fit_transform(rows[source]))
    nearest = known.kneighbors(vectorizer.transform(test[source]), return_distance=False)[:, 0]
    written = {
        "copy of the source": test[source][:],
        f"translation of the nearest training source{some}": rows[nearest][target],
    }
    return {name: score.value(texts, test[target][:]) for name, texts in written.items()}


def main():
    args, training_args, push = parse(
        (Arguments, Seq2SeqTrainingArguments),
        output_dir="outputs/translation",
        learning_rate=1e-3,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        predict_with_generate=True,
        max_steps=400,
        logging_steps=20,
    )
    check_writing(args, training_args)
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
    results = train(trainer, data, final)
    is_default = is_own(args) and not args.model_name_or_path
    part = f". During training the first {len(shown):,} for validation were scored"
    counts = f"{count_rows(data)}{part}"
    about = about_data(args, "Tatoeba, English to Swedish", ABOUT_TATOEBA, counts)
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'A small M2M100').name} on {about['dataset']}",
        task="translation",
        baselines=baselines,
        limits="It translates sentences like those that it was trained on, and others badly: what "
        "it writes may be fluent and mean something else.",
        base_model=args.model_name_or_path,
        language=["en", "sv"] if is_own(args) else None,
        license="apache-2.0" if is_default else None,
    )


if __name__ == "__main__":
    sys.exit(main())
