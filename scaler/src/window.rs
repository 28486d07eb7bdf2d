//! What one target's pods and gateways said in the last minute: sixty slots of one second, and the newest state of each
//! pod and gateway. Counters become deltas here, restarts included; the result is [`Inputs`], which `decide` reads.
//!
//! Times are Unix ms from a clock that never goes back. Missing data stays visible as missing: nothing is taken for 0.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use penstock_core::load::BackendLoad;
use serde::{Deserialize, Serialize};

use crate::inputs::{Inputs, Ledger, Rates, Ttft, TtftSource};
use penstock_core::engine_page::Sample;

/// Length of the window, s.
pub const WINDOW_S: u64 = 60;
/// A pod or gateway that said nothing for longer than this is stale: five scrapes of one second were lost.
pub const FRESH_MS: u64 = 5_000;
/// Prometheus itself scrapes every 15 to 30 s, so its answers are worth keeping longer.
pub const PROMETHEUS_FRESH_MS: u64 = 30_000;
/// Gauges are averaged over this, so that one scrape in the middle of a burst decides nothing.
const GAUGE_MS: u64 = 5_000;
/// Most gauge readings kept per pod; 1 s apart, so [`GAUGE_MS`] never needs more.
const MAX_READINGS: usize = 8;
/// Rate of work done, for capacity: short, so that it is the rate under the breach and not before it.
const SERVED_S: u64 = 10;
/// Rate of work asked for.
const DEMAND_S: u64 = 20;
/// A new pod is in the balancers' view, and its first tokens are out, this long after it became ready.
const SETTLE_MS: u64 = 5_000;
/// An engine with running requests whose counters stand still this long shows a stale gauge (vllm#29928).
const SUSPECT_MS: u64 = 30_000;
/// Waiting requests in a pod that gave no first token for at least this long have waited that long.
const STALL_MS: u64 = 3_000;

/// A pod of the target, as the world has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Takes requests.
    pub ready: bool,
    /// Not yet ready, not terminating, and created recently enough to expect it.
    pub loading: bool,
}

/// What the target's surroundings look like at a tick.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Pods that are not terminating, by name.
    pub members: BTreeMap<String, Member>,
    /// Gateways whose load counts for this target; empty if it has none.
    pub gateways: BTreeSet<String>,
}

/// The state of one target's window. What is skipped in its serialised form is rebuilt from the next readings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Window {
    slots: VecDeque<Slot>,
    first_data_ms: Option<u64>,
    supply_since_ms: u64,
    last_busy_ms: u64,
    #[serde(skip)]
    pods: BTreeMap<String, PodTrack>,
    #[serde(skip)]
    gateways: BTreeMap<String, GatewayTrack>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Slot {
    second: u64,
    pods: Firsts,
    gateways: Firsts,
    arrivals: f64,
    prompt_tokens: f64,
    concurrency: f64,
    ready: Option<u32>,
}

/// First tokens of a second. `all` also holds those that do not count as evidence.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Firsts {
    within: f64,
    missed: f64,
    all: f64,
}

