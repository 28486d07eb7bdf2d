//! How long one step of an engine takes, as a sum of four parts, and named sets of those constants.
//!
//! `T = base + prefill·(prompt tokens computed) + kv·(KV tokens read) + sequence·(sequences in the batch)`. Dynamo,
//! llm-d's workload-variant autoscaler, BLIS and vLLM's fleet simulator all reduce to this form.

use std::time::Duration;

/// The constants of one engine's step time, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepTime {
    /// Every step: reading the weights once, launching the kernels.
    pub base_ns: u64,
    /// Each prompt token computed in the step.
    pub prefill_token_ns: u64,
    /// Each KV-cache token that attention reads in the step.
    pub kv_token_ns: u64,
    /// Each sequence in the step's batch: sampling and bookkeeping.
    pub sequence_ns: u64,
}

impl StepTime {
    /// The same, with every step `factor` times as long.
    #[must_use]
    pub fn slowed(self, factor: u32) -> Self {
        let factor = u64::from(factor);
        Self {
            base_ns: self.base_ns.saturating_mul(factor),
            prefill_token_ns: self.prefill_token_ns.saturating_mul(factor),
            kv_token_ns: self.kv_token_ns.saturating_mul(factor),
            sequence_ns: self.sequence_ns.saturating_mul(factor),
        }
    }

    /// The duration of a step with these contents.
    pub fn of(&self, prefill_tokens: u64, kv_tokens: u64, sequences: u64) -> Duration {
        Duration::from_nanos(
            self.base_ns
                .saturating_add(self.prefill_token_ns.saturating_mul(prefill_tokens))
                .saturating_add(self.kv_token_ns.saturating_mul(kv_tokens))
                .saturating_add(self.sequence_ns.saturating_mul(sequences)),
        )
    }
}

/// A model on some hardware: its step time, and what vLLM would choose there unless told otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// What `--profile` calls it.
    pub name: &'static str,
    /// What it stands for.
    pub about: &'static str,
    /// Where the constants come from.
    pub source: &'static str,
    /// Constants of the step time.
    pub step_time: StepTime,
    /// KV blocks of 16 tokens that fit beside the weights.
    pub num_gpu_blocks: u32,
    /// vLLM's default for a server on this hardware.
    pub max_num_seqs: u32,
    /// vLLM's default for a server on this hardware.
    pub max_num_batched_tokens: u32,
}

// The measured runs: 300 ShareGPT requests at about 10/s against vLLM 0.19.0, published by
// LLMServingSim (casys-kaist, MIT). Fitted by least squares over each request's decode time against
// the integrals of batch, KV tokens and prefill tokens over that time; the error is the mean absolute
// percentage error of those decode times. Replays in tests.rs meet the measured mean time to first
// token within 6 %, the mean time per further token within 1 % and the span within 2 %.
const MEASURED: &str = "least squares over the requests of a measured run (vLLM 0.19.0, \
                        LLMServingSim's vllm bench, MIT)";

/// All profiles; the first is the default.
pub const PROFILES: [Profile; 4] = [
    // Block count: (80 GB · 0.92 − 16 GB of weights − 2 GB of activations) / 2 MiB per block of 16 tokens.
    Profile {
        name: "llama-3.1-8b-h100",
        about: "Llama 3.1 8B, bf16, one H100 SXM 80 GB",
        source: "scaled from llama-3.1-8b-rtxpro6000: weights and KV reads by memory bandwidth (1.79 to 3.35 TB/s), \
                 prefill by dense bf16 throughput; not measured",
        step_time: StepTime {
            base_ns: 6_900_000,
            prefill_token_ns: 25_000,
            kv_token_ns: 31,
            sequence_ns: 38_000,
        },
        num_gpu_blocks: 26_500,
        max_num_seqs: 1024,
        max_num_batched_tokens: 8192,
    },
    // Error 0.4 %. Block count by the same arithmetic as above, 96 GB · 0.92.
    Profile {
        name: "llama-3.1-8b-rtxpro6000",
        about: "Llama 3.1 8B, bf16, one RTX PRO 6000 96 GB",
        source: MEASURED,
        step_time: StepTime {
            base_ns: 11_075_000,
            prefill_token_ns: 41_400,
            kv_token_ns: 57,
            sequence_ns: 71_800,
        },
        num_gpu_blocks: 33_500,
        max_num_seqs: 1024,
        max_num_batched_tokens: 8192,
    },
    // A least-squares fit fails here: the run preempts all the time, which single requests' decode times do not show.
    // 15 GB of weights and 128 KiB per KV token at 1.008 TB/s; 16 GFLOP per prompt token at 165 TFLOP/s. Block count
    // as measured.
    Profile {
        name: "llama-3.1-8b-rtx4090",
        about: "Llama 3.1 8B, bf16, one RTX 4090 24 GB",
        source: "the card's memory bandwidth and bf16 throughput; the time per sequence was chosen so that a replay \
                 of a measured run (vLLM 0.19.0, LLMServingSim's vllm bench, MIT) takes as long as the run",
        step_time: StepTime {
            base_ns: 15_000_000,
            prefill_token_ns: 97_000,
            kv_token_ns: 130,
            sequence_ns: 130_000,
        },
        num_gpu_blocks: 2_588,
        max_num_seqs: 256,
        max_num_batched_tokens: 2048,
    },
    // Error 0.6 %. Block count: (192 GB · 0.92 − 66 GB − 6 GB) / 4 MiB.
    Profile {
        name: "qwen3-32b-rtxpro6000-tp2",
        about: "Qwen3 32B, bf16, two RTX PRO 6000 96 GB, tensor parallel",
        source: MEASURED,
        step_time: StepTime {
            base_ns: 23_330_000,
            prefill_token_ns: 183_900,
            kv_token_ns: 67,
            sequence_ns: 212_200,
        },
        num_gpu_blocks: 24_900,
        max_num_seqs: 1024,
        max_num_batched_tokens: 8192,
    },
];

impl Profile {
    /// The profile that is called `name`.
    pub fn named(name: &str) -> Option<&'static Self> {
        PROFILES.iter().find(|profile| profile.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_time_is_the_sum_of_its_parts() {
        let time = StepTime {
            base_ns: 1_001,
            prefill_token_ns: 10,
            kv_token_ns: 3,
            sequence_ns: 100,
        };
        assert_eq!(time.of(0, 0, 0), Duration::from_nanos(1_001));
        assert_eq!(
            time.of(7, 5, 2),
            Duration::from_nanos(1_001 + 70 + 15 + 200)
        );
        assert_eq!(time.of(u64::MAX, 0, 0), Duration::from_nanos(u64::MAX));
    }

    #[test]
    fn names_are_unique_and_found() {
        for profile in &PROFILES {
            assert_eq!(Profile::named(profile.name), Some(profile));
        }
        assert_eq!(Profile::named("abacus"), None);
    }
}
