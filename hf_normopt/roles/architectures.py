"""What a pass cannot see: how single architectures fuse, stack and transpose their maps.

Most of it is seen when `forward` runs, so that an architecture in no release is known too. The
tables hold the rest; each row was read off the architecture's modelling source. A new row names the
class that multiplies by the tensor, the tensor's name under it, and how its axes are to be read.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fused:
    """A tensor that holds several maps.

    Args:
        owner: pattern of the class name of the module that uses the tensor.
        path: pattern of the name of the tensor's module under the owner, or of a raw parameter.
        axis: how the fused axis is read, given the owner; replaces `out` in weight and bias.
        reason: what a person reads in the table.
    """

    owner: str
    path: str
    axis: Callable[[Any], str]
    reason: str


# What a pass does not see; a row here wins over what it does.
FUSED: tuple[Fused, ...] = (
    Fused(
        ".*",
        r"(.*[._])?bbox_(head|embed)[._].*",
        lambda _: "out",
        "one map: coordinates of a box",
    ),
    Fused(
        ".*Attention.*",
        "sampling_offsets",
        lambda _: "out",
        "one map: offsets of points, of all levels",
    ),
    Fused(
        "DiffLlamaAttention",
        "v_proj",
        lambda _: "out",
        "one map: both halves of the heads are values",
    ),
    Fused(
        "EsmFold2TriangleMultiplicativeUpdate",
        "proj_bundle",
        lambda _: "(part=4 out)",
        "left and right and their gates; divided after they are multiplied",
    ),
    Fused(
        "LightGlueMatchAssignmentLayer",
        "final_projection",
        lambda _: "out",
        "one map: both images go through it in one batch",
    ),
    Fused(
        "DeepseekV4(CSACompressor|Indexer)",
        "kv_proj|gate_proj",
        lambda _: "(part=2 out)",
        "for the window before and for its own, in a buffer",
    ),
    Fused(
        "ZambaMambaMixer",
        "in_proj",
        lambda _: "(out part=2)",
        "input and gate interleaved; each is then cut into heads",
    ),
    Fused(
        "VitsWaveNet",
        r"in_layers\.\d+",
        lambda _: "(part=2 out)",
        "halves for tanh and sigmoid, divided at a number that is passed as a tensor",
    ),
    Fused(
        "VitsWaveNet",
        "cond_layer",
        lambda net: f"(part={2 * net.num_layers} out)",
        "the same of each layer, added to them",
    ),
    Fused(
        ".*MaskDecoder",
        r"iou_prediction_head\..*",
        lambda _: "out",
        "one map: scores of several masks",
    ),
    Fused(
        "Qwen2_5_OmniAdaLayerNormZero(_Final)?",
        "linear",
        lambda norm: "(part=2 out)" if type(norm).__name__.endswith("Final") else "(part=6 out)",
        "shifts, scales and gates",
    ),
    Fused(
        "SegGptAttention|GlmImageVisionAttention",
        "qkv",
        lambda _: "(part=3 out)",
        "queries, keys and values",
    ),
    Fused("EsmFold2.*", r"(.*\.)?gate_up_proj", lambda _: "(part=2 out)", "gate and up"),
    Fused("EsmFold2.*", r"(.*\.)?adaln_linear", lambda _: "(part=6 out)", "shifts, scales, gates"),
    Fused("EsmFold2OuterProductMean", "input_proj", lambda _: "(part=2 out)", "both sides"),
    Fused("JetMoeAttention", "kv_proj", lambda _: "(part=2 out)", "keys and values"),
    Fused(
        "PPDocLayoutV2GlobalPointer",
        "dense",
        lambda _: "(part=2 out)",
        "queries and keys, which are compared",
    ),
    Fused(
        ".*Res2NetBlock",
        r"tdnn1\.conv",
        lambda _: "out",
        "one map: the next module divides what it gets",
    ),
    Fused(
        "VitsConvFlow",
        "conv_proj",
        lambda flow: f"(out={flow.num_bins}+{flow.num_bins}+{flow.num_bins - 1})",
        "widths, heights and derivatives of a spline",
    ),
    Fused(
        "UnivNetKernelPredictor",
        "(kernel|bias)_conv",
        lambda predictor: f"(layer={predictor.conv_layers} out)",
        "kernels of each layer, which uses its own",
    ),
    Fused(
        "EsmFoldInvariantPointAttention",
        "linear_kv_points",
        lambda m: f"(out0={3 * m.num_heads} out1={m.num_qk_points}+{m.num_v_points})",
        "points of keys and of values, for each coordinate and head",
    ),
    Fused(
        "WavLMAttention",
        "gru_rel_pos_linear",
        lambda _: "(part=2 out)",
        "two gates, each the sum of its half",
    ),
    Fused(
        ".*Gemma.*Text(Model|PLE)",
        "per_layer_model_projection",
        lambda model: f"(layer={getattr(model, 'config', model).num_hidden_layers} out)",
        "one map for each layer",
    ),
    Fused(
        "DeepseekV4GroupedLinear",
        "weight",
        lambda linear: f"(group={linear.n_groups} out)",
        "each group of inputs has a map of its own",
    ),
    Fused(
        "Zamba2(Attention)?MLP",
        r"gate_up_proj_adapter_list\.\d+\.1",
        lambda _: "(part=2 out)",
        "added to gate and up",
    ),
    Fused("InklingTopkRouter", "weight", lambda _: "out", "one map, for shared experts too"),
)


def fused_row(owner: Any, path: str) -> Fused | None:
    """The row for a matrix of an owner, if there is one.

    Args:
        owner: a module.
        path: name of a matrix's module under the owner, or of a raw parameter of it.
    """
    rows = (row for row in _fused_rows(class_names(owner)) if re.fullmatch(row.path, path))
    return next(rows, None)


@functools.cache
def _fused_rows(classes: tuple[str, ...]) -> list[Fused]:
    return [row for row in FUSED if any(re.fullmatch(row.owner, name) for name in classes)]


def class_names(owner: Any) -> tuple[str, ...]:
    """The names of an owner's class, and of those that it refines, as FSDP does."""
    return tuple(cls.__name__ for cls in type(owner).__mro__)


