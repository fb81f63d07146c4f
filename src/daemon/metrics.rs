//! The figures of a pool in the text form that Prometheus collects (OpenMetrics 1.0), made by `prometheus-client`.
//!
//! Counters begin anew with each engine process, as those of a program that was restarted do.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::protocol::{Figures, VolumeFigures};
use crate::export::server::counters::{IoKind, KindCounters, LATENCY_BOUNDS_US};
use crate::io::PUNCH_BOUNDS_US;

/// Content type of what [`text`] makes.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The figures as metrics.
pub(super) fn text(figures: Figures) -> String {
    let pool = figures.pool.name.clone();
    let labels = std::iter::once(("pool".into(), pool.into()));
    let mut registry = Registry::with_prefix_and_labels("plywood", labels);
    registry.register_collector(Box::new(Told(figures)));
    let mut text = String::new();
    // Writing into a string does not fail, and the collector does nothing else.
    if let Err(error) = encode(&mut text, &registry) {
        tracing::error!(%error, "metrics");
    }
    text
}

/// One figure of a volume; none where it is not known.
type Value = fn(&VolumeFigures) -> Option<u64>;

#[derive(Debug)]
struct Told(Figures);

impl Collector for Told {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.encode_space(&mut encoder)?;
        self.encode_state(&mut encoder)?;
        self.encode_engine(&mut encoder)?;
        self.encode_volumes(&mut encoder)
    }
}

impl Told {
    fn encode_space(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let pool = &self.0.pool;
        let host_free = pool.host_free_bytes.map(|free| ("host_free", "Free on the host's file system", free));
        let counted = [
            ("pool_kept", "Data that no volume owns any more", pool.kept_bytes),
            ("pool_metadata", "Maps, records and attributes of volumes, and tables", pool.metadata_bytes),
        ];
        let counted = counted.into_iter().filter_map(|(name, help, bytes)| Some((name, help, bytes?)));
        let spaces = [
            ("pool_size", "Size of the pool", pool.size_bytes),
            ("pool_size_limit", "Size up to which the pool grows by itself; 0 when it does not", pool.size_limit_bytes),
            ("pool_used", "Allocated to data and metadata, as of the last checkpoint", pool.used_bytes),
            ("pool_own", "Data that volumes own, as of the last checkpoint", pool.own_bytes),
            ("pool_layout", "Superblocks, journal, and the space map of the groups in use", pool.layout_bytes),
            ("pool_free", "Free for data and metadata", pool.free_bytes),
            ("pool_reserve", "Kept back for metadata", pool.reserve_bytes),
            ("pool_virtual", "Sum of the virtual sizes of all volumes", pool.virtual_bytes),
            ("pool_reserved", "Sum of what is reserved for volumes", pool.reserved_bytes),
            ("pool_owed", "Free for volumes with a reservation only", pool.owed_bytes),
            ("pool_host", "Taken of the host by the pool file", pool.host_bytes),
            ("journal_size", "The journal ring", pool.journal_bytes),
            ("journal_used", "Part of the journal that is in use", pool.journal_used_bytes),
        ];
        encode_each(
            encoder,
            MetricType::Gauge,
            Some(&Unit::Bytes),
            spaces.into_iter().chain(counted).chain(host_free),
        )?;
        let help = "Part of the space that pool and host can give that is used, in percent";
        encode_each(encoder, MetricType::Gauge, None, [("pool_filled_percent", help, pool.filled_percent)])?;
        let help = "Whether a threshold of used space is reached";
        let mut reached = encoder.encode_descriptor("threshold_reached", help, None, MetricType::Gauge)?;
        for threshold in &pool.thresholds {
            let labels = [("percent", threshold.percent.to_string())];
            gauge(threshold.reached.into()).encode(reached.encode_family(&labels)?)?;
        }
        Ok(())
    }

    fn encode_state(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let pool = &self.0.pool;
        let states = [
            ("volumes", "Volumes, without snapshots", pool.volumes),
            ("snapshots", "Snapshots", pool.snapshots),
            ("snapshots_sealed", "Snapshots that are sealed", pool.sealed),
            ("attached", "Volumes that are block devices", pool.attached.len() as u64),
            ("carcasses", "Deleted trees whose blocks are still being given back", pool.carcasses),
            ("writes_waiting", "Writes that wait for space", pool.waiting),
            ("poisoned", "Whether the pool takes no more writes", pool.poisoned.is_some().into()),
            ("generation", "Number of the last checkpoint", pool.generation),
            ("engine_restarts", "How often the engine process was started again", pool.engine_restarts.unwrap_or(0)),
            ("scrub_faults", "Faults that the last scrub could not mend", scrub_faults(&self.0)),
        ];
        encode_each(encoder, MetricType::Gauge, None, states)
    }

