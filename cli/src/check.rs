//! (IO) `penstock check`: what is wrong in a folder of objects, each line with file, path and how to mend it.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use penstock_core::ids::Id;
use penstock_core::names;
use penstock_crds::compile::KeyFacts;
use penstock_crds::manifest::{self, Manifests};
use penstock_crds::{Facts, compile};
use penstock_gateway::source::directory;

/// Exit code of a folder with problems; 1 is for a check that could not run.
const EXIT_PROBLEMS: u8 = 2;

/// Checks objects without a cluster. Exit code 0: nothing wrong, 2: problems, 1: the folder could not be read.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder of YAML files, or one file.
    #[arg(short = 'f', long = "file", value_name = "DIR")]
    folder: PathBuf,
}

/// A folder's objects with everything that is wrong about them, one line each.
pub(crate) struct Checked {
    /// What could be read.
    pub(crate) manifests: Manifests,
    /// What it compiles to.
    pub(crate) compiled: penstock_crds::Compiled,
    /// `file: Kind namespace/name: path: message`.
    pub(crate) problems: Vec<String>,
}

/// Reads and compiles a folder. References to Services are taken to resolve; those to Secrets and ConfigMaps must be in
/// the folder.
pub(crate) fn check(folder: &Path) -> Result<Checked, directory::DirectoryError> {
    check_with(folder, |_| ())
}

/// The same of a folder to which `complete` adds what a cluster's operator would make.
pub(crate) fn check_with(
    folder: &Path,
    complete: impl FnOnce(&mut Manifests),
) -> Result<Checked, directory::DirectoryError> {
    let (mut manifests, file_problems) = manifest::read(&directory::read(folder)?);
    complete(&mut manifests);
    let facts = Facts {
        services: None,
        secrets: Some(versions(&manifests.secrets)),
        config_maps: Some(versions(&manifests.config_maps)),
        keys: Some(keys(&manifests)),
    };
    let compiled = compile(&manifests.objects, &facts);
    let mut problems: Vec<String> = file_problems
        .into_iter()
        .map(|problem| {
            line(
                &problem.file,
                &problem.object,
                &problem.path,
                &problem.message,
            )
        })
        .collect();
    for problem in &compiled.problems {
        let file = manifests
            .origins
            .get(&problem.object)
            .map_or("?", String::as_str);
        problems.push(line(
            file,
            &problem.object.to_string(),
            &problem.path,
            &problem.message,
        ));
    }
    Ok(Checked {
        manifests,
        compiled,
        problems,
    })
}

/// What is known of VirtualKeys: nothing of those whose Secret is still to be made.
fn keys(manifests: &Manifests) -> BTreeMap<Id, KeyFacts> {
    let keys = manifests.objects.keys.iter();
    let facts = keys.filter_map(|(id, object)| {
        let secret = |name: &str| manifests.secrets.get(&Id::new(&id.namespace, name));
        let name = object.spec.secret(&id.name);
        let pepper = secret(&names::gateway_pepper(&object.spec.gateway));
        let pepper = pepper.and_then(|values| values.get(names::PEPPER_KEY));
        let pepper = pepper.map(Vec::as_slice).unwrap_or_default();
        let facts = KeyFacts::of(&object.spec, &name, secret(&name)?, pepper);
        Some((id.clone(), facts))
    });
    facts.collect()
}

/// Object → key → the version of its value.
fn versions(
    objects: &BTreeMap<Id, BTreeMap<String, Vec<u8>>>,
) -> BTreeMap<Id, BTreeMap<String, String>> {
    let versions = |keys: &BTreeMap<String, Vec<u8>>| {
        let keys = keys.iter();
        keys.map(|(key, value)| (key.clone(), version(value)))
            .collect()
    };
    let objects = objects.iter();
    objects
        .map(|(id, keys)| (id.clone(), versions(keys)))
        .collect()
}

/// First 16 hexadecimal digits of a credential's SHA-256.
pub(crate) fn version(value: &[u8]) -> String {
    penstock_core::config::sha256_hex(value)
        .chars()
        .take(16)
        .collect()
}

fn line(file: &str, object: &str, path: &str, message: &str) -> String {
    let place = if path.is_empty() {
        String::new()
    } else {
        format!("{path}: ")
    };
    format!("{file}: {object}: {place}{message}")
}

/// Prints problems and a summary.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let checked = check(&args.folder)?;
    let mut out = std::io::stdout().lock();
    for ignored in &checked.manifests.ignored {
        writeln!(out, "not checked, of another API: {ignored}")?;
    }
    for problem in &checked.problems {
        writeln!(out, "{problem}")?;
    }
    let objects = checked.manifests.origins.len();
    if objects == 0 && checked.problems.is_empty() {
        writeln!(
            out,
            "{}: no objects of penstock.dev in any *.yaml file",
            args.folder.display()
        )?;
    }
    writeln!(
        out,
        "check: objects={objects} problems={}",
        checked.problems.len()
    )?;
    let ok = checked.problems.is_empty() && objects > 0;
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(EXIT_PROBLEMS)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_text(text: &str) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a.yaml"), text).unwrap();
        let prefix = format!("{}/", folder.path().display());
        check(folder.path())
            .unwrap()
            .problems
            .iter()
            .map(|line| line.replace(&prefix, ""))
            .collect()
    }

    #[test]
    fn problem_line_has_file_object_path_and_mend() {
        let policy = "apiVersion: penstock.dev/v1alpha1\nkind: RoutingPolicy\nmetadata: {name: p}\n\
                      spec: {rules: [{name: r, match: {models: [chat]}, backends: [{name: chat}]}]}\n";
        assert_eq!(
            check_text(policy),
            [
                "a.yaml: RoutingPolicy/default/p: spec.rules[0].backends[0].name: \
                 LLMBackend default/chat does not exist: create it or correct the name"
            ]
        );
    }

    #[test]
    fn secret_in_the_folder_resolves_a_credential() {
        let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: keys}\nstringData: {token: abc}\n---\n\
                    apiVersion: penstock.dev/v1alpha1\nkind: LLMBackend\nmetadata: {name: b}\n\
                    spec: {external: {url: 'https://a/v1', credential: {secret: keys, key: token}}}\n";
        assert_eq!(check_text(text), [] as [&str; 0]);
    }
}
