//! Where the hub is, where its cache is, and how long to be patient with it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::HubError;

/// The public hub.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// How to reach the hub and where its files go.
#[derive(Clone)]
pub struct HubConfig {
    /// Address of the hub or of a mirror, with its scheme.
    pub endpoint: String,
    /// Sent to the endpoint's origin only.
    pub token: Option<String>,
    /// The cache: holds `models--org--name` folders. `None` where nothing says it.
    pub cache: Option<PathBuf>,
    /// Use the cache only.
    pub offline: bool,
    /// Certificate authorities (PEM) to trust in place of the built-in ones.
    pub ca_file: Option<PathBuf>,
    /// Go through the proxy that `HTTPS_PROXY`, `HTTP_PROXY` or `ALL_PROXY` names, except where `NO_PROXY` says not to.
    pub use_proxy: bool,
    /// Time limits.
    pub patience: Patience,
}

/// Bounds of every wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// For a name to be resolved and a connection to be made, each.
    pub connect: Duration,
    /// For the next bytes of an answer.
    pub read: Duration,
    /// Tries of a request before its error is final. Counting starts anew after 1 MiB of progress.
    pub attempts: u32,
    /// Before the second try; doubled before each further one.
    pub backoff: Duration,
    /// For another process that downloads the same file.
    pub lock: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            read: Duration::from_secs(30),
            attempts: 4,
            backoff: Duration::from_millis(500),
            lock: Duration::from_secs(3_600),
        }
    }
}

impl HubConfig {
    /// The configuration that Hugging Face's own tools read from the environment.
    ///
    /// `lookup` gives a variable's value. Read are `HF_ENDPOINT`; `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, `HF_API_TOKEN`
    /// or the file `HF_TOKEN_PATH` or `$HF_HOME/token`; `HF_HUB_CACHE`, `HUGGINGFACE_HUB_CACHE`, `HF_HOME`,
    /// `XDG_CACHE_HOME`, `HOME`; `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`; `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`. The
    /// first of each list that is set and not empty counts.
    pub fn from_env(lookup: &dyn Fn(&str) -> Option<String>) -> Self {
        let first = |names: &[&str]| {
            names.iter().find_map(|name| lookup(name).map(|value| value.trim().to_owned()).filter(|v| !v.is_empty()))
        };
        let user_home = first(&["HOME"]).map(PathBuf::from);
        let path = |names: &[&str]| first(names).map(|value| expand_home(&value, user_home.as_deref()));
        let hf_home = path(&["HF_HOME"])
            .or_else(|| path(&["XDG_CACHE_HOME"]).map(|dir| dir.join("huggingface")))
            .or_else(|| user_home.as_ref().map(|dir| dir.join(".cache/huggingface")));
        let token_file = || {
            let file = path(&["HF_TOKEN_PATH"]).or_else(|| hf_home.as_ref().map(|dir| dir.join("token")))?;
            let token = std::fs::read_to_string(file).ok()?.trim().to_owned();
            Some(token).filter(|token| !token.is_empty())
        };
        let is_on = |name: &str| {
            first(&[name]).is_some_and(|v| matches!(v.to_ascii_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"))
        };
        Self {
            endpoint: first(&["HF_ENDPOINT"]).unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned()),
            token: first(&["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"]).or_else(token_file),
            cache: path(&["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"]).or_else(|| hf_home.map(|dir| dir.join("hub"))),
            offline: is_on("HF_HUB_OFFLINE") || is_on("TRANSFORMERS_OFFLINE"),
            ca_file: path(&["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]),
            use_proxy: true,
            patience: Patience::default(),
        }
    }

    pub(super) fn cache_dir(&self) -> Result<&Path, HubError> {
        self.cache.as_deref().ok_or(HubError::NoCacheDir)
    }

    /// An HTTP client that follows no redirect and takes no status for an error: both are this module's decisions.
    pub(super) fn agent(&self) -> Result<ureq::Agent, HubError> {
        let Patience { connect, read, .. } = self.patience;
        let mut tls = ureq::tls::TlsConfig::builder();
        if let Some(path) = &self.ca_file
            && self.endpoint.starts_with("https://")
        {
            tls = tls.root_certs(root_certs(path)?);
        }
        let proxy = if self.use_proxy { ureq::Proxy::try_from_env() } else { None };
        let config = ureq::Agent::config_builder()
            .proxy(proxy)
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_resolve(Some(connect))
            .timeout_connect(Some(connect))
            .timeout_recv_response(Some(read))
            .timeout_per_read(Some(read))
            .timeout_per_write(Some(read))
            .user_agent(concat!("niwaki/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity") // lengths and ranges must be those of the file itself
            .tls_config(tls.build())
            .build();
        Ok(config.new_agent())
    }
}

impl fmt::Debug for HubConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubConfig")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(hidden)"))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("ca_file", &self.ca_file)
            .field("use_proxy", &self.use_proxy)
            .field("patience", &self.patience)
            .finish()
    }
}

