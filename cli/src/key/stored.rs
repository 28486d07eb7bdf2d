//! (IO) Keys in a gateway's store, by its admin port.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::Full;
use serde_json::{Map, Value, json};

use super::{Command, Create};
use crate::admin;
use crate::table::aligned;

/// A thousand keys with all their fields stay below it.
const MAX_ANSWER_BYTES: usize = 8 << 20;
/// Keys that are asked for at one time.
const PAGE: usize = 1_000;
const TOKEN: &str = "PENSTOCK_ADMIN_TOKEN";

/// Where keys are managed.
pub(super) struct Desk<'a> {
    admin: &'a str,
    token: String,
}

impl<'a> Desk<'a> {
    pub(super) fn open(admin: &'a str, token: Option<&Path>) -> anyhow::Result<Self> {
        let token = match token {
            Some(path) => {
                std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?
            }
            None => std::env::var(TOKEN)
                .with_context(|| format!("--admin needs --token-file, or a token in {TOKEN}"))?,
        };
        let token = token.trim().to_owned();
        ensure!(!token.is_empty(), "the admin token is empty");
        Ok(Self { admin, token })
    }

    pub(super) async fn run(&self, command: Command) -> anyhow::Result<()> {
        let mut out = std::io::stdout();
        match command {
            Command::Create(create) => {
                let made = self.ask(Method::POST, "/keys", Some(body(*create))).await?;
                writeln!(out, "{}", text(&made))?;
            }
            Command::Rotate(rotate) => {
                let path = format!("/keys/{}/rotate", rotate.name);
                let body = json!({ "overlap": rotate.overlap });
                let made = self.ask(Method::POST, &path, Some(body)).await?;
                writeln!(out, "{}", text(&made))?;
            }
            Command::Revoke(revoke) => {
                let path = format!("/keys/{}", revoke.name);
                if revoke.suspend {
                    let patch = json!({ "suspended": true });
                    self.ask(Method::PATCH, &path, Some(patch)).await?;
                } else {
                    self.ask(Method::DELETE, &path, None).await?;
                }
            }
            Command::List => {
                for line in aligned(&self.rows().await?, None) {
                    writeln!(out, "{line}")?;
                }
            }
        }
        Ok(())
    }

    async fn rows(&self) -> anyhow::Result<Vec<Vec<String>>> {
        let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
        let mut after = String::new();
        loop {
            let path = format!("/keys?limit={PAGE}{after}");
            let page = self.ask(Method::GET, &path, None).await?;
            let keys = page["data"].as_array().map_or(&[][..], Vec::as_slice);
            rows.extend(keys.iter().map(row));
            match keys.last() {
                Some(last) if page["hasMore"] == true => {
                    after = format!("&after={}", of(last, "name"));
                }
                _ => return Ok(rows),
            }
        }
    }

    async fn ask(&self, method: Method, path: &str, body: Option<Value>) -> anyhow::Result<Value> {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(admin::address(self.admin, path)?)
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token))
            .body(Full::new(Bytes::from(body)))?;
        let (status, answer) = admin::ask(self.admin, request, MAX_ANSWER_BYTES).await?;
        if !status.is_success() {
            bail!("{}", String::from_utf8_lossy(&answer).trim());
        }
        if answer.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&answer).context("read the gateway's answer")
    }
}

fn body(create: Create) -> Value {
    let attributes: Map<String, Value> = create
        .attributes
        .into_iter()
        .map(|(name, value)| (name, value.into()))
        .collect();
    let mut body = json!({
        "name": create.name, "team": create.team, "attributes": attributes,
        "models": create.models, "policies": create.policies,
    });
    for (name, value) in [("user", create.user), ("expiresAt", create.expires_at)] {
        if let Some(value) = value {
            body[name] = value.into();
        }
    }
    body
}

fn text(made: &Value) -> &str {
    made["key"].as_str().unwrap_or_default()
}

const HEAD: [&str; 7] = [
    "NAME",
    "TEAM",
    "USER",
    "MODELS",
    "EXPIRES",
    "SUSPENDED",
    "CREATED",
];

fn of<'a>(key: &'a Value, field: &str) -> &'a str {
    key[field].as_str().unwrap_or_default()
}

fn row(key: &Value) -> Vec<String> {
    let or = |field: &str, other: &str| key[field].as_str().unwrap_or(other).to_owned();
    let models = key["models"].as_array();
    let models: Vec<&str> = models
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    vec![
        or("name", ""),
        or("team", ""),
        or("user", "-"),
        if models.is_empty() {
            "*".to_owned()
        } else {
            models.join(",")
        },
        or("expiresAt", "never"),
        if key["suspended"] == true {
            "yes"
        } else {
            "no"
        }
        .to_owned(),
        or("createdAt", ""),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_key() {
        let alice = json!({
            "name": "alice", "team": "search", "models": ["chat", "gpt-*"], "revision": 1,
            "createdAt": "2026-11-23T08:00:00Z", "suspended": true,
        });
        let lines = aligned(&[HEAD.map(str::to_owned).to_vec(), row(&alice)], None);
        assert_eq!(
            lines,
            [
                "NAME   TEAM    USER  MODELS      EXPIRES  SUSPENDED  CREATED",
                "alice  search  -     chat,gpt-*  never    yes        2026-11-23T08:00:00Z",
            ]
        );
    }
}
