//! Making a pool larger.

use super::{Pool, Storage};
use crate::error::{Error, Result};

impl<S: Storage> Pool<S> {
    /// later
    pub async fn enlarge(&self, _size_bytes: u64) -> Result<()> {
        Err(Error::InvalidInput("growing is not there yet".into()))
    }
}