def is_a(owner: Any, pattern: str) -> bool:
    """Whether an owner's class, or one that it refines, has such a name."""
    return any(re.fullmatch(pattern, name) for name in class_names(owner))


@dataclass(frozen=True)
class Head:
    """A head that reading `forward` does not find, or what it finds and is none.

    Args:
        owner: pattern of the class name of a module above it.
        path: pattern of the matrix's name under the owner.
        reason: what a person reads in the table.
        is_head: False for what is none.
    """

    owner: str
    path: str
    reason: str
    is_head: bool = True


HEADS: tuple[Head, ...] = (
    Head("LxmertVisualObjHead", r"decoder_dict\.\w+", "what is predicted of objects, for the loss"),
    Head("DPTAuxiliaryHead", r"head\.4", "class scores, which only the loss sees"),
    Head(".*FCNHead", "classifier", "class scores, which only the loss sees"),
    Head("AMSoftmaxLoss", "weight", "class scores, which only the loss sees"),
    Head("SpeechT5SpeechDecoderPostnet", "prob_out", "probability to stop, for generate()"),
    Head("Nemotron3_5Transcribe.*", "word_timestamp_head", "word timestamps, for generate()"),
    Head("LightGlueMatchAssignmentLayer", "matchability", "scores of points, for the matches"),
    Head("MobileBertLMPredictionHead", "dense", "token scores, beside those of the tied table"),
    Head("SplinterFor.*", r"splinter_qass\.(start|end)_classifier", "bilinear in the question"),
    Head(".*TTSFlowHead", r"final_layer\.proj", "velocity of the flow"),
    Head("Qwen2_5OmniToken2WavDiTModel", "proj_out", "velocity of the flow"),
    Head("EncodecDecoder", r"layers\.15\.conv", "samples of the sound"),
    Head("FastSpeech2ConformerDurationPredictor", "linear", "durations, which are rounded"),
    Head("FlavaMaskedPredictionHead", "decoder", "scores, which only the loss sees"),
    Head("FlavaITMHead", "seq_relationship", "scores, which only the loss sees"),
    Head("SeamlessM4T(v2)?HifiGan", "conv_post", "samples of the sound"),
    Head("Tipsv2DptFor.*", r"(depth_)?decoder\.head", "depths"),
    Head("EsmFold2Model", "distogram_head", "distances"),
    Head("SuperPointDescriptorDecoder", "conv_descriptor_b", "descriptors"),
    Head("(Lw|Rf)DetrModel", r"enc_out_bbox_embed\.\d+\.layers\.2", "boxes of the proposals"),
    Head("(Lw|Rf)DetrModel", r"enc_out_class_embed\.\d+", "scores of the proposals"),
    Head("(Lw|Rf)DetrForObjectDetection", r"class_embed|bbox_embed\.layers\.2", "boxes, scores"),
    Head("OneFormer.*Decoder", "class_embed", "class scores"),
    Head("PerceiverBasicDecoder", "final_layer", "scores"),
    Head("Qwen2_5OmniTalkerForConditionalGeneration", "codec_head", "codes"),
    Head("Qwen3OmniMoeTalkerCodePredictorModelFor.*", r"lm_head\.\d+", "codes"),
    Head("Musicgen(Melody)?ForConditionalGeneration", r"decoder\.lm_heads\.\d+", "codes"),
    Head("NeuCodecModel", r"acoustic_decoder\.head\.linear", "a spectrum"),
    Head("PPDocLayoutV2Decoder", r"class_embed\.\d+|bbox_embed\.\d+\.layers\.2", "boxes, scores"),
    Head(
        "(MM)?GroundingDinoModel", r"encoder_output_bbox_embed\.layers\.2", "boxes of the proposals"
    ),
    Head("BrosSpadeEE.*", r"initial_token_classifier\.3", "scores of first tokens"),
    Head("Blip2ForImageTextRetrieval", "itm_head", "scores of matches"),
    Head("ZoeDepthConditionalLogBinomialSoftmax", r"mlp\.2", "probabilities of the bins"),
    Head("FSMTDecoder", "output_projection", "token scores, which the base model returns"),
    Head("Bark(Causal|Coarse|Semantic)Model", "lm_head", "token scores"),
    Head("UVDocHead", r"out_point_positions2D\.conv_up", "two coordinates for each pixel"),
    Head("FastSpeech2ConformerSpeechDecoderPostnet", "feat_out", "spectrogram"),
    Head(".*ContactPredictionHead", "regression", "contacts, for predict_contacts()"),
    Head("EsmFold2ConfidenceHead", "(pae|pde)_head|(plddt|resolved)_weight", "confidences"),
    Head("EsmFold2AtomDecoder", "output_linear", "positions of atoms"),
    Head(".*MaskDecoder", r"(iou_prediction|pred_obj_score)_head\.proj_out", "scores of masks"),
    Head("Sam3.*DetrDecoder", r"(box|presence)_head\.layer3", "boxes and their presence"),
    Head("Sam3.*MaskDecoder", "semantic_projection", "semantic segmentation"),
    Head("PPDocLayoutV4Decoder", r"class_embed\.\d+", "class scores, of every layer"),
    Head("Bark.*|Kyutai.*|Musicgen.*", r"(codec_model|audio_encoder)\..*", "codec", is_head=False),
    Head("EfficientLoFTR.*", r"refinement_layer\..*", "features before the match", is_head=False),
    Head("VisualBertFor.*", r"attention\.value", "compared with regions", is_head=False),
    Head("PPDocLayoutV2.*", r"reading_order\.relative_head\.dense", "compared", is_head=False),
    Head("BrosSpade.*", r"subsequent_token_classifier\.key", "compared", is_head=False),
    Head("VitsResidualCouplingLayer", "conv_post", "mean inside the flow", is_head=False),
    Head("VitsTextEncoder", "project", "mean and variance of the prior", is_head=False),
    Head("ConditionalDetrDecoder", r"ref_point_head\..*", "points to look at", is_head=False),
    Head("DeformableDetrModel", "reference_points", "points to look at", is_head=False),
    Head("ZoeDepthAttractorLayer.*", "conv2", "moves the bins", is_head=False),
    Head("SuperPointConvBlock", "conv_b", "features before the score", is_head=False),
    Head("RfDetrFor.*", "query_features_proj", "compared with pixels", is_head=False),
    Head("LightGlue.*", r".*projector|.*mlp\.fc2", "features before the match", is_head=False),
)


