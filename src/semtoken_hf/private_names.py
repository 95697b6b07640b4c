"""Every private name of another library that this package uses, and why: what a new release may move.

Each was seen in Transformers 5.17 and 5.23 unless its reason says otherwise. Public twins are preferred where there are
any; a test says by name which one is gone, and refuses one that is not listed here.
"""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "transformers.modeling_utils.PreTrainedModel"
GENERATION = "transformers.generation.utils.GenerationMixin"
MANAGER = "transformers.generation.continuous_batching.continuous_api.ContinuousBatchingManager"
MIXIN = "transformers.generation.continuous_batching.continuous_api"
TOKENIZER = "transformers.tokenization_utils_tokenizers.TokenizersBackend"
TRAINER = "transformers.trainer.Trainer"
LM_EVAL = "lm_eval.models.huggingface.HFLM"


@dataclass(frozen=True)
class PrivateName:
    """A name of another library.

    Attributes:
        name: as it is written.
        owner: dotted path of the class or module that has it, or whose source sets it.
        reason: what it is for.
    """

    name: str
    owner: str
    reason: str


PRIVATE_NAMES = (
    PrivateName("_prepare_generation_config", GENERATION, "own arguments may stand in a generation configuration"),
    PrivateName("_prepare_cache_for_generation", GENERATION, "the cache of `generate` tracks slots"),
    PrivateName(
        "_previous_max_cache_length", "transformers.generation.utils", "compiled steps fit the next static cache"
    ),
    PrivateName("_dynamo", "torch", "where a static cache counts, CUDA graphs expect one address"),
    PrivateName("_prefill", GENERATION, "a prompt is read once for all its beams and returns"),
    PrivateName("_get_candidate_generator", GENERATION, "a plain assistant refuses our arguments"),
    PrivateName("_get_logits_processor", GENERATION, "guidance reads the last logits of its prompt alone"),
    PrivateName("_is_user_defined", "transformers.generation.utils", "a cache of the user's own is left alone"),
    PrivateName("_mask_length", "transformers.generation.utils", "the length of a mask of ones that was dropped; 5.23"),
    PrivateName("_pad_token_tensor", "transformers.generation.utils", "what fills up finished rows"),
    PrivateName("_init_weights", MODEL, "the merger starts at zero"),
    PrivateName("_no_split_modules", MODEL, "the encoder stays on one device"),
    PrivateName("_keep_in_fp32_modules", MODEL, "quantisers leave the encoder alone"),
    PrivateName("_keep_in_fp32_modules_strict", MODEL, "loading does not round the encoder"),
    PrivateName("_tied_weights_keys", MODEL, "which tensors a file may lack"),
    PrivateName("_set_gradient_checkpointing", MODEL, "a checkpointed layer runs again with the same adapter"),
    PrivateName("_pp_stage", "transformers.modeling_utils", "pipeline stages see no tokens; 5.23"),
    PrivateName("_auto_class", MODEL, "what is saved names its AutoModel as well"),
    PrivateName("_from_config", MODEL, "random models of a shape in one dtype, for benchmarks"),
    PrivateName("_get_name", "torch.nn.Module", "`Trainer` shifts smoothed labels for the models it knows by name"),
    PrivateName("_apply", "torch.nn.Module", "`model.half()` leaves the encoder in its own dtype"),
    PrivateName("_get_files_timestamps", "transformers.utils.hub.PushToHubMixin", "an adapter counts as a new file"),
    PrivateName("_hf_peft_config_loaded", "transformers.integrations.peft.PeftAdapterMixin", "save base and adapter"),
    PrivateName("_hf_hook", "accelerate.hooks", "where offloaded layers compute"),
    PrivateName("_attn_implementation", "transformers.configuration_utils.PreTrainedConfig", "which attention runs"),
    PrivateName(
        "_attn_implementation_internal",
        "transformers.configuration_utils.PreTrainedConfig",
        "the encoder keeps its attention when the model's changes",
    ),
    PrivateName("_name_or_path", "transformers.configuration_utils.PreTrainedConfig", "what a message calls a model"),
    PrivateName("_dequantize", "transformers.cache_utils.QuantizedLayer", "quantised layers cannot be cropped"),
    PrivateName("_encode_plus", TOKENIZER, "plans beside the ids"),
    PrivateName("_pad", TOKENIZER, "plans are padded with the ids"),
    PrivateName("_create_batch_processor", MANAGER, "the paged cache carries what a step reads"),
    PrivateName("_cached_continuous_batching_manager", MIXIN, "a manager that lives on is used again"),
    PrivateName("_generation_step", MANAGER, "a step is told which columns are slots"),
    PrivateName("_generation_loop_body", MANAGER, "prompts of ended requests are forgotten"),
    PrivateName("_run_generation_loop", MANAGER, "prompts of ended requests are forgotten"),
    PrivateName("_request_counter", MANAGER, "a request is named before it is added"),
    PrivateName("_request_lock", MANAGER, "a request is named before it is added"),
    PrivateName("_get_train_sampler", TRAINER, "blocks come in an order that a resumed run repeats"),
    PrivateName("_save", TRAINER, "what was trained alone"),
    PrivateName("_save_checkpoint", TRAINER, "a checkpoint is whole or not there"),
    PrivateName("_load_from_checkpoint", TRAINER, "what was trained alone"),
    PrivateName("_get_output_dir", TRAINER, "a checkpoint is written beside its place"),
    PrivateName("_scaled_dot_product_flash_attention_for_cpu", "torch.ops.aten", "attention with its log-sum-exp"),
    PrivateName("_scaled_dot_product_flash_attention_for_cpu_backward", "torch.ops.aten", "its FLOPs are counted"),
    PrivateName("_fused_sdp_choice", "torch", "`doctor` says which kernel SDPA picks"),
    PrivateName("_instances", "tqdm.std", "bars are closed before an error is printed"),
    PrivateName("_processes", "concurrent.futures.ProcessPoolExecutor", "workers end with a killed evaluation"),
    PrivateName("_exit", "os", "a worker ends without the clean-up of its parent"),
    PrivateName("_get_backend", LM_EVAL, "a SemToken checkpoint is a causal model"),
    PrivateName("_loglikelihood_tokens", LM_EVAL, "continuations are scored behind compressed contexts"),
    PrivateName("_model_generate", LM_EVAL, "what was generated, with its slots"),
    PrivateName("_detect_batch_size", LM_EVAL, "the batch size that fits"),
)

__all__ = ["PRIVATE_NAMES", "PrivateName"]
