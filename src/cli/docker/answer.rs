//! The protocol: what is asked by which path, and the JSON that answers it.
//!
//! Docker and Podman differ in what they send: a body may be missing where it says nothing, and a member may be missing or
//! null. Errors are status 500 with `{"Err": ...}`: Docker reads the text, Podman the status.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::volumes::Volumes;

/// Longest body of a request.
pub const BODY_BYTES: usize = 64 << 10;
/// Longest name or id in a request.
const WORD_BYTES: usize = 255;

/// What is sent back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status.
    pub status: u16,
    /// The body.
    pub body: Value,
}

impl Answer {
    /// An answer that tells what went wrong.
    pub fn error(status: u16, text: &str) -> Self {
        Self { status, body: json!({ "Err": text }) }
    }
}

/// All that any request may have.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Request {
    name: Option<String>,
    #[serde(rename = "ID")]
    id: Option<String>,
    opts: Option<BTreeMap<String, Value>>,
}

impl Request {
    fn read(body: &[u8]) -> Result<Self> {
        if body.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let request: Option<Self> = serde_json::from_slice(body).context("the request is not understood")?;
        Ok(request.unwrap_or_default())
    }

    fn name(&self) -> Result<&str> {
        word(self.name.as_deref(), "Name")
    }

    fn id(&self) -> Result<&str> {
        word(self.id.as_deref(), "ID")
    }

    /// The options as text; Podman and compose files give numbers and truths as well.
    fn options(&self) -> BTreeMap<String, String> {
        let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        self.opts.iter().flatten().map(|(key, value)| (key.clone(), text(value))).collect()
    }
}

fn word<'a>(given: Option<&'a str>, what: &str) -> Result<&'a str> {
    let given = given.filter(|text| !text.is_empty()).with_context(|| format!("the request has no {what}"))?;
    anyhow::ensure!(given.len() <= WORD_BYTES, "the request's {what} has more than {WORD_BYTES} bytes");
    Ok(given)
}

/// Does what is asked by `path`.
pub fn answer(volumes: &Volumes, path: &str, body: &[u8]) -> Answer {
    let Some(call) = Call::of(path) else {
        return Answer::error(
            404,
            &format!("plywood does not know {path}; it speaks version 1 of the volume protocol"),
        );
    };
    match Request::read(body).and_then(|request| call.answer(volumes, &request)) {
        Ok(body) => {
            tracing::debug!(path, "done");
            Answer { status: 200, body }
        }
        Err(error) => {
            let text = crate::cli::one_line(&error);
            tracing::info!(path, "{text}");
            Answer::error(500, &format!("plywood: {text}"))
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Call {
    Activate,
    Capabilities,
    Create,
    Get,
    List,
    Remove,
    Path,
    Mount,
    Unmount,
}

impl Call {
    fn of(path: &str) -> Option<Self> {
        Some(match path {
            "/Plugin.Activate" => Self::Activate,
            "/VolumeDriver.Capabilities" => Self::Capabilities,
            "/VolumeDriver.Create" => Self::Create,
            "/VolumeDriver.Get" => Self::Get,
            "/VolumeDriver.List" => Self::List,
            "/VolumeDriver.Remove" => Self::Remove,
            "/VolumeDriver.Path" => Self::Path,
            "/VolumeDriver.Mount" => Self::Mount,
            "/VolumeDriver.Unmount" => Self::Unmount,
            _ => return None,
        })
    }

    fn answer(self, volumes: &Volumes, request: &Request) -> Result<Value> {
        let done = json!({ "Err": "" });
        let mountpoint = |path: Option<&Path>| json!({ "Mountpoint": path.unwrap_or(Path::new("")), "Err": "" });
        Ok(match self {
            Self::Activate => json!({ "Implements": ["VolumeDriver"] }),
            Self::Capabilities => json!({ "Capabilities": { "Scope": "local" } }),
            Self::Create => {
                volumes.create(request.name()?, &request.options())?;
                done
            }
            Self::Get => json!({ "Volume": volumes.info(request.name()?)?, "Err": "" }),
            Self::List => json!({ "Volumes": volumes.list()?, "Err": "" }),
            Self::Remove => {
                volumes.remove(request.name()?)?;
                done
            }
            Self::Path => mountpoint(volumes.path(request.name()?)?.as_deref()),
            Self::Mount => mountpoint(Some(&volumes.mount(request.name()?, request.id()?)?)),
            Self::Unmount => {
                volumes.unmount(request.name()?, request.id()?)?;
                done
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_and_podman_send_is_read() {
        // Docker, Podman, compose; and what says nothing.
        let read = |body: &str| Request::read(body.as_bytes()).unwrap();
        let docker = read("{\"Name\":\"data\",\"Opts\":{\"size\":\"1G\"}}\n");
        assert_eq!((docker.name().unwrap(), docker.options()["size"].as_str()), ("data", "1G"));
        let mount = read(r#"{"Name":"data","ID":"2f73349c"}"#);
        assert_eq!(mount.id().unwrap(), "2f73349c");
        let odd = read(r#"{"Name":"data","Opts":{"size":1024,"ephemeral":true},"More":[1]}"#);
        assert_eq!(odd.options(), [("ephemeral", "true"), ("size", "1024")].map(|(k, v)| (k.into(), v.into())).into());
        for nothing in ["", " \n", "{}", "null", r#"{"Name":null,"Opts":null}"#] {
            let request = read(nothing);
            assert!(request.name().is_err() && request.options().is_empty(), "{nothing}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        for body in ["x", "[1]", "7", "{\"Name\":7}", "{\"Name\":\"a\"", "\u{0}", "{\"Opts\":[]}"] {
            let error = Request::read(body.as_bytes()).unwrap_err();
            assert!(error.to_string().contains("not understood"), "{body}: {error}");
        }
        let long = Request { name: Some("x".repeat(256)), ..Request::default() };
        assert!(long.name().unwrap_err().to_string().contains("255"));
        assert!(Request { name: Some(String::new()), ..Request::default() }.name().is_err());
    }
}
