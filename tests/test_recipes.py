"""The recipes, run as a user runs them: on other data, with other models, and wrongly."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import wave
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_chrf
from seqeval.metrics import f1_score, precision_score, recall_score
from sklearn.metrics import accuracy_score
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTImageProcessorPil,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from common import METRICS, MetricArguments, Score
from hf_normopt import PRESETS, update_model_card
from recipes.cards import OPTIMIZERS, RECIPES, SEEDS, table
from tests.processes import run_script

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "data"


def start(script, *argv):
    command = [sys.executable, str(ROOT / "recipes" / f"{script}.py"), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)


def run(script, *argv):
    done = start(script, *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def result(printed, metric):
    """Of the last line; without test data it is that of the validation data."""
    last = printed.splitlines()[-1]
    return float(re.fullmatch(rf"(?:test|validation)_{metric} = (\d+\.\d+)", last)[1])


@pytest.mark.slow
def test_the_command_of_the_readme_learns(tmp_path):
    """It ends at 0.98 after 40 steps, and at 0.95 after 12."""
    done = run("text_classification", "--output_dir", tmp_path, "--max_steps", 12)
    assert result(done.stdout, "accuracy") >= 0.93
    assert "NormOpt, preset normopt:" in done.stdout
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"]["0"] == "AddToPlaylist"
    for line in (ROOT / "README.md").read_text().splitlines():  # the table that README shows
        if re.match(r"(linear|embedding|head|norm|bias) +\S+->", line):
            assert line in done.stdout


def sentences():
    with gzip.open(DATA / "snips" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][::5]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def save_tokenizer(folder):
    bpe = ByteLevelBPETokenizer(add_prefix_space=True)
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    texts = [row["text"] for row in sentences()]
    bpe.train_from_iterator(texts, 400, special_tokens=special, show_progress=False)
    names = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), special, strict=True))
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    fast.save_pretrained(folder)
    return {"vocab_size": len(fast), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def text_classification(folder):
    """A csv whose labels are words."""
    lines = [f'"{row["text"].replace(chr(34), "")}",{row["label_name"]}' for row in sentences()]
    (folder / "train.csv").write_text("\n".join(["sentence,intent", *lines]))
    ids = save_tokenizer(folder / "model")
    DistilBertModel(
        DistilBertConfig(dim=32, hidden_dim=64, n_layers=2, n_heads=2, **ids)
    ).save_pretrained(folder / "model")
    argv = ["--train_file", folder / "train.csv", "--label_column_name", "intent"]
    return argv, {"--text_column_name": "sentence"}


def token_classification(folder):
    """Parquet files whose tags are numbers with names, and test data."""
    rows = [{"words": row["tokens"], "ner_tags": row["ner_tags"]} for row in sentences()]
    names = sorted({tag for row in rows for tag in row["ner_tags"]})
    columns = {"words": datasets.List(datasets.Value("string"))}
    columns["ner_tags"] = datasets.List(datasets.ClassLabel(names=names))
    table = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
    table.to_parquet(folder / "train.parquet")
    table.select(range(9)).to_parquet(folder / "test.parquet")
    ids = save_tokenizer(folder / "model")
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 64}
    config = ElectraConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, **ids)
    ElectraModel(config).save_pretrained(folder / "model")
    files = ["--train_file", folder / "train.parquet", "--test_file", folder / "test.parquet"]
    return files, {"--text_column_name": "words"}


def gpt2(folder):
    ids = save_tokenizer(folder)
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=256, **ids)
    ).save_pretrained(folder)


def pretrain_causal_lm(folder):
    gpt2(folder / "model")
    train = write_rows(folder / "train.jsonl", [{"line": row["text"]} for row in sentences()])
    return ["--train_file", train, "--block_size", "32"], {"--text_column_name": "line"}


def sft_lora(folder):
    gpt2(folder / "model")
    rows = [{"ask": row["text"], "completion": row["label_name"]} for row in sentences()]
    train = write_rows(folder / "train.jsonl", rows)
    return ["--train_file", train, "--lora_r", "2", "--max_length", "64"], {
        "--prompt_column": "ask"
    }


def image_classification(folder):
    """A data set in a folder, with test data."""
    random = np.random.default_rng(0)
    for split, label in product(("train", "test"), ("cat", "dog")):
        (folder / "photos" / split / label).mkdir(parents=True)
        for i in range(12):
            pixels = random.integers(0, 255, (20, 24, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / split / label / f"{i}.png")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "model")
    return ["--dataset_name", folder / "photos"], {"--image_column_name": "image"}


def audio_classification(folder):
    """A csv with the paths of recordings."""
    random, rows = np.random.default_rng(0), ["clip,label"]
    for i, width in enumerate((1, 2, 3, 4) * 6):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setparams((1, width, 8000, 0, "NONE", ""))
            file.writeframes(random.bytes(4000 * width))
        rows.append(f"{folder / f'{i}.wav'},{'yes' if i % 2 else 'no'}")
    (folder / "train.csv").write_text("\n".join(rows))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    conv = {"conv_dim": [16] * 3, "conv_kernel": [10, 3, 3], "conv_stride": [5, 4, 4]}
    config = Wav2Vec2Config(**sizes, **conv, num_attention_heads=2, num_conv_pos_embeddings=16)
    Wav2Vec2Model(config).save_pretrained(folder / "model")
    Wav2Vec2FeatureExtractor().save_pretrained(folder / "model")
    return ["--train_file", folder / "train.csv"], {"--audio_column_name": "clip"}


def translation(folder):
    ids = save_tokenizer(folder / "model")
    ids["decoder_start_token_id"] = ids["forced_eos_token_id"] = 1
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, encoder_layers=1, decoder_layers=1, **ids)
    BartForConditionalGeneration(config).save_pretrained(folder / "model")
    rows = [{"en": row["text"], "back": " ".join(row["tokens"][::-1])} for row in sentences()]
    train = write_rows(folder / "train.jsonl", rows)
    return ["--train_file", train, "--max_target_length", "8"], {"--target_lang": "back"}


def summarization(folder):
    ids = save_tokenizer(folder / "model")
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=2, **ids))
    model.save_pretrained(folder / "model")
    rows = [{"article": row["text"], "summary": row["label_name"]} for row in sentences()]
    train = write_rows(folder / "train.jsonl", rows)
    return ["--train_file", train, "--max_target_length", "8"], {"--text_column": "article"}


CASES = {
    "text_classification": (text_classification, "accuracy"),
    "token_classification": (token_classification, "f1"),
    "pretrain_causal_lm": (pretrain_causal_lm, "bits_per_byte"),
    "sft_lora": (sft_lora, "mean_token_accuracy"),
    "image_classification": (image_classification, "accuracy"),
    "audio_classification": (audio_classification, "accuracy"),
    "translation": (translation, "chrf"),
    "summarization": (summarization, "rougeL"),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", CASES)
def test_other_data_and_another_model(tmp_path, recipe):
    """Other data, another architecture, checkpoints, resume, a whole card, a wrong column."""
    make, metric = CASES[recipe]
    data, columns = make(tmp_path)
    argv = [*data, *(word for item in columns.items() for word in item)]
    argv += ["--model_name_or_path", tmp_path / "model", "--per_device_train_batch_size", 4]
    argv += ["--output_dir", tmp_path / "out", "--save_steps", 1, "--logging_steps", 1]
    argv += ["--eval_steps", 1, "--optim", "normopt_muon"]
    script = ROOT / "recipes" / f"{recipe}.py"
    run_script(script, [*argv, "--max_steps", 1], tmp_path / "first.txt")
    argv += ["--resume_from_checkpoint", tmp_path / "out" / "checkpoint-1", "--max_steps", 3]
    printed = run_script(script, argv, tmp_path / "resumed.txt")
    assert "NormOpt, preset muon" in printed
    assert (tmp_path / "out" / "checkpoint-3" / "optimizer.pt").exists()

    record = json.loads((tmp_path / "out" / "normopt_run.json").read_text())
    value = record["metrics"][f"{record['final_split']}_{metric}"]
    has_test = recipe in ("token_classification", "image_classification")
    assert record["final_split"] == ("test" if has_test else "validation")
    assert record["dataset_id"] is None  # nothing is from the Hub
    assert result(printed, metric) == pytest.approx(value, abs=0.01)
    assert record["steps"] == 3
    assert all(np.isfinite(baseline) for baseline in record["baselines"].values())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_value == round(value, 4)
    assert card.data["optimizer_preset"] == "muon"
    assert card.data.base_model is None  # a folder is none that the Hub has
    assert "![Norms by role during training](normopt_norms.png)" in card.text
    assert (tmp_path / "out" / "normopt_norms.png").stat().st_size > 10_000
    module, wrong = import_module(f"recipes.{recipe}"), dict.fromkeys(columns, "nowhere")
    words = [str(word) for word in (*data, *(word for item in wrong.items() for word in item))]
    parser = HfArgumentParser(module.Arguments)
    args, _ = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    with pytest.raises(SystemExit, match="nowhere"):
        module.load_data(args)


def load(recipe, **given):
    module = import_module(f"recipes.{recipe}")
    return module.load_data(module.Arguments(**{key: str(value) for key, value in given.items()}))


@pytest.mark.parametrize("recipe", CASES)
def test_every_recipe_explains_its_flags(recipe):
    flags = HfArgumentParser(import_module(f"recipes.{recipe}").Arguments).format_help()
    assert "--train_file" in flags


@pytest.mark.parametrize("recipe", CASES)
@pytest.mark.parametrize("other", [{}, {"dataset_name": "d", "train_file": "t.csv"}])
def test_data_that_would_be_left_out_are_refused(recipe, other):
    with pytest.raises(SystemExit, match="Name --train_"):
        load(recipe, validation_file="x.csv", **other)


@pytest.mark.parametrize(
    ("recipe", "row", "given", "complaint"),
    [
        ("text_classification", {"text": None, "label": "a"}, {}, "rows without text or label"),
        ("token_classification", {"tokens": ["a"], "ner_tags": [1]}, {}, "ner_tags has 1"),
        ("translation", {"en": "a", "sv": None}, {}, "rows without a translation"),
        ("summarization", {"document": "a", "summary": None}, {}, "rows without text or summary"),
        (
            "summarization",
            {"document": "a", "summary": "b"},
            {"references_column": "c"},
            "column c",
        ),
        ("sft_lora", {"text": "a"}, {"prompt_column": "ask"}, "neither ask and completion"),
    ],
)
def test_what_would_go_wrong_in_silence_is_refused(tmp_path, recipe, row, given, complaint):
    with pytest.raises(SystemExit, match=complaint):
        load(recipe, train_file=write_rows(tmp_path / "train.jsonl", [row] * 20), **given)
    if recipe != "sft_lora":
        (tmp_path / "train.tsv").write_text("a")
        with pytest.raises(SystemExit, match=r"train\.tsv is none of \.csv"):
            load(recipe, train_file=tmp_path / "train.tsv")


def test_a_single_reference_is_not_a_list_of_letters(tmp_path):
    rows = [{"document": "a b", "summaries": "a"}] * 20
    given = {"train_file": write_rows(tmp_path / "train.jsonl", rows)}
    assert load("summarization", **given, summary_column="summaries")["train"][0] == {
        "text": "a b",
        "summary": "a",
        "references": ["a"],
    }


SHIPPED = {
    "accuracy": ([0, 1, 2, 2], [0, 1, 1, 2]),
    "seqeval": (
        [["B-a", "I-a", "O"], ["B-b", "O", "B-a"]],
        [["B-a", "I-a", "O"], ["B-b", "I-b", "O"]],
    ),
    "chrf": (["en liten katt", "hunden sover"], ["en katt", "hunden sover nu"]),
    "rouge": (["a small cat", "dogs sleep"], [["a cat", "one small cat"], ["the dog sleeps"]]),
    "mean_token_accuracy": ([[1, 2, 3], [4]], [[1, 5, 3], [4]]),
    "bits_per_byte": (np.linspace(0.1, 3, 7, dtype=np.float32), np.arange(7)),
}


def by_the_libraries(name):
    """What the metrics have to be, by the packages that define them."""
    found, true = SHIPPED[name]
    if name == "accuracy":
        return {"accuracy": accuracy_score(true, found)}
    if name == "seqeval":
        kinds = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
        return {key: kind(true, found) for key, kind in kinds.items()} | {"accuracy": 4 / 6}
    if name == "chrf":
        return {"chrf": corpus_chrf(found, [true]).score}
    if name == "rouge":
        names = ("rouge1", "rouge2", "rougeL")
        scorer = RougeScorer(names, use_stemmer=True)
        rows = [scorer.score_multi(r, w) for w, r in zip(found, true, strict=True)]
        return {key: 100 * np.mean([row[key].fmeasure for row in rows]) for key in names}
    if name == "mean_token_accuracy":
        pairs = zip(map(torch.tensor, found), map(torch.tensor, true), strict=True)
        return {name: np.mean([((f == t).sum() / len(t)).item() for f, t in pairs])}
    loss = found.astype(np.float64)
    return {"perplexity": np.exp(loss.mean()), "bits_per_byte": loss.sum() / np.log(2) / 12}


def score(script, usual, best=None, **given):
    return Score(
        MetricArguments(**given), SimpleNamespace(metric_for_best_model=best), script, usual
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_metric_is_the_librarys_to_the_last_bit(name):
    assert {path.stem for path in METRICS.glob("*.py")} == set(SHIPPED)
    expected = by_the_libraries(name)
    usual = list(expected)[-1]
    ours = score(f"{name}.py", usual)
    more = {"size": 12} if name == "bits_per_byte" else {}
    assert ours(*SHIPPED[name], **more) == expected
    assert ours.value(*SHIPPED[name], **more) == expected[ours.headline]
    assert ours.headline == usual


ANOTHER = """
import datasets
import evaluate
import numpy as np