fn expand_home(value: &str, user_home: Option<&Path>) -> PathBuf {
    match (value.strip_prefix("~/"), user_home) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(value),
    }
}

fn root_certs(path: &Path) -> Result<ureq::tls::RootCerts, HubError> {
    let failed = |reason: String| HubError::Certificates { path: path.to_path_buf(), reason };
    let pem = std::fs::read(path).map_err(|source| failed(source.to_string()))?;
    let mut certificates = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let ureq::tls::PemItem::Certificate(certificate) = item.map_err(|source| failed(source.to_string()))? {
            certificates.push(certificate);
        }
    }
    if certificates.is_empty() {
        return Err(failed("it holds no certificate".to_owned()));
    }
    Ok(ureq::tls::RootCerts::new_with_certs(&certificates))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&str, &str)]) -> HubConfig {
        HubConfig::from_env(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_environment_is_read_as_hugging_face_tools_read_it() {
        let default = config(&[("HOME", "/nowhere/u")]);
        assert_eq!(default.endpoint, "https://huggingface.co");
        assert_eq!(default.cache.as_deref(), Some(Path::new("/nowhere/u/.cache/huggingface/hub")));
        assert_eq!((default.token, default.offline), (None, false));

        let cache = |variables: &[(&str, &str)]| config(variables).cache.map(|dir| dir.display().to_string());
        assert_eq!(cache(&[]), None);
        assert_eq!(cache(&[("XDG_CACHE_HOME", "/x")]).as_deref(), Some("/x/huggingface/hub"));
        assert_eq!(cache(&[("HF_HOME", "~/hf"), ("HOME", "/u")]).as_deref(), Some("/u/hf/hub"));
        assert_eq!(cache(&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/c")]).as_deref(), Some("/c"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "/b"), ("HUGGINGFACE_HUB_CACHE", "/c")]).as_deref(), Some("/b"));

        assert_eq!(config(&[("HF_API_TOKEN", " t1\n")]).token.as_deref(), Some("t1"));
        assert_eq!(config(&[("HF_TOKEN", ""), ("HF_API_TOKEN", "t2")]).token.as_deref(), Some("t2"));
        for (value, expected) in [("1", true), ("true", true), ("ON", true), ("0", false), ("", false), ("no", false)] {
            assert_eq!(config(&[("HF_HUB_OFFLINE", value)]).offline, expected, "{value:?}");
        }
    }

    #[test]
    fn a_stored_token_is_found_and_no_token_is_ever_printed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("token"), "hf_stored\n").unwrap();
        let config = config(&[("HF_HOME", dir.path().to_str().unwrap())]);
        assert_eq!(config.token.as_deref(), Some("hf_stored"));
        assert!(!format!("{config:?}").contains("hf_stored"));
    }

    #[test]
    fn unusable_certificates_are_an_error_only_where_tls_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        std::fs::write(&path, "no certificate here").unwrap();
        let mut config = config(&[("SSL_CERT_FILE", path.to_str().unwrap())]);
        assert!(matches!(config.agent(), Err(HubError::Certificates { .. })));
        config.endpoint = "http://127.0.0.1:1".to_owned();
        config.agent().unwrap();
    }
}
