//! What the demo shows at the end: on one screen.

use anyhow::Result;
use serde::Serialize;

use super::measure::{Times, show_time};
use super::sides::{PlywoodStory, Side, Sizes};
use crate::cli::{Context, output, size};

/// Something that the demo claims.
#[derive(Clone, Debug, Serialize)]
pub struct Claim {
    /// Whether it came out so.
    pub holds: bool,
    /// What.
    pub text: String,
}

/// Everything that was seen.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// On plywood.
    pub plywood: PlywoodStory,
    /// On overlayfs.
    pub overlay: Side,
    /// What was claimed.
    pub claims: Vec<Claim>,
}

impl Report {
    /// Prints it.
    ///
    /// # Errors
    ///
    /// Standard output takes no more.
    pub fn print(&self, context: &Context) -> Result<()> {
        if context.json {
            return Ok(output::json("demo", self)?);
        }
        let count = self.plywood.containers.len();
        output::line(&format!(
            "{count} containers, each writing 4 KiB into the large file of the image and syncing it, twice"
        ))?;
        output::line("")?;
        self.print_comparison(count)?;
        output::line("")?;
        self.print_trials()?;
        output::line("")?;
        self.print_sizes()?;
        output::line("")?;
        for claim in &self.claims {
            let mark = if claim.holds { "holds " } else { "BROKEN" };
            output::line(&format!("{mark} {}", claim.text))?;
        }
        Ok(())
    }

    fn print_comparison(&self, count: usize) -> Result<()> {
        let (plywood, overlay) = (&self.plywood.side, &self.overlay);
        let each = |bytes: Option<u64>| {
            bytes.map_or_else(|| "not counted".to_owned(), |bytes| size::show(bytes / count.max(1) as u64))
        };
        let times = |what: &str, of: &dyn Fn(&Side) -> Times| {
            let (here, there) = (of(plywood), of(overlay));
            vec![
                what.to_owned(),
                format!("{} (worst {})", show_time(here.median_us), show_time(here.worst_us)),
                format!("{} (worst {})", show_time(there.median_us), show_time(there.worst_us)),
                ratio(there.median_us, here.median_us),
            ]
        };
        let bytes = |what: &str, here: Option<u64>, there: Option<u64>| {
            let ratio = match (here, there) {
                (Some(here), Some(there)) => ratio(there as f64, here as f64),
                _ => String::new(),
            };
            vec![what.to_owned(), each(here), each(there), ratio]
        };
        let rows = vec![
            times("root of a container made and mounted", &|side| side.start),
            times("first write + fsync", &|side| side.first),
            times("second write + fsync", &|side| side.second),
            bytes("disk wrote during the first, each", plywood.first_written_bytes, overlay.first_written_bytes),
            bytes("disk wrote during the second, each", plywood.second_written_bytes, overlay.second_written_bytes),
            bytes("space taken, each", Some(plywood.taken_bytes), Some(overlay.taken_bytes)),
        ];
        Ok(output::table(&["", "plywood", &overlay.name, "ratio"], &["ratio"], rows)?)
    }

    fn print_trials(&self) -> Result<()> {
        let show = |right: bool, seen: &str| format!("{} {seen}", if right { "ok:" } else { "WRONG:" });
        let trials = self.plywood.side.trials.iter().zip(&self.overlay.trials);
        let rows = trials.map(|(here, there)| {
            vec![here.what.to_owned(), show(here.right, &here.seen), show(there.right, &there.seen)]
        });
        Ok(output::table(&["on a file of the image", "plywood", &self.overlay.name], &[], rows.collect())?)
    }

    fn print_sizes(&self) -> Result<()> {
        let story = &self.plywood;
        let row = |one: &Sizes| vec![one.name.clone(), size::show(one.own_bytes), size::show(one.virtual_bytes)];
        let mut rows: Vec<Vec<String>> = story.layers.iter().map(row).collect();
        if let (Some(first), Some(last)) = (story.containers.first(), story.containers.last()) {
            rows.push(row(first));
            if story.containers.len() > 2 {
                rows.push(vec!["...".to_owned(), String::new(), String::new()]);
            }
            if story.containers.len() > 1 {
                rows.push(row(last));
            }
        }
        let accounts = &story.accounts;
        rows.push(vec!["all together".into(), size::show(accounts.own_bytes), String::new()]);
        output::table(&["NAME", "SIZE", "VIRTUAL"], &["SIZE", "VIRTUAL"], rows)?;
        let back = &story.given_back;
        output::line(&format!(
            "du of the pool grew by {}: {} above, {} metadata, {} space map, {} written ahead or in reserve",
            size::show(accounts.grown_bytes),
            size::show(accounts.own_bytes),
            size::show(accounts.metadata_bytes),
            size::show(accounts.layout_bytes),
            size::show(accounts.ahead_bytes),
        ))?;
        Ok(output::line(&format!(
            "du of the pool: {}; containers deleted: {}; the three layers deleted: {}",
            size::show(back.before_bytes),
            size::show(back.without_containers_bytes),
            size::show(back.without_layers_bytes),
        ))?)
    }
}

fn ratio(large: f64, small: f64) -> String {
    match large / small {
        ratio if !ratio.is_finite() => String::new(),
        ratio if ratio >= 10.0 => format!("{ratio:.0} x"),
        ratio if ratio >= 1.0 => format!("{ratio:.1} x"),
        ratio => format!("1/{:.1} x", 1.0 / ratio),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_have_as_many_digits_as_they_deserve() {
        assert_eq!(
            [ratio(1759.0, 0.8), ratio(3.0, 2.0), ratio(1.0, 2.5), ratio(1.0, 0.0)],
            ["2199 x", "1.5 x", "1/2.5 x", ""]
        );
    }
}
