//! Flags as they are typed. Every flag of `serve` is also an environment variable; `--help` is the manual. Those of the hub have
//! no `env` here: its variables are several for one flag, and read where Hugging Face's rules for them are kept.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Compresses a Hugging Face Transformer and serves it over HTTP on ordinary CPUs.
#[derive(Debug, Parser)]
#[command(name = "niwaki", version, about, max_term_width = 100)]
pub(super) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(super) command: Command,
}

/// The verbs of the program.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Serve a model over HTTP. Without --model, the model inside the binary is served.
    Serve(Box<ServeArgs>),
    /// Compress a model directory into an artefact that `serve` reads.
    Compress(Box<CompressArgs>),
    /// Measure a model: similarity, classification, retrieval, fidelity to another model, speed and memory.
    Eval(Box<EvalArgs>),
    /// Compare models: sizes, quality and speed in one table, measured in turn.
    Compare(Box<CompareArgs>),
    /// Show a model's layers, sizes, multiply-accumulates and provenance.
    Inspect(InspectArgs),
    /// Embed lines of text from standard input to standard output, one JSON array a line.
    Embed(EmbedArgs),
    /// Measure latency, throughput and the share of the processor's limit.
    Bench(Box<BenchArgs>),
    /// Ask a running server for its health; the exit code is the answer.
    Health(HealthArgs),
}

/// Which model, and how it is run.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArgs {
    /// A Hugging Face model directory or an artefact written by `niwaki compress`. `serve` takes several, each with the
    /// name that requests know it by (NAME=DIR); the first is the one that requests without a name mean.
    #[arg(long, env = "MODEL", value_name = "[NAME=]DIR", conflicts_with = "model_id", value_parser = super::parse::place)]
    pub(super) model: Vec<Place>,
    /// A model of the Hugging Face hub, downloaded once into the cache.
    #[arg(long, env = "MODEL_ID", value_name = "ORG/NAME")]
    pub(super) model_id: Option<String>,
    /// Branch, tag or commit of --model-id.
    #[arg(long, env = "REVISION", default_value = "main")]
    pub(super) revision: String,
    /// Access token of the hub (default: $HF_TOKEN, $HUGGING_FACE_HUB_TOKEN, $HF_API_TOKEN, or the file $HF_TOKEN_PATH or
    /// $HF_HOME/token).
    #[arg(long, value_name = "TOKEN")]
    pub(super) hf_token: Option<String>,
    /// Where downloads are kept (default: $HF_HUB_CACHE, $HUGGINGFACE_HUB_CACHE, $HF_HOME/hub or ~/.cache/huggingface/hub).
    #[arg(long, value_name = "DIR")]
    pub(super) huggingface_hub_cache: Option<PathBuf>,
    /// Numbers to compute with. An f32 checkpoint is quantized when it is loaded for int8.
    #[arg(long, env = "PRECISION", value_enum, default_value_t = Precision::Int8)]
    pub(super) precision: Precision,
    /// Sentence pooling, instead of the model's own.
    #[arg(long, env = "POOLING", value_enum)]
    pub(super) pooling: Option<PoolingArg>,
    /// Which keys a token sees: `window=W` on either side, `window=L:R`, `dilated=W:D` (every D-th), `strided=S` (a window
    /// and every S-th), `fixed=B:C` (its block of B and the last C of every block), `pooled=B` (its block, its neighbours,
    /// and the means of the others), or `full`; besides, `globals=cls` or a count of leading tokens that see and are seen
    /// by all, and `sinks=N` leading tokens that are seen by all. Positions repeat beyond the model's table.
    #[arg(long, env = "ATTENTION", value_name = "PATTERN", value_parser = super::parse::attention)]
    pub(super) attention: Option<crate::model::Band>,
    /// Longest input in tokens (default: the model's limit; with --attention 8192).
    #[arg(long, env = "MAX_INPUT_LENGTH", value_name = "TOKENS")]
    pub(super) max_input_length: Option<usize>,
    /// Threads that compute (default: the CPU quota of the cgroup, at most the processors there are).
    #[arg(long, env = "NIWAKI_THREADS")]
    pub(super) threads: Option<std::num::NonZeroUsize>,
    /// Instruction set, instead of the best that the processor has.
    #[arg(long, env = "NIWAKI_ISA", value_name = "ISA")]
    pub(super) isa: Option<String>,
}

