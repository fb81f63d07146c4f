//! `plywood demo`: the whole story on one screen, with overlayfs beside it.
//!
//! A root file system becomes an image, three layers are put on it, containers are started from the top, and each
//! writes one block of a large file of the image, twice. The same is done on overlayfs on the same host file system.
//! Everything that is printed was measured in this run; the demo fails when it is not as claimed.

mod content;
mod faults;
mod measure;
mod overlay;
mod place;
mod report;
mod sides;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use anyhow::{Result, ensure};
use clap::Args;

use self::measure::Disk;
use self::place::Place;
use self::report::{Claim, Report};
use self::sides::{Side, on_overlay, on_plywood};
use super::image::{Interrupt, watch_signals};
use super::output::Waiting;
use super::{Context, run, size};

/// How much faster the first write has to be than overlayfs's.
const RATIO_CLAIMED: f64 = 200.0;

/// Shows the whole story.
#[derive(Clone, Debug, Args)]
pub struct DemoArguments {
    /// A root file system instead of one made by mmdebstrap: an archive, or `oci:DIR[:TAG]`
    #[arg(long, value_name = "TAR|oci:DIR")]
    rootfs: Option<std::ffi::OsString>,
    /// How many containers to start
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=100))]
    containers: u32,
    /// Size of the large file in the image
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    file_size: u64,
    /// Where to put everything that the demo makes, and takes away again
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    directory: PathBuf,
}

/// What every step needs to know.
#[derive(Debug)]
struct Story {
    arguments: DemoArguments,
    interrupt: Interrupt,
    disk: Disk,
}

impl Story {
    fn check(&self) -> Result<()> {
        ensure!(!self.interrupt.load(Ordering::Relaxed), "interrupted by a signal");
        Ok(())
    }
}

/// `plywood demo`. Answers failure when something was not as claimed.
///
/// # Errors
///
/// The demo could not be carried through.
pub fn demo(context: &Context, arguments: &DemoArguments) -> Result<ExitCode> {
    ensure!(rustix::process::geteuid().is_root(), "the demo attaches and mounts; run it as root");
    run::check_runtime()?;
    let interrupt = watch_signals()?;
    let place = Place::make(&arguments.directory)?;
    let story = Story { disk: Disk::below(place.path())?, arguments: arguments.clone(), interrupt };
    let large = arguments.file_size.next_multiple_of(4096);
    let needed = large.saturating_mul(u64::from(arguments.containers) + 3) + (4 << 30);
    let free = story.disk.free_bytes()?;
    ensure!(
        free >= needed,
        "{}: {} are free, overlayfs's copies need {}; choose another --directory, or a smaller --file-size",
        arguments.directory.display(),
        size::show(free),
        size::show(needed)
    );
    let outcome = tell(&story, &place);
    let waiting = Waiting::begin("cleaning up");
    let cleaned = place.clear();
    drop(waiting);
    let report = outcome?;
    cleaned?;
    report.print(context)?;
    Ok(if report.claims.iter().all(|claim| claim.holds) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn tell(story: &Story, place: &Place) -> Result<Report> {
    let source = {
        let _waiting = Waiting::begin("making a Debian root file system (mmdebstrap)");
        place::root_file_system(story, place)?
    };
    story.check()?;
    let plywood = on_plywood(story, place, &source)?;
    story.check()?;
    let overlay = on_overlay(story, place, &source)?;
    story.check()?;
    Ok(Report { claims: claims(&plywood.side, &overlay, &plywood), plywood, overlay })
}

fn claims(plywood: &Side, overlay: &Side, story: &sides::PlywoodStory) -> Vec<Claim> {
    let ratio = overlay.first.median_us / plywood.first.median_us.max(0.001);
    let accounted = story.accounts.accounted_bytes();
    let grown = story.accounts.grown_bytes;
    let difference = grown.abs_diff(accounted) as f64 / grown.max(1) as f64;
    let wrong: Vec<&str> = plywood.trials.iter().filter(|trial| !trial.right).map(|trial| trial.what).collect();
    vec![
        Claim {
            holds: ratio >= RATIO_CLAIMED,
            text: format!("first write {ratio:.0} times as fast as on overlayfs (claimed: {RATIO_CLAIMED:.0})"),
        },
        Claim {
            holds: story.untouched_bytes < 64 << 10,
            text: format!(
                "a started container that wrote nothing has {} of its own",
                size::show(story.untouched_bytes)
            ),
        },
        Claim {
            holds: wrong.is_empty(),
            text: match wrong.as_slice() {
                [] => "all that was tried is right on plywood".to_owned(),
                wrong => format!("wrong on plywood: {}", wrong.join(", ")),
            },
        },
        Claim {
            holds: difference <= 0.01,
            text: format!(
                "sizes, space map and reserve add up to the growth of du within {:.2} % (the rest is metadata)",
                difference * 100.0
            ),
        },
        Claim {
            holds: story.given_back.back_bytes() * 100 >= story.given_back.expected_bytes * 95,
            text: format!(
                "deleting the containers and the layers above the root file system gave {} of {} back",
                size::show(story.given_back.back_bytes()),
                size::show(story.given_back.expected_bytes)
            ),
        },
        Claim {
            holds: story.check_faults.is_empty(),
            text: match story.check_faults.as_slice() {
                [] => "pool check found nothing wrong".to_owned(),
                [first, ..] => format!("pool check: {first}"),
            },
        },
    ]
}
