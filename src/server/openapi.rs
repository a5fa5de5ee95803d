//! The OpenAPI document.
//!
//! What succeeds is described at the handlers; what fails is filled in from the table of error classes, so that the
//! document cannot promise another status than the service gives.

use std::collections::BTreeMap;

use utoipa::openapi::path::{Operation, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, SchemaType, Type};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Required, Response, ResponseBuilder, SecurityRequirement};
use utoipa::{Modify, OpenApi};

use super::api;
use super::error::{Dialect, ErrorClass};
use super::routes::{embed, inference, ops, score, text};
use crate::telemetry::Route;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "niwaki",
        description = "Embeddings and scores from compressed Transformers on ordinary CPUs. The routes are Text \
            Embeddings Inference's, OpenAI's, Cohere's, and the Open Inference Protocol's. Every request may carry \
            `x-request-id` and `x-request-timeout-ms`; every response carries `x-request-id`. Where several models \
            are served, a request names one by the field `model` of its API, by `?model=` or by the header `x-model`; \
            otherwise the first one is meant.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        embed::embed,
        embed::root,
        embed::embed_all,
        embed::similarity,
        embed::v1_embeddings,
        embed::embeddings,
        score::predict,
        score::rerank,
        score::v1_rerank,
        score::v2_rerank,
        inference::server,
        inference::live,
        inference::ready,
        inference::model,
        inference::model_ready,
        inference::infer,
        ops::reload,
        text::tokenize,
        text::decode,
        ops::models,
        ops::model,
        ops::info,
        ops::health,
        ops::live,
        ops::ready,
        ops::ping,
        ops::root,
        ops::metrics,
    ),
    components(schemas(api::ErrorBody, api::OpenAiErrorBody)),
    modifiers(&Failures)
)]
struct Document;

/// The document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    Document::openapi()
}

/// The document of a port without metrics and administration.
#[must_use]
pub fn public_document() -> utoipa::openapi::OpenApi {
    let mut document = document();
    document.paths.paths.retain(|path, _| !matches!(Route::matched(path), Route::Metrics | Route::Reload));
    document
}

struct Failures;

impl Modify for Failures {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        let components = document.components.get_or_insert_default();
        components.security_schemes.insert("api_key".to_owned(), RefOr::T(SecurityScheme::Http(bearer)));
        for (path, item) in &mut document.paths.paths {
            let route = Route::matched(path);
            if let Some(operation) = &mut item.post {
                name_model(operation, route);
                describe(operation, ErrorClass::of(route), Dialect::of(route, path));
            }
            if let Some(operation) = &mut item.get {
                // `GET /` is a probe, `POST /` is work.
                let route = if route == Route::Root { Route::Health } else { route };
                name_model(operation, route);
                describe(operation, ErrorClass::of(route), Dialect::of(route, path));
            }
        }
    }
}

/// The routes that take the name of a model from their address or headers.
fn name_model(operation: &mut Operation, route: Route) {
    let takes = route == Route::Reload || route == Route::Info || ErrorClass::of(route).contains(&ErrorClass::Deadline);
    if !takes || route == Route::Infer {
        return;
    }
    let name = ParameterBuilder::new()
        .name("model")
        .parameter_in(ParameterIn::Query)
        .required(Required::False)
        .description(Some("Name of the model; the header `x-model` says the same"))
        .schema(Some(ObjectBuilder::new().schema_type(SchemaType::Type(Type::String)).build()))
        .build();
    operation.parameters.get_or_insert_default().push(RefOr::T(name));
}

fn describe(operation: &mut Operation, classes: &[ErrorClass], dialect: Dialect) {
    let mut by_status: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for class in classes {
        let words = class.words();
        by_status.entry(words.status.as_u16()).or_default().push(words.description);
    }
    for (status, descriptions) in by_status {
        let response = failure(&descriptions.join("; or: "), dialect);
        operation.responses.responses.insert(status.to_string(), RefOr::T(response));
    }
    if classes.contains(&ErrorClass::Unauthorized) {
        let key = SecurityRequirement::new("api_key", Vec::<String>::new());
        // The second says that a server may be without keys.
        operation.security = Some(vec![key, SecurityRequirement::default()]);
    }
}

fn failure(description: &str, dialect: Dialect) -> Response {
    let schema = match dialect {
        Dialect::Tei | Dialect::Grpc => "ErrorBody",
        Dialect::OpenAi => "OpenAiErrorBody",
    };
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name(schema))).build();
    ResponseBuilder::new().description(description).content("application/json", content).build()
}