/// A model directory, and what it is to be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// The name, if one is given.
    pub(super) name: Option<String>,
    /// The directory.
    pub(super) dir: PathBuf,
}

/// Numbers to compute with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Precision {
    /// 8-bit integers, own kernels.
    Int8,
    /// Single precision, the reference.
    F32,
}

impl Precision {
    /// As it is typed.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::F32 => "f32",
        }
    }
}

/// Sentence pooling by its usual names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum PoolingArg {
    /// The first token.
    Cls,
    /// The mean of all tokens.
    Mean,
    /// The maximum of all tokens.
    Max,
    /// The last token.
    LastToken,
}

/// Flags of `niwaki serve`; those that Text Embeddings Inference has too carry its names and defaults.
#[derive(Debug, Clone, Args)]
pub(super) struct ServeArgs {
    /// The model.
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Address to listen on. (Not read from HOSTNAME, which container runtimes set to the container's own name.)
    #[arg(long, env = "NIWAKI_HOSTNAME", default_value = "0.0.0.0")]
    pub(super) hostname: String,
    /// Port to listen on; 0 picks a free one.
    #[arg(short, long, env = "PORT", default_value_t = 3000)]
    pub(super) port: u16,
    /// Port of the gRPC service (Text Embeddings Inference's); 0 picks a free one. Without it there is none.
    #[arg(long, env = "GRPC_PORT", value_name = "PORT")]
    pub(super) grpc_port: Option<u16>,
    /// Port of their own for /metrics, /admin/reload (which needs a key there too) and probes; the main port then has the
    /// probes and neither of the others. 0 picks a free one. Without it the main port has all of them.
    #[arg(long, env = "PROMETHEUS_PORT", value_name = "PORT", visible_alias = "admin-port")]
    pub(super) prometheus_port: Option<u16>,
    /// Name of the model in answers (of a single model; see --model).
    #[arg(long, env = "SERVED_MODEL_NAME")]
    pub(super) served_model_name: Option<String>,
    /// Threads that tokenize (default: the computing threads).
    #[arg(long, env = "TOKENIZATION_WORKERS")]
    pub(super) tokenization_workers: Option<std::num::NonZeroUsize>,
    /// Inputs that may be in the server at once; more get 429.
    #[arg(long, env = "MAX_CONCURRENT_REQUESTS", default_value_t = 512)]
    pub(super) max_concurrent_requests: usize,
    /// Tokens of one batch.
    #[arg(long, env = "MAX_BATCH_TOKENS", default_value_t = 16_384)]
    pub(super) max_batch_tokens: usize,
    /// Inputs of one batch (default: no limit but the tokens).
    #[arg(long, env = "MAX_BATCH_REQUESTS")]
    pub(super) max_batch_requests: Option<usize>,
    /// Tokens that may wait at once; more get 429.
    #[arg(long, env = "MAX_QUEUE_TOKENS", default_value_t = 262_144)]
    pub(super) max_queue_tokens: usize,
    /// Inputs of one request; more get 422.
    #[arg(long, env = "MAX_CLIENT_BATCH_SIZE", default_value_t = 32)]
    pub(super) max_client_batch_size: usize,
    /// Truncate inputs that are too long (otherwise 422, unless the request asks for truncation).
    #[arg(long, env = "AUTO_TRUNCATE", default_value_t = true, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub(super) auto_truncate: bool,
    /// Name of the prompt put before every input that names none.
    #[arg(long, env = "DEFAULT_PROMPT_NAME", conflicts_with = "default_prompt")]
    pub(super) default_prompt_name: Option<String>,
    /// Text put before every input whose request names no prompt.
    #[arg(long, env = "DEFAULT_PROMPT")]
    pub(super) default_prompt: Option<String>,
    /// Largest request body in bytes; more gets 413.
    #[arg(long, env = "PAYLOAD_LIMIT", default_value_t = 2_000_000)]
    pub(super) payload_limit: usize,
    /// Key that clients must send as `Authorization: Bearer KEY` or `x-api-key: KEY`. Without a key all routes but
    /// /admin/reload are open to everyone; that one always needs a key, and is closed where there is none.
    #[arg(long, env = "API_KEY", hide_env_values = true)]
    pub(super) api_key: Option<String>,
    /// File of further keys, one a line; lines that begin with `#` are comments. Read again on SIGHUP and by
    /// /admin/reload; a file that cannot be used is refused then, and the old keys stay.
    #[arg(long, env = "API_KEY_FILE", value_name = "FILE")]
    pub(super) api_key_file: Option<PathBuf>,
    /// Certificate for TLS on all ports, followed by those that lead to its authority; PEM. Read again on SIGHUP and
    /// by /admin/reload, together with its key; a pair that cannot be used is refused then, and the old one stays.
    #[arg(long, env = "TLS_CERT", value_name = "FILE", requires = "tls_key")]
    pub(super) tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert; PEM (PKCS #8, PKCS #1 or SEC 1).
    #[arg(long, env = "TLS_KEY", value_name = "FILE", requires = "tls_cert")]
    pub(super) tls_key: Option<PathBuf>,
    /// Connections of each port at once; more get 429 for work and answers to probes, and far more none (default: three
    /// quarters of the files that may be open, divided by the number of ports, at most 16384).
    #[arg(long, env = "MAX_CONNECTIONS")]
    pub(super) max_connections: Option<std::num::NonZeroUsize>,
    /// Largest head of a request in bytes; more gets 431.
    #[arg(long, env = "MAX_HEADER_SIZE", value_name = "BYTES", default_value_t = 32_768)]
    pub(super) max_header_size: usize,
    /// Origins that browsers may call from (default: any).
    #[arg(long, env = "CORS_ALLOW_ORIGIN", value_delimiter = ',')]
    pub(super) cors_allow_origin: Vec<String>,
    /// Time after which a request that sets no `x-request-timeout-ms` gets 504; 0 means none.
    #[arg(long, env = "DEFAULT_TIMEOUT_MS", value_name = "MS", default_value_t = 30_000)]
    pub(super) default_timeout_ms: u64,
    /// Seconds that requests in flight have to finish after SIGTERM.
    #[arg(long, env = "SHUTDOWN_GRACE", value_name = "SECONDS", default_value_t = 30)]
    pub(super) shutdown_grace: u64,
    /// Collector of OpenTelemetry traces, by OTLP over gRPC without TLS, such as http://localhost:4317. Requests for work
    /// then give a span, and one for each stage; a client's `traceparent` is honoured. A collector that cannot be reached
    /// holds nothing up. (`OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS` are read too.)
    #[arg(long, env = "OTLP_ENDPOINT", value_name = "URL")]
    pub(super) otlp_endpoint: Option<String>,
    /// Name of the service in traces.
    #[arg(long, env = "OTLP_SERVICE_NAME", default_value = "niwaki")]
    pub(super) otlp_service_name: String,
    /// Share of the traces to sample that begin here, 0 to 1; of those that a client began, the client decides.
    #[arg(long, env = "OTLP_SAMPLE_RATIO", value_name = "SHARE", default_value_t = 1.0, value_parser = super::parse::ratio)]
    pub(super) otlp_sample_ratio: f64,
    /// Log requests that take longer, with their ids, their trace and the time of each stage; 0 means none.
    #[arg(long, env = "SLOW_REQUEST_MS", value_name = "MS", default_value_t = 0)]
    pub(super) slow_request_ms: u64,
    /// Log as JSON lines. Events that concern a request carry its id and that of its trace; no text of a user is logged.
    #[arg(long, env = "JSON_OUTPUT", default_value_t = false, num_args = 0..=1, default_missing_value = "true", action = clap::ArgAction::Set)]
    pub(super) json_output: bool,
}

/// Flags of `niwaki compress`.
#[derive(Debug, Args)]
pub(super) struct CompressArgs {
    /// The uncompressed Hugging Face model directory.
    #[arg(long, value_name = "DIR")]
    pub(super) model: PathBuf,
    /// Directory of the artefact; written whole or not at all.
    #[arg(long, value_name = "DIR")]
    pub(super) out: PathBuf,
    /// Replace OUT if it exists.
    #[arg(long)]
    pub(super) force: bool,
    /// Passes in order, as TOML; without it the flags below say what is done, plain INT8 if none is given.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prune_heads", "prune_ffn", "importance"])]
    pub(super) recipe: Option<PathBuf>,
    /// Text that passes measure on, one text a line (instead of the recipe's).
    #[arg(long, value_name = "FILE")]
    pub(super) calibration: Option<PathBuf>,
    /// Tokens of calibration text to use (default: the recipe's, or 30000).
    #[arg(long, value_name = "TOKENS")]
    pub(super) calibration_tokens: Option<usize>,
    /// Share of all attention heads to remove, 0 to 0.9.
    #[arg(long, default_value_t = 0.0, value_parser = super::parse::share)]
    pub(super) prune_heads: f64,
    /// Share of all FFN neurons to remove, 0 to 0.9.
    #[arg(long, default_value_t = 0.0, value_parser = super::parse::share)]
    pub(super) prune_ffn: f64,
    /// How the importance of heads and neurons is measured (default: curvature).
    #[arg(long)]
    pub(super) importance: Option<crate::compress::Importance>,
    /// Attention pattern of every layer of the artefact, as for `serve`.
    #[arg(long, value_name = "PATTERN", value_parser = super::parse::attention)]
    pub(super) attention: Option<crate::model::Band>,
    /// Longest input in tokens (default: the model's; with --attention 8192).
    #[arg(long, value_name = "TOKENS")]
    pub(super) max_input_length: Option<usize>,
    /// Measure the speed before and after on this machine, for the report; its bytes then differ from run to run.
    #[arg(long)]
    pub(super) speed: bool,
    /// Name of the model in the artefact (default: the name of the directory).
    #[arg(long)]
    pub(super) name: Option<String>,
    /// Seed of every random choice (default: the recipe's, or 0).
    #[arg(long)]
    pub(super) seed: Option<u64>,
}

/// Flags of `niwaki eval`.
#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// The model.
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// What to measure.
    #[command(flatten)]
    pub(super) tasks: super::tasks::TaskArgs,
    /// The model that --texts compares with: the cosine between both models' embeddings is measured. A directory, run in
    /// f32 unless it ends in `@int8`.
    #[arg(long, value_name = "DIR[@f32|@int8]", requires = "texts")]
    pub(super) reference: Option<super::subject::Named>,
    /// A second model, measured on the same tasks; differences get intervals by paired bootstrap. `@builtin` is the model
    /// inside the binary.
    #[arg(long, value_name = "DIR[@f32|@int8]")]
    pub(super) against: Option<super::subject::Named>,
    /// Measure latency, throughput and memory as well.
    #[arg(long)]
    pub(super) speed: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// Flags of `niwaki compare`.
#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Model directories or artefacts; differences are to the first. `@builtin` is the model inside the binary; a directory
    /// followed by `@f32` is run in single precision.
    #[arg(value_name = "DIR[@f32|@int8]", num_args = 2.., required = true)]
    pub(super) models: Vec<super::subject::Named>,
    /// What to measure.
    #[command(flatten)]
    pub(super) tasks: super::tasks::TaskArgs,
    /// Leave out latency and throughput.
    #[arg(long)]
    pub(super) no_speed: bool,
    /// Passes over the texts that latency and throughput are measured in; the models take turns.
    #[arg(long, default_value = "7")]
    pub(super) rounds: std::num::NonZeroUsize,
    /// Write tables and charts as one HTML file.
    #[arg(long, value_name = "FILE")]
    pub(super) out: Option<PathBuf>,
    /// Threads that compute (default: the CPU quota of the cgroup, at most the processors there are).
    #[arg(long, env = "NIWAKI_THREADS")]
    pub(super) threads: Option<std::num::NonZeroUsize>,
    /// Instruction set, instead of the best that the processor has.
    #[arg(long, env = "NIWAKI_ISA", value_name = "ISA")]
    pub(super) isa: Option<String>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// Flags of `niwaki inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// A model directory (default: the model inside the binary).
    #[arg(long, env = "MODEL", value_name = "DIR")]
    pub(super) model: Option<PathBuf>,
    /// List every matrix.
    #[arg(long)]
    pub(super) matrices: bool,
    /// Print the manifest, the layers and the matrices as JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// Flags of `niwaki embed`.
#[derive(Debug, Args)]
pub(super) struct EmbedArgs {
    /// The model.
    #[command(flatten)]
    pub(super) model: ModelArgs,
}

/// Flags of `niwaki bench`.
#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// The model.
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Inputs, one JSON value a line: a string, a list of token ids, or an object with a `text` or `ids` (default:
    /// --sequences of --length tokens).
    #[arg(long, value_name = "FILE")]
    pub(super) input: Option<PathBuf>,
    /// Sequences to make up when there is no input file.
    #[arg(long, default_value = "1")]
    pub(super) sequences: std::num::NonZeroUsize,
    /// Tokens of each made-up sequence.
    #[arg(long, default_value = "128")]
    pub(super) length: std::num::NonZeroUsize,
    /// Tokens of one batch.
    #[arg(long, default_value_t = 16_384)]
    pub(super) max_batch_tokens: usize,
    /// Sequences of one batch (default: as many as fit).
    #[arg(long)]
    pub(super) batch: Option<usize>,
    /// Batches that run at once, each on its share of the threads.
    #[arg(long, default_value = "1")]
    pub(super) workers: std::num::NonZeroUsize,
    /// Passes over the input that are not counted.
    #[arg(long, default_value_t = 3)]
    pub(super) warmup: usize,
    /// Passes over the input that are counted.
    #[arg(long, default_value = "20")]
    pub(super) rounds: std::num::NonZeroUsize,
    /// Show what share of the time each operation takes (one worker, INT8).
    #[arg(long)]
    pub(super) profile: bool,
    /// Send the inputs to a running server instead, one a request.
    #[arg(long, value_name = "URL", conflicts_with_all = ["workers", "batch", "profile"])]
    pub(super) http: Option<String>,
    /// With --http: the route that takes `{"inputs": …}`.
    #[arg(long, default_value = "/embed", requires = "http")]
    pub(super) route: String,
    /// With --http: clients that send a request as soon as their last one is answered; with --rate, the most requests
    /// that may be open at once.
    #[arg(long, default_value = "64", requires = "http")]
    pub(super) clients: std::num::NonZeroUsize,
    /// With --http: requests per second that arrive whether or not earlier ones were answered. Latency counts from the
    /// moment a request was due.
    #[arg(long, value_name = "PER_SECOND", requires = "http")]
    pub(super) rate: Option<f64>,
    /// With --http: seconds to measure, after a fifth of that to warm up.
    #[arg(long, default_value_t = 10.0, requires = "http")]
    pub(super) seconds: f64,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// Flags of `niwaki health`.
#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// Host of the server.
    #[arg(long, default_value = "127.0.0.1")]
    pub(super) host: String,
    /// Port of the server.
    #[arg(short, long, env = "PORT", default_value_t = 3000)]
    pub(super) port: u16,
    /// Speak TLS; so does a TLS_CERT in the environment, which is how a container tells its server. As other probes do,
    /// this one asks its own machine and does not check whom the certificate is for.
    #[arg(long)]
    pub(super) tls: bool,
}
