//! One pass over one namespace: observe → make keys → plan → apply → conditions → status. Every pass looks at
//! everything in the namespace anew, so a missed event costs nothing but time, and at rest it writes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use penstock_core::config::FORMAT;
use penstock_core::names;

use crate::acks;
use crate::apply::{WriteError, Writer, Writes};
use crate::args::PlanSettings;
use crate::events::Events;
use crate::findings;
use crate::keys;
use crate::live::ChildKind;
use crate::observe::observe;
use crate::observed::Observed;
use crate::plan::{Plan, config_map, plan};
use crate::pod::Owner;
use crate::programmed::{Fleet, Hashes, Recent};
use crate::queue::Outcome;
use crate::status;

/// A namespace is looked at this often even if nothing seems to change.
const RESYNC: Duration = Duration::from_mins(10);

/// Looks at keys that were just made. One that is not there then is not for this operator to read.
const MAX_LOOKS: u32 = 4;

/// What is remembered of one namespace from pass to pass. Losing it costs at most one needless write a child.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    writes: Writes,
    recent: BTreeMap<String, Recent>,
}

/// What every pass uses.
pub(crate) struct Context {
    pub(crate) writer: Writer,
    pub(crate) events: Events,
    pub(crate) settings: PlanSettings,
}

/// Brings a namespace up to date.
pub(crate) async fn reconcile(context: &Context, namespace: &str, memory: &mut Memory) -> Outcome {
    match pass(context, namespace, memory).await {
        Ok(outcome) => outcome,
        // The next leader does it.
        Err(WriteError::NotLeader) => Outcome::Done(None),
        Err(err) => {
            let cause = std::error::Error::source(&err)
                .map(ToString::to_string)
                .unwrap_or_default();
            tracing::warn!(namespace, error = %err, cause, "pass not finished");
            Outcome::Failed
        }
    }
}

async fn pass(
    context: &Context,
    namespace: &str,
    memory: &mut Memory,
) -> Result<Outcome, WriteError> {
    let writer = &context.writer;
    let mut observed = observe(&writer.client, &writer.world, namespace).await?;
    let minted = writer.mint(&observed).await?;
    if minted.any {
        // News of what was just made may cross the first look at it.
        for _ in 0..MAX_LOOKS {
            observed = observe(&writer.client, &writer.world, namespace).await?;
            if keys::wanted(&observed).is_empty() {
                break;
            }
        }
    }
    let planned = plan(&observed, &context.settings);
    remember(&observed, &planned, &mut memory.recent);
    let applied = writer
        .apply(&observed, &planned, &mut memory.writes)
        .await?;
    let fleets = fleets(&observed, &planned, &memory.recent);
    let found = findings::collect(&observed, &planned, &applied, &fleets);
    let unreported = writer.report(&observed, &found, &context.events).await?;

    if applied.failed || minted.failed || unreported {
        return Ok(Outcome::Failed);
    }
    let grace = fleets
        .values()
        .filter_map(|fleet| fleet.again_s)
        .min()
        .map(Duration::from_secs);
    let end = keys::until_next_end(&observed, status::now().0);
    let again = [applied.again, grace, end]
        .into_iter()
        .flatten()
        .min()
        .unwrap_or(RESYNC);
    let idle = found.is_empty() && planned.children.is_empty();
    Ok(Outcome::Done(if idle {
        None
    } else {
        Some(again.min(RESYNC))
    }))
}

/// Remembers which state of which object is in the configs that replicas may ack: the one that is published and the one
/// that is about to be.
fn remember(observed: &Observed, planned: &Plan, recent: &mut BTreeMap<String, Recent>) {
    recent.retain(|gateway, _| planned.gateways.contains_key(gateway));
    for (gateway, planned) in &planned.gateways {
        let recent = recent.entry(gateway.clone()).or_default();
        let live = observed.child(
            ChildKind::ConfigMap,
            &names::gateway_config_map(gateway, FORMAT),
        );
        if let Some(live) = live
            && live
                .annotation(names::DIGEST_ANNOTATION)
                .is_some_and(|digest| !recent.knows(digest))
            && let Ok(config) = config_map::unpack(live)
            && let Ok(digest) = config.digest()
        {
            recent.note(&digest, || hashes(&config));
        }
        recent.note(&planned.digest, || planned.objects.clone());
    }
}

fn hashes(config: &penstock_core::config::GatewayConfig) -> Hashes {
    config
        .objects
        .iter()
        .map(|(object, version)| (object.clone(), version.hash.clone()))
        .collect()
}

fn fleets(
    observed: &Observed,
    planned: &Plan,
    recent: &BTreeMap<String, Recent>,
) -> BTreeMap<String, Fleet> {
    let now_s = status::now().0.as_second();
    let none = Recent::default();
    planned
        .gateways
        .keys()
        .map(|gateway| {
            let owner = Owner::Gateway(gateway.clone());
            let acks =
                acks::read(observed.child(ChildKind::ConfigMap, &names::gateway_acks(gateway)));
            let recent = recent.get(gateway).unwrap_or(&none);
            (
                gateway.clone(),
                Fleet::new(observed.pods_of(&owner), &acks, recent, now_s),
            )
        })
        .collect()
}