#[derive(Clone, Debug, Default)]
struct PodTrack {
    heard_ms: u64,
    progress_ms: u64,
    stalled_since_ms: Option<u64>,
    last: Sample,
    readings: VecDeque<(u64, Reading)>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Reading {
    kv_use: Option<f64>,
    running: f64,
    waiting: f64,
}

#[derive(Clone, Debug, Default)]
struct GatewayTrack {
    heard_ms: u64,
    process_start_ms: u64,
    load: BackendLoad,
}

#[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^53")]
fn float(count: u64) -> f64 {
    count as f64
}

fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl Window {
    /// Takes in one scrape of a pod.
    pub fn on_sample(&mut self, pod: &str, now_ms: u64, sample: Sample, limit: Duration) {
        self.first_data_ms.get_or_insert(now_ms);
        let since_supply = now_ms
            .checked_sub(self.supply_since_ms)
            .map(Duration::from_millis);
        let known = self.pods.contains_key(pod);
        let track = self.pods.entry(pod.to_owned()).or_default();
        let before = std::mem::replace(&mut track.last, sample);
        track.heard_ms = now_ms;
        let reading = Reading {
            kv_use: track.last.kv_use,
            running: track.last.running.unwrap_or(0.0),
            waiting: track.last.waiting.unwrap_or(0.0),
        };
        if track.readings.len() == MAX_READINGS {
            track.readings.pop_front();
        }
        track.readings.push_back((now_ms, reading));
        if reading.running + reading.waiting > 0.0 {
            self.last_busy_ms = now_ms;
        }
        if !known || restarted(&before, &track.last) {
            track.progress_ms = now_ms;
            track.stalled_since_ms = None;
            return;
        }
        let firsts = track.last.ttft.since(&before.ttft);
        let first_tokens = firsts
            .as_ref()
            .map_or(0.0, penstock_core::engine_page::Buckets::count);
        track.note_stall(now_ms, reading.waiting, first_tokens);
        let prompt_tokens = delta(track.last.prompt_tokens, before.prompt_tokens);
        let moved = first_tokens
            + prompt_tokens
            + delta(track.last.generation_tokens, before.generation_tokens)
            + delta(track.last.ended, before.ended);
        if moved > 0.0 {
            track.progress_ms = now_ms;
            self.last_busy_ms = now_ms;
        }
        let slot = self.slot(now_ms);
        slot.prompt_tokens += prompt_tokens;
        slot.pods.all += first_tokens;
        if let (Some(firsts), Some(since_supply)) = (firsts, since_supply) {
            let within = firsts.at_or_below(limit);
            slot.pods.within += within;
            // A wait that began before the supply grew says nothing about the supply that is there now.
            slot.pods.missed += (firsts.at_or_below(since_supply) - within).max(0.0);
        }
    }

    /// Takes in what one gateway says about this target's backend.
    pub fn on_load(
        &mut self,
        gateway: &str,
        now_ms: u64,
        process_start_ms: u64,
        load: BackendLoad,
        limit: Duration,
    ) {
        self.first_data_ms.get_or_insert(now_ms);
        let since_supply = now_ms
            .checked_sub(self.supply_since_ms)
            .map(Duration::from_millis);
        let track = self.gateways.entry(gateway.to_owned()).or_default();
        let same_process = track.heard_ms > 0 && track.process_start_ms == process_start_ms;
        let before = std::mem::replace(&mut track.load, load);
        track.heard_ms = now_ms;
        track.process_start_ms = process_start_ms;
        let busy_now = track.load.in_flight + track.load.held + track.load.waiting > 0;
        let arrivals = track.load.arrivals.saturating_sub(before.arrivals);
        if busy_now || (same_process && arrivals > 0) {
            self.last_busy_ms = now_ms;
        }
        if !same_process {
            return;
        }
        let firsts = track.load.ttft.since(&before.ttft);
        let slot = self.slot(now_ms);
        slot.arrivals += float(arrivals);
        slot.gateways.all += float(firsts.count());
        if let Some(since_supply) = since_supply {
            let within = firsts.count_at_or_below(limit);
            slot.gateways.within += float(within);
            slot.gateways.missed += float(
                firsts
                    .count_at_or_below(since_supply)
                    .saturating_sub(within),
            );
        }
    }

    /// Closes the tick: forgets what left, notes growth of the supply, and says what a decision may rely on.
    pub fn inputs(&mut self, now_ms: u64, view: &View, limit: Duration) -> Inputs {
        self.pods.retain(|name, _| view.members.contains_key(name));
        self.gateways.retain(|id, _| view.gateways.contains(id));
        let ready = count(view.members.values().filter(|member| member.ready).count());
        self.note_supply(now_ms, ready);
        let mut inputs = Inputs {
            ready,
            loading: count(
                view.members
                    .values()
                    .filter(|member| member.loading)
                    .count(),
            ),
            supply_age_ms: now_ms.saturating_sub(self.supply_since_ms),
            full: self
                .first_data_ms
                .is_some_and(|first| now_ms.saturating_sub(first) >= WINDOW_S * 1000),
            ..Inputs::default()
        };
        self.add_ledger(&mut inputs, now_ms, view);
        self.add_engines(&mut inputs, now_ms, view);
        inputs.waiting += inputs.held;
        let concurrency = (inputs.running + inputs.waiting).max(inputs.in_flight);
        let slot = self.slot(now_ms);
        slot.concurrency = slot.concurrency.max(concurrency);
        slot.ready = slot.ready.max(Some(ready));
        inputs.peak_concurrency = self
            .slots
            .iter()
            .map(|slot| slot.concurrency)
            .reduce(f64::max);
        inputs.busy =
            self.last_busy_ms > 0 && now_ms.saturating_sub(self.last_busy_ms) < WINDOW_S * 1000;
        // Traffic that reaches the engines past the gateways is seen in the engines alone.
        let in_gateways =
            inputs.in_flight > 0.0 || self.slots.iter().any(|slot| slot.arrivals > 0.0);
        let from_gateway = inputs.ledger == Ledger::Fresh && in_gateways;
        let source = if from_gateway {
            TtftSource::Gateway
        } else {
            TtftSource::Pods
        };
        inputs.ttft = self.ttft(now_ms, view, limit, source);
        inputs.served = self.rates(now_ms, SERVED_S, |slot| {
            if from_gateway {
                slot.gateways.all
            } else {
                slot.pods.all
            }
        });
        inputs.demand = self.rates(now_ms, DEMAND_S, |slot| {
            if from_gateway {
                slot.arrivals
            } else {
                slot.pods.all
            }
        });
        inputs
    }

    /// Whether a pod was ready before: its load still counts when its readiness fails.
    pub fn knows(&self, pod: &str) -> bool {
        self.pods.contains_key(pod)
    }

    /// Whether this gateway ever named the target's backend.
    pub fn hears(&self, gateway: &str) -> bool {
        self.gateways.contains_key(gateway)
    }

    fn slot(&mut self, now_ms: u64) -> &mut Slot {
        let second = now_ms / 1000;
        while self
            .slots
            .front()
            .is_some_and(|slot| slot.second + WINDOW_S <= second)
        {
            self.slots.pop_front();
        }
        if self.slots.back().is_none_or(|slot| slot.second < second) {
            self.slots.push_back(Slot {
                second,
                ..Slot::default()
            });
        }
        let last = self.slots.len() - 1;
        &mut self.slots[last]
    }

    /// A pod whose readiness flaps must not postpone evidence for ever: only more pods than at any time in the window
    /// are a growth.
    fn note_supply(&mut self, now_ms: u64, ready: u32) {
        let most = self.slots.iter().filter_map(|slot| slot.ready).max();
        if most.is_some_and(|most| ready > most) {
            self.supply_since_ms = now_ms + SETTLE_MS;
        }
    }

    fn add_ledger(&self, inputs: &mut Inputs, now_ms: u64, view: &View) {
        if view.gateways.is_empty() {
            return;
        }
        let fresh = |track: &&GatewayTrack| now_ms.saturating_sub(track.heard_ms) <= FRESH_MS;
        let fresh: Vec<_> = self.gateways.values().filter(fresh).collect();
        inputs.ledger = if fresh.len() == view.gateways.len() {
            Ledger::Fresh
        } else {
            Ledger::Stale
        };
        inputs.held = fresh.iter().map(|track| float(track.load.held)).sum();
        inputs.in_flight = fresh.iter().map(|track| float(track.load.in_flight)).sum();
    }

    fn add_engines(&self, inputs: &mut Inputs, now_ms: u64, view: &View) {
        let counted = view
            .members
            .iter()
            .filter(|(name, member)| member.ready || self.knows(name));
        let nothing_asked =
            inputs.ledger == Ledger::Fresh && inputs.in_flight == 0.0 && inputs.held == 0.0;
        let (mut fresh, mut stale, mut unknown) = (Vec::new(), Vec::new(), 0.0);
        for (name, _) in counted {
            inputs.counted += 1;
            let Some(track) = self.pods.get(name) else {
                unknown += 1.0;
                continue;
            };
            let stuck = track.is_stuck(now_ms);
            let reading = track.mean(now_ms);
            if now_ms.saturating_sub(track.heard_ms) > FRESH_MS || (stuck && !nothing_asked) {
                stale.push(reading);
            } else if stuck {
                fresh.push(Reading {
                    kv_use: reading.kv_use.map(|_| 0.0),
                    ..Reading::default()
                });
            } else {
                fresh.push(reading);
            }
        }
        inputs.fresh = count(fresh.len());
        inputs.running =
            total(&fresh, &stale, unknown, |reading| Some(reading.running)).unwrap_or(0.0);
        inputs.waiting =
            total(&fresh, &stale, unknown, |reading| Some(reading.waiting)).unwrap_or(0.0);
        inputs.kv_use = total(&fresh, &stale, unknown, |reading| reading.kv_use);
    }

    fn ttft(&self, now_ms: u64, view: &View, limit: Duration, source: TtftSource) -> Option<Ttft> {
        let since = (self.supply_since_ms / 1000).max((now_ms / 1000).saturating_sub(WINDOW_S - 1));
        let mut ttft = Ttft {
            source,
            within: 0.0,
            missed: 0.0,
            overdue: 0.0,
        };
        for slot in self.slots.iter().filter(|slot| slot.second >= since) {
            let firsts = if source == TtftSource::Gateway {
                slot.gateways
            } else {
                slot.pods
            };
            ttft.within += firsts.within;
            ttft.missed += firsts.missed;
        }
        ttft.overdue = match source {
            TtftSource::Gateway => self.overdue_in_gateways(now_ms, limit),
            _ => self.overdue_in_pods(now_ms, view, limit),
        };
        (ttft.within + ttft.missed + ttft.overdue > 0.0).then_some(ttft)
    }

    fn overdue_in_gateways(&self, now_ms: u64, limit: Duration) -> f64 {
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let since_supply = now_ms.saturating_sub(self.supply_since_ms);
        let overdue = |age: &&u64| **age > limit_ms && **age <= since_supply;
        let ages = |track: &GatewayTrack| {
            float(track.load.waiting_ages_ms.iter().filter(overdue).count() as u64)
        };
        self.gateways.values().map(ages).sum()
    }

    /// Without ages, only a pod that has waiting requests and gives no first token at all is evidence.
    fn overdue_in_pods(&self, now_ms: u64, view: &View, limit: Duration) -> f64 {
        let long_ms = u64::try_from(limit.as_millis())
            .unwrap_or(u64::MAX)
            .max(STALL_MS);
        let stalled = |track: &&PodTrack| {
            now_ms.saturating_sub(track.heard_ms) <= FRESH_MS
                && track.stalled_since_ms.is_some_and(|since| {
                    now_ms.saturating_sub(since.max(self.supply_since_ms)) > long_ms
                })
        };
        let ready = self
            .pods
            .iter()
            .filter(|(name, _)| view.members.get(*name).is_some_and(|member| member.ready));
        ready
            .map(|(_, track)| track)
            .filter(stalled)
            .map(|track| track.last.waiting.unwrap_or(0.0))
            .sum()
    }

    fn rates(&self, now_ms: u64, span_s: u64, requests: impl Fn(&Slot) -> f64) -> Rates {
        let Some(first_ms) = self.first_data_ms else {
            return Rates::default();
        };
        let span_s = (now_ms.saturating_sub(first_ms) / 1000).clamp(1, span_s);
        // The current second is not over yet.
        let end = now_ms / 1000;
        let slots = self
            .slots
            .iter()
            .filter(|slot| slot.second < end && slot.second + span_s >= end);
        let (sum_requests, sum_tokens) = slots.fold((0.0, 0.0), |(sum, tokens), slot| {
            (sum + requests(slot), tokens + slot.prompt_tokens)
        });
        Rates {
            requests: sum_requests / float(span_s),
            prompt_tokens: sum_tokens / float(span_s),
        }
    }
}

impl PodTrack {
    fn note_stall(&mut self, now_ms: u64, waiting: f64, first_tokens: f64) {
        if waiting > 0.0 && first_tokens == 0.0 {
            self.stalled_since_ms.get_or_insert(now_ms);
        } else {
            self.stalled_since_ms = None;
        }
    }

