//! Compresses a Hugging Face Transformer and serves it over HTTP.

/// Counts what is allocated, for the memory metrics.
#[global_allocator]
static ALLOCATOR: niwaki::telemetry::allocator::CountingAllocator = niwaki::telemetry::allocator::CountingAllocator;

fn main() -> std::process::ExitCode {
    niwaki::telemetry::allocator::use_small_pages();
    niwaki::cli::run()
}
