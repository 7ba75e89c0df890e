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
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
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

ABOUT_SPOKEN_DIGITS = (
    "English digits spoken by four people, a balanced part of the [Free Spoken Digit Dataset]"
    "(https://github.com/Jakobovski/free-spoken-digit-dataset), made 8-bit, CC BY-SA 4.0"
)


@dataclass
class Arguments(FolderArguments):
    model_name_or_path: str | None = option(None, "On the Hub or a folder; default: from scratch.")
    audio_column_name: str = option("audio", "The column of the recordings.")
    label_column_name: str = option("label", "The column of the labels.")
    max_length_seconds: float = option(1.0, "Longer recordings are cut; in training anywhere.")
    speed: float = option(0.15, "Training recordings are played faster or slower by up to this.")


def load_data(args):
    """Train, validation and test splits of sounds and labels' numbers, and the labels' names."""
    audio, label = args.audio_column_name, args.label_column_name

    def read_folder(path):  # the loader "audiofolder" needs torchcodec
        files = sorted(Path(path).glob("*/*.wav"))
        columns = {audio: [*map(str, files)], label: [file.parent.name for file in files]}
        return datasets.Dataset.from_dict(columns)

    own = DATA / "spoken_digits" / "{split}.parquet"
    data, names = read_labelled(args, audio, own, read_folder)
    for split, rows in data.items():
        if isinstance(rows.features[audio], datasets.Value):  # paths; Audio takes no large_string
            rows = rows.cast_column(audio, datasets.Value("string"))
        data[split] = rows.cast_column(audio, datasets.Audio(decode=False))
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


def simple_methods(rows, test, audio, score):
    """What the most frequent label reaches on the test data, and a linear model of the sound."""
    log_mel = WhisperFeatureExtractor(40)

    def statistics(rows):
        sounds = [read_wav(sound, 16000) for sound in rows[audio]]
        bands = [log_mel(s, sampling_rate=16000, padding="longest").input_features for s in sounds]
        return [np.concatenate([b[0].mean(1), b[0].std(1)]) for b in bands]

    most_frequent = Counter(rows["labels"]).most_common(1)[0][0]
    rows, some = some_rows(rows)
    linear = LogisticRegression(C=100, max_iter=1000).fit(statistics(rows), rows["labels"][:])
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


def main():
    args, training_args, push = parse(
        (Arguments, TrainingArguments),
        output_dir="outputs/audio_classification",
        learning_rate=5e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=100,
        max_steps=240,
        logging_steps=20,
        remove_unused_columns=False,
    )
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
    results = train(trainer, ready, final)
    is_default = is_own(args) and not args.model_name_or_path
    about = about_data(args, "spoken digits", ABOUT_SPOKEN_DIGITS, count_rows(data))
    finish(
        trainer,
        score,
        results,
        final,
        **about,
        push_to_hub=push,
        title=f"{Path(args.model_name_or_path or 'Whisper encoder').name} on {about['dataset']}",
        task="audio-classification",
        baselines=baselines,
        limits=f"It takes every sound for one of its labels: {', '.join(names)}.",
        base_model=args.model_name_or_path,
        language="en" if is_own(args) else None,
        license="cc-by-sa-4.0" if is_default else None,
    )


if __name__ == "__main__":
    sys.exit(main())
