"""Train a tokenizer and a small Llama from scratch, with an operator norm for each tensor.

    python recipes/pretrain_causal_lm.py

trains a byte-level BPE tokenizer and a Llama of a million parameters on Shakespeare's plays
(recipes/data/tinyshakespeare) in 2 minutes on two CPU cores. Other data, sizes, architectures, and
going on from a model:

    python recipes/pretrain_causal_lm.py --train_file book.txt --hidden_size 256 --block_size 256
    python recipes/pretrain_causal_lm.py --config_name openai-community/gpt2
    python recipes/pretrain_causal_lm.py --model_name_or_path HuggingFaceTB/SmolLM2-135M \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1
"""

import bz2
import lzma
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from common import (
    DATA,
    LOADERS,
    DataArguments,
    Score,
    about_data,
    check_columns,
    finish,
    is_own,
    option,
    parse,
    read_data,
    train,
    with_validation,
)

ABOUT_SHAKESPEARE = (
    "Speeches from Shakespeare's plays, from [karpathy/char-rnn]"
    "(https://github.com/karpathy/char-rnn), in the order of the file: the first 90 % to "
    "train, 5 % for validation, 5 % for test; the text is in the public domain"
)


@dataclass
class Arguments(DataArguments):
    model_name_or_path: str | None = option(None, "Go on from this model, on the Hub or a folder.")
    config_name: str | None = option(
        None, "From scratch, but this configuration and its tokenizer."
    )
    tokenizer_name: str | None = option(
        None, "Default: the model's; without a model it is trained."
    )
    vocab_size: int = option(1024, "Of the tokenizer that is trained.")
    hidden_size: int = option(128, "Of the Llama, as the next four.")
    intermediate_size: int = option(352, "Width of the MLP.")
    num_hidden_layers: int = option(4, "Layers.")
    num_attention_heads: int = option(4, "Attention heads.")
    tie_word_embeddings: bool = option(False, "Whether the head is the embedding.")
    block_size: int = option(128, "Tokens in a training sequence.")
    text_column_name: str = option("text", "The column of the texts.")


