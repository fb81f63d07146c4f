//! Names for links below /dev, in the words of udev (`packaging/udev`): the rules see a loop device and the file below it,
//! which has the pool's uuid and the volume's id; the names are the daemon's to tell.

use std::fmt::Write as _;

use anyhow::Result;
use clap::Args;

use super::output;
use crate::daemon;

/// Which device.
#[derive(Debug, Args)]
pub struct DeviceNameArguments {
    /// The kernel's name of it: loop7
    device: String,
}

/// Prints `PLYWOOD_LINK=POOL/VOLUME` for a device of ours, and nothing for another one.
///
/// # Errors
/// What the daemon answers.
pub fn print(arguments: &DeviceNameArguments) -> Result<()> {
    if let Some((pool, volume)) = daemon::name_of_device(&arguments.device)? {
        output::line(&format!("PLYWOOD_LINK={}/{}", file_name(&pool), file_name(&volume)))?;
    }
    Ok(())
}

/// A name as one component of a path, in udev's escapes: what udev does not let into a link's name is `\xHH`, so that
/// two names are never one.
fn file_name(name: &str) -> String {
    let mut escaped = String::new();
    for (index, character) in name.chars().enumerate() {
        let hidden = index == 0 && character == '.';
        if !hidden && (character.is_alphanumeric() || "#+-.:=@_".contains(character)) {
            escaped.push(character);
        } else {
            for byte in character.encode_utf8(&mut [0; 4]).bytes() {
                // Writing to a string does not fail.
                let _ = write!(escaped, "\\x{byte:02x}");
            }
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_one_component_and_differ() {
        assert_eq!(file_name("layer-3.x_y:z"), "layer-3.x_y:z");
        assert_eq!(file_name("größe"), "größe");
        assert_eq!(file_name("a b/c"), "a\\x20b\\x2fc");
        assert_eq!(file_name(".."), "\\x2e.");
        assert_eq!(file_name("a\\x20b"), "a\\x5cx20b");
    }
}
