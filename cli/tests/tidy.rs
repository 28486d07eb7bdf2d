//! Rules of the source tree that no compiler checks. Each failure says which file and what to do.
#![cfg(test)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file with more lines than this, tests aside, is two ideas in one room.
const MAX_LINES: usize = 600;
const MAX_COLUMNS: usize = 120;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// All files below the root, without what git ignores.
fn files(extension: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, extension: &str, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if !["target", ".git", "__pycache__", ".venv", "node_modules"]
                    .contains(&name.as_str())
                {
                    walk(&path, extension, found);
                }
            } else if path.extension().is_some_and(|e| e == extension) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), extension, &mut found);
    found.sort();
    found
}

fn report(problems: &[String]) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

#[test]
fn every_source_file_says_what_it_is() {
    let problems: Vec<_> = files("rs")
        .iter()
        .filter(|path| !name(path).contains("/tests/") && !name(path).ends_with("/tests.rs"))
        .filter(|path| !std::fs::read_to_string(path).unwrap().starts_with("//!"))
        .map(|path| {
            format!(
                "{}: begin it with //! and what it is, what flows in and out",
                name(path)
            )
        })
        .collect();
    report(&problems);
}

#[test]
fn source_files_are_short() {
    let mut problems = Vec::new();
    for path in files("rs") {
        let text = std::fs::read_to_string(&path).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        let lines = code.lines().count();
        if lines > MAX_LINES {
            problems.push(format!(
                "{}: {lines} lines without tests: split it",
                name(&path)
            ));
        }
        for (number, line) in text.lines().enumerate() {
            let comment = line.trim_start().starts_with("//") && !line.contains("://");
            if comment && line.chars().count() > MAX_COLUMNS {
                problems.push(format!(
                    "{}:{}: longer than {MAX_COLUMNS} columns",
                    name(&path),
                    number + 1
                ));
            }
        }
    }
    report(&problems);
}

#[test]
fn nothing_is_left_for_later() {
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("unimplemented", "!"),
        concat!("#[ig", "nore"),
    ];
    let mut problems = Vec::new();
    for extension in ["rs", "py", "yaml", "md", "toml"] {
        for path in files(extension) {
            let text = std::fs::read_to_string(&path).unwrap();
            for (number, line) in text.lines().enumerate() {
                if let Some(word) = words.iter().find(|word| line.contains(*word)) {
                    problems.push(format!("{}:{}: {word}", name(&path), number + 1));
                }
            }
        }
    }
    report(&problems);
}

/// Which crates a crate may use; ARCHITECTURE.md draws the same arrows.
#[test]
fn crates_depend_only_along_the_arrows() {
    let arrows: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("core", &[][..]),
        ("crds", &["core"]),
        ("shell", &[]),
        ("operator", &["core", "crds", "shell"]),
        ("gateway", &["core", "crds", "shell"]),
        ("scaler", &["core", "shell"]),
        ("engine", &["core", "shell"]),
        (
            "cli",
            &[
                "core", "crds", "shell", "operator", "gateway", "scaler", "engine",
            ],
        ),
    ]);
    let mut problems = Vec::new();
    for (name, allowed) in &arrows {
        let manifest = std::fs::read_to_string(root().join(name).join("Cargo.toml")).unwrap();
        for line in manifest.lines() {
            let Some(used) = line.strip_prefix("penstock-") else {
                continue;
            };
            let used = used.split([' ', '=', '.']).next().unwrap();
            if !allowed.contains(&used) {
                problems.push(format!(
                    "{name}/Cargo.toml: {name} may not depend on {used}"
                ));
            }
        }
    }
    report(&problems);
}

/// The YAML library stays behind one file (docs/decisions/0002).
#[test]
fn yaml_library_is_used_in_one_file() {
    let problems: Vec<_> = files("rs")
        .iter()
        .filter(|path| !["crds/src/yaml.rs", "cli/tests/tidy.rs"].contains(&name(path).as_str()))
        .filter(|path| {
            std::fs::read_to_string(path)
                .unwrap()
                .contains("serde_yaml")
        })
        .map(|path| format!("{}: use penstock_crds::yaml", name(path)))
        .collect();
    report(&problems);
}

/// Every YAML block with our kinds in README and docs, and every example, passes `penstock check`.
#[test]
fn examples_in_the_documentation_are_valid() {
    let penstock = env!("CARGO_BIN_EXE_penstock");
    let mut problems = Vec::new();
    for path in files("md") {
        let text = std::fs::read_to_string(&path).unwrap();
        for (number, block) in text.split("```yaml\n").skip(1).enumerate() {
            let block = block.split("```").next().unwrap();
            if !block.contains("penstock.dev/v1alpha1") {
                continue;
            }
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("block.yaml"), block).unwrap();
            if let Err(said) = check(penstock, folder.path()) {
                problems.push(format!("{} block {}:\n{said}", name(&path), number + 1));
            }
        }
    }
    for entry in std::fs::read_dir(root().join("examples")).unwrap() {
        let folder = entry.unwrap().path();
        if let Err(said) = check(penstock, &folder) {
            problems.push(format!("{}:\n{said}", name(&folder)));
        }
    }
    report(&problems);
}

fn check(penstock: &str, folder: &Path) -> Result<(), String> {
    let output = std::process::Command::new(penstock)
        .arg("check")
        .arg("-f")
        .arg(folder)
        .output()
        .unwrap();
    if output.status.success() {
        Ok(())
    } else {
        Err(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}
