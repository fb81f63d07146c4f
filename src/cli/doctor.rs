//! `plywood doctor`: looks over what plywood needs of a machine, what dead daemons left, and the pools that it finds. Reads
//! only.

mod bundle;
mod machine;
mod pools;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use serde::Serialize;

pub(super) use machine::linux_version;

use super::{Context, output};

/// What to do beside looking.
#[derive(Debug, Args)]
pub struct DoctorArguments {
    /// Write what a bug report needs to this new file: what the doctor found, logs, pool info, superblocks; names of pools
    /// and volumes are in it, and nothing of what volumes hold
    #[arg(long, value_name = "FILE.tar.zst")]
    bundle: Option<PathBuf>,
}

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    Warning,
    Bad,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How it is.
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What to do, where something is to be done.
    pub advice: Option<String>,
}

impl Finding {
    fn ok(what: &str, found: impl Into<String>) -> Self {
        Self { what: what.to_owned(), verdict: Verdict::Ok, found: found.into(), advice: None }
    }

    fn warning(what: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Warning, advice: Some(advice.into()), ..Self::ok(what, found) }
    }

    fn bad(what: &str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { verdict: Verdict::Bad, advice: Some(advice.into()), ..Self::ok(what, found) }
    }
}

/// Looks over machine and pools. Ends with 1 when something is bad.
///
/// # Errors
/// When the pool that was named cannot be found, or the bundle cannot be written.
pub fn run(context: &Context, arguments: &DoctorArguments) -> Result<ExitCode> {
    let mut findings = machine::look();
    let pools = pools::find(context, &mut findings);
    pools::look(&pools, &mut findings);
    pools::look_for_remains(&mut findings);
    if let Some(file) = &arguments.bundle {
        bundle::write(file, &findings, &pools)?;
    }
    show(context, &findings, arguments.bundle.as_deref())?;
    let bad = findings.iter().any(|finding| finding.verdict == Verdict::Bad);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn show(context: &Context, findings: &[Finding], bundle: Option<&Path>) -> Result<()> {
    if context.json {
        #[derive(Serialize)]
        struct Told<'a> {
            findings: &'a [Finding],
            bundle: Option<&'a Path>,
        }
        return Ok(output::json("doctor", &Told { findings, bundle })?);
    }
    output::line(&text(findings))?;
    if let Some(bundle) = bundle {
        output::line(&format!("written: {}; look at it before you send it", bundle.display()))?;
    }
    Ok(())
}

fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.what.chars().count()).max().unwrap_or(0);
    let line = |finding: &Finding| {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Bad => "bad",
        };
        let advice = finding.advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default();
        format!("{verdict:<8} {:<width$}  {}{advice}", finding.what, finding.found)
    };
    findings.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_with_its_advice() {
        let findings = [Finding::ok("kernel", "6.18"), Finding::bad("fuse", "missing", "modprobe fuse")];
        assert_eq!(text(&findings), "ok       kernel  6.18\nbad      fuse    missing; modprobe fuse");
    }
}
