//! Long work shows a bar on a terminal and a line now and then elsewhere; always on standard error.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::tell;
use crate::checkpoint::hub::HubProgress;

/// Without a terminal, a phase that goes on is mentioned this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// Shows one phase at a time.
#[derive(Debug)]
pub(super) struct Bars {
    terminal: bool,
    current: Mutex<Option<Current>>,
}

#[derive(Debug)]
struct Current {
    name: String,
    bar: ProgressBar,
    started: Instant,
    last_line: Instant,
}

impl Bars {
    pub(super) fn new() -> Self {
        Self { terminal: std::io::stderr().is_terminal(), current: Mutex::new(None) }
    }

    pub(super) fn start(&self, name: &str, total: Option<u64>, done: u64, bytes: bool) {
        self.finish();
        let bar = if self.terminal {
            let numbers = if bytes { "{bytes}/{total_bytes} {bytes_per_sec}" } else { "{pos}/{len}" };
            let bar = total.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
            let template = format!("{{msg:28}} {{wide_bar}} {numbers} {{elapsed}}");
            if let Ok(style) = ProgressStyle::with_template(&template) {
                bar.set_style(style);
            }
            bar
        } else {
            tell(format_args!("{name} …"));
            let bar = ProgressBar::hidden();
            if let Some(total) = total {
                bar.set_length(total);
            }
            bar
        };
        bar.set_message(name.to_owned());
        bar.set_position(done);
        let now = Instant::now();
        *self.lock() = Some(Current { name: name.to_owned(), bar, started: now, last_line: now });
    }

    pub(super) fn advance(&self, by: u64) {
        if let Some(current) = self.lock().as_mut() {
            current.bar.inc(by);
            if !self.terminal && current.last_line.elapsed() >= LINE_INTERVAL {
                current.last_line = Instant::now();
                match current.bar.length() {
                    Some(total) if total > 0 => {
                        tell(format_args!("{} … {} %", current.name, current.bar.position() * 100 / total));
                    }
                    _ => tell(format_args!("{} … {}", current.name, current.bar.position())),
                }
            }
        }
    }

    pub(super) fn finish(&self) {
        if let Some(current) = self.lock().take() {
            current.bar.finish_and_clear();
            tell(format_args!("{}: {:.1} s", current.name, current.started.elapsed().as_secs_f64()));
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        if let Some(current) = self.lock().take() {
            current.bar.abandon();
        }
    }
}

impl HubProgress for Bars {
    fn file_started(&self, file: &str, total: Option<u64>, resumed_from: u64) {
        self.start(file, total, resumed_from, true);
    }

    fn received(&self, bytes: u64) {
        self.advance(bytes);
    }

    fn file_finished(&self, _file: &str) {
        self.finish();
    }

    fn waiting(&self, file: &str, reason: &str, delay: Duration) {
        tell(format_args!("{file}: {reason}; trying again in {:.1} s", delay.as_secs_f64()));
    }
}
