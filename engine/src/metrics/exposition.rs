//! Prometheus text as Python's client writes it: labels in alphabetical order, every number a float, a `_created`
//! gauge beside each counter and histogram. The Rust client writes `OpenMetrics`, which spells both differently.

use std::fmt::Write as _;
use std::time::Duration;

use super::histogram::Histogram;

/// Label names and values in alphabetical order of the names, values escaped.
#[derive(Clone, Debug)]
pub(crate) struct Labels(Vec<(&'static str, String)>);

impl Labels {
    /// No labels.
    pub(crate) fn none() -> Self {
        Self(Vec::new())
    }

    /// What nearly all of vLLM's families carry. There is one engine per process.
    pub(crate) fn engine(model: &str) -> Self {
        Self::frontend(model).with("engine", "0")
    }

    /// What families of vLLM's API server carry.
    pub(crate) fn frontend(model: &str) -> Self {
        Self::none().with("model_name", model)
    }

    /// These labels and one more.
    pub(crate) fn with(&self, name: &'static str, value: &str) -> Self {
        let mut labels = self.0.clone();
        let value = value
            .replace('\\', "\\\\")
            .replace('\n', "\\n")
            .replace('"', "\\\"");
        let at = labels.partition_point(|(other, _)| *other < name);
        labels.insert(at, (name, value));
        Self(labels)
    }
}

/// Python's `floatToGoString`: like `repr`, but with an exponent from a million on.
pub(crate) fn number(value: f64) -> String {
    if value.is_infinite() {
        return if value > 0.0 {
            "+Inf".to_owned()
        } else {
            "-Inf".to_owned()
        };
    }
    let plain = format!("{value:?}");
    match plain.split_once('.') {
        Some((whole, fraction)) if value > 0.0 && whole.len() > 6 => {
            let digits = format!("{}.{}{fraction}", &whole[..1], &whole[1..]);
            let mantissa = digits.trim_end_matches('0').trim_end_matches('.');
            format!("{mantissa}e+{:02}", whole.len() - 1)
        }
        _ => plain,
    }
}

#[expect(clippy::cast_precision_loss, reason = "the format has floats only")]
fn float(count: u64) -> f64 {
    count as f64
}

/// The values of `vllm:cache_config_info` that vLLM 0.32 shows for a plain full-attention model. A stand-in has no
/// opinion on them; a reader that looks for a label finds it.
const CACHE_CONFIG: [(&str, &str); 37] = [
    ("_block_size_resolved", "True"),
    ("block_size", ""),
    ("cache_dtype", "auto"),
    ("cache_hit_alignment_tokens", "None"),
    ("effective_attention_block_size", ""),
    ("enable_mamba_shared_prefix_checkpoint", "False"),
    ("enable_prefix_caching", ""),
    ("engine", "0"),
    ("gpu_memory_utilization", "0.92"),
    ("hash_block_size", "None"),
    ("is_attention_free", "False"),
    ("kv_cache_dtype_skip_layers", "[]"),
    ("kv_cache_layout", "None"),
    ("kv_cache_max_concurrency", ""),
    ("kv_cache_memory_bytes", "None"),
    ("kv_cache_size_tokens", ""),
    ("kv_offloading_backend", "native"),
    ("kv_offloading_size", "None"),
    ("kv_sharing_fast_prefill", "False"),
    ("mamba_block_size", "None"),
    ("mamba_cache_dtype", "auto"),
    ("mamba_cache_mode", "none"),
    ("mamba_page_size_padded", "None"),
    ("mamba_ssm_cache_dtype", "float32"),
    ("num_cpu_blocks", "None"),
    ("num_gpu_blocks", ""),
    ("num_gpu_blocks_override", ""),
    ("prefix_cache_retention_interval", "0"),
    ("prefix_caching_hash_algo", "sha256"),
    ("prefix_match_unit", "None"),
    ("replayssm_buffer_len", "16"),
    ("skip_page_size_padded", "None"),
    ("sliding_window", "None"),
    ("swa_bounded_replay", "True"),
    ("use_kda_recoverssm", "False"),
    ("use_replayssm", "False"),
    ("user_specified_block_size", "False"),
];

/// The text so far.
#[derive(Debug)]
pub(crate) struct Writer {
    text: String,
    created: f64,
}

impl Writer {
    /// Empty; `created` is the value of all `_created` gauges.
    pub(crate) fn new(created: Duration) -> Self {
        // A whole page is about 48 KB.
        Self {
            text: String::with_capacity(64 * 1024),
            created: created.as_secs_f64(),
        }
    }

    /// The text.
    pub(crate) fn finish(self) -> String {
        self.text
    }

    /// The two lines that open a family.
    pub(crate) fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    /// One line.
    pub(crate) fn sample(&mut self, name: &str, labels: &Labels, value: f64) {
        self.text.push_str(name);
        for (index, (label, value)) in labels.0.iter().enumerate() {
            let separator = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{separator}{label}=\"{value}\"");
        }
        if !labels.0.is_empty() {
            self.text.push('}');
        }
        let _ = writeln!(self.text, " {}", number(value));
    }

    /// A gauge with one value.
    pub(crate) fn gauge(&mut self, name: &str, help: &str, labels: &Labels, value: f64) {
        self.family(name, "gauge", help);
        self.sample(name, labels, value);
    }

    /// A counter with one value; `name` without `_total`.
    pub(crate) fn counter(&mut self, name: &str, help: &str, labels: &Labels, value: u64) {
        let total = format!("{name}_total");
        self.family(&total, "counter", help);
        self.sample(&total, labels, float(value));
        self.created(name, help, std::slice::from_ref(labels));
    }

    /// A counter with one value for each value of `label`; `name` without `_total`.
    pub(crate) fn counters(
        &mut self,
        name: &str,
        help: &str,
        labels: &Labels,
        label: &'static str,
        values: &[(&str, u64)],
    ) {
        let total = format!("{name}_total");
        self.family(&total, "counter", help);
        let labels: Vec<_> = values
            .iter()
            .map(|(of, _)| labels.with(label, of))
            .collect();
        for (labels, (_, value)) in labels.iter().zip(values) {
            self.sample(&total, labels, float(*value));
        }
        self.created(name, help, &labels);
    }

    fn created(&mut self, name: &str, help: &str, labels: &[Labels]) {
        let name = format!("{name}_created");
        self.family(&name, "gauge", help);
        for labels in labels {
            self.sample(&name, labels, self.created);
        }
    }

    /// A histogram.
    pub(crate) fn histogram(
        &mut self,
        name: &str,
        help: &str,
        labels: &Labels,
        histogram: &Histogram,
    ) {
        self.family(name, "histogram", help);
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        for (edge, cumulative) in histogram.buckets() {
            self.sample(
                &bucket,
                &labels.with("le", &number(edge)),
                float(cumulative),
            );
            count = cumulative;
        }
        self.sample(&format!("{name}_count"), labels, float(count));
        self.sample(&format!("{name}_sum"), labels, histogram.sum());
        self.created(name, help, std::slice::from_ref(labels));
    }

    /// `vllm:cache_config_info`, with `values` in place of the defaults.
    pub(crate) fn cache_config(&mut self, values: &[(&str, &str)]) {
        let name = "vllm:cache_config_info";
        let labels = CACHE_CONFIG.iter().map(|&(label, default)| {
            let value = values
                .iter()
                .find(|(of, _)| *of == label)
                .map_or(default, |(_, value)| value);
            (label, value.to_owned())
        });
        let labels = Labels(labels.collect());
        self.gauge(name, "The engine's KV cache, in labels.", &labels, 1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_python_writes_them() {
        for (value, text) in [
            (0.0, "0.0"),
            (1058.0, "1058.0"),
            (0.001, "0.001"),
            (16384.0, "16384.0"),
            (999_999.0, "999999.0"),
            (4_194_304.0, "4.194304e+06"),
            (5_000_000.0, "5e+06"),
            (1_795_251_888.171_816, "1.795251888171816e+09"),
            (22.713_469_982_147_217, "22.713469982147217"),
            (f64::INFINITY, "+Inf"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn label_values_are_escaped() {
        let mut out = Writer::new(Duration::ZERO);
        out.sample("m", &Labels::engine("a\"b\\c\nd"), 1.0);
        assert_eq!(
            out.finish(),
            "m{engine=\"0\",model_name=\"a\\\"b\\\\c\\nd\"} 1.0\n"
        );
    }
}
