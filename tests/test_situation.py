"""What a model was before training is found, and gives the rates that the table says."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hf_normopt import PRESETS, create_normopt_optimizer, update_model_card
from hf_normopt.optim.situation import (
    CHOICES,
    Choice,
    find_situation,
    remember,
    summary,
    with_choices,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 32, "vocab_size": 50, "max_position_embeddings": 20}
HEAD, EMBEDDING = CHOICES["new", "head"].factor, CHOICES["scratch", "embedding"].factor
FIRST_HEAD, FIRST_TABLE = CHOICES["scratch", "head"], CHOICES["scratch", "embedding"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("bert"))
    BertModel(BertConfig(**SIZES)).save_pretrained(folder)
    return folder


def classifier(checkpoint):
    return BertForSequenceClassification.from_pretrained(checkpoint, num_labels=3)


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes))


def rates(optimizer):
    """The multiplier of each parameter."""
    return {
        name: group["multiplier"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def changed_rates(model, **options):
    found = rates(create_normopt_optimizer(model, lr=1e-3, **options))
    return {name: rate for name, rate in found.items() if rate != 1}


def test_a_fresh_head_on_a_checkpoint(checkpoint):
    model = classifier(checkpoint)
    situation = find_situation(model)
    assert situation.name == "pretrained"
    assert {n for n in situation.states if situation.state(n) == "new"} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert changed_rates(model) == {"classifier.weight": HEAD}


def test_a_whole_model_that_was_loaded(checkpoint, tmp_path):
    classifier(checkpoint).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    assert set(find_situation(model).states.values()) == {"loaded"}
    assert changed_rates(model) == {}
    other = BertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=5, ignore_mismatched_sizes=True
    )
    assert changed_rates(other) == {"classifier.weight": HEAD}


def test_everything_from_a_config():
    model = llama()
    assert find_situation(model).name == "scratch"
    factors = {"model.embed_tokens.weight": EMBEDDING, "lm_head.weight": FIRST_HEAD.factor}
    assert changed_rates(model) == factors
    assert changed_rates(llama(tie_word_embeddings=True)) == {}  # the head is the same matrix


def test_a_head_among_many_new_parts_is_not_that_of_a_pretrained_model():
    model = llama()
    for name, p in model.named_parameters():
        p._is_hf_initialized = name.startswith("model.norm")
    assert find_situation(model).state("lm_head.weight") == "new part"
    assert changed_rates(model) == {}


def test_only_tables_of_the_input_alone_are_quick():
    tied = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=20)
    assert changed_rates(GPT2LMHeadModel(tied)) == {}
    untied = GPT2Config(**tied.to_diff_dict() | {"tie_word_embeddings": False})
    model = GPT2LMHeadModel(untied)
    assert "transformer.wte.weight" not in changed_rates(model)  # the group has the positions too
    model.transformer.wpe.requires_grad_(False)
    assert changed_rates(model)["transformer.wte.weight"] == EMBEDDING


def test_a_resized_vocabulary_is_no_new_head(tmp_path):
    llama().save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(60)
    assert find_situation(model).state("lm_head.weight") == "resized"
    assert find_situation(model).state("model.embed_tokens.weight") == "loaded"
    assert changed_rates(model) == {}


def test_adapters_keep_their_rates_and_a_new_head_beside_them_is_quick(checkpoint):
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])  # copies the head
    model = get_peft_model(classifier(checkpoint), config)
    situation = find_situation(model)
    states = {
        name.rpartition("layer.0.")[2]: situation.state(name)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    copied = "base_model.model.classifier.modules_to_save.default.weight"
    assert states[copied] == "beside adapters"
    assert states["attention.self.query.lora_A.default.weight"] == "adapter"
    assert situation.name == "pretrained"
    assert changed_rates(model) == {copied: CHOICES["beside adapters", "head"].factor}


def test_a_copy_of_a_loaded_head_beside_adapters_is_loaded(tmp_path, checkpoint):
    classifier(checkpoint).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    situation = find_situation(get_peft_model(model, config))
    assert situation.state("base_model.model.classifier.modules_to_save.default.weight") == "loaded"


def test_ddp_does_not_hide_it(checkpoint):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(classifier(checkpoint))
        assert changed_rates(model) == {"module.classifier.weight": HEAD}
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_known_is_said_and_changes_nothing(checkpoint):
    plain = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    optimizer = create_normopt_optimizer(plain, lr=1e-3)
    assert optimizer.situation["name"] == "unknown"
    assert optimizer.situation["text"].endswith("no multiplier")
    assert set(rates(optimizer).values()) == {1.0}

    trained = copy.deepcopy(classifier(checkpoint))  # the marks do not survive
    for p in trained.parameters():
        p.data += 0.01 * torch.randn_like(p)
    assert find_situation(trained).why == "trained before, but not loaded by from_pretrained"
    assert changed_rates(trained) == {}


def test_who_knows_can_say():
    plain = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    factors = {"0.weight": EMBEDDING, "2.weight": FIRST_HEAD.factor}
    assert changed_rates(plain, situation="scratch") == factors
    assert changed_rates(llama(), situation="neutral") == {}
    assert changed_rates(llama(), situation="pretrained") == {}
    with pytest.raises(ValueError, match="auto, scratch, pretrained, neutral"):
        changed_rates(plain, situation="fresh")


def test_an_option_for_a_role_goes_before(checkpoint):
    assert changed_rates(classifier(checkpoint), lr_head=2.0) == {"classifier.weight": 2.0}
    assert changed_rates(classifier(checkpoint), lr_head=1) == {}
    assert changed_rates(llama(), scale="norm") == {}  # the table was measured with another one
    other = changed_rates(llama(), norm_embedding="l1->linf")
    assert other == {"lm_head.weight": FIRST_HEAD.factor}
    kept = changed_rates(llama(), lr_head=2.0)
    assert kept == {"lm_head.weight": 2.0, "model.embed_tokens.weight": EMBEDDING}


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - {"normopt", "free"}))
def test_other_presets_are_as_published(preset):
    model = llama()
    before = create_normopt_optimizer(model, lr=1e-3, preset=preset, situation="neutral")
    after = create_normopt_optimizer(model, lr=1e-3, preset=preset)
    assert rates(before) == rates(after)
    assert not after.situation


def test_parameters_that_a_wrapper_replaces_are_remembered(checkpoint):
    model = classifier(checkpoint)
    remember(model)
    for module in model.modules():  # as fully_shard does
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(p, device="meta")))
    situation = find_situation(model)
    assert situation.state("classifier.weight") == "new"
    assert situation.state("bert.pooler.dense.weight") == "loaded"


def test_a_group_has_a_factor_where_it_fits_all(checkpoint):
    """Groups are not divided: a checkpoint's schedule has a rate for each."""
    model = classifier(checkpoint)
    params, choices = dict(model.named_parameters()), {("new", "linear"): Choice(3.0)}
    group = {"role": "linear", "kind": "", "layouts": ["", ""]}
    for names, factor in (
        (["bert.pooler.dense.weight", "classifier.weight"], 1.0),
        (["classifier.weight", "classifier.bias"], 3.0),
    ):
        group["params"] = [(name, params[name]) for name in names]
        (made,) = with_choices([group], find_situation(model), choices, {})
        assert made == {**group, "factor": factor, "smoothing": None}
    said = summary(find_situation(model), [made])
    assert said["chosen"] == {"lr_linear": {"factor": 3.0, "parameters": names}}


