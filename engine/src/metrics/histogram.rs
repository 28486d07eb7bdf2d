//! A histogram with fixed bucket edges, as Prometheus' classic format has them.

/// Counts per bucket, their number and their sum.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    edges: &'static [f64],
    /// One per edge and one above the last; not cumulative.
    counts: Vec<u64>,
    sum: f64,
}

impl Histogram {
    /// An empty histogram over rising edges.
    pub(crate) fn new(edges: &'static [f64]) -> Self {
        Self {
            edges,
            counts: vec![0; edges.len() + 1],
            sum: 0.0,
        }
    }

    /// Counts one value in the first bucket whose edge is not below it.
    pub(crate) fn observe(&mut self, value: f64) {
        let bucket = self.edges.partition_point(|&edge| edge < value);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.sum += value;
    }

    /// Upper edge and cumulative count of each bucket; the last edge is infinite.
    pub(crate) fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let edges = self
            .edges
            .iter()
            .copied()
            .chain(std::iter::once(f64::INFINITY));
        edges.zip(self.counts.iter().scan(0, |seen, count| {
            *seen += count;
            Some(*seen)
        }))
    }

    /// Sum of all values.
    pub(crate) fn sum(&self) -> f64 {
        self.sum
    }
}
