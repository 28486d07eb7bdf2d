//! (IO) `penstock crds`: the CustomResourceDefinitions, as this binary knows them.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::Context as _;

/// Prints all CustomResourceDefinitions, or writes one file each.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Args {
    /// Folder to write the files to. Default: print to standard output.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Prints or writes them.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    for definition in penstock_crds::definition::all().context("write the definitions as YAML")? {
        match &args.out {
            None => write!(std::io::stdout().lock(), "---\n{}", definition.text)?,
            Some(folder) => {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("create {}", folder.display()))?;
                let path = folder.join(&definition.file);
                std::fs::write(&path, &definition.text)
                    .with_context(|| format!("write {}", path.display()))?;
            }
        }
    }
    Ok(())
}