    /// An engine that shows no counters cannot be judged by them.
    fn is_stuck(&self, now_ms: u64) -> bool {
        let counts = self
            .last
            .prompt_tokens
            .or(self.last.generation_tokens)
            .or(self.last.ended)
            .is_some();
        counts
            && self.last.running.unwrap_or(0.0) > 0.0
            && now_ms.saturating_sub(self.progress_ms) > SUSPECT_MS
    }

    /// Mean of the readings of the last [`GAUGE_MS`] before the newest one.
    fn mean(&self, now_ms: u64) -> Reading {
        let since = now_ms.min(self.heard_ms).saturating_sub(GAUGE_MS);
        let recent: Vec<_> = self
            .readings
            .iter()
            .filter(|(at, _)| *at > since)
            .map(|(_, reading)| *reading)
            .collect();
        let of = |values: Vec<f64>| {
            (!values.is_empty()).then(|| values.iter().sum::<f64>() / float(values.len() as u64))
        };
        Reading {
            kv_use: of(recent.iter().filter_map(|reading| reading.kv_use).collect()),
            running: of(recent.iter().map(|reading| reading.running).collect()).unwrap_or(0.0),
            waiting: of(recent.iter().map(|reading| reading.waiting).collect()).unwrap_or(0.0),
        }
    }
}

/// Sum over pods. A stale pod counts as its last value or as the mean of the fresh ones, whichever is larger; one that
/// was never heard as that mean. So losing a pod's data never lowers the sum.
fn total(
    fresh: &[Reading],
    stale: &[Reading],
    unknown: f64,
    of: impl Fn(&Reading) -> Option<f64>,
) -> Option<f64> {
    let values: Vec<f64> = fresh.iter().filter_map(&of).collect();
    let sum: f64 = values.iter().sum();
    let mean = if values.is_empty() {
        None
    } else {
        Some(sum / float(values.len() as u64))
    };
    let stale_values: Vec<f64> = stale.iter().filter_map(&of).collect();
    if mean.is_none() && stale_values.is_empty() {
        return None;
    }
    let mean =
        mean.unwrap_or_else(|| stale_values.iter().sum::<f64>() / float(stale_values.len() as u64));
    let silent = float((fresh.len() + stale.len() - values.len() - stale_values.len()) as u64);
    Some(
        sum + stale_values
            .iter()
            .map(|value| value.max(mean))
            .sum::<f64>()
            + (unknown + silent) * mean,
    )
}

fn restarted(before: &Sample, now: &Sample) -> bool {
    let fell = |before: Option<f64>, now: Option<f64>| matches!((before, now), (Some(before), Some(now)) if now < before);
    before.process_start_s != now.process_start_s
        || fell(before.prompt_tokens, now.prompt_tokens)
        || fell(before.generation_tokens, now.generation_tokens)
        || fell(before.ended, now.ended)
}

fn delta(now: Option<f64>, before: Option<f64>) -> f64 {
    match (now, before) {
        (Some(now), Some(before)) => (now - before).max(0.0),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use penstock_core::engine_page::Buckets;

    const START: u64 = 1_000_000_000;
    const LIMIT: Duration = Duration::from_millis(500);

    fn view(pods: &[&str], gateways: &[&str]) -> View {
        let ready = Member {
            ready: true,
            loading: false,
        };
        View {
            members: pods
                .iter()
                .map(|name| ((*name).to_owned(), ready))
                .collect(),
            gateways: gateways.iter().map(|id| (*id).to_owned()).collect(),
        }
    }

    fn sample(kv_use: f64, running: f64, waiting: f64) -> Sample {
        Sample {
            kv_use: Some(kv_use),
            running: Some(running),
            waiting: Some(waiting),
            process_start_s: Some(1.0),
            ..Sample::default()
        }
    }

    /// Cumulative: `within` in time, `late` within 10 s.
    fn with_firsts(within: f64, late: f64) -> Sample {
        let ttft = Buckets::new([
            (0.5, within),
            (10.0, within + late),
            (f64::INFINITY, within + late),
        ]);
        Sample {
            ttft,
            prompt_tokens: Some((within + late) * 100.0),
            ..sample(0.1, 1.0, 0.0)
        }
    }

    fn load(arrivals: u64, in_flight: u64, ages_ms: &[u64], ttft_ms: &[u64]) -> BackendLoad {
        let mut load = BackendLoad {
            arrivals,
            in_flight,
            waiting: ages_ms.len() as u64,
            waiting_ages_ms: ages_ms.to_vec(),
            ..BackendLoad::default()
        };
        for ms in ttft_ms {
            load.ttft.record(Duration::from_millis(*ms));
        }
        load
    }

    #[test]
    fn gauges_are_averaged_over_five_seconds_and_summed_over_pods() {
        let mut window = Window::default();
        for second in 0..10_u64 {
            let burst = if second == 9 { 50.0 } else { 0.0 };
            window.on_sample("a", START + second * 1000, sample(0.5, 10.0, burst), LIMIT);
            window.on_sample("b", START + second * 1000, sample(0.1, 2.0, 0.0), LIMIT);
        }
        let inputs = window.inputs(START + 9_100, &view(&["a", "b"], &[]), LIMIT);
        assert!((inputs.kv_use.unwrap() - 0.6).abs() < 1e-9);
        assert_eq!((inputs.running, inputs.waiting), (12.0, 10.0));
        assert_eq!((inputs.ready, inputs.fresh, inputs.counted), (2, 2, 2));
    }

    #[test]
    fn stale_pod_counts_with_its_last_value_or_the_mean_of_the_others() {
        let mut window = Window::default();
        window.on_sample("hot", START, sample(0.9, 9.0, 0.0), LIMIT);
        window.on_sample("cold", START, sample(0.1, 1.0, 0.0), LIMIT);
        window.on_sample("cold", START + 20_000, sample(0.1, 1.0, 0.0), LIMIT);
        let inputs = window.inputs(START + 20_000, &view(&["cold", "hot"], &[]), LIMIT);
        assert!((inputs.kv_use.unwrap() - 1.0).abs() < 1e-9);
        assert_eq!((inputs.fresh, inputs.counted), (1, 2));
        let inputs = window.inputs(START + 20_000, &view(&["cold", "hot", "new"], &[]), LIMIT);
        assert!(
            (inputs.kv_use.unwrap() - 1.1).abs() < 1e-9,
            "a pod never heard counts as the mean of the fresh ones"
        );
    }

    #[test]
    fn pod_whose_readiness_fails_still_counts_until_it_is_gone() {
        let mut window = Window::default();
        window.on_sample("a", START, sample(0.8, 8.0, 0.0), LIMIT);
        let mut view = view(&["a"], &[]);
        view.members.insert(
            "a".into(),
            Member {
                ready: false,
                loading: false,
            },
        );
        let inputs = window.inputs(START, &view, LIMIT);
        assert_eq!(
            (inputs.ready, inputs.counted, inputs.kv_use),
            (0, 1, Some(0.8))
        );
        assert_eq!(window.inputs(START, &View::default(), LIMIT).kv_use, None);
    }

    #[test]
    fn first_tokens_of_the_last_minute_are_counted_once() {
        let mut window = Window::default();
        for second in 0..100_u32 {
            let at = START + u64::from(second) * 1000;
            window.on_sample(
                "a",
                at,
                with_firsts(f64::from(second) * 3.0, f64::from(second)),
                LIMIT,
            );
        }
        let ttft = window
            .inputs(START + 99_000, &view(&["a"], &[]), LIMIT)
            .ttft
            .unwrap();
        assert_eq!(
            (ttft.source, ttft.within, ttft.missed, ttft.overdue),
            (TtftSource::Pods, 180.0, 60.0, 0.0)
        );
    }

    #[test]
    fn restarted_engine_adds_no_delta() {
        let mut window = Window::default();
        window.on_sample("a", START, with_firsts(100.0, 0.0), LIMIT);
        window.on_sample("a", START + 1000, with_firsts(110.0, 0.0), LIMIT);
        window.on_sample(
            "a",
            START + 2000,
            Sample {
                process_start_s: Some(2.0),
                ..with_firsts(500.0, 0.0)
            },
            LIMIT,
        );
        window.on_sample("a", START + 3000, with_firsts(3.0, 0.0), LIMIT);
        window.on_sample("a", START + 4000, with_firsts(5.0, 0.0), LIMIT);
        let ttft = window
            .inputs(START + 4000, &view(&["a"], &[]), LIMIT)
            .ttft
            .unwrap();
        assert_eq!((ttft.within, ttft.missed), (12.0, 0.0));
    }

    #[test]
    fn gateway_evidence_wins_over_the_engines_where_traffic_passes_it() {
        let mut window = Window::default();
        let both = view(&["a"], &["g"]);
        window.on_sample("a", START, with_firsts(0.0, 0.0), LIMIT);
        window.on_sample("a", START + 1000, with_firsts(30.0, 0.0), LIMIT);
        window.on_load("g", START, 7, BackendLoad::default(), LIMIT);
        window.on_load("g", START + 1000, 7, BackendLoad::default(), LIMIT);
        assert_eq!(
            window
                .inputs(START + 1000, &both, LIMIT)
                .ttft
                .unwrap()
                .source,
            TtftSource::Pods
        );
        window.on_load(
            "g",
            START + 2000,
            7,
            load(4, 1, &[900, 100], &[100, 2000]),
            LIMIT,
        );
        let inputs = window.inputs(START + 2000, &both, LIMIT);
        let ttft = inputs.ttft.unwrap();
        assert_eq!(
            (ttft.source, ttft.within, ttft.missed, ttft.overdue),
            (TtftSource::Gateway, 1.0, 1.0, 1.0)
        );
        assert_eq!(inputs.ledger, Ledger::Fresh);
    }

    #[test]
    fn restarted_gateway_adds_no_delta_and_a_silent_one_makes_the_ledger_stale() {
        let mut window = Window::default();
        window.on_load("g", START, 7, load(1000, 0, &[], &[100]), LIMIT);
        window.on_load("g", START + 1000, 8, load(2000, 0, &[], &[100, 100]), LIMIT);
        let view = view(&[], &["g"]);
        let inputs = window.inputs(START + 3000, &view, LIMIT);
        assert_eq!(
            (inputs.demand.requests, inputs.ttft, inputs.ledger),
            (0.0, None, Ledger::Fresh)
        );
        assert_eq!(
            window
                .inputs(START + 1000 + FRESH_MS + 1, &view, LIMIT)
                .ledger,
            Ledger::Stale
        );
    }

    #[test]
    fn growth_of_the_supply_starts_the_evidence_anew() {
        let mut window = Window::default();
        let one = view(&["a"], &["g"]);
        let two = view(&["a", "b"], &["g"]);
        window.on_load("g", START, 7, load(0, 0, &[], &[]), LIMIT);
        window.inputs(START, &one, LIMIT);
        window.on_load(
            "g",
            START + 1000,
            7,
            load(50, 9, &[3_000], &[2_000; 40]),
            LIMIT,
        );
        assert_eq!(
            window
                .inputs(START + 1000, &one, LIMIT)
                .ttft
                .unwrap()
                .missed,
            40.0
        );
        assert_eq!(window.inputs(START + 2000, &two, LIMIT).ttft, None);
        // First tokens of requests that had queued before, 12 s after the growth: no evidence. New ones: evidence.
        let mut later = load(60, 9, &[11_000, 900], &[2_000; 40]);
        later.ttft.record(Duration::from_secs(11));
        later.ttft.record(Duration::from_secs(2));
        window.on_load("g", START + 14_000, 7, later, LIMIT);
        let ttft = window.inputs(START + 14_000, &two, LIMIT).ttft.unwrap();
        assert_eq!((ttft.within, ttft.missed, ttft.overdue), (0.0, 1.0, 1.0));
    }

    #[test]
    fn flapping_readiness_does_not_postpone_evidence() {
        let mut window = Window::default();
        for second in 0..30_u64 {
            let pods: &[&str] = if second % 2 == 0 { &["a", "b"] } else { &["a"] };
            window.inputs(START + second * 1000, &view(pods, &[]), LIMIT);
        }
        assert_eq!(window.supply_since_ms, 0);
    }

    #[test]
    fn stalled_engine_counts_its_waiting_requests_as_overdue() {
        let mut window = Window::default();
        for second in 0..6_u64 {
            window.on_sample(
                "a",
                START + second * 1000,
                Sample {
                    waiting: Some(4.0),
                    ..with_firsts(10.0, 0.0)
                },
                LIMIT,
            );
        }
        let inputs = window.inputs(START + 5_000, &view(&["a"], &[]), LIMIT);
        assert_eq!(inputs.ttft.unwrap().overdue, 4.0);
        window.on_sample(
            "a",
            START + 6_000,
            Sample {
                waiting: Some(4.0),
                ..with_firsts(11.0, 0.0)
            },
            LIMIT,
        );
        let inputs = window.inputs(START + 6_000, &view(&["a"], &[]), LIMIT);
        assert_eq!(
            inputs.ttft.unwrap().overdue,
            0.0,
            "it gives first tokens again"
        );
    }

    #[test]
    fn engine_that_stands_still_with_running_requests_is_not_believed() {
        let mut window = Window::default();
        let stuck = Sample {
            generation_tokens: Some(5.0),
            ..sample(0.99, 3.0, 0.0)
        };
        for second in 0..40_u64 {
            window.on_sample("a", START + second * 1000, stuck.clone(), LIMIT);
            window.on_load("g", START + second * 1000, 7, BackendLoad::default(), LIMIT);
        }
        let now = START + 39_500;
        let inputs = window.inputs(now, &view(&["a"], &[]), LIMIT);
        assert_eq!(
            (inputs.fresh, inputs.kv_use),
            (0, Some(0.99)),
            "unknown, and its last word stands"
        );
        window.on_load("g", now, 7, BackendLoad::default(), LIMIT);
        let inputs = window.inputs(now, &view(&["a"], &["g"]), LIMIT);
        assert_eq!(
            (inputs.fresh, inputs.kv_use),
            (1, Some(0.0)),
            "no gateway has a request there: the gauge is a leftover"
        );
    }

    #[test]
    fn window_is_full_after_a_minute_and_bounded() {
        let mut window = Window::default();
        let view = view(&["a"], &[]);
        assert!(!window.inputs(START, &view, LIMIT).full, "nothing heard");
        for second in 0..200_u64 {
            window.on_sample("a", START + second * 1000, sample(0.0, 0.0, 0.0), LIMIT);
            let inputs = window.inputs(START + second * 1000, &view, LIMIT);
            assert_eq!(inputs.full, second >= WINDOW_S);
            assert!(window.slots.len() <= 60 && window.pods["a"].readings.len() <= MAX_READINGS);
        }
    }

    #[test]
    fn busy_ends_a_window_after_the_last_sign_of_work() {
        let mut window = Window::default();
        let view = view(&["a"], &[]);
        window.on_sample("a", START, sample(0.0, 1.0, 0.0), LIMIT);
        window.on_sample("a", START + 1000, sample(0.0, 0.0, 0.0), LIMIT);
        assert!(window.inputs(START + 59_999, &view, LIMIT).busy);
        assert!(!window.inputs(START + 60_000, &view, LIMIT).busy);
    }

    #[test]
    fn peak_concurrency_is_the_most_of_the_window() {
        let mut window = Window::default();
        let both = view(&["a"], &["g"]);
        window.on_sample("a", START, sample(0.0, 3.0, 2.0), LIMIT);
        window.inputs(START, &both, LIMIT);
        window.on_sample("a", START + 30_000, sample(0.0, 1.0, 0.0), LIMIT);
        assert_eq!(
            window.inputs(START + 30_000, &both, LIMIT).peak_concurrency,
            Some(5.0)
        );
        window.on_load("g", START + 31_000, 7, load(0, 9, &[], &[]), LIMIT);
        assert_eq!(
            window.inputs(START + 31_000, &both, LIMIT).peak_concurrency,
            Some(9.0)
        );
    }

    #[test]
    fn window_survives_being_handed_over() {
        let mut window = Window::default();
        for second in 0..70_u32 {
            window.on_sample(
                "a",
                START + u64::from(second) * 1000,
                with_firsts(f64::from(second), 0.0),
                LIMIT,
            );
        }
        let text = serde_json::to_string(&window).unwrap();
        let mut copy: Window = serde_json::from_str(&text).unwrap();
        let view = view(&["a"], &[]);
        let inputs = copy.inputs(START + 70_000, &view, LIMIT);
        assert!(inputs.full && inputs.busy);
        assert_eq!(
            inputs.ttft,
            window.inputs(START + 70_000, &view, LIMIT).ttft
        );
    }

    proptest! {
        #[test]
        fn losing_pods_data_never_lowers_the_demand(kv in prop::collection::vec(0.0..1.0_f64, 2..8), lost in prop::collection::vec(any::<bool>(), 8)) {
            let names: Vec<String> = (0..kv.len()).map(|n| format!("p{n}")).collect();
            let view = view(&names.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
            let mut window = Window::default();
            for (name, kv) in names.iter().zip(&kv) {
                window.on_sample(name, START, sample(*kv, *kv * 10.0, 1.0), LIMIT);
            }
            let before = window.inputs(START, &view, LIMIT);
            for ((name, kv), lost) in names.iter().zip(&kv).zip(&lost) {
                if !lost {
                    window.on_sample(name, START + 20_000, sample(*kv, *kv * 10.0, 1.0), LIMIT);
                }
            }
            let after = window.inputs(START + 20_000, &view, LIMIT);
            prop_assert!(after.kv_use.unwrap() >= before.kv_use.unwrap() - 1e-9);
            prop_assert!(after.running >= before.running - 1e-9 && after.waiting >= before.waiting - 1e-9);
        }
    }
}
