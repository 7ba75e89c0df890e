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
    # whose defaults build no model
    "autoformer": tf.AutoformerConfig(prediction_length=24),
    "dbrx": tf.DbrxConfig(
        n_layers=2, d_model=64, n_heads=4, attn_config={"rope_theta": 1e4, "kv_n_heads": 2}
    ),
    "deformable_detr": tf.DeformableDetrConfig(
        backbone_config=tf.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
        with_box_refine=True,
        two_stage=True,
    ),
    "detr": tf.DetrConfig(
        backbone_config=tf.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    ),
    "esm": tf.EsmConfig(vocab_size=33, mask_token_id=32, pad_token_id=1),
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


# With their default configs: a base model first, then what adds to it, in the families' order.
MORE = {
    # encoders of text
    "albert": "AlbertModel AlbertForPreTraining AlbertForSequenceClassification",
    "canine": "CanineModel CanineForSequenceClassification",
    "deberta_v2": "DebertaV2Model DebertaV2ForMaskedLM DebertaV2ForSequenceClassification",
    "electra": "ElectraModel ElectraForPreTraining ElectraForSequenceClassification",
    "esm": "EsmModel EsmForMaskedLM",
    "fnet": "FNetModel FNetForPreTraining",
    "funnel": "FunnelModel FunnelForPreTraining FunnelForSequenceClassification",
    "layoutlmv3": "LayoutLMv3Model LayoutLMv3ForTokenClassification LayoutLMv3ForQuestionAnswering",
    "luke": "LukeModel LukeForMaskedLM LukeForEntitySpanClassification",
    "reformer": "ReformerModel ReformerForMaskedLM",
    "tapas": "TapasModel TapasForQuestionAnswering",
    "xlm": "XLMModel XLMForSequenceClassification XLMForQuestionAnswering",
    "xlnet": "XLNetModel XLNetLMHeadModel XLNetForQuestionAnswering",
    # decoders
    "bloom": "BloomModel BloomForCausalLM",
    "codegen": "CodeGenModel CodeGenForCausalLM",
    "dbrx": "DbrxModel DbrxForCausalLM",
    "deepseek_v3": "DeepseekV3Model DeepseekV3ForCausalLM",
    "falcon": "FalconModel FalconForCausalLM",
    "gpt_bigcode": "GPTBigCodeModel GPTBigCodeForCausalLM",
    "gpt_neox": "GPTNeoXModel GPTNeoXForCausalLM",
    "gpt_oss": "GptOssModel GptOssForCausalLM",
    "llama4": "Llama4TextModel Llama4ForCausalLM",
    "opt": "OPTModel OPTForSequenceClassification",
    "phi3": "Phi3Model Phi3ForCausalLM",
    "qwen3_moe": "Qwen3MoeModel Qwen3MoeForCausalLM",
    "qwen3_next": "Qwen3NextModel Qwen3NextForCausalLM",
    # states instead of attention
    "jamba": "JambaModel JambaForCausalLM",
    "mamba": "MambaModel MambaForCausalLM",
    "mamba2": "Mamba2Model Mamba2ForCausalLM",
    "recurrent_gemma": "RecurrentGemmaModel RecurrentGemmaForCausalLM",
    "rwkv": "RwkvModel RwkvForCausalLM",
    "zamba2": "Zamba2Model Zamba2ForCausalLM",
    # encoders and decoders
    "fsmt": "FSMTModel FSMTForConditionalGeneration",
    "led": "LEDModel LEDForConditionalGeneration LEDForQuestionAnswering",
    "switch_transformers": "SwitchTransformersModel SwitchTransformersForConditionalGeneration",
    # images
    "beit": "BeitModel BeitForImageClassification BeitForMaskedImageModeling",
    "convnextv2": "ConvNextV2Model ConvNextV2ForImageClassification",
    "deit": "DeiTModel DeiTForImageClassificationWithTeacher DeiTForMaskedImageModeling",
    "dinov2": "Dinov2Model Dinov2ForImageClassification",
    "efficientnet": "EfficientNetModel EfficientNetForImageClassification",
    "levit": "LevitModel LevitForImageClassificationWithTeacher",
    "mobilevit": "MobileViTModel MobileViTForImageClassification MobileViTForSemanticSegmentation",
    "segformer": "SegformerModel SegformerForSemanticSegmentation SegformerForImageClassification",
    "swin": "SwinModel SwinForImageClassification SwinForMaskedImageModeling",
    "swinv2": "Swinv2Model Swinv2ForImageClassification",
    "vit_mae": "ViTMAEModel ViTMAEForPreTraining",
    # objects, masks, depth
    "deformable_detr": "DeformableDetrModel DeformableDetrForObjectDetection",
    "detr": "DetrModel DetrForObjectDetection DetrForSegmentation",
    "dpt": "DPTModel DPTForDepthEstimation DPTForSemanticSegmentation",
    "mask2former": "Mask2FormerModel Mask2FormerForUniversalSegmentation",
    "rt_detr": "RTDetrModel RTDetrForObjectDetection",
    "sam": "SamModel",
    # sound
    "audio_spectrogram_transformer": "ASTModel ASTForAudioClassification",
    "encodec": "EncodecModel",
    "speecht5": "SpeechT5Model SpeechT5ForTextToSpeech SpeechT5ForSpeechToText SpeechT5HifiGan",
    "vits": "VitsModel",
    "wav2vec2": "Wav2Vec2Model Wav2Vec2ForCTC Wav2Vec2ForPreTraining Wav2Vec2ForXVector",
    # several modalities
    "blip_2": "Blip2Model Blip2ForConditionalGeneration",
    "csm": "CsmDepthDecoderForCausalLM CsmForConditionalGeneration",
    "git": "GitModel GitForCausalLM",
    "owlvit": "OwlViTModel OwlViTForObjectDetection",
    "perceiver": "PerceiverModel PerceiverForMaskedLM PerceiverForSequenceClassification",
    "pix2struct": "Pix2StructTextModel Pix2StructForConditionalGeneration",
    "qwen2_vl": "Qwen2VLModel Qwen2VLForConditionalGeneration",
    "siglip": "SiglipModel SiglipForImageClassification",
    # series, trajectories
    "autoformer": "AutoformerModel AutoformerForPrediction",
    "decision_transformer": "DecisionTransformerModel",
    "patchtst": "PatchTSTModel PatchTSTForPrediction PatchTSTForPretraining",
    "timesfm": "TimesFmModel TimesFmModelForPrediction",
}


def classes(architecture):
    """The classes of an architecture's table, the one that the others add to first."""
    if architecture in MORE:
        return MORE[architecture].split()
    base = BASES[architecture]
    return [base, *(base.removesuffix("Model") + task for task in TASKS[architecture].split())]


def build(class_name, architecture):
    cls = getattr(tf, class_name)
    with torch.device("meta"):
        return cls(CONFIGS.get(architecture) or cls.config_class())