    fn encode_engine(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let counters = &self.0.counters;
        let counts = [
            (
                "blocks_gathered",
                "Data blocks moved together because they were read or written together",
                counters.blocks_gathered,
            ),
            ("blocks_redirected", "Data blocks redirected because they were shared", counters.blocks_redirected),
            ("blocks_provisioned", "Data blocks provisioned by a first write", counters.blocks_provisioned),
            ("blocks_extended", "Blocks written with zeros ahead of use", counters.blocks_extended),
            ("blocks_punched", "Blocks given back to the host", counters.blocks_punched),
            ("blocks_sealed", "Blocks whose checksum was recorded", counters.blocks_sealed),
            ("checkpoints", "Checkpoints", counters.checkpoints),
            ("journal_batches", "Batches appended to the journal", counters.batches),
            ("journal_wraps", "Times that the journal began again at the ring's start", counters.ring_wraps),
            ("nodes_read", "Nodes read from the medium", counters.nodes_read),
            ("nodes_written", "Nodes written by checkpoints", counters.nodes_written),
            (
                "second_copies_used",
                "Metadata read from a second copy because the first was bad",
                counters.second_copies_used,
            ),
            ("checksum_mismatches", "Blocks that did not match their checksum when read", counters.checksum_mismatches),
            ("quota_refusals", "Writes refused by a quota", counters.quota_hits),
            ("space_refusals", "Writes refused for want of space", counters.space_refusals),
        ];
        encode_each(encoder, MetricType::Counter, None, counts)?;
        let written = [
            (
                "metadata_written",
                "Batches, nodes, pages, records and superblocks written",
                counters.metadata_bytes_written,
            ),
            ("data_written", "Data written", counters.data_bytes_written),
        ];
        encode_each(encoder, MetricType::Counter, Some(&Unit::Bytes), written)?;
        let punching = &self.0.punching;
        let help = "Calls that gave space back to the host; other I/O on the pool waits for each";
        let family = encoder.encode_descriptor("punch", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        let sum = punching.total.as_secs_f64();
        encode_histogram(family, sum, punching.calls, &PUNCH_BOUNDS_US, &punching.durations)
    }

    fn encode_volumes(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (bytes, seconds) = (Unit::Bytes, Unit::Seconds);
        let sizes: [(&str, &str, &Unit, Value); 5] = [
            ("volume_size", "Virtual size", &bytes, |volume| Some(volume.size_bytes)),
            ("volume_own", "Written since the volume's creation and still mapped", &bytes, |volume| {
                Some(volume.own_bytes)
            }),
            ("volume_mapped", "Mapped, shared or not", &bytes, |volume| Some(volume.mapped_bytes)),
            ("volume_exclusive", "What deleting the volume would free", &bytes, |volume| volume.exclusive_bytes),
            ("volume_exclusive_age", "How long ago deleting it would have freed that", &seconds, |volume| {
                volume.exclusive_age_seconds
            }),
        ];
        for (name, help, unit, value) in sizes {
            let mut family = encoder.encode_descriptor(name, help, Some(unit), MetricType::Gauge)?;
            for volume in &self.0.volumes {
                let Some(value) = value(volume) else { continue };
                gauge(value).encode(family.encode_family(&[("volume", volume.name.as_str())])?)?;
            }
        }
        let help = "Blocks of a volume that were redirected because they were shared";
        let mut family = encoder.encode_descriptor("volume_blocks_redirected", help, None, MetricType::Counter)?;
        for volume in &self.0.volumes {
            let labels = [("volume", volume.name.as_str())];
            ConstCounter::new(volume.blocks_redirected).encode(family.encode_family(&labels)?)?;
        }
        let help = "Requests of a volume that failed";
        self.count_requests(encoder, "volume_io_errors", help, None, |counters| counters.errors)?;
        let help = "Bytes of a volume's requests";
        self.count_requests(encoder, "volume_io", help, Some(&Unit::Bytes), |counters| counters.bytes)?;
        // Its count is that of the operations.
        let help = "Latency of a volume's requests";
        let (unit, kind) = (Some(&Unit::Seconds), MetricType::Histogram);
        let mut family = encoder.encode_descriptor("volume_io_latency", help, unit, kind)?;
        self.each_kind(&mut family, |encoder, counters| {
            let sum = counters.latency_ns as f64 / 1e9;
            encode_histogram(encoder, sum, counters.operations, &LATENCY_BOUNDS_US, &counters.latencies)
        })
    }

    fn count_requests(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        unit: Option<&Unit>,
        value: impl Fn(&KindCounters) -> u64,
    ) -> fmt::Result {
        let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
        self.each_kind(&mut family, |encoder, counters| ConstCounter::new(value(counters)).encode(encoder))
    }

    fn each_kind(
        &self,
        family: &mut MetricEncoder<'_>,
        encode: impl Fn(MetricEncoder<'_>, &KindCounters) -> fmt::Result,
    ) -> fmt::Result {
        for volume in &self.0.volumes {
            for kind in IoKind::ALL {
                let labels = [("volume", volume.name.as_str()), ("kind", kind.name())];
                encode(family.encode_family(&labels)?, volume.io.of(kind))?;
            }
        }
        Ok(())
    }
}

/// A histogram of durations: `counts` by `bounds_us`, and one more for what took longer.
fn encode_histogram(
    mut encoder: MetricEncoder<'_>,
    sum_seconds: f64,
    count: u64,
    bounds_us: &[u64],
    counts: &[u64],
) -> fmt::Result {
    let bounds = bounds_us.iter().map(|bound| *bound as f64 / 1e6).chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(counts.iter().copied()).collect();
    encoder.encode_histogram::<[(&str, &str); 0]>(sum_seconds, count, &buckets, None)
}

/// Figures that have no labels of their own: name, help and value of each.
fn encode_each(
    encoder: &mut DescriptorEncoder<'_>,
    kind: MetricType,
    unit: Option<&Unit>,
    figures: impl IntoIterator<Item = (&'static str, &'static str, u64)>,
) -> fmt::Result {
    for (name, help, value) in figures {
        let encoder = encoder.encode_descriptor(name, help, unit, kind)?;
        if matches!(kind, MetricType::Counter) {
            ConstCounter::new(value).encode(encoder)?;
        } else {
            gauge(value).encode(encoder)?;
        }
    }
    Ok(())
}

fn gauge(value: u64) -> ConstGauge<i64> {
    ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX))
}

