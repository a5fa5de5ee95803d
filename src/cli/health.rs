//! `niwaki health`: a probe for containers that have no shell and no curl.

use std::time::Duration;

use anyhow::{Context, bail};

use super::args::HealthArgs;

pub(super) fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let url = format!("http://{}:{}/health/ready", args.host, args.port);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(Duration::from_secs(5)))
        .http_status_as_error(false)
        .build()
        .into();
    let status = agent.get(&url).call().with_context(|| format!("no answer from {url}"))?.status();
    if !status.is_success() {
        bail!("{url} answered {status}");
    }
    Ok(())
}
