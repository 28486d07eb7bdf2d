//! Names of vLLM 0.32's families with a line of help each, in the order in which vLLM lists them.

/// A family's name and help.
pub(super) type Family = (&'static str, &'static str);

/// Counters that are always 0 here.
pub(super) const ESTIMATES: [Family; 3] = [
    (
        "vllm:estimated_flops_per_gpu",
        "Floating point operations; not estimated here.",
    ),
    (
        "vllm:estimated_read_bytes_per_gpu",
        "Bytes read from memory; not estimated here.",
    ),
    (
        "vllm:estimated_write_bytes_per_gpu",
        "Bytes written to memory; not estimated here.",
    ),
];

/// Counters between the gauges and the counters by source.
pub(super) const COUNTERS: [Family; 8] = [
    (
        "vllm:prefix_cache_queries",
        "Tokens looked up in the prefix cache.",
    ),
    (
        "vllm:prefix_cache_hits",
        "Tokens found in the prefix cache.",
    ),
    (
        "vllm:external_prefix_cache_queries",
        "Tokens looked up in other engines' caches.",
    ),
    (
        "vllm:external_prefix_cache_hits",
        "Tokens found in other engines' caches.",
    ),
    (
        "vllm:mm_cache_queries",
        "Items looked up in the multi-modal cache.",
    ),
    (
        "vllm:mm_cache_hits",
        "Items found in the multi-modal cache.",
    ),
    ("vllm:num_preemptions", "Preemptions."),
    ("vllm:prompt_tokens", "Prompt tokens processed."),
];

/// All histograms.
pub(super) const HISTOGRAMS: [Family; 16] = [
    ("vllm:request_prompt_tokens", "Prompt tokens of a request."),
    (
        "vllm:request_generation_tokens",
        "Generated tokens of a request.",
    ),
    ("vllm:iteration_tokens_total", "Tokens of a step."),
    (
        "vllm:request_max_num_generation_tokens",
        "Most tokens of a request's answers.",
    ),
    ("vllm:request_params_n", "Answers asked for."),
    (
        "vllm:request_params_max_tokens",
        "Limit on generated tokens.",
    ),
    (
        "vllm:time_to_first_token_seconds",
        "Arrival to first token.",
    ),
    ("vllm:inter_token_latency_seconds", "Token to token."),
    (
        "vllm:request_time_per_output_token_seconds",
        "Mean time per token after the first.",
    ),
    ("vllm:e2e_request_latency_seconds", "Arrival to last token."),
    ("vllm:request_queue_time_seconds", "Arrival to first step."),
    (
        "vllm:request_inference_time_seconds",
        "First step to last token.",
    ),
    (
        "vllm:request_prefill_time_seconds",
        "First step to first token.",
    ),
    (
        "vllm:request_decode_time_seconds",
        "First token to last token.",
    ),
    ("vllm:request_num_preemptions", "Preemptions of a request."),
    (
        "vllm:request_prefill_kv_computed_tokens",
        "Prompt tokens that no cache held.",
    ),
];