@dataclass(frozen=True)
class Raw:
    """A raw parameter whose use is not plain from its module's source.

    Args:
        owner: pattern of the class name of the module that holds it.
        leaf: pattern of its name there.
        role: what it is.
        reason: what a person reads in the table.
        layout: a pattern, or a function of the owner that gives it; "" for the role's usual one.
    """

    owner: str
    leaf: str
    role: str
    reason: str
    layout: str | Callable[[Any], str] = ""


def _experts_of(glu: Any, stacked: str, other: str) -> str:
    return f"(expert={glu.moe_num_experts} {stacked}) {other}"


def _zamba(mixer: Any) -> str:
    return f"stack (out={mixer.time_step_rank}+{mixer.ssm_state_size}+{mixer.ssm_state_size}) in"


def _tdnn(layer: Any) -> str:
    return f"out (tap={layer.kernel_size} in)"


RAW: tuple[Raw, ...] = (
    # flattened experts, handed to `forward` one by one: x.matmul(w1.T), h.matmul(w2)
    Raw("DbrxExpertGLU", "w1|v1", "linear", "experts", lambda glu: _experts_of(glu, "out", "in")),
    Raw("DbrxExpertGLU", "w2", "linear", "experts", lambda glu: _experts_of(glu, "in", "out")),
    Raw("ZambaMambaMixer", "x_proj_weight", "linear", "time step, B and C", _zamba),
    Raw("EsmFold2ConfidenceHead", "(plddt|resolved)_weight", "head", "confidences", "stack in out"),
    Raw("Tvp.*PadPrompter", "pad_.*", "embedding", "a frame around images"),
    Raw("Inkling2BlockAttentionResidual", "query", "embedding", "a query that is learned"),
    Raw("Phi4MultimodalImageEmbedding", ".*_extensor", "embedding", "separates parts of images"),
    Raw("Phi4MultimodalAudioGluPointWiseConv", "b[12]", "bias", "added to both halves"),
    Raw(".*MultiModalProjector", "mm_input_projection_weight", "linear", "of an image", "in out"),
    # a layer's weight that is viewed as a kernel, never called
    Raw("TDNNLayer", r"kernel\.weight", "conv", "kernel over time", _tdnn),
    Raw(".*Snake.*", "alpha|beta", "norm", "frequency or inverse height of a periodic activation"),
    Raw(".*Attention", "sinks", "other", "logits that take attention from all tokens"),
    Raw("DiffLlamaAttention", r"lambda_[qk]\d", "other", "their products weigh two attentions"),
    Raw("RecurrentGemmaRglru", "recurrent_param", "other", "rates of a recurrence"),
    Raw("RwkvSelfAttention", "time_first", "bias", "added to the key of the current token"),
    Raw("RwkvFeedForward|RwkvSelfAttention", "time_mix_.*", "norm", "mixes a token with the last"),
    Raw("EsmFold2Parcae", "input_matrix_continuous", "linear", "rows scaled, then multiplied by"),
    Raw("EsmFold2LanguageModelEncoder", "layer_weights", "other", "logits of a mean over layers"),
    Raw("TapasForQuestionAnswering", "(column_)?output_weights", "head", "one row: scores", "in"),
    Raw("Inkling2DynamicShortConvolution", "static_weight", "conv", "depthwise", "tap=4 group"),
    Raw("CsmCodebooksHead", "weight", "head", "token scores of each codebook", "stack in out"),
    Raw("FunnelRelMultiheadAttention", "r_kernel", "linear", "of positions", "in out0 out1"),
    Raw(".*", "no_(object|memory)_.*", "embedding", "stands for what is not there"),
    Raw("AxialPositionEmbeddings", r"weights\.\d", "embedding", "positions along one axis"),
    Raw("Sam.*PositionalEmbedding", ".*", "linear", "random features of coordinates", "in out"),
    Raw("(XLNet|FunnelRel).*Attention", "seg_embed", "embedding", "two segments", "in out0 out1"),
    Raw(".*", "memory_temporal_pos.*", "embedding", "number of the frame", "in out0 out1 out2"),
    Raw("Sam2HieraDetModel", "pos_embed.*", "embedding", "grid of positions", "in0 out in1 in2"),
    Raw("HieraEmbeddings", "position_embeddings", "embedding", "grid of positions"),
)


def listed_parameter(owner: Any, leaf: str) -> Raw | None:
    """The row for a raw parameter, if there is one."""
    return _row(class_names(owner), leaf)


@functools.cache
def _row(classes: tuple[str, ...], leaf: str) -> Raw | None:
    for row in RAW:
        if re.fullmatch(row.leaf, leaf) and any(re.fullmatch(row.owner, c) for c in classes):
            return row
    return None
