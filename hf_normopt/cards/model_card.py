"""Model cards: the section on how NormOpt trained the model.

The section comes from `normopt.json`, which every trainer leaves beside the model (see
`report.py`): it says what ran, whatever the training arguments say. Where a script has also left
`normopt_run.json` (see `run_record.py`), the whole card is rewritten.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..optim.presets import PRESETS
from ..optim.schedules import parse_schedule
from ..optim.step_sizes import STEP_SIZES
from ..tables import format_table
from .files import write_whole
from .plot import PICTURE
from .report import has_report, read_report
from .run_card import HYPERPARAMETERS, run_card
from .run_record import read_run

TAG = "hf-normopt"
MOST_SPIKES = 5  # that a card tells of

_START, _END = "<!-- hf-normopt: start -->", "<!-- hf-normopt: end -->"
_SECTION = re.compile(f"{_START}(?:(?!{_START}).)*?{_END}", re.DOTALL)

_CITATION = """\
```bibtex
@article{bernstein2024old,
  title   = {Old Optimizer, New Norm: An Anthology},
  author  = {Bernstein, Jeremy and Newhouse, Laker},
  journal = {arXiv preprint arXiv:2409.20325},
  year    = {2024}
}
```"""


def update_model_card(path: str | os.PathLike[str]) -> Path:
    """Write what NormOpt did into a model's card; make the card if there is none.

    The section `## Optimizer` is added or replaced, transformers' list of hyperparameters is
    corrected, and the metadata get the tag `hf-normopt`, `optimizer` and `optimizer_preset`. The
    rest of the card stays. Where the folder has a `normopt_run.json` (see [`finish_run`]), the
    whole card is rewritten.

    `create_model_card` and `push_to_hub` call this in every `Trainer`, and in TRL's trainers with
    [`NormOptMixin`]. TRL's trainers without the mixin rewrite their card each time: call this after
    them, then `ModelCard.load(path).push_to_hub(trainer.hub_model_id)` to publish it.

    Args:
        path: the folder of the model (`output_dir` or a checkpoint), or its card.

    Returns:
        The path of the card.

    Raises:
        FileNotFoundError: if the folder has neither `normopt.json` nor `normopt_run.json`.
        ValueError: if the card's metadata cannot be read.
    """
    file = card_file(path)
    run = read_run(file.parent)
    if run is not None:
        card = run_card(run)
        is_ours = str(run["optimizer"]).lower().startswith("normopt")
        if not (is_ours and has_report(file.parent)):  # trained by another optimizer
            _save(card, file)
            return file
    elif file.is_file():
        card = _loaded(file)
    else:
        card = ModelCard(f"---\ntags:\n- {TAG}\n---\n\n# {file.parent.resolve().name}\n")
    content = read_report(file.parent)

    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), TAG]))
    data["optimizer"] = "normopt"
    data["optimizer_preset"] = content["preset"]["name"] or None

    before, marked, after = _around_section(card.text)
    for name, value in _hyperparameters(content).items():
        before = _corrected(before, name, value)
    listed = f"- optimizer: {_optimizer_line(content)}" in before
    section = _section(content, (file.parent / PICTURE).is_file(), listed)
    card.text = f"{before}{section}{after}" if marked else f"{before.rstrip()}\n\n{section}\n"
    _save(card, file)
    return file


def say_optimizer(path: str | os.PathLike[str], what: str) -> None:
    """Correct the optimizer in a card's list of hyperparameters.

    Args:
        path: as in [`update_model_card`].
        what: the text for the line.
    """
    file = card_file(path)
    card = _loaded(file)
    card.text = _corrected(card.text, "optimizer", what)
    _save(card, file)


def card_file(path: str | os.PathLike[str]) -> Path:
    """The path of a folder's card; the path itself if it is a card."""
    path = Path(path)
    return path if path.suffix == ".md" and not path.is_dir() else path / "README.md"


def _save(card: ModelCard, file: Path) -> None:
    """Write a card; on a full disk the old one stays."""
    if file.is_symlink():  # keep the user's link
        card.save(file)
    else:
        write_whole(file, str(card).encode())


