//! Sizes as people write and read them: IEC units, a bare number is bytes.

use bytesize::ByteSize;

/// Reads `10G`, `512 MiB` or `4096`. `G`, `GB` and `GiB` are all 2^30.
///
/// # Errors
/// With one line that says what a size looks like.
pub fn parse(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    config.parse_size(text).map_err(|error| format!("{error}; a size looks like 10G, 512MiB or 4096 (bytes)"))
}

/// `10.0 GiB`.
pub fn show(bytes: u64) -> String {
    ByteSize::b(bytes).display().iec().to_string()
}

/// `10.0 GiB (10737418240 bytes)`, for the size that was taken.
pub fn echo(bytes: u64) -> String {
    if bytes < 1024 { show(bytes) } else { format!("{} ({bytes} bytes)", show(bytes)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_binary_and_bare_numbers_bytes() {
        for (text, bytes) in
            [("4096", 4096), ("10G", 10 << 30), ("10GiB", 10 << 30), ("10GB", 10 << 30), ("1.5 k", 1536), ("0", 0)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "G", "-1", "10X", "1e400"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn taken_size_is_echoed_with_its_bytes() {
        assert_eq!(echo(10 << 30), "10.0 GiB (10737418240 bytes)");
        assert_eq!(echo(512), "512 B");
    }
}
