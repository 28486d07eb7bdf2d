//! (IO) The scaler's own admin paths: `GET /decisions` says for each target how many replicas and why; `GET /state` is
//! what another replica copies when it starts.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use penstock_core::ids::Id;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot, watch};

use crate::decide::Decision;
use crate::fleet::Saved;
use crate::service::Board;

/// A request for the fleet's state.
pub type SaveRequest = oneshot::Sender<Vec<Saved>>;

#[derive(Clone)]
struct Admin {
    board: watch::Receiver<Arc<Board>>,
    save: mpsc::Sender<SaveRequest>,
}

/// One entry of `GET /decisions`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    scaled_object: &'a Id,
    metadata: &'a BTreeMap<String, String>,
    decision: Option<&'a Decision>,
}

/// The paths.
pub fn router(board: watch::Receiver<Arc<Board>>, save: mpsc::Sender<SaveRequest>) -> Router {
    Router::new()
        .route("/decisions", get(decisions))
        .route("/state", get(state))
        .with_state(Admin { board, save })
}

async fn decisions(State(admin): State<Admin>) -> Response {
    let board = Arc::clone(&admin.board.borrow());
    let entry = |(key, decision): (&Arc<_>, &Option<Decision>)| -> Result<serde_json::Value, serde_json::Error> {
        let key: &crate::fleet::TargetKey = key;
        serde_json::to_value(Entry { scaled_object: &key.object, metadata: &key.metadata, decision: decision.as_ref() })
    };
    match board
        .iter()
        .map(|(key, decision)| entry((key, decision)))
        .collect::<Result<Vec<_>, _>>()
    {
        Ok(entries) => Json(entries).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn state(State(admin): State<Admin>) -> Response {
    let (sender, receiver) = oneshot::channel();
    if admin.save.send(sender).await.is_err() {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    match receiver.await {
        Ok(saved) => Json(saved).into_response(),
        Err(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}
