//! Addresses: where one points, and what may be said of it.

use ureq::http::Uri;

/// Scheme, host and port: what a token may be sent to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Origin {
    scheme: String,
    host: String,
    port: u16,
}

impl Origin {
    pub(super) fn of(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_ascii_lowercase();
        let default_port = match scheme.as_str() {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let host = uri.host().filter(|host| !host.is_empty())?.to_ascii_lowercase();
        Some(Self { scheme, host, port: uri.port_u16().unwrap_or(default_port) })
    }
}

/// An address without what may be secret in it: storage links carry signatures in their query.
pub(super) fn without_query(url: &str) -> String {
    url.split(['?', '#']).next().unwrap_or_default().to_owned()
}

/// The address that `location` means in an answer of `base`; `None` unless it is http or https.
pub(super) fn resolve(base: &str, location: &str) -> Option<String> {
    let location = location.split('#').next().unwrap_or_default();
    let (scheme, rest) = base.split_once("://")?;
    let absolute = if location.contains("://") && !location.starts_with('/') {
        location.to_owned()
    } else if let Some(network_path) = location.strip_prefix("//") {
        format!("{scheme}://{network_path}")
    } else if location.starts_with('/') {
        format!("{scheme}://{}{location}", rest.split(['/', '?', '#']).next()?)
    } else if location.is_empty() {
        return None;
    } else {
        let path = without_query(base);
        format!("{}/{location}", path.rsplit_once('/').filter(|(dir, _)| dir.contains("://") && !dir.ends_with('/'))?.0)
    };
    Origin::of(&absolute).map(|_| absolute)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved_and_other_schemes_refused() {
        let base = "https://hub.example:8443/org/name/resolve/main/a.json?x=1";
        let cases = [
            ("https://cdn.example/f?sig=s", Some("https://cdn.example/f?sig=s")),
            ("/other/path", Some("https://hub.example:8443/other/path")),
            ("//cdn.example/f", Some("https://cdn.example/f")),
            ("b.json", Some("https://hub.example:8443/org/name/resolve/main/b.json")),
            ("/f?next=http://x/", Some("https://hub.example:8443/f?next=http://x/")),
            ("file:///etc/passwd", None),
            ("ftp://x/y", None),
            ("", None),
        ];
        for (location, expected) in cases {
            assert_eq!(resolve(base, location).as_deref(), expected, "{location:?}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let origin = |url| Origin::of(url).unwrap();
        assert_eq!(origin("https://Hub.example/a"), origin("https://hub.example:443/b?c"));
        for other in ["http://hub.example/", "https://hub.example:444/", "https://hub.example.evil/"] {
            assert_ne!(origin("https://hub.example"), origin(other), "{other}");
        }
        assert_eq!((Origin::of("hub.example"), Origin::of("ftp://hub.example"), Origin::of("")), (None, None, None));
    }
}
