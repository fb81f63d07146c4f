//! Where an image goes to: `oci:DIR[:TAG]` or `docker-archive:FILE[:NAME[:TAG]]`.

use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::distribution::Reference;

/// A place for an image, as it is typed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// An OCI image layout, to which the image is added.
    Oci {
        /// Its directory, which is made when it is not there.
        directory: PathBuf,
        /// The name in it.
        tag: String,
    },
    /// What `docker load` reads: a new file.
    DockerArchive {
        /// The file.
        file: PathBuf,
        /// The image's name and tag; when none is given its name in the pool.
        reference: Option<String>,
    },
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once(':').unwrap_or((text, ""));
        if rest.is_empty() || !matches!(scheme, "oci" | "docker-archive") {
            return Err(format!("{text:?}: give oci:DIR[:TAG] or docker-archive:FILE[:NAME[:TAG]]"));
        }
        // The first colon ends the path, as it does for skopeo.
        let (path, name) = match rest.split_once(':') {
            Some((path, name)) if !path.is_empty() && !name.is_empty() => (path, Some(name)),
            Some(_) => return Err(format!("{text:?}: a path or a name is missing beside the colon")),
            None => (rest, None),
        };
        if scheme == "oci" {
            return Ok(Self::Oci { directory: path.into(), tag: name.unwrap_or("latest").to_owned() });
        }
        let reference = name.map(|name| tagged(name).ok_or_else(|| format!("{name:?} is no name of an image")));
        Ok(Self::DockerArchive { file: path.into(), reference: reference.transpose()? })
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Oci { directory, tag } => write!(formatter, "oci:{}:{tag}", directory.display()),
            Self::DockerArchive { file, .. } => write!(formatter, "docker-archive:{}", file.display()),
        }
    }
}

/// A name with its tag; `latest` when it has none. None for what is no name of an image.
pub(super) fn tagged(name: &str) -> Option<String> {
    let reference: Reference = name.parse().ok()?;
    let last = name.rsplit('/').next().unwrap_or(name);
    match (reference.digest(), last.contains(':')) {
        (Some(_), _) => None,
        (None, true) => Some(name.to_owned()),
        (None, false) => Some(format!("{name}:latest")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notations_are_told_apart() {
        let parse = |text: &str| text.parse::<Target>();
        let oci = |directory: &str, tag: &str| Target::Oci { directory: directory.into(), tag: tag.into() };
        assert_eq!(parse("oci:d"), Ok(oci("d", "latest")));
        assert_eq!(parse("oci:/a/b:v1:2"), Ok(oci("/a/b", "v1:2")));
        let archive = |reference: Option<&str>| {
            Ok(Target::DockerArchive { file: "/x.tar".into(), reference: reference.map(str::to_owned) })
        };
        assert_eq!(parse("docker-archive:/x.tar"), archive(None));
        assert_eq!(parse("docker-archive:/x.tar:web"), archive(Some("web:latest")));
        assert_eq!(parse("docker-archive:/x.tar:host.example/a/web:1"), archive(Some("host.example/a/web:1")));
        for wrong in ["", "oci", "oci:", "oci::x", "oci:d:", "tar:x", "x", "docker-archive:/x.tar:Not A Name"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_get_a_tag() {
        assert_eq!(tagged("debian").as_deref(), Some("debian:latest"));
        assert_eq!(tagged("debian:12").as_deref(), Some("debian:12"));
        assert_eq!(tagged("localhost:5000/a").as_deref(), Some("localhost:5000/a:latest"));
        assert_eq!(tagged("UPPER CASE"), None);
        assert_eq!(tagged(&format!("a@sha256:{}", "0".repeat(64))), None);
    }
}