def _loaded(file: Path) -> ModelCard:
    """A card, read with Unix newlines."""
    try:
        return ModelCard(file.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ValueError(f"The metadata of {file} cannot be read: {error}") from None


def _around_section(text: str) -> tuple[str, str, str]:
    """The text before our section, the section itself, and the text after it."""
    match = _SECTION.search(text)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


def _corrected(text: str, name: str, value: str) -> str:
    """The text with one value replaced in transformers' list of hyperparameters."""
    head, mark, rest = text.partition(HYPERPARAMETERS)
    items, blank, tail = rest.partition("\n\n")
    # transformers puts the arguments of most optimizers on a second line
    line = rf"^- {name}: (?:.*and the args are:\n)?.*"
    items = re.sub(line, lambda _: f"- {name}: {value}", items, flags=re.MULTILINE)
    return f"{head}{mark}{items}{blank}{tail}"


def _hyperparameters(content: Mapping[str, Any]) -> dict[str, str]:
    """The true values of hyperparameters that transformers reads from the training arguments."""
    schedules = _schedules(content)
    values = {
        "optimizer": _optimizer_line(content),
        "learning_rate": str(content["learning_rate"]),
    }
    if len(schedules) > 1:
        values["lr_scheduler_type"] = _schedule_line(content)
    elif text := next(iter(schedules)):
        name, *options = text.split("/")
        warmups = [word.partition(":")[2] for word in options if word.startswith("warmup:")]
        own = "" if _is_readable(name) else f"not used, {name} is a scheduler of its own"
        values["lr_scheduler_type"] = name
        values["lr_scheduler_warmup_steps"] = own or "".join(warmups) or "0"
    return values


def _optimizer_line(content: Mapping[str, Any]) -> str:
    name = content["preset"]["name"]
    words = [
        f"NormOpt (hf_normopt {content['versions']['hf_normopt']})",
        f"preset {name}" if name else "a policy of its own",
        f"step size {content['step_size']}",
    ]
    options = options_text(content, but=("step_size",))
    return ", ".join(words) + (f", options `{options}`" if options else "")


def options_text(content: Mapping[str, Any], but: Collection[str] = ()) -> str:
    """A report's options, written as `optim_args` takes them."""
    return ",".join(f"{key}={v}" for key, v in _options(content).items() if key not in but)


def _options(content: Mapping[str, Any]) -> dict[str, str]:
    """A report's options, each with the text that `optim_args` takes."""
    texts = {}
    for key, value in content["options"].items():
        if key == "overrides":
            texts["roles"] = ";".join(f"{role}:{pattern}" for pattern, role in value.items())
        else:  # transformers takes all spaces out of optim_args
            texts[key] = str(value).lower() if isinstance(value, bool) else str(value)
            texts[key] = texts[key].replace(" ", "")
    return texts


def _is_readable(schedule: str) -> bool:
    try:
        return bool(parse_schedule(schedule).name)
    except ValueError:  # the class of the user's own scheduler
        return False


def _schedules(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """The full text of each schedule, with the labels of its roles."""
    run = content["schedule"]
    found: dict[str, list[str]] = {}
    for role in content["roles"]:
        text = run
        if _is_readable(run):
            text = str(parse_schedule(role["schedule"]).over(parse_schedule(run)))
        found.setdefault(text, []).append(role["label"])
    return found


def _schedule_line(content: Mapping[str, Any]) -> str:
    (first, _), *others = _schedules(content).items()
    return "; ".join([first, *(f"{text} for {', '.join(roles)}" for text, roles in others)])


def _section(content: Mapping[str, Any], picture: bool, listed: bool) -> str:
    """The section on NormOpt.

    Args:
        content: the report.
        picture: whether the folder has a picture.
        listed: whether the card already names the optimizer.
    """
    preset, size, options = content["preset"], content["step_size"], _options(content)
    kind = STEP_SIZES.get(size.partition("/")[0])
    about = f" {(kind.__doc__ or '').splitlines()[0]}" if kind else ""
    steps, max_steps, last = content["steps"], content["max_steps"], content["last_step_size"]
    logged = " With the rate and the schedule, at the last step that was logged: {:.4g}."
    logged = "" if last is None else logged.format(last)
    facts = {
        "optimizer": "" if listed else _optimizer_line(content),
        "preset": f"`{preset['name']}`. {preset['description']}" if preset["name"] else "none",
        "source": preset["source"],
        "options": ", ".join(f"`{key}={value}`" for key, value in options.items()) or "none",
        "situation": content.get("situation", {}).get("text", ""),
        "learning rate": str(content["learning_rate"]),
        "weight decay": str(content["weight_decay"]),
        "step size": f"`{size}`.{about}" + logged,
        "schedule": f"`{_schedule_line(content)}`" if content["schedule"] else "",
        "steps": f"{steps:,}" + (f" of {max_steps:,}" if max_steps > steps else ""),
        "begun anew": "; ".join(content["resets"]),
        "jumps of the loss": _spikes(content.get("spikes", [])),
        "versions": ", ".join(f"{name} {text}" for name, text in content["versions"].items()),
    }
    parts = [
        f"{_START}\n## Optimizer",
        "Trained with NormOpt of `hf_normopt`: steepest descent under an operator norm for each "
        "tensor, by the role that it plays in the network.",
        "\n".join(f"- {name}: {text}" for name, text in facts.items() if text),
        _roles_table(content),
        "### Final norms",
        _norms(content),
        *([f"![Norms by role during training]({PICTURE})"] if picture else []),
        "### How to reproduce",
        _reproduction(content),
        "### Citation",
        f"{_CITATION}\n{_END}",
    ]
    return "\n\n".join(parts)


def _spikes(events: Sequence[str]) -> str:
    more = f"; and {len(events) - MOST_SPIKES} more" if len(events) > MOST_SPIKES else ""
    return "; ".join(events[:MOST_SPIKES]) + more


def _roles_table(content: Mapping[str, Any]) -> str:
    header = ("role", "norm", "tensors", "parameters", "learning rate", "weight decay", "rule")
    rows = [
        (
            role["label"],
            role["norm"],
            f"{role['tensors']:,}",
            f"{role['parameters']:,}",
            f"{role['learning_rate']:.10g}",
            f"{role['weight_decay']:.10g}",
            role["rule"].removeprefix(f"{role['norm']}, ").partition("; ")[0],
        )
        for role in content["roles"]
    ]
    return format_table(header, rows, markdown=True)


def _norms(content: Mapping[str, Any]) -> str:
    quantities = list(dict.fromkeys(name for role in content["roles"] for name in role["norms"]))
    if not quantities:
        return "No norms were logged."
    rows = [
        [
            role["label"],
            *(f"{role['norms'][q]:.4g}" if q in role["norms"] else "" for q in quantities),
        ]
        for role in content["roles"]
    ]
    names = [name.replace("_", " ") for name in quantities]
    table = format_table(["role", *names], rows, markdown=True)
    return f"Of each role in its own norm, at the last step that was logged:\n\n{table}"


def _reproduction(content: Mapping[str, Any]) -> str:
    """Code that creates the same optimizer and schedule."""
    if not content["preset"]["name"]:
        return (
            "The optimizer was made by a script, with a policy of its own: the table has its rules."
        )
    options = {"preset": content["preset"]["name"], **_options(content)}
    arguments: dict[str, Any] = {"output_dir": "output", "optim": "normopt"}
    overrides = content["options"].get("overrides", {})
    typed = any(re.search(r"[\s,=;]", pattern) for pattern in overrides)
    if typed:  # optim_args cannot hold these characters
        del options["roles"]
        arguments["role_overrides"] = overrides
    arguments["optim_args"] = ",".join(f"{key}={value}" for key, value in options.items())
    arguments |= {key: content[key] for key in ("learning_rate", "weight_decay")}
    arguments |= _schedule_arguments(content)
    if content["max_steps"]:
        arguments["max_steps"] = content["max_steps"]
    name = "hf_normopt.NormOptArguments" if typed else "TrainingArguments"
    lines = [
        "```python",
        "import hf_normopt",
        *([] if typed else ["from transformers import TrainingArguments"]),
        f"\nargs = {name}(",
        *(f"    {key}={_code(value)}," for key, value in arguments.items()),
        ")",
        "# trainer = hf_normopt.NormOptTrainer(model, args, train_dataset=...)",
        "```",
    ]
    others = "The data, the batch size, the seed and the clipping of gradients are the script's"
    if content["schedule"] and not _is_readable(content["schedule"]):
        others += f"; so is the schedule, a `{content['schedule']}`"
    if any(role.get("own") for role in content["roles"]):
        others += "; so are the groups with a rate or a decay of their own, which the table shows"
    return "\n".join(lines) + f"\n\n{others}."


def _schedule_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """The training arguments that give the run's schedule."""
    if not _is_readable(content["schedule"]):
        return {}
    schedule, preset = parse_schedule(content["schedule"]), PRESETS.get(content["preset"]["name"])
    usual = parse_schedule(preset.schedule if preset and preset.schedule else "linear")
    arguments: dict[str, Any] = {}
    if "schedule" not in content["options"] and schedule != replace(usual, warmup=schedule.warmup):
        options = dict(schedule.options)
        if "decay" in options:
            options["decay_ratio"] = options.pop("decay")
        arguments["lr_scheduler_type"] = schedule.name
        if options:
            arguments["lr_scheduler_kwargs"] = options
    if schedule.warmup:
        arguments["warmup_steps"] = schedule.warmup
    return arguments


def _code(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
