//! (IO) `penstock key`: keys of callers, as VirtualKey objects of a cluster, or in a gateway's store ([`stored`]).

mod stored;

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use penstock_core::names::{SECRET_KEY, SECRET_REVISION};
use penstock_crds::key::RotationSpec;
use penstock_crds::{VirtualKey, VirtualKeySpec};
use serde_json::json;

use crate::table::aligned;

/// An operator makes a key within a second; one that takes longer does not run, or may not.
const MADE_WITHIN: Duration = Duration::from_secs(30);
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Makes, changes and takes back keys of a gateway's callers: VirtualKeys of the cluster that the kubeconfig names, or
/// with `--admin` keys that the gateway there has in its store.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Namespace of the keys; default: the kubeconfig's.
    #[arg(short, long, global = true)]
    namespace: Option<String>,
    /// Keys in a gateway's store: its admin address, of `penstock up` or of a port-forward to a gateway's port 9090.
    #[arg(long, global = true, value_name = "URL", conflicts_with = "namespace")]
    admin: Option<String>,
    /// File with the gateway's admin token, for --admin; else it is in PENSTOCK_ADMIN_TOKEN.
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum Command {
    /// Make a key and print it.
    Create(Box<Create>),
    /// Make the next key and print it; the one before it is good for some time.
    Rotate(Rotate),
    /// Take a key back.
    Revoke(Revoke),
    /// List the keys, without their texts.
    List,
}

#[derive(Clone, Debug, clap::Args)]
struct Create {
    /// Name of the VirtualKey.
    name: String,
    /// Whose it is.
    #[arg(long)]
    team: String,
    /// Whose it is within the team.
    #[arg(long)]
    user: Option<String>,
    /// What else rules may ask for, NAME=VALUE; may be given several times.
    #[arg(long = "attribute", value_name = "NAME=VALUE", value_parser = attribute)]
    attributes: Vec<(String, String)>,
    /// A model that it may ask for; may be given several times. Default: any.
    #[arg(long = "model", value_name = "MODEL")]
    models: Vec<String>,
    /// A RoutingPolicy whose rules it may use; may be given several times. Default: all of its gateway.
    #[arg(long = "policy", value_name = "POLICY")]
    policies: Vec<String>,
    /// The gateway that knows it; with --admin it is the one there.
    #[arg(long, default_value = "default")]
    gateway: String,
    /// When it ends, such as 2027-01-01T00:00:00Z. Default: never.
    #[arg(long, value_name = "TIME")]
    expires_at: Option<String>,
}

#[derive(Clone, Debug, clap::Args)]
struct Rotate {
    /// Name of the VirtualKey.
    name: String,
    /// How long the key before it may still be used.
    #[arg(long, default_value = "24h")]
    overlap: String,
}

#[derive(Clone, Debug, clap::Args)]
struct Revoke {
    /// Name of the VirtualKey.
    name: String,
    /// Keep it: the key is refused until `suspended` is taken out of it.
    #[arg(long)]
    suspend: bool,
}

fn attribute(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() && !value.is_empty() => {
            Ok((name.to_owned(), value.to_owned()))
        }
        _ => Err(format!("'{text}' is not of the form NAME=VALUE")),
    }
}

/// Does it.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(admin) = &args.admin {
        let desk = stored::Desk::open(admin, args.token_file.as_deref())?;
        return desk.run(args.command).await;
    }
    let client = Client::try_default()
        .await
        .context("find a cluster: is there a kubeconfig?")?;
    let namespace = args
        .namespace
        .unwrap_or_else(|| client.default_namespace().to_owned());
    let keys = Keys {
        objects: Api::namespaced(client.clone(), &namespace),
        secrets: Api::namespaced(client, &namespace),
    };
    match args.command {
        Command::Create(create) => keys.create(*create).await,
        Command::Rotate(rotate) => keys.rotate(rotate).await,
        Command::Revoke(revoke) => keys.revoke(revoke).await,
        Command::List => keys.list().await,
    }
}

struct Keys {
    objects: Api<VirtualKey>,
    secrets: Api<Secret>,
}

impl Keys {
    async fn create(&self, create: Create) -> anyhow::Result<()> {
        let spec = VirtualKeySpec {
            gateway: create.gateway,
            team: create.team,
            user: create.user,
            attributes: create.attributes.into_iter().collect(),
            models: create.models,
            policies: create.policies,
            secret_name: None,
            expires_at: create.expires_at,
            suspended: false,
            rotation: None,
        };
        let object = VirtualKey::new(&create.name, spec);
        let object = self
            .objects
            .create(&PostParams::default(), &object)
            .await
            .with_context(|| format!("create VirtualKey {}", create.name))?;
        self.print_key(&object, 1).await
    }