fn scrub_faults(figures: &Figures) -> u64 {
    figures.pool.scrub.as_ref().map_or(0, |scrub| scrub.fault_count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::protocol::{Pool, Threshold};
    use crate::io::PunchStatistics;

    #[test]
    fn figures_become_metrics_with_labels_and_buckets() {
        let mut volume = VolumeFigures {
            name: "a \"b\"".into(),
            own_bytes: 8192,
            exclusive_bytes: Some(4096),
            ..VolumeFigures::default()
        };
        volume.io.read.operations = 3;
        volume.io.read.bytes = 12288;
        volume.io.read.latency_ns = 1_500_000;
        volume.io.read.latencies[0] = 2;
        volume.io.read.latencies[9] = 1;
        let pool = Pool {
            name: "main".into(),
            used_bytes: 77,
            thresholds: vec![Threshold { percent: 80, reached: true }, Threshold { percent: 90, reached: false }],
            ..Pool::default()
        };
        let punching = PunchStatistics { calls: 5, durations: [1, 0, 0, 3, 1, 0, 0, 0], ..PunchStatistics::default() };
        let text = text(Figures { pool, punching, volumes: vec![volume], ..Figures::default() });
        for line in [
            "# TYPE plywood_pool_used_bytes gauge",
            "plywood_pool_used_bytes{pool=\"main\"} 77",
            "plywood_threshold_reached{pool=\"main\",percent=\"80\"} 1",
            "plywood_threshold_reached{pool=\"main\",percent=\"90\"} 0",
            "plywood_volume_exclusive_bytes{pool=\"main\",volume=\"a \\\"b\\\"\"} 4096",
            "plywood_volume_own_bytes{pool=\"main\",volume=\"a \\\"b\\\"\"} 8192",
            "plywood_volume_io_bytes_total{pool=\"main\",volume=\"a \\\"b\\\"\",kind=\"read\"} 12288",
            "plywood_volume_io_latency_seconds_sum{pool=\"main\",volume=\"a \\\"b\\\"\",kind=\"read\"} 0.0015",
            "plywood_volume_io_latency_seconds_count{pool=\"main\",volume=\"a \\\"b\\\"\",kind=\"read\"} 3",
            "plywood_volume_io_latency_seconds_bucket{pool=\"main\",le=\"0.00005\",volume=\"a \\\"b\\\"\",kind=\"read\"} 2",
            "plywood_volume_io_latency_seconds_bucket{pool=\"main\",le=\"+Inf\",volume=\"a \\\"b\\\"\",kind=\"read\"} 3",
            "plywood_checkpoints_total{pool=\"main\"} 0",
            "plywood_punch_seconds_bucket{pool=\"main\",le=\"0.001\"} 4",
            "plywood_punch_seconds_count{pool=\"main\"} 5",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in:\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert!(!text.contains("host_free"), "nothing is known of the host");
    }
}
