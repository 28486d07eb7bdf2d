//! (IO) Objects from a folder of YAML files, for a life without a cluster.

use std::path::{Path, PathBuf};

use penstock_crds::manifest::File;

/// Files read at most: a folder with more is not a folder of objects.
pub const MAX_FILES: usize = 1_000;
/// Size of one file at most; the API server takes about as much for one object.
pub const MAX_FILE_BYTES: u64 = 2 * 1024 * 1024;

/// A folder that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The folder itself.
    #[error("read folder {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        err: std::io::Error,
    },
    /// One of its files.
    #[error("read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        err: std::io::Error,
    },
    /// More than [`MAX_FILES`].
    #[error("{} holds more than {MAX_FILES} YAML files: name a folder with Penstock's objects only", .0.display())]
    TooManyFiles(PathBuf),
    /// Larger than [`MAX_FILE_BYTES`].
    #[error("{} is larger than {MAX_FILE_BYTES} bytes: split it", .0.display())]
    TooLarge(PathBuf),
}

/// All `*.yaml` and `*.yml` files directly in `folder`, by name; or `folder` itself if it is a file.
pub fn read(folder: &Path) -> Result<Vec<File>, DirectoryError> {
    let folder_error = |err| DirectoryError::Folder {
        path: folder.to_owned(),
        err,
    };
    let mut paths = Vec::new();
    if std::fs::metadata(folder).map_err(folder_error)?.is_file() {
        paths.push(folder.to_owned());
    } else {
        for entry in std::fs::read_dir(folder).map_err(folder_error)? {
            let path = entry.map_err(folder_error)?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "yaml" || extension == "yml")
            {
                paths.push(path);
            }
            if paths.len() > MAX_FILES {
                return Err(DirectoryError::TooManyFiles(folder.to_owned()));
            }
        }
    }
    paths.sort();
    paths.into_iter().map(read_file).collect()
}

fn read_file(path: PathBuf) -> Result<File, DirectoryError> {
    let size = std::fs::metadata(&path)
        .map_err(|err| DirectoryError::File {
            path: path.clone(),
            err,
        })?
        .len();
    if size > MAX_FILE_BYTES {
        return Err(DirectoryError::TooLarge(path));
    }
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(File {
            path: path.display().to_string(),
            text,
        }),
        Err(err) => Err(DirectoryError::File { path, err }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_files_are_read_in_order_and_others_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("b.yaml", "b"), ("a.yml", "a"), ("c.txt", "c")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let texts: Vec<_> = read(folder.path())
            .unwrap()
            .into_iter()
            .map(|file| file.text)
            .collect();
        assert_eq!(texts, ["a", "b"]);
    }

    #[test]
    fn missing_folder_is_named() {
        let error = read(Path::new("/does/not/exist")).unwrap_err();
        assert_eq!(error.to_string(), "read folder /does/not/exist");
    }

    #[test]
    fn too_large_file_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("big.yaml");
        std::fs::File::create(&path)
            .unwrap()
            .set_len(MAX_FILE_BYTES + 1)
            .unwrap();
        assert!(matches!(read(&path), Err(DirectoryError::TooLarge(_))));
    }

    #[test]
    fn too_many_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..=MAX_FILES {
            std::fs::write(folder.path().join(format!("{number}.yaml")), "").unwrap();
        }
        assert!(matches!(
            read(folder.path()),
            Err(DirectoryError::TooManyFiles(_))
        ));
    }
}