def load_data(args):
    """Train, validation and test splits, and whether a row is a line, not a document."""
    loaders = {".txt": ("text", {"keep_linebreaks": True}), **LOADERS}
    data = read_data(args, DATA / "tinyshakespeare" / "{split}.txt.gz", loaders)
    check_columns(data, [args.text_column_name], "--text_column_name", what="text")
    if not len(data["train"]):
        raise SystemExit("The training data is empty.")
    data = with_validation(data, shuffle=False)
    is_text = args.train_file is None or ".txt" in Path(args.train_file).suffixes
    are_lines = is_text and not args.dataset_name
    return data.select_columns([args.text_column_name]), are_lines


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer: it knows every text, and no text is changed by it."""
    bpe = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|padding|>"]
    bpe.train_from_iterator(texts, vocab_size, show_progress=False, special_tokens=special)
    end, padding = special
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end, pad_token=padding
    )


def compressed(known, test):
    """Bits per byte of the test text for general compressors that have read the training text."""
    known = known[-8_000_000:]  # as far back as they look
    found = {}
    for compressor in (lzma, bz2):
        sizes = [len(compressor.compress(text.encode())) for text in (known, known + test)]
        found[f"{compressor.__name__} after the training text"] = (
            8 * (sizes[1] - sizes[0]) / len(test.encode())
        )
    return found


def load_model(args, data):
    """The model and its tokenizer: those named, or new ones."""
    name = args.tokenizer_name or args.model_name_or_path or args.config_name
    if name:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.eos_token is None:
            raise SystemExit(f"The tokenizer of {name} has no eos_token, which begins the text.")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    else:
        tokenizer = train_tokenizer(iter(data["train"][args.text_column_name]), args.vocab_size)
    if args.model_name_or_path:
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype="float32")
    elif args.config_name:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.config_name))
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=args.hidden_size,
            intermediate_size=args.intermediate_size,
            num_hidden_layers=args.num_hidden_layers,
            num_attention_heads=args.num_attention_heads,
            tie_word_embeddings=args.tie_word_embeddings,
            max_position_embeddings=max(1024, args.block_size),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = AutoModelForCausalLM.from_config(config)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    longest = getattr(model.config, "max_position_embeddings", None) or args.block_size
    if args.block_size > longest:
        raise SystemExit(f"The model takes {longest} tokens: use --block_size {longest} or less.")
    return model, tokenizer


def main():
    args, training_args, push = parse(
        (Arguments, TrainingArguments),
        output_dir="outputs/pretrain_causal_lm",
        learning_rate=2e-3,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        max_steps=250,
        logging_steps=20,
    )
    raw, rows_are_lines = load_data(args)
    final = "test" if "test" in raw else "validation"
    score = Score(args, training_args, "bits_per_byte.py", "bits_per_byte")
    model, tokenizer = load_model(args, raw)

    def encode(batch):
        texts = batch[args.text_column_name]
        texts = ["".join(texts)] if rows_are_lines else [t + tokenizer.eos_token for t in texts]
        return {"tokens": tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]}

    tokens, data = {}, {}
    for split, texts in raw.items():
        texts = texts.map(encode, batched=True, remove_columns=texts.column_names)
        tokens[split] = np.array([*chain.from_iterable(texts["tokens"])], dtype=np.int64)
        if not len(tokens[split]):
            raise SystemExit(f"The {split} data is empty.")
        # Each block begins with the last token of the one before: every token is predicted once.
        stream = np.concatenate([[tokenizer.eos_token_id], tokens[split]])
        starts = range(0, len(stream) - 1, args.block_size - 1)
        blocks = [stream[start : start + args.block_size] for start in starts]
        data[split] = datasets.Dataset.from_dict({"input_ids": blocks, "labels": blocks})

    def count_bytes(tokens):
        return len(tokenizer.decode(tokens, skip_special_tokens=True).encode())

    def keep(logits, labels):
        """The loss of each token, or for another metric the best guess, in place of the logits."""
        logits = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1]
        if not score.is_own:
            return logits.argmax(-1)
        return torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels[:, 1:], reduction="none"
        )

    def compute_metrics(p):
        predicted = p.label_ids[:, 1:] != -100
        found, true = p.predictions[predicted], p.label_ids[:, 1:][predicted]
        return score(found, true, size=count_bytes(true)) if score.is_own else score(found, true)

    texts = {split: tokenizer.decode(tokens[split], skip_special_tokens=True) for split in tokens}
    if score.is_own:
        baselines = compressed(texts["train"], texts[final])
    else:
        usual = np.bincount(tokens["train"]).argmax()
        guesses = np.full_like(tokens[final], usual)
        baselines = {"most frequent token": score.value(guesses, tokens[final])}

    trainer = Trainer(
        model,
        training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the last block, and its labels
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=keep,
    )
    results = train(trainer, data, final)
    prompt = torch.tensor([[tokenizer.eos_token_id, *tokens[final][:8]]], device=model.device)
    sample = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_length=args.block_size, do_sample=True
    )
    print(tokenizer.decode(sample[0], skip_special_tokens=True))
    start = args.model_name_or_path or args.config_name
    sizes = ", ".join(f"{len(found):,} for {split}" for split, found in tokens.items())
    about = about_data(args, "Shakespeare", ABOUT_SHAKESPEARE, f"Tokens: {sizes}")
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(start).name if start else 'A small Llama'} on {about['dataset']}",
        task="text-generation",
        baselines=baselines,
        limits="It writes text that looks like its training data, and means nothing. "
        + (
            "Less is better: bits_per_byte is the loss of all tokens of the split, in bits, over "
            "the bytes of their text; a"
            if score.is_own
            else "A"
        )
        + f" token is predicted from at most {args.block_size - 1} tokens before it.",
        base_model=args.model_name_or_path,
        language="en" if is_own(args) else None,
        license="apache-2.0" if is_own(args) and not start else None,
    )


if __name__ == "__main__":
    sys.exit(main())
