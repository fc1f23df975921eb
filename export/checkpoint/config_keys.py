"""What this project makes of every key of a checkpoint's settings files.

A key is *used* (read by config.py, tower.py or packed_settings.py), *irrelevant* to what is computed here, with why, or
*neutral*: allowed with the values that change nothing, and refused with others, as nothing here computes what those ask
for. A key in none of the three is unknown: it is listed in the plan, in the outline of a build and in the manifest as
not obeyed. null always means the default, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from engines.bundle.consistency import NUMBERS
from engines.checks import shown
from engines.errors import ConfigError, FlexError
from export.checkpoint.settings import parse

_LISTED = 5  # refusals spelt out in one error


@dataclass(frozen=True)
class Neutral:
    """The values of a key that change nothing, and what they say, for people."""

    values: tuple[Any, ...]
    expected: str

    def has(self, value: Any) -> bool:
        """Whether `value` is one of them; true is not 1, but 1.0 is."""
        return value is None or any(
            isinstance(value, bool) == isinstance(each, bool) and value == each for each in self.values
        )


@dataclass(frozen=True)
class Keys:
    """The table of one kind of file: key -> what it means here."""

    used: frozenset[str]
    irrelevant: Mapping[str, str]
    neutral: Mapping[str, Neutral]

    def unknown(self, given: Mapping[str, Any]) -> list[str]:
        """The keys of `given`, null ones apart, that are in no part of the table, sorted."""
        said = {key for key, value in given.items() if value is not None}
        return sorted(said - self.used - {*self.irrelevant} - {*self.neutral})

    def refused(self, given: Mapping[str, Any]) -> list[str]:
        """The keys of `given` whose value asks for what is not computed here."""
        return [key for key, only in self.neutral.items() if not only.has(given.get(key))]

    def check(self, given: Mapping[str, Any], path: Path | str, error: type[FlexError] = ConfigError) -> None:
        """`error` for the keys of `given`, read from `path`, whose value asks for what is not computed here."""
        refused = self.refused(given)
        if refused:
            some = refused[:_LISTED]
            found = "; ".join(f"{key} {shown(given[key])} is not supported" for key in some)
            more = f"; and {len(refused) - len(some)} more" if len(refused) > len(some) else ""
            wanted = (self.neutral[key].expected for key in some)
            raise error(
                f"{path}: {found}{more}",
                expected="; ".join(wanted if len(some) == 1 else map(": ".join, zip(some, wanted, strict=True))),
                fix="use a checkpoint without this; the bundle would compute something else than its model",
            )


def _each(why: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


def _only(expected: str, names: str, *values: Any) -> dict[str, Neutral]:
    return dict.fromkeys(names.split(), Neutral(values, expected))


# Of any config that transformers has written, whichever its version.
_COMMON = {
    **_each("where it came from", "_name_or_path name_or_path _commit_hash transformers_version license"),
    **_each("weights have dtypes of their own, the bundle its precision", "torch_dtype dtype use_bfloat16 fp16 bf16"),
    **_each(
        "how the official code runs, not what it computes",
        "use_cache torchscript tf_legacy_loss return_dict output_attentions output_hidden_states "
        "chunk_size_feed_forward attn_implementation _attn_implementation _attn_implementation_autoset "
        "_flash_attn_2_enabled experts_implementation gradient_checkpointing use_flash_attention_2 flash_attn "
        "use_flash_attn",
    ),
    **_each(
        "for training alone",
        "initializer_range initializer_factor attention_dropout hidden_dropout dropout resid_pdrop embd_pdrop "
        "attn_pdrop hidden_dropout_prob attention_probs_dropout_prob logit_scale_init_value unsloth_version "
        "unsloth_fixed",
    ),
    **_each("of classifiers", "finetuning_task id2label label2id num_labels problem_type task_specific_params"),
    **_each(
        "of the tokenizer, whose own files decide", "tokenizer_class prefix pad_token_id sep_token_id cls_token_id"
    ),
    **_each("of encoder-decoders, which is refused", "decoder_start_token_id cross_attention_hidden_size is_decoder"),
}
_PLAIN = {
    **_only("false: a decoder alone", "is_encoder_decoder add_cross_attention tie_encoder_decoder", False),
    **_only("none: all heads", "pruned_heads", {}),
}

# generation_config.json, and config.json where transformers kept the same before there was that file. A neutral key
# with another value is no error but a note (special_tokens.py): a request says how it wants its answer.
GENERATION = Keys(
    used=_names("eos_token_id bos_token_id"),  # BOS: of an empty prompt; the prompt's is the tokenizer's
    irrelevant={
        **_each("of batches of unequal prompts", "pad_token_id"),
        **_each("where it came from", "_from_model_config transformers_version _commit_hash"),
        **_each("how long an answer may be is a request's to say", "max_length max_new_tokens"),
        **_each("of beam search alone", "early_stopping length_penalty diversity_penalty num_beam_groups"),
        **_each("the greedy token is the same", "renormalize_logits remove_invalid_values low_memory"),
        **_each("of sampling alone", "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff"),
        **_each(
            "what generate returns and how it runs",
            "output_attentions output_hidden_states output_scores output_logits return_dict_in_generate use_cache "
            "cache_implementation cache_config return_legacy_cache max_cache_len compile_config disable_compile "
            "continuous_batching_config prefill_chunk_size num_return_sequences trust_remote_code",
        ),
        **_each(
            "of assisted decoding, which gives the same tokens",
            "is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold use_mtp "
            "prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind "
            "target_lookbehind assistant_ensemble_weight speculation_type",
        ),
        **_each("of encoder-decoders", "decoder_start_token_id"),
    },
    neutral={
        **_only("false", "do_sample token_healing", False),
        **_only("1", "num_beams repetition_penalty encoder_repetition_penalty guidance_scale", 1),
        **_only("0", "no_repeat_ngram_size encoder_no_repeat_ngram_size min_length min_new_tokens penalty_alpha", 0),
        **_only(
            "none",
            "bad_words_ids force_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id "
            "forced_eos_token_id sequence_bias dola_layers exponential_decay_length_penalty constraints "
            "watermarking_config stop_strings max_time",
            [],
            {},
        ),
    },
)
# What do_sample brings into force.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")

DECODER = Keys(
    used=_names(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size "
        "rms_norm_eps rope_theta rope_scaling rope_parameters attention_bias tie_word_embeddings "
        "max_position_embeddings tokenizer_model_max_length bos_token_id eos_token_id mm_vision_tower "
        "mm_vision_select_layer mm_projector_type mm_hidden_size extra quantization_config compression_config "
        "vision_config text_config vision_feature_layer sliding_window use_sliding_window layer_types"
    ),
    irrelevant={
        **_COMMON,
        **GENERATION.irrelevant,  # the notes on its neutral keys are special_tokens.py's
        **dict.fromkeys(GENERATION.neutral, "of generation: special_tokens.py"),
        **_each("splits matrix products: the same numbers, up to rounding", "pretraining_tp"),
        **_each("of sliding windows, which are refused where they matter", "max_window_layers sliding_window_pattern"),
        **_each(
            "for training alone",
            "tune_mm_mlp_adapter freeze_mm_mlp_adapter freeze_backbone tune_mm_vision_resampler mm_projector_lr "
            "freeze_mm_vision_resampler mm_vision_tower_lr mm_tunable_parts pretrain_mm_mlp_adapter "
            "tokenizer_padding_side vision_tower_pretrained",
        ),
        **_each(
            "says whether the tower was trained: the one inside the checkpoint is used where there is one",
            "unfreeze_mm_vision_tower tune_mm_vision_tower",
        ),
        **_each("of image_aspect_ratio anyres, which is refused", "image_grid_pinpoints image_crop_resolution "
                "image_split_resolution mm_newline_position"),
        **_each("adds a token that no prompt of the official evaluation has", "mm_use_im_patch_token"),
        **_each("the image's place is told by -200, its tokens by the tower", "image_token_index image_token_id "
                "image_seq_length"),
    },
    neutral={
        **_PLAIN,
        **_only("none: code that comes with the checkpoint is not run; if it computes what the official code does, "
                "remove auto_map", "auto_map"),
        **_only("llava, llava_llama or llama: others compute otherwise", "model_type", "llava", "llava_llama", "llama"),
        **_only(
            "LlavaLlamaForCausalLM: others compute otherwise; if it computes the same, remove architectures",
            "architectures",
            [], ["LlavaLlamaForCausalLM"], ["LlamaForCausalLM"], ["LlavaForConditionalGeneration"],
        ),
        **_only("silu", "hidden_act hidden_activation activation_function", "silu", "swish"),
        **_only("false: the MLP has no biases", "mlp_bias", False),
        **_only("false: biases of the attention are attention_bias, q, k, v and o together",
                "bias qkv_bias use_qkv_bias use_bias o_bias add_bias_linear add_qkv_bias lm_head_bias", False),
        **_only("1: rotary positions turn the whole head", "partial_rotary_factor rotary_pct rotary_percent", 1),
        **_only("none: every head is turned as a whole", "rotary_dim"),
        **_only("false: positions are rotary in every layer", "alibi use_alibi", False),
        **_only("none: positions are rotary in every layer", "no_rope_layers no_rope_layer_interval", []),
        **_only("false: queries and keys have no norms", "qk_norm use_qk_norm qk_layernorm use_qk_layernorm", False),
        **_only("none: logits and scores have no cap", "attn_logit_softcapping final_logit_softcapping "
                "attn_logit_softcap final_logit_softcap logits_soft_cap clip_qkv"),
        **_only("1: nothing is scaled beside the attention's scores",
                "logit_scale logits_scaling residual_multiplier embedding_multiplier scale_emb embedding_scale "
                "lm_head_multiplier mup_width_multiplier", 1),
        **_only("none: scores are divided by sqrt(head_dim)", "attention_multiplier query_pre_attn_scalar "
                "scale_depth dim_model_base"),
        **_only("none: every layer has one MLP", "num_experts num_local_experts n_routed_experts n_shared_experts "
                "num_experts_per_tok num_experts_per_token moe_intermediate_size moe_layer_freq moe "
                "first_k_dense_replace", 0, False),
        **_only("none: keys and values have a projection each", "kv_lora_rank q_lora_rank qk_rope_head_dim "
                "qk_nope_head_dim v_head_dim"),
        **_only("none: attention sees the whole context", "attention_chunk_size attention_window_size "
                "sliding_window_size"),
        **_only("none: all layers are alike", "block_configs per_layer_config mlp_only_layers "
                "cross_attention_layers", [], {}),
        **_only("false", "parallel_attn use_parallel_residual multi_query", False),
        **_only("pad", "image_aspect_ratio", "pad"),  # the official evaluation scripts always pad
        **_only("patch (the class token is dropped)", "mm_vision_select_feature", "patch"),
        **_only("default (the class token is dropped)", "vision_feature_select_strategy", "default"),
        **_only("false: the image stands in the prompt without marker tokens", "mm_use_im_start_end", False),
        **_only("flat: the tokens of an image are one sequence", "mm_patch_merge_type", "flat"),
        **_only("true", "use_mm_proj multimodal_projector_bias", True),
        **_only("gelu", "projector_hidden_act", "gelu"),
        **_only("none: no resampler between tower and projector", "mm_resampler_type mm_vision_resampler "
                "mm_spatial_pool_mode mm_spatial_pool_stride mm_spatial_pool_out_channels mm_perceiver_depth "
                "mm_qformer_depth", "identity"),
        **_only("false: one scale of the image beside the pages", "s2 mm_use_s2", False),
    },
)  # fmt: skip

# Under `extra`: all that the official code reads, and this project's own (config.py). An unknown one is refused, not
# listed: a misspelt threshold would give another selection.
EXTRA = Keys(
    used=_names(
        "extra.zoom_ratio extra.highres_size extra.lowres_size extra.threshold extra.start_layer extra.cells "
        "extra.prompt_template extra.turn_template extra.system_prompt"
    ),
    irrelevant={"extra.warmup": "for training alone"},
    neutral=_only("no such key: it replaces the selection by a random one", "extra.special"),
)

TOWER = Keys(
    used=_names(
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size patch_size "
        "hidden_act layer_norm_eps"
    ),
    irrelevant={
        **_COMMON,
        **GENERATION.irrelevant,  # older transformers wrote these into every config
        **dict.fromkeys(GENERATION.neutral, "of generation, which a tower has none of"),
        **_each("of the text beside it, which LLaVA does not use", "projection_dim vocab_size bos_token_id "
                "eos_token_id"),
        **_each("the official code names its classes itself", "auto_map"),
    },
    neutral={
        **_PLAIN,
        **_only("a CLIP vision tower", "model_type", "clip_vision_model", "clip"),
        **_only(
            "a CLIP vision tower", "architectures", [],
            *([f"CLIP{kind}"] for kind in ("VisionModel", "Model", "VisionModelWithProjection")),
        ),
        **_only("true: q, k and v have biases", "qkv_bias attention_bias", True),
        **_only("false", "vision_use_head use_mean_pooling", False),
    },
)  # fmt: skip
# Of the config of a whole CLIP, around its vision_config.
CLIP = Keys(
    used=_names("vision_config vision_config_dict"),
    irrelevant={
        **_COMMON,
        **_each(
            "of the text beside it, which LLaVA does not use",
            "text_config text_config_dict projection_dim bos_token_id eos_token_id",
        ),
        **_each("the official code names its classes itself", "auto_map"),
    },
    neutral={key: TOWER.neutral[key] for key in (*_PLAIN, "model_type", "architectures")},
)

# preprocessor_config.json of the tower. The official code pads the image to a square, resizes it to the size that it
# sets itself, and hands it to CLIPImageProcessor for the rest.
PREPROCESSOR = Keys(
    used=_names("image_mean image_std"),
    irrelevant={
        **_each("the official code sets the size itself", "size crop_size default_to_square pad_size"),
        **_each("a square image is not cropped", "do_center_crop"),
        **_each("an image is RGB before that", "do_convert_rgb"),
        **_each(
            "the official code names its processor itself",
            "image_processor_type feature_extractor_type processor_class auto_map _processor_class",
        ),
        **_each("how it runs, not what it computes", "return_tensors device disable_grouping input_data_format "
                "_valid_processor_keys transformers_version"),
    },
    neutral={
        **_only("true", "do_resize do_rescale do_normalize", True),
        **_only("1/255", "rescale_factor", 1 / 255),
        **_only("3 (bicubic)", "resample", 3),
        **_only("false: the image was padded to a square before", "do_pad do_thumbnail do_align_long_axis", False),
        **_only("channels_first", "data_format", "channels_first"),
    },
)  # fmt: skip

# tokenizer_config.json. What texts become is decided by tokenizer.model or tokenizer.json.
TOKENIZER = Keys(
    used=_names(
        "add_bos_token add_prefix_space bos_token eos_token pad_token added_tokens_decoder legacy "
        "clean_up_tokenization_spaces"
    ),
    irrelevant={
        **_each("of the tokenizer's own files, or without a place in a prompt", "unk_token sep_token cls_token "
                "mask_token additional_special_tokens extra_special_tokens image_token boi_token eoi_token "
                "add_special_tokens"),
        **_each("how long a prompt may be is the context", "model_max_length max_length stride"),
        **_each("a request is not padded or cut", "padding_side truncation_side truncation_strategy padding "
                "pad_to_multiple_of pad_token_type_id"),
        **_each("of decoding special tokens, which an answer leaves out", "spaces_between_special_tokens"),
        **_each("templates are those of the official evaluation, or of extra: prompt_template, turn_template",
                "chat_template use_default_system_prompt default_chat_template response_template"),
        **_each("how it is loaded", "tokenizer_class backend is_local local_files_only use_fast from_slow name_or_path "
                "special_tokens_map_file tokenizer_file vocab_file processor_class model_input_names auto_map "
                "device_map return_token_type_ids trust_remote_code transformers_version _commit_hash tokenizer_type "
                "model_specific_special_tokens files_loaded"),
        **_each("whether a typed special token is one is a request's to say", "split_special_tokens"),
    },
    neutral={
        **_only("false: no part of a prompt ends in EOS", "add_eos_token", False),
        **_only("none: SentencePiece encodes a text in one way", "sp_model_kwargs", {}, {"enable_sampling": False}),
        **_only("false", "do_lower_case", False),
    },
)  # fmt: skip


Base = Annotated[float, Field(ge=1, le=NUMBERS["rope_theta"][1])]  # of the angles of rotary positions
_NO_FACTOR = ("factor", "partial_rotary_factor", "attention_factor")  # of 1, they change nothing


class _Rope(BaseModel):
    """A `rope_scaling`, or transformers 5's `rope_parameters`."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    type: str | None = None
    rope_type: str | None = None
    rope_theta: Base | None = None


