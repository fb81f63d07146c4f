//! A file that is made: it has its name when all of it is durable.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tempfile::NamedTempFile;

/// A new file under way. It is gone when this is dropped before it was finished.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    draft: NamedTempFile,
}

impl NewFile {
    /// Begins a file that is to be at `path`.
    ///
    /// # Errors
    /// When something is there, or nothing can be made there.
    pub fn begin(path: &Path) -> Result<Self> {
        ensure!(!path.exists(), "{} exists already; choose another file", path.display());
        let draft = NamedTempFile::new_in(directory_of(path)).with_context(|| path.display().to_string())?;
        Ok(Self { path: path.to_owned(), draft })
    }

    /// The file, to be written.
    pub fn file(&self) -> &File {
        self.draft.as_file()
    }

    /// Where it is until it is finished.
    pub fn draft(&self) -> &Path {
        self.draft.path()
    }

    /// Gives it its name, durably.
    ///
    /// # Errors
    /// When it cannot be written out, or something has come to be there.
    pub fn finish(self) -> Result<File> {
        let Self { path, draft } = self;
        let finish = || {
            draft.as_file().sync_all()?;
            let file = draft.persist_noclobber(&path).map_err(|error| error.error)?;
            File::open(directory_of(&path))?.sync_all()?;
            Ok::<_, std::io::Error>(file)
        };
        finish().with_context(|| path.display().to_string())
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn file_is_there_whole_or_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let dropped = NewFile::begin(&path).unwrap();
        dropped.file().write_all(b"half").unwrap();
        drop(dropped);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
        let (first, second) = (NewFile::begin(&path).unwrap(), NewFile::begin(&path).unwrap());
        first.file().write_all(b"first").unwrap();
        first.finish().unwrap();
        second.finish().unwrap_err();
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert!(NewFile::begin(&path).unwrap_err().to_string().contains("exists already"));
    }
}
