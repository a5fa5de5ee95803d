//! The socket that a service listens on.

use std::io;

use tokio::net::{TcpListener, TcpSocket, lookup_host};

/// Connections that may wait to be accepted. With the 128 that are usual a burst of clients overflows, and each of those
/// beyond tries again only after a second.
const BACKLOG: u32 = 1024;

/// Listens on the first address of `host` that can be had.
///
/// # Errors
/// If there is none: why the last one cannot be had.
pub async fn bind(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut refused = io::Error::new(io::ErrorKind::InvalidInput, "the host has no address");
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // A port that was in use until a moment ago can be used again.
        socket.set_reuseaddr(true)?;
        match socket.bind(address).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_burst_of_connections_waits_to_be_accepted() {
        let listener = bind("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let waiting: Vec<_> =
            (0..400).map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(500)).unwrap()).collect();
        assert_eq!(waiting.len(), 400);
        let taken = bind("127.0.0.1", address.port()).await.unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    }
}