def smoothed(optimizer):
    """The parameters whose rule has a statistic, and its beta."""
    return {
        name: optimizer.rule_of(group).statistic.beta
        for group in optimizer.param_groups
        for name in group["param_names"]
        if optimizer.rule_of(group).statistic
    }


ENDS_SMOOTHED = {
    "model.embed_tokens.weight": FIRST_TABLE.smoothing,
    "lm_head.weight": FIRST_HEAD.smoothing,
}


def test_a_first_head_is_smoothed():
    """And the first table: as those whose rule says so; no others, nor where an option speaks."""
    beta, factor = FIRST_HEAD.smoothing, FIRST_HEAD.factor
    torch.manual_seed(0)
    models = [llama()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    options = {"statistic_head": beta, "lr_head": factor}
    options |= {"statistic_embedding": FIRST_TABLE.smoothing, "lr_embedding": FIRST_TABLE.factor}
    as_found, as_said, as_loaded = (
        create_normopt_optimizer(model, lr=1e-2, **options)
        for model, options in zip(models, ({}, options, {"situation": "pretrained"}), strict=True)
    )
    assert smoothed(as_found) == smoothed(as_said) == ENDS_SMOOTHED
    assert smoothed(as_loaded) == {}
    for _ in range(3):
        for ps in zip(*(model.parameters() for model in models), strict=True):
            ps[0].grad = torch.randn_like(ps[0])
            ps[1].grad = ps[0].grad.clone()
        as_found.step()
        as_said.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
    for options in ({"lr_head": 1.0}, {"norm_head": "rms->rms"}):
        found = smoothed(create_normopt_optimizer(llama(), lr=1e-2, **options))
        assert found == {"model.embed_tokens.weight": FIRST_TABLE.smoothing}
    found = create_normopt_optimizer(llama(), lr=1.0, preset="free")
    assert smoothed(found) == ENDS_SMOOTHED
    found = create_normopt_optimizer(llama(), lr=1e-2, step_size="dual_norm")
    assert smoothed(found) == {}
    assert rates(found)["model.embed_tokens.weight"] == FIRST_TABLE.unsmoothed


def test_a_checkpoint_goes_on_with_its_smoothing():
    """Also one that was written before heads were smoothed."""
    model = llama()
    for options, found in (({}, ENDS_SMOOTHED), ({"situation": "neutral"}, {})):
        saved = copy.deepcopy(stepped(model, **options).state_dict())
        if not found:
            for group in saved["param_groups"]:
                del group["smoothing"]
        for situation in ("auto", "pretrained"):
            optimizer = create_normopt_optimizer(model, lr=1e-3, situation=situation)
            optimizer.load_state_dict(copy.deepcopy(saved))
            assert smoothed(optimizer) == found, (options, situation)


def stepped(model, **options):
    optimizer = create_normopt_optimizer(model, lr=1e-3, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def test_a_checkpoint_goes_on_with_its_factor(checkpoint, tmp_path):
    """The model was loaded from the run's own checkpoint: nothing in it seems to be new."""
    model = classifier(checkpoint)
    saved = copy.deepcopy(stepped(model).state_dict())
    model.save_pretrained(tmp_path)
    resumed = BertForSequenceClassification.from_pretrained(tmp_path)
    optimizer = create_normopt_optimizer(resumed, lr=1e-3)
    assert rates(optimizer)["classifier.weight"] == 1
    optimizer.load_state_dict(saved)
    assert rates(optimizer)["classifier.weight"] == HEAD
    for group in saved["param_groups"]:  # as before there were situations
        del group["factor"]
    optimizer = create_normopt_optimizer(classifier(checkpoint), lr=1e-3)
    optimizer.load_state_dict(saved)
    assert set(rates(optimizer).values()) == {1.0}


def test_an_option_goes_before_a_checkpoint(checkpoint):
    saved = stepped(classifier(checkpoint)).state_dict()
    optimizer = create_normopt_optimizer(classifier(checkpoint), lr=1e-3, lr_head=1)
    optimizer.load_state_dict(saved)
    assert rates(optimizer)["classifier.weight"] == 1


def test_the_trainer_says_it_and_keeps_it(checkpoint, tmp_path, capsys):
    rows = [{"input_ids": [1, 2, 3], "labels": 0}] * 4
    args = TrainingArguments(
        str(tmp_path),
        optim="normopt",
        learning_rate=1e-3,
        max_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(classifier(checkpoint), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    line = f"lr_head={HEAD:g} for classifier.weight"
    assert line in capsys.readouterr().out
    content = json.loads((tmp_path / "normopt.json").read_text())
    assert content["situation"]["chosen"]["lr_head"]["factor"] == HEAD
    by_role = {role["role"]: role["learning_rate"] for role in content["roles"]}
    assert by_role["head"] == pytest.approx(HEAD * by_role["linear"])
    assert line in update_model_card(tmp_path).read_text()
