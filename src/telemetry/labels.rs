//! Label values: every one comes from an enum here, never from a request.

/// Declares an enum whose variants are label values.
macro_rules! labels {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident => $label:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant,)+ }

        impl $name {
            /// All values, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The value of the label.
            #[must_use]
            pub const fn label(self) -> &'static str {
                match self { $(Self::$variant => $label,)+ }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.label())
            }
        }
    };
}

labels! {
    /// A route as the router matched it; what matches none is [`Route::Other`].
    Route {
        /// `POST /embed`.
        Embed => "/embed",
        /// `POST /embed_all`.
        EmbedAll => "/embed_all",
        /// `POST /similarity`.
        Similarity => "/similarity",
        /// `POST /tokenize`.
        Tokenize => "/tokenize",
        /// `POST /decode`.
        Decode => "/decode",
        /// `POST /predict`.
        Predict => "/predict",
        /// `POST /rerank`.
        Rerank => "/rerank",
        /// `POST /v1/rerank`, Cohere's and Jina's.
        CohereRerank => "/v1/rerank",
        /// `POST /v2/rerank`, the same.
        CohereRerank2 => "/v2/rerank",
        /// `POST /v1/embeddings`.
        OpenAiEmbeddings => "/v1/embeddings",
        /// `POST /embeddings`, the same under its other name.
        Embeddings => "/embeddings",
        /// `GET` and `POST /`.
        Root => "/",
        /// `GET /v1/models`.
        Models => "/v1/models",
        /// `GET /v1/models/{id}`.
        Model => "/v1/models/{id}",
        /// `GET /v2`, of the Open Inference Protocol as what follows.
        Inference => "/v2",
        /// `GET /v2/health/live`.
        InferenceLive => "/v2/health/live",
        /// `GET /v2/health/ready`.
        InferenceReady => "/v2/health/ready",
        /// `GET /v2/models/{name}`.
        InferenceModel => "/v2/models/{name}",
        /// `GET /v2/models/{name}/ready`.
        InferenceModelReady => "/v2/models/{name}/ready",
        /// `POST /v2/models/{name}/infer`.
        Infer => "/v2/models/{name}/infer",
        /// `POST /admin/reload`.
        Reload => "/admin/reload",
        /// `GET /info`.
        Info => "/info",
        /// `GET /health`.
        Health => "/health",
        /// `GET /health/live`.
        HealthLive => "/health/live",
        /// `GET /health/ready`.
        HealthReady => "/health/ready",
        /// `GET /ping`.
        Ping => "/ping",
        /// `GET /metrics`.
        Metrics => "/metrics",
        /// `GET /docs` and what lies below.
        Docs => "/docs",
        /// `GET /api-doc/openapi.json`.
        OpenApi => "/api-doc/openapi.json",
        /// gRPC's `tei.v1.Info`.
        GrpcInfo => "/tei.v1.Info",
        /// gRPC's `tei.v1.Embed`.
        GrpcEmbed => "/tei.v1.Embed",
        /// gRPC's `tei.v1.Predict`.
        GrpcPredict => "/tei.v1.Predict",
        /// gRPC's `tei.v1.Rerank`.
        GrpcRerank => "/tei.v1.Rerank",
        /// gRPC's `tei.v1.Tokenize`.
        GrpcTokenize => "/tei.v1.Tokenize",
        /// gRPC's `grpc.health.v1.Health`.
        GrpcHealth => "/grpc.health.v1.Health",
        /// Everything that matched no route.
        Other => "other",
    }
}

/// Codes of a route that runs the model or the tokenizer.
const WORK_CODES: &[u16] = &[200, 400, 401, 404, 405, 408, 413, 415, 422, 424, 429, 500, 503, 504];
/// Codes of a probe: open to everyone, no body.
const PROBE_CODES: &[u16] = &[200, 405, 500, 503];
/// Codes of a page that needs the key, where one is set.
const READ_CODES: &[u16] = &[200, 401, 405, 500, 503];

impl Route {
    /// The route of a matched path; wildcard routes below `/docs` count as `/docs`, methods of gRPC as their service.
    #[must_use]
    pub fn matched(path: &str) -> Self {
        let service = path.rsplit_once('/').map_or("", |(service, _)| service);
        match path {
            _ if path.starts_with("/docs/") => Self::Docs,
            _ if service.contains('.') => {
                let routes = Self::ALL.iter().copied().filter(|route| route.is_grpc());
                routes.into_iter().find(|route| route.label() == service).unwrap_or(Self::Other)
            }
            "other" => Self::Other,
            _ => Self::ALL.iter().copied().find(|route| route.label() == path).unwrap_or(Self::Other),
        }
    }

    /// Whether it is a service of gRPC. Its answers are counted by the codes of HTTP that mean the same.
    #[must_use]
    pub const fn is_grpc(self) -> bool {
        matches!(
            self,
            Self::GrpcInfo
                | Self::GrpcEmbed
                | Self::GrpcPredict
                | Self::GrpcRerank
                | Self::GrpcTokenize
                | Self::GrpcHealth
        )
    }