class _RopeTheta(BaseModel):
    """The spelling of before."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    rope_theta: Base = 10000.0


def rope_theta(given: Mapping[str, Any], path: Path | str) -> float:
    """The base of the rotary positions, from whichever of its spellings are there: rope_theta, and inside rope_scaling
    and rope_parameters. ConfigError when they contradict each other, and for every kind of scaling."""
    bases = {"rope_theta": parse(_RopeTheta, given, path).rope_theta} if "rope_theta" in given else {}
    for key in ("rope_scaling", "rope_parameters"):
        raw = given.get(key)
        if not raw and isinstance(raw, dict | None):
            continue
        rope = parse(_Rope, raw, f"{path}: {key}")
        kinds = {"rope_type": rope.rope_type, "type": rope.type}
        others = {name: value for name, value in (rope.model_extra or {}).items() if value is not None}
        wrong = {name: kind for name, kind in kinds.items() if kind not in (None, "default")}
        # A default that has a factor, or parts by kind of layer, is none.
        wrong |= {name: value for name, value in others.items() if name not in _NO_FACTOR or value != 1}
        if wrong:
            said = ", ".join(f"{name} {shown(value)}" for name, value in [*wrong.items()][:5])
            raise ConfigError(
                f"{path}: {key} with {said} is not supported",
                expected="rope_type default and its rope_theta: the official hi-res rotary tables are unscaled",
                fix="use a checkpoint without scaled rotary positions",
            )
        if rope.rope_theta is not None:
            bases[f"{key}.rope_theta"] = rope.rope_theta
    if len({*bases.values()}) > 1:
        raise ConfigError(
            f"{path}: {' and '.join(f'{name} is {value}' for name, value in bases.items())}",
            expected="the same in both",
            fix="keep the one that the model was trained with",
        )
    return next(iter(bases.values()), _RopeTheta().rope_theta)
