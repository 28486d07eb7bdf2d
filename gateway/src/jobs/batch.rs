//! A batch as the store has it and as the API shows it. Pure.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::call::Headers;
use super::lines::LineError;
use super::share::Queued;
use super::stored::{Owner, Record};

/// The only window that OpenAI knows.
pub(super) const WINDOW: Duration = Duration::from_hours(24);

/// Where a batch stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Status {
    Validating,
    Failed,
    InProgress,
    Completed,
    Expired,
    Cancelling,
    Cancelled,
}

impl Status {
    pub(super) fn is_over(self) -> bool {
        matches!(
            self,
            Self::Failed | Self::Completed | Self::Expired | Self::Cancelled
        )
    }
}

/// When a batch came to each status, in Unix seconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Times {
    pub(super) in_progress: Option<u64>,
    pub(super) completed: Option<u64>,
    pub(super) failed: Option<u64>,
    pub(super) expired: Option<u64>,
    pub(super) cancelling: Option<u64>,
    pub(super) cancelled: Option<u64>,
}

/// How far a batch is: what counts is that all lines before a place in the file are done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Progress {
    /// Lines before that place; blank ones count.
    pub(super) lines: u64,
    /// The place, in bytes.
    pub(super) offset: u64,
    pub(super) completed: u64,
    pub(super) failed: u64,
    pub(super) output_bytes: u64,
    pub(super) error_bytes: u64,
}

/// What is known of a batch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Batch {
    pub(super) id: String,
    pub(super) owner: Owner,
    pub(super) class: String,
    pub(super) endpoint: String,
    pub(super) input: String,
    /// Files that are shown once the batch is over, if there is something in them.
    pub(super) output: String,
    pub(super) error: String,
    pub(super) files_kept_s: u64,
    pub(super) created_at: u64,
    pub(super) status: Status,
    pub(super) times: Times,
    pub(super) errors: Vec<LineError>,
    pub(super) total: u64,
    pub(super) progress: Progress,
    pub(super) metadata: Option<Value>,
    pub(super) headers: Headers,
}

impl Record for Batch {
    const PART: &'static str = "batch";
    const WHAT: &'static str = "batch";
    const KEPT: Duration = super::files::MAX_KEPT;

    fn id(&self) -> &str {
        &self.id
    }

    fn owner(&self) -> &Owner {
        &self.owner
    }
}

impl Batch {
    /// Its place in the queue.
    pub(super) fn queued(&self) -> Queued {
        Queued::new(&self.owner, &self.class, &self.id, self.created_at)
    }

    pub(super) fn expires_at(&self) -> u64 {
        self.created_at + WINDOW.as_secs()
    }

    /// As the API shows it.
    pub(super) fn shown(&self) -> Value {
        let file =
            |id: &str, bytes: u64| (self.status.is_over() && bytes > 0).then(|| id.to_owned());
        let errors = json!({"object": "list", "data": self.errors});
        let times = &self.times;
        json!({
            "id": self.id, "object": "batch", "endpoint": self.endpoint, "status": self.status,
            "completion_window": "24h", "input_file_id": self.input, "metadata": self.metadata,
            "errors": (!self.errors.is_empty()).then_some(errors),
            "output_file_id": file(&self.output, self.progress.output_bytes),
            "error_file_id": file(&self.error, self.progress.error_bytes),
            "created_at": self.created_at, "expires_at": self.expires_at(),
            "in_progress_at": times.in_progress, "finalizing_at": times.completed, "completed_at": times.completed,
            "failed_at": times.failed, "expired_at": times.expired, "cancelling_at": times.cancelling,
            "cancelled_at": times.cancelled,
            "request_counts": {
                "total": self.total, "completed": self.progress.completed, "failed": self.progress.failed,
            },
        })
    }
}
