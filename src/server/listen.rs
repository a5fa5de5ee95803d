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

/// Makes a listener deaf to clients that begin to connect; those that have begun go on. A connection that is complete between the
/// last look for one and the end of the listener would be reset, with the request that it may hold. A client that is not
/// heard knocks again after a second, as after a lost packet, and is refused then.
///
/// # Errors
/// If the system has no filters for sockets.
#[cfg(target_os = "linux")]
pub(super) fn deafen(listener: &TcpListener) -> io::Result<()> {
    use socket2::{SockFilter, SockRef};
    // Where the flags are in the head of a segment, and the flag of one that begins a connection.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    // Instructions of the packet filter (`linux/bpf_common.h`): load a byte, skip unless a bit is set, keep so many bytes.
    const LOAD_BYTE: u16 = 0x30;
    const SKIP_UNLESS_SET: u16 = 0x45;
    const KEEP: u16 = 0x06;
    SockRef::from(listener).attach_filter(&[
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS),
        SockFilter::new(SKIP_UNLESS_SET, 0, 1, SYN),
        SockFilter::new(KEEP, 0, 0, 0),
        SockFilter::new(KEEP, 0, 0, u32::MAX),
    ])
}

/// There is no such filter.
///
/// # Errors
/// Always.
#[cfg(not(target_os = "linux"))]
pub(super) fn deafen(_listener: &TcpListener) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
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

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_deaf_listener_hears_no_knock_and_keeps_those_who_came_before() {
        let listener = bind("127.0.0.1", 0).await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut before = TcpStream::connect(address).unwrap();
        deafen(&listener).unwrap();
        let listener = listener.into_std().unwrap();
        let late = TcpStream::connect_timeout(&address, Duration::from_millis(200)).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let (mut accepted, _) = listener.accept().unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(listener);
        accepted.set_nonblocking(false).unwrap();
        let mut heard = [0; 5];
        before.write_all(b"hello").unwrap();
        accepted.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        let refused = TcpStream::connect_timeout(&address, Duration::from_secs(1)).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
