//! Names on the command line: any bytes are accepted there, and refused in words when they cannot be a name.

use std::ffi::OsString;

use anyhow::{Result, bail};

/// The name of a volume or snapshot as it was typed.
#[derive(Clone, Debug)]
pub struct Name(OsString);

impl From<OsString> for Name {
    fn from(typed: OsString) -> Self {
        Self(typed)
    }
}

impl Name {
    /// The name as text. Everything else about names is checked where the command is executed.
    ///
    /// # Errors
    /// When it is not UTF-8.
    pub fn text(&self) -> Result<String> {
        match self.0.to_str() {
            Some(text) => Ok(text.to_owned()),
            None => bail!("name {:?} has bytes that are not UTF-8; choose another", self.0),
        }
    }
}