    async fn rotate(&self, rotate: Rotate) -> anyhow::Result<()> {
        let before = self.get(&rotate.name).await?;
        let rotation = RotationSpec {
            revision: before.spec.revision() + 1,
            overlap: rotate.overlap.as_str().into(),
        };
        let revision = rotation.revision;
        // Refused if somebody else rotates it meanwhile.
        let version = before.resource_version();
        let patch = json!({
            "metadata": { "resourceVersion": version },
            "spec": { "rotation": rotation },
        });
        let patched = self.patch(&rotate.name, &patch).await?;
        self.print_key(&patched, revision).await
    }

    async fn revoke(&self, revoke: Revoke) -> anyhow::Result<()> {
        if revoke.suspend {
            let patch = json!({ "spec": { "suspended": true } });
            self.patch(&revoke.name, &patch).await?;
            return Ok(());
        }
        self.objects
            .delete(&revoke.name, &DeleteParams::default())
            .await
            .with_context(|| format!("delete VirtualKey {}", revoke.name))?;
        Ok(())
    }

    async fn list(&self) -> anyhow::Result<()> {
        let all = self.objects.list(&ListParams::default()).await;
        let all = all.context("list VirtualKeys")?;
        let mut rows = vec![HEAD.map(str::to_owned).to_vec()];
        rows.extend(all.items.iter().map(row));
        let mut out = std::io::stdout().lock();
        for line in aligned(&rows, None) {
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    async fn get(&self, name: &str) -> anyhow::Result<VirtualKey> {
        let object = self.objects.get(name).await;
        object.with_context(|| format!("read VirtualKey {name}"))
    }

    async fn patch(&self, name: &str, patch: &serde_json::Value) -> anyhow::Result<VirtualKey> {
        let patched = self
            .objects
            .patch(name, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.with_context(|| format!("change VirtualKey {name}"))
    }

    /// Waits until the operator has made the key of this revision, and prints it.
    async fn print_key(&self, object: &VirtualKey, revision: i32) -> anyhow::Result<()> {
        let name = object.name_any();
        let secret = object.spec.secret(&name);
        let made = async {
            loop {
                if let Some(key) = self.key(&secret, revision).await? {
                    return anyhow::Ok(key);
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        let Ok(key) = tokio::time::timeout(MADE_WITHIN, made).await else {
            bail!(
                "no key was made within {} s: is the operator running, and does it look after this namespace? See \
                 kubectl describe virtualkey {name}",
                MADE_WITHIN.as_secs()
            );
        };
        writeln!(std::io::stdout(), "{}", key?)?;
        Ok(())
    }

    async fn key(&self, secret: &str, revision: i32) -> anyhow::Result<Option<String>> {
        let found = self.secrets.get_opt(secret).await;
        let found = found.with_context(|| format!("read Secret {secret}"))?;
        let data = found.and_then(|secret| secret.data).unwrap_or_default();
        let text = |key: &str| {
            let value = data.get(key)?.0.clone();
            String::from_utf8(value).ok()
        };
        let made: Option<i32> = text(SECRET_REVISION).and_then(|text| text.parse().ok());
        // A Secret without a number was there before.
        let is_it = made.is_none_or(|made| made >= revision);
        Ok(text(SECRET_KEY).filter(|_| is_it))
    }
}

const HEAD: [&str; 7] = [
    "NAME", "TEAM", "USER", "MODELS", "EXPIRES", "READY", "REASON",
];

fn row(object: &VirtualKey) -> Vec<String> {
    let spec = &object.spec;
    let status = object.status.as_ref();
    let mut conditions = status.into_iter().flat_map(|status| &status.conditions);
    let ready = conditions.find(|condition| condition.type_ == "Ready");
    let or = |text: Option<&String>, other: &str| text.cloned().unwrap_or_else(|| other.to_owned());
    vec![
        object.name_any(),
        spec.team.clone(),
        or(spec.user.as_ref(), "-"),
        if spec.models.is_empty() {
            "*".to_owned()
        } else {
            spec.models.join(",")
        },
        or(spec.expires_at.as_ref(), "never"),
        or(ready.map(|ready| &ready.status), "Unknown"),
        or(ready.map(|ready| &ready.reason), "-"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_key_and_shows_no_text_of_one() {
        let object: VirtualKey = serde_json::from_value(json!({
            "apiVersion": "penstock.dev/v1alpha1", "kind": "VirtualKey", "metadata": {"name": "alice"},
            "spec": {"team": "search", "models": ["chat", "gpt-*"]},
        }))
        .unwrap();
        let lines = aligned(&[HEAD.map(str::to_owned).to_vec(), row(&object)], None);
        assert_eq!(
            lines,
            [
                "NAME   TEAM    USER  MODELS      EXPIRES  READY    REASON",
                "alice  search  -     chat,gpt-*  never    Unknown  -",
            ]
        );
    }

    #[test]
    fn attributes_have_a_name_and_a_value() {
        assert_eq!(
            attribute("tier=gold=1"),
            Ok(("tier".to_owned(), "gold=1".to_owned()))
        );
        for wrong in ["tier", "=gold", "tier="] {
            assert!(attribute(wrong).is_err(), "{wrong}");
        }
    }
}
