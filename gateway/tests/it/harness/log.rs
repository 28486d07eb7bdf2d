//! The decision log, as a collector of logs sees it.

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Mutex, MutexGuard, OnceLock};

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Decisions by request id, of all tests of the process.
static TOLD: OnceLock<Mutex<HashMap<String, Vec<Value>>>> = OnceLock::new();

fn told() -> MutexGuard<'static, HashMap<String, Vec<Value>>> {
    TOLD.get_or_init(Mutex::default).lock().unwrap()
}

struct Decisions;

#[derive(Default)]
struct Fields {
    id: String,
    decision: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        match field.name() {
            "request.id" => value.clone_into(&mut self.id),
            "decision" => value.clone_into(&mut self.decision),
            _ => {}
        }
    }

    fn record_debug(&mut self, _field: &Field, _value: &dyn Debug) {}
}

impl Subscriber for Decisions {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "decision"
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let decision = serde_json::from_str(&fields.decision).unwrap();
        told().entry(fields.id).or_default().push(decision);
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// From now on decisions are kept. Other logs stay off.
pub(crate) fn keep_decisions() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| tracing::subscriber::set_global_default(Decisions).unwrap());
}

/// What was told of the request with this id, once it is.
pub(crate) async fn decision(id: &str) -> Value {
    super::until("the decision is told", || told().contains_key(id)).await;
    let mut all = told().remove(id).unwrap();
    assert_eq!(all.len(), 1, "one line a request");
    all.remove(0)
}

/// Whether something was told of it.
pub(crate) fn is_told(id: &str) -> bool {
    told().contains_key(id)
}
