"""The architectures of the golden tables: their configs, small, and their classes."""

import torch
import transformers as tf

SMALL = {"num_hidden_layers": 2}

CONFIGS = {
    "bert": tf.BertConfig(**SMALL),
    "roberta": tf.RobertaConfig(**SMALL),
    "distilbert": tf.DistilBertConfig(n_layers=2),
    "modernbert": tf.ModernBertConfig(**SMALL),
    "gpt2": tf.GPT2Config(n_layer=2, add_cross_attention=True),
    "llama": tf.LlamaConfig(**SMALL, num_key_value_heads=8),
    "qwen3": tf.Qwen3Config(**SMALL),
    "gemma3": tf.Gemma3Config(
        text_config={**SMALL, "hidden_size": 64, "vocab_size": 100},
        vision_config={**SMALL, "hidden_size": 48},
    ),
    "t5": tf.T5Config(num_layers=2),
    "bart": tf.BartConfig(encoder_layers=2, decoder_layers=2),
    "vit": tf.ViTConfig(**SMALL),
    "convnext": tf.ConvNextConfig(),
    "resnet": tf.ResNetConfig(),
    "clip": tf.CLIPConfig(text_config=SMALL, vision_config=SMALL),
    "whisper": tf.WhisperConfig(encoder_layers=2, decoder_layers=2, use_weighted_layer_sum=True),
    "mixtral": tf.MixtralConfig(**SMALL),
}

BASES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "distilbert": "DistilBertModel",
    "modernbert": "ModernBertModel",
    "gpt2": "GPT2Model",
    "llama": "LlamaModel",
    "qwen3": "Qwen3Model",
    "gemma3": "Gemma3Model",
    "t5": "T5Model",
    "bart": "BartModel",
    "vit": "ViTModel",
    "convnext": "ConvNextModel",
    "resnet": "ResNetModel",
    "clip": "CLIPModel",
    "whisper": "WhisperModel",
    "mixtral": "MixtralModel",
}

TASKS = {
    "bert": (
        "ForMaskedLM ForMultipleChoice ForNextSentencePrediction ForPreTraining "
        "ForQuestionAnswering ForSequenceClassification ForTokenClassification LMHeadModel "
    ),
    "roberta": (
        "ForCausalLM ForMaskedLM ForMultipleChoice ForQuestionAnswering "
        "ForSequenceClassification ForTokenClassification "
    ),
    "distilbert": (
        "ForMaskedLM ForMultipleChoice ForQuestionAnswering ForSequenceClassification "
        "ForTokenClassification "
    ),
    "modernbert": (
        "ForMaskedLM ForSequenceClassification ForTokenClassification ForQuestionAnswering "
        "ForMultipleChoice "
    ),
    "gpt2": (
        "DoubleHeadsModel ForQuestionAnswering ForSequenceClassification "
        "ForTokenClassification LMHeadModel "
    ),
    "llama": ("ForCausalLM ForSequenceClassification ForQuestionAnswering ForTokenClassification "),
    "qwen3": ("ForCausalLM ForSequenceClassification ForQuestionAnswering ForTokenClassification "),
    "gemma3": ("ForConditionalGeneration ForSequenceClassification "),
    "t5": (
        "EncoderModel ForConditionalGeneration ForQuestionAnswering ForSequenceClassification "
        "ForTokenClassification "
    ),
    "bart": ("ForConditionalGeneration ForQuestionAnswering ForSequenceClassification "),
    "vit": ("ForImageClassification ForMaskedImageModeling "),
    "convnext": ("ForImageClassification "),
    "resnet": ("ForImageClassification "),
    "clip": ("ForImageClassification "),
    "whisper": ("ForConditionalGeneration ForAudioClassification "),
    "mixtral": (
        "ForCausalLM ForQuestionAnswering ForSequenceClassification ForTokenClassification "
    ),
}


def build(class_name, architecture):
    with torch.device("meta"):
        return getattr(tf, class_name)(CONFIGS[architecture])
