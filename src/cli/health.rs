//! `niwaki health`: a probe for containers that have no shell and no curl.

use std::time::Duration;

use anyhow::{Context, bail};
use ureq::tls::TlsConfig;

use super::args::HealthArgs;

pub(super) fn run(args: &HealthArgs) -> anyhow::Result<()> {
    let secure = args.tls || std::env::var_os("TLS_CERT").is_some_and(|path| !path.is_empty());
    let scheme = if secure { "https" } else { "http" };
    let url = format!("{scheme}://{}:{}/health/ready", args.host, args.port);
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .tls_config(TlsConfig::builder().disable_verification(true).build())
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
