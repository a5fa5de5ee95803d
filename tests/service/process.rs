//! `niwaki serve` as a process, with its signals and its log.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A server; it ends with the value.
pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) address: SocketAddr,
    /// Where metrics are: a port of their own, or the same.
    pub(crate) admin: SocketAddr,
    pub(crate) grpc: Option<SocketAddr>,
    log: Arc<Mutex<Vec<Value>>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The server's command, on a free port.
pub(crate) fn serve(level: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_niwaki"));
    command
        .args(["serve", "--hostname", "127.0.0.1", "--port", "0", "--threads", "1", "--json-output"])
        .args(arguments)
        .env("LOG_LEVEL", level);
    command
}

/// What a server says that does not start.
pub(crate) fn refused(arguments: &[&str]) -> Output {
    serve("info", arguments).output().unwrap()
}

impl Process {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::start_at("info", arguments)
    }

    /// With a log of another level.
    pub(crate) fn start_at(level: &str, arguments: &[&str]) -> Self {
        let mut child = serve(level, arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let log = Arc::new(Mutex::new(Vec::new()));
        let ready = loop {
            let line = lines.next().expect("the server ended").unwrap();
            // What is no event is what the process has to say at its end.
            let event: Value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line}"));
            log.lock().unwrap().push(event.clone());
            if event["message"] == "ready" {
                break event;
            }
        };
        let written = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                written.lock().unwrap().push(serde_json::from_str(&line).unwrap_or(Value::String(line)));
            }
        });
        let address = |name: &str| ready[name].as_str().map(|address| address.parse::<SocketAddr>().unwrap());
        let main = address("address").unwrap();
        Self { child, address: main, admin: address("admin").unwrap_or(main), grpc: address("grpc"), log }
    }

    /// The events logged so far.
    pub(crate) fn log(&self) -> Vec<Value> {
        self.log.lock().unwrap().clone()
    }

    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, String) {
        self.ask_with("key", method, path, body)
    }

    pub(crate) fn ask_with(&self, key: &str, method: &str, path: &str, body: &Value) -> (u16, String) {
        ask(self.address, key, method, path, body)
    }

    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = ask(self.admin, "key", "GET", "/metrics", &Value::Null).1;
        let line = text.lines().find(|line| line.rsplit_once(' ').is_some_and(|(name, _)| name == series));
        line.unwrap_or_else(|| panic!("{series} is not in\n{text}")).rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    pub(crate) fn until_metric(&self, series: &str, value: f64) {
        let start = Instant::now();
        while self.metric(series) != value {
            assert!(start.elapsed() < Duration::from_secs(20), "{series} is {}", self.metric(series));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }
}

/// Asks a server, on a connection of its own.
pub(crate) fn ask(address: SocketAddr, key: &str, method: &str, path: &str, body: &Value) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    let body = body.to_string();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\ncontent-type: application/json\r\n\
         authorization: Bearer {key}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}
