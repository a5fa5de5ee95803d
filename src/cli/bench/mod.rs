//! `niwaki bench`: latency, throughput and the share of the machine's limit, in process or over HTTP.

mod http;
mod input;
mod local;
mod profile;

use super::args::BenchArgs;

pub(super) fn run(args: &BenchArgs) -> anyhow::Result<()> {
    match &args.http {
        Some(url) => http::run(url, args),
        None => local::run(args),
    }
}

/// The value below which `share` of `sorted` lies; `sorted` must not be empty.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the length")]
    let index = ((sorted.len() - 1) as f64 * share).round() as usize;
    sorted[index]
}