class Another(evaluate.Metric):
    def _info(self):
        kind = datasets.Value("int32")
        features = datasets.Features(predictions=kind, references=kind)
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, average):
        return {
            "kind": average, "table": [[1, 2], [3, 4]], "score": np.float32(0.5),
            "each": [p == r for p, r in zip(predictions, references)], "recall": np.int64(1),
        }
"""


def test_another_metric_takes_the_place_of_the_recipes(tmp_path):
    path = tmp_path / "another.py"
    path.write_text(ANOTHER)
    given = {"metric": str(path), "metric_arguments": '{"average": "macro"}'}
    another = score("accuracy.py", "accuracy", **given)
    found = another([1, 2, 3, 4], [1, 2, 3, 5])
    assert found == {"another": 0.5, "each": 0.75, "recall": 1.0}  # numbers, none by "score" alone
    assert another.headline == "another"  # the first
    assert (tmp_path / "another.py").read_text() == ANOTHER
    assert [*tmp_path.iterdir()] == [path]
    for best in ("recall", "eval_recall"):
        asked = score("accuracy.py", "accuracy", best=best, **given)
        assert asked.value([1], [1]) == 1.0
        assert asked.headline == "recall"
    same = score("accuracy.py", "each", **given)
    assert same.value([1, 2], [1, 3]) == 0.5  # that with the name of the recipe's own


def test_a_metric_that_cannot_be_is_told_before_training(tmp_path):
    (tmp_path / "another.py").write_text(ANOTHER)
    with pytest.raises(SystemExit, match=r"metric nowhere cannot be loaded: .* rouge\.py, seqeval"):
        score("accuracy.py", "accuracy", metric="nowhere")
    with pytest.raises(SystemExit, match="metric missing cannot be loaded"):
        score("accuracy.py", "accuracy", metric=str(tmp_path / "missing.py"))
    with pytest.raises(SystemExit, match=r"--metric_arguments average=macro is no JSON"):
        score("accuracy.py", "accuracy", metric_arguments="average=macro")
    without = score("accuracy.py", "accuracy", metric=str(tmp_path / "another.py"))
    with pytest.raises(SystemExit, match=r"cannot score this task: .*average.* --metric_arguments"):
        without([1], [1])
    texts = score("accuracy.py", "accuracy", metric=str(METRICS / "chrf.py"))
    with pytest.raises(SystemExit, match="metric chrf cannot score this task"):
        texts([1], [1])


@pytest.mark.slow
def test_another_metric_and_optimizer_and_a_card_without_ours(tmp_path):
    (tmp_path / "another.py").write_text(ANOTHER)
    data, columns = text_classification(tmp_path)
    argv = [*data, *(word for item in columns.items() for word in item), "--max_steps", 2]
    argv += ["--model_name_or_path", tmp_path / "model", "--eval_steps", 1, "--save_steps", 1]
    argv += ["--metric", tmp_path / "another.py", "--metric_arguments", '{"average": "macro"}']
    argv += ["--metric_for_best_model", "each", "--load_best_model_at_end", "True"]
    argv += ["--optim", "adamw_torch"]
    done = run("text_classification", *argv, "--output_dir", tmp_path / "out")
    value = result(done.stdout, "each")
    record = json.loads((tmp_path / "out" / "normopt_run.json").read_text())
    assert record["metric"] == "each"
    assert record["metrics"]["validation_another"] == 0.5
    assert "validation_accuracy" not in record["metrics"]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(value, abs=1e-4)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.eval_results[0].metric_type == "each"
    assert "ADAMW_TORCH" in card.content
    assert "NormOpt" not in card.content


def test_labels_that_are_kept_secret_are_not_scored(tmp_path):
    """The test data of GLUE and others are labelled -1."""
    rows = [{"text": row["text"], "label": row["label"]} for row in sentences()]
    columns = {"text": datasets.Value("string"), "label": datasets.ClassLabel(num_classes=7)}
    table = datasets.Dataset.from_list(rows, features=datasets.Features(columns))
    table.to_parquet(tmp_path / "train.parquet")
    secret = [{"text": row["text"], "label": -1} for row in rows]
    secret = datasets.Dataset.from_list(secret, features=table.features)
    secret.to_parquet(tmp_path / "test.parquet")
    data, _, _ = load("text_classification", dataset_name=tmp_path)
    assert set(data) == {"train", "validation"}


@pytest.mark.slow
def test_anthology_prints_its_equivalences_and_draws(tmp_path):
    done = run("anthology", "--steps", 40, "--output_dir", tmp_path)
    differences = [float(d) for d in re.findall(r"= .*? (\d\.\de[-+]\d+)", done.stdout)]
    assert len(differences) == 5
    assert max(differences) < 1e-6
    for name in PRESETS:
        assert re.search(rf"^  {name} +lr", done.stdout, re.MULTILINE)
    assert (tmp_path / "norms.png").stat().st_size > 10_000
    assert (tmp_path / "escape_velocity.png").stat().st_size > 10_000


def test_shipped_data_has_its_source_and_licence():
    for folder in DATA.iterdir():
        source = (folder / "SOURCE.txt").read_text()
        assert re.search(r"^repository: https://", source, re.MULTILINE)
        assert re.search(r"^licence ", source, re.MULTILINE)
        for name in re.findall(r"\bUPSTREAM_[A-Za-z_.]+", source):
            assert (folder / name.rstrip(".")).exists(), name
    assert sum(f.stat().st_size for f in DATA.rglob("*") if f.is_file()) < 5e6


CARDS = sorted(path for path in (ROOT / "model_cards").iterdir() if path.is_dir())
of_every_card = pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)


@of_every_card
def test_a_shipped_card_is_what_its_run_says(tmp_path, folder):
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "README.md").unlink()
    card = update_model_card(tmp_path / "run").read_text()
    assert card == (folder / "README.md").read_text()


@of_every_card
def test_a_shipped_card_is_valid(folder):
    card = ModelCard.load(folder / "README.md")
    record = json.loads((folder / "normopt_run.json").read_text())
    (result,) = card.data.eval_results
    assert result.metric_value == round(record["metrics"][f"test_{record['metric']}"], 4)
    assert card.data.pipeline_tag == result.task_type == record["task"]
    assert card.data.license
    assert {"hf-normopt", "generated_from_trainer"} <= set(card.data.tags)
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    links = re.findall(r"\]\(([^)]*)\)", card.text)
    assert "normopt_norms.png" in links
    for link in links:
        assert link.startswith("https://") or (folder / link).is_file(), link
    assert (folder / "normopt_norms.png").read_bytes().startswith(b"\x89PNG")
    assert "More information needed" not in card.text
    assert not re.search(r"/(home|root|tmp|usr|work)/", card.content)
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"])  # all that ran is in the repository
    assert record["command"].startswith(f"python recipes/{folder.name}.py")


@of_every_card
def test_a_shipped_comparison_is_fair(folder):
    """Rates by validation data on one seed, the best of them not at the edge, then three seeds."""
    record = json.loads((folder / "normopt_run.json").read_text())
    name, larger_is_better = folder.name, RECIPES[folder.name][1]
    for optim in OPTIMIZERS:
        runs = [run for run in record["compared"] if run["optimizer"] == optim]
        assert {run["steps"] for run in runs} == {record["steps"]}
        rates = {run["learning_rate"]: run["validation"] for run in runs if run["seed"] == SEEDS[0]}
        best = (max if larger_is_better else min)(rates, key=rates.get)
        assert min(rates) < best < max(rates), (name, optim, rates)
        assert {run["seed"] for run in runs if run["learning_rate"] == best} == set(SEEDS)
        if optim == record["optimizer"]:
            assert record["learning_rate"] == best  # the recipe's default


def test_the_readmes_show_the_results_of_the_cards():
    assert {folder.name for folder in CARDS} == set(RECIPES)
    assert table() in (ROOT / "recipes" / "README.md").read_text()
    assert table("recipes/", "model_cards/") in (ROOT / "README.md").read_text()