    /// The status codes whose series exist from the start. A code that is not listed is counted too, in a series made
    /// when it first occurs.
    #[must_use]
    pub const fn codes(self) -> &'static [u16] {
        match self {
            Self::Embed
            | Self::EmbedAll
            | Self::Similarity
            | Self::Tokenize
            | Self::Decode
            | Self::OpenAiEmbeddings
            | Self::Embeddings
            | Self::Predict
            | Self::Rerank
            | Self::CohereRerank
            | Self::CohereRerank2
            | Self::Infer
            | Self::GrpcEmbed
            | Self::GrpcPredict
            | Self::GrpcRerank
            | Self::GrpcTokenize
            | Self::Root => WORK_CODES,
            Self::Models | Self::Inference | Self::GrpcInfo => READ_CODES,
            Self::GrpcHealth => &[200, 404, 500, 503],
            Self::Model | Self::Info | Self::InferenceModel => &[200, 401, 404, 405, 500, 503],
            Self::InferenceModelReady => &[200, 404, 405, 500, 503],
            Self::Reload => &[200, 401, 404, 405, 422, 500, 503],
            Self::InferenceLive | Self::InferenceReady => PROBE_CODES,
            Self::Health | Self::HealthLive | Self::HealthReady | Self::Ping | Self::Metrics | Self::OpenApi => {
                PROBE_CODES
            }
            Self::Docs => &[200, 303, 304, 404, 405, 500],
            Self::Other => &[200, 400, 401, 404, 405, 413, 500, 503],
        }
    }
}

labels! {
    /// A part of a request's time.
    Stage {
        /// Text to token ids.
        Tokenize => "tokenize",
        /// From admission until a worker takes the sequence.
        Queue => "queue",
        /// The forward pass of the batch that held it.
        Infer => "infer",
        /// Rows to bytes.
        Serialize => "serialize",
    }
}

labels! {
    /// Why a request was answered without its result.
    RejectReason {
        /// The queue's tokens or requests are taken.
        Overload => "overload",
        /// Its deadline passed.
        Deadline => "deadline",
        /// The bytes set aside for requests are taken.
        Memory => "memory",
        /// The connection was one too many.
        Connections => "connections",
        /// The process is stopping.
        Draining => "draining",
        /// Body too large, or not readable as JSON.
        Payload => "payload",
        /// The request means nothing valid.
        Validation => "validation",
        /// Key missing or wrong.
        Auth => "auth",
        /// More inputs than one request may carry.
        ClientBatch => "client_batch",
    }
}

labels! {
    /// Where a request was when its deadline passed.
    ExpiryStage {
        /// It had passed on arrival at the engine.
        Admission => "admission",
        /// While the text was turned into ids, or waited for it.
        Tokenize => "tokenize",
        /// While all of it waited in the queue: it has cost no compute.
        Queue => "queue",
        /// While a part of it was computed, or after.
        Infer => "infer",
    }
}

labels! {
    /// A port of the service.
    Port {
        /// HTTP with JSON.
        Http => "http",
        /// gRPC.
        Grpc => "grpc",
        /// Metrics and administration.
        Admin => "admin",
    }
}

labels! {
    /// Why a connection was ended, or not let in.
    Dropped {
        /// TLS could not be agreed on, or not in time.
        Handshake => "handshake",
        /// No request's head came in time; idle connections of HTTP/1 end so too.
        HeadTimeout => "head_timeout",
        /// A request's head was too large.
        HeadSize => "head_size",
        /// The client took nothing of its answer for too long, or too little.
        SlowReader => "slow_reader",
        /// There were too many.
        Limit => "limit",
    }
}

labels! {
    /// What became of a span.
    SpanResult {
        /// A collector took it.
        Exported => "exported",
        /// No collector took its batch.
        Failed => "failed",
        /// It found the queue full.
        Dropped => "dropped",
    }
}

labels! {
    /// What is read again while the service runs, besides models.
    Credential {
        /// The file of API keys.
        ApiKeys => "api_keys",
        /// The certificate and its key.
        Certificate => "certificate",
    }
}

labels! {
    /// What memory is held for.
    MemoryKind {
        /// Weights, shared by all workers.
        Weights => "weights",
        /// Workspaces of all workers.
        Workspace => "workspace",
        /// The largest part of the workspaces that a batch has used, summed over the workers.
        WorkspacePeak => "workspace_peak",
        /// The tokenizer's tables.
        Tokenizer => "tokenizer",
        /// Bytes that the program holds from the allocator.
        AllocatorAllocated => "allocator_allocated",
        /// Bytes that the allocator has made accessible and not given back to the system.
        AllocatorResident => "allocator_resident",
        /// Resident set of the process, file pages included.
        Rss => "rss",
        /// Size of the mapped model file.
        ModelFile => "model_file",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_found_by_its_path() {
        for &route in Route::ALL {
            assert_eq!(Route::matched(route.label()), route);
            assert!(route.codes().is_sorted(), "{route}");
            assert!(route.codes().contains(&200), "{route}");
        }
        assert_eq!(Route::matched("/docs/swagger-ui.css"), Route::Docs);
        assert_eq!(Route::matched("/embed/"), Route::Other);
        assert_eq!(Route::matched("/docsearch"), Route::Other);
        assert_eq!(Route::matched("/tei.v1.Embed/EmbedStream"), Route::GrpcEmbed);
        assert_eq!(Route::matched("/tei.v2.Embed/EmbedStream"), Route::Other);
    }
}
