//! Names of volumes: what they may be made of.

use crate::error::Error;

/// Longest name of a volume in bytes.
pub const VOLUME_NAME_BYTES_MAX: usize = 255;

/// Whether a new volume may have this name. A name becomes a file name and a command-line argument, so it must be neither
/// a path, nor hidden, nor an option, nor invisible.
///
/// # Errors
/// [`Error::InvalidInput`] for one that is empty, longer than 255 bytes, has control characters or '/', begins with '-'
/// or '.', or has white space at an end.
pub fn check_name(name: &str) -> Result<(), Error> {
    let fault = if name.is_empty() {
        "it is empty".to_owned()
    } else if name.len() > VOLUME_NAME_BYTES_MAX {
        format!("it has {} bytes, at most {VOLUME_NAME_BYTES_MAX} are allowed", name.len())
    } else if name.contains('/') {
        "it contains '/'".to_owned()
    } else if name.chars().any(char::is_control) {
        "it contains a control character".to_owned()
    } else if name.starts_with(['-', '.']) {
        "it begins with '-' or '.'".to_owned()
    } else if name.trim() != name {
        "it begins or ends with white space".to_owned()
    } else {
        return Ok(());
    };
    // Debug quotes what a terminal would act on; a long name is shown by its head only.
    let shown: String = name.chars().take(64).collect();
    Err(Error::InvalidInput(format!("{shown:?} is not a name for a volume: {fault}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usual_names_are_accepted() {
        for name in ["a", "debian:12", "library_nginx@sha256", "Ünïcode", "with space", "x.y-z", &"n".repeat(255)] {
            check_name(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }

    #[test]
    fn names_that_would_mislead_are_refused() {
        let long = "n".repeat(256);
        let names = ["", long.as_str(), "a/b", "..", ".", "-x", ".x", " x", "x ", "x\n", "a\u{7f}", "a\0b", "\u{a0}x"];
        for name in names {
            assert!(matches!(check_name(name), Err(Error::InvalidInput(_))), "{name:?}");
        }
    }

    #[test]
    fn message_never_carries_control_characters() {
        let Err(Error::InvalidInput(message)) = check_name("a\x1b[31mb") else { panic!("accepted") };
        assert!(message.chars().all(|character| !character.is_control()));
    }
}
