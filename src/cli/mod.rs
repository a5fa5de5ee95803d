//! The command line: flags, and the only place where all rooms meet.

mod args;
mod bench;
mod compare;
mod compare_page;
mod compress;
mod default_model;
mod eval;
mod health;
mod inspect;
mod model;
mod output;
mod parse;
mod players;
mod progress;
mod serve;
mod subject;
mod tasks;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use output::OutputError;

/// Runs the program. Usage errors, unreadable models and bad input end with exit code 2 and one line on standard error.
#[must_use]
pub fn run() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::Compress(args) => compress::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Embed(args) => eval::embed_lines(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Health(args) => health::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A closed pipe is the reader's way to say that it has enough.
        Err(error) if error.downcast_ref().is_some_and(OutputError::is_closed) => ExitCode::SUCCESS,
        Err(error) => {
            // Where nobody can be told, the exit code still can.
            output::tell(format_args!("niwaki: {}", in_one_line(&error)));
            ExitCode::from(2)
        }
    }
}

/// An error and what it was caused by; some errors tell their cause themselves.
fn in_one_line(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |line, cause| if line.ends_with(&cause) { line } else { format!("{line}: {cause}") })
}
