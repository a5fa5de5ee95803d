//! Long work tells how far it is.

/// Where a compression reports to. Phases come one after the other.
pub trait Progress {
    /// A phase of `total` steps begins.
    fn phase_started(&self, name: &str, total: u64);
    /// `by` more steps of the phase are done.
    fn advanced(&self, by: u64);
    /// The phase is done.
    fn phase_finished(&self);
}

/// Reports to nobody.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase_started(&self, _name: &str, _total: u64) {}
    fn advanced(&self, _by: u64) {}
    fn phase_finished(&self) {}
}
