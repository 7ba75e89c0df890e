"""Train an audio classifier, with an operator norm for each tensor by its role.

    python recipes/audio_classification.py

trains a small Whisper encoder from scratch on 400 recordings of spoken digits
(recipes/data/spoken_digits) in one minute on two CPU cores. Other models and data:

    python recipes/audio_classification.py --model_name_or_path facebook/wav2vec2-base \
        --train_dir clips --validation_dir more_clips --learning_rate 5e-4   # clips/LABEL/*.wav
    python recipes/audio_classification.py --train_file train.csv --audio_column_name path
"""

import io
import sys
import wave
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    set_seed,
)

import hf_normopt
from common import MetricArguments, Score, option

SPLITS = ("train", "validation", "test")
SPOKEN_DIGITS = Path(__file__).parent / "data" / "spoken_digits"
ABOUT_SPOKEN_DIGITS = (
    "English digits spoken by four people, a balanced part of the [Free Spoken Digit Dataset]"
    "(https://github.com/Jakobovski/free-spoken-digit-dataset), made 8-bit, CC BY-SA 4.0"
)
MOST = 20_000  # rows that the simple methods learn from


@dataclass
class Arguments(MetricArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: from scratch.")
    dataset_name: str | None = option(None, "A data set on the Hub or a folder.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    train_dir: str | None = option(None, "A folder with a folder of WAV files for each label.")
    validation_dir: str | None = option(None, "The same, for validation.")
    test_dir: str | None = option(None, "The same, for the test.")
    train_file: str | None = option(None, "A parquet, csv or json file of WAV files or paths.")
    validation_file: str | None = option(None, "Default: 10 percent of the training data.")
    test_file: str | None = option(None, "Default: only the validation data are scored.")
    audio_column_name: str = option("audio", "The column of the recordings.")
    label_column_name: str = option("label", "The column of the labels.")
    max_length_seconds: float = option(1.0, "Longer recordings are cut; in training anywhere.")
    speed: float = option(0.15, "Training recordings are played faster or slower by up to this.")


def load_data(args):
    """Train, validation and test splits of sounds and labels' numbers, and the labels' names."""
    audio, label, data = args.audio_column_name, args.label_column_name, {}
    paths = {s: getattr(args, f"{s}_file") or getattr(args, f"{s}_dir") for s in SPLITS}
    if any(paths.values()) and (args.dataset_name or not paths["train"]):
        raise SystemExit(
            "Name --train_dir or --train_file, with the same for validation and test, or "
            "--dataset_name."
        )
    if args.dataset_name:
        try:
            found = datasets.load_dataset(args.dataset_name, args.dataset_config_name)
        except datasets.exceptions.DatasetGenerationError as error:
            raise SystemExit(
                f"{args.dataset_name} cannot be read ({error.__cause__ or error}); a folder of WAV "
                "files goes with --train_dir."
            ) from None
        data = {split: found[split] for split in SPLITS if split in found}
    elif not paths["train"]:
        paths = {split: SPOKEN_DIGITS / f"{split}.parquet" for split in SPLITS}
    for split, path in paths.items():
        if path:
            if not Path(path).exists():
                raise SystemExit(f"There is no {path}, given for the {split} data.")
            if Path(path).is_dir():  # the loader "audiofolder" needs torchcodec
                files = sorted(Path(path).glob("*/*.wav"))
                columns = {audio: map(str, files), label: [file.parent.name for file in files]}
                data[split] = datasets.Dataset.from_dict({k: list(v) for k, v in columns.items()})
                continue
            kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(path).suffix, "json")
            source = {"path": kind, "data_files": str(path)}
            if kind == "csv":
                source["keep_default_na"] = False  # "null" is a label too
            try:
                data[split] = datasets.load_dataset(**source, split="train")
            except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
                why = f"{error.__cause__ or error}"
                raise SystemExit(f"No {split} data can be read from {path}: {why}") from None
    for split, rows in data.items():
        if {audio, label} - set(rows.column_names) or not len(rows):
            raise SystemExit(
                f"The {split} data needs rows with the columns {audio} and {label}; it has "
                f"{len(rows)} rows with {', '.join(rows.column_names)}. Name your columns with "
                "--audio_column_name and --label_column_name; a folder needs one for each label."
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
        sounds = rows.select_columns(audio)
        if isinstance(sounds.features[audio], datasets.Value):  # paths; Audio takes no large_string
            sounds = sounds.cast_column(audio, datasets.Value("string"))
        sounds = sounds.cast_column(audio, datasets.Audio(decode=False))
        data[split] = sounds.add_column("labels", [names.index(text) for text in texts])
    return data, names


def read_wav(sound, rate, speed=1.0):
    """A PCM WAV file as numbers between -1 and 1, one channel, at a sampling rate."""
    try:
        with wave.open(io.BytesIO(sound["bytes"]) if sound["bytes"] else sound["path"]) as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            raw = np.frombuffer(file.readframes(file.getnframes()), np.uint8).reshape(-1, width)
    except (wave.Error, EOFError) as error:
        raise SystemExit(f"{sound['path']} is no PCM WAV file ({error}): convert it.") from None
    if width == 1:
        raw = raw ^ 128  # the only ones without a sign
    top = np.pad(raw, ((0, 0), (4 - width, 0)))  # the upper bytes of 32-bit integers
    samples = top.view("<i4").astype(np.float32) / 2.0**31
    samples = samples.reshape(-1, channels).mean(1)
    places = np.arange(0, len(samples), own / rate * speed)
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def simple_methods(train, test, audio, score):
    """What the most frequent label reaches on the test data, and a linear model of the sound."""
    log_mel = WhisperFeatureExtractor(40)

    def statistics(rows):
        sounds = [read_wav(sound, 16000) for sound in rows[audio]]
        bands = [log_mel(s, sampling_rate=16000, padding="longest").input_features for s in sounds]
        return [np.concatenate([b[0].mean(1), b[0].std(1)]) for b in bands]

    most_frequent = Counter(train["labels"]).most_common(1)[0][0]
    some = ""
    if len(train) > MOST:
        train, some = train.shuffle(seed=0).select(range(MOST)), f", {MOST:,} rows"
    linear = LogisticRegression(C=100, max_iter=1000).fit(statistics(train), train["labels"][:])
    found = {
        "most frequent label": [most_frequent] * len(test),
        f"linear on log-mel statistics{some}": linear.predict(statistics(test)),
    }
    return {name: score.value(labels, test["labels"][:]) for name, labels in found.items()}


def small_whisper(labels, seconds):
    """An encoder as Whisper's from scratch and its feature extractor."""
    extractor = WhisperFeatureExtractor(40, chunk_length=int(np.ceil(seconds)))
    config = WhisperConfig(
        num_mel_bins=40,
        max_source_positions=extractor.nb_max_frames // 2,
        d_model=96,
        encoder_layers=4,
        encoder_attention_heads=4,
        encoder_ffn_dim=192,
        classifier_proj_size=96,
        dropout=0.1,
        **labels,
    )
    return AutoModelForAudioClassification.from_config(config), extractor


def most_likely(logits, labels):
    """What is kept of a batch's predictions; some models give more than their logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def main():
    parser = HfArgumentParser((Arguments, TrainingArguments))
    parser.set_defaults(
        output_dir="outputs/audio_classification",
        optim="normopt",
        learning_rate=5e-3,
        weight_decay=0.01,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        max_steps=240,
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
    baselines = simple_methods(data["train"], data[final], args.audio_column_name, score)
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    if args.model_name_or_path:
        extractor = AutoFeatureExtractor.from_pretrained(args.model_name_or_path)
        model = AutoModelForAudioClassification.from_pretrained(
            args.model_name_or_path, ignore_mismatched_sizes=True, dtype="float32", **labels
        )
    else:
        model, extractor = small_whisper(labels, args.max_length_seconds)
    rate = extractor.sampling_rate
    longest = int(args.max_length_seconds * rate)

    def prepare(batch, augment):
        sounds = []
        for sound in batch[args.audio_column_name]:
            factor, place = torch.rand(2).tolist() if augment else (0.5, 0.0)
            samples = read_wav(sound, rate, speed=1 + args.speed * (2 * factor - 1))
            start = int(place * (len(samples) - longest))  # negative: silence before it
            sounds.append(np.pad(samples, (max(0, -start), 0))[max(0, start) :][:longest])
        return {"sound": sounds, "labels": batch["labels"]}

    def collate(rows):
        sounds = [row["sound"] for row in rows]
        features = extractor.pad(extractor(sounds, sampling_rate=rate), return_tensors="pt")
        return {**features, "labels": torch.tensor([row["labels"] for row in rows])}

    ready = {
        split: rows.with_transform(partial(prepare, augment=split == "train"))
        for split, rows in data.items()
    }
    trainer = Trainer(
        model,
        training_args,
        train_dataset=ready["train"],
        eval_dataset=ready["validation"],
        processing_class=extractor,
        data_collator=collate,
        compute_metrics=lambda p: score(p.predictions, p.label_ids),
        preprocess_logits_for_metrics=most_likely,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()  # the feature extractor too
    trainer.save_state()
    results = {}
    for split in dict.fromkeys(("validation", final)):
        metrics = trainer.evaluate(ready[split], metric_key_prefix=split)
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
        results |= metrics
    given = args.dataset_name or args.train_file or args.train_dir
    name = Path(given).name if given else "spoken digits"
    rows = ", ".join(f"{len(data[split]):,} for {split}" for split in data)
    hf_normopt.finish_run(
        trainer,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'Whisper encoder').name} on {name}",
        task="audio-classification",
        metrics=results,
        metric=score.headline,
        dataset=name,
        dataset_id=args.dataset_name,
        data=f"{name if given else ABOUT_SPOKEN_DIGITS}. Rows: {rows}.",
        baselines=baselines,
        limits=f"It takes every sound for one of its labels: {', '.join(names)}.",
        base_model=args.model_name_or_path,
        language=None if given else "en",
        license=None if given or args.model_name_or_path else "cc-by-sa-4.0",
    )
    headline = f"{final}_{score.headline}"
    print(f"{headline} = {results[headline]:.4f}")


if __name__ == "__main__":
    sys.exit(main())
