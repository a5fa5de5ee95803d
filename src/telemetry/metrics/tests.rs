use std::collections::BTreeMap;

use super::super::events::{self, BatchStats, ResponseStats};
use super::*;

/// Samples by name with labels, our prefix left off; panics on a line that is neither a comment nor a sample.
fn samples(text: &str) -> BTreeMap<String, f64> {
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.is_empty())
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            (name.trim_start_matches(PREFIX).to_owned(), value.parse().unwrap_or_else(|_| panic!("no number: {line}")))
        })
        .collect()
}

#[test]
fn all_series_exist_before_the_first_request() {
    let text = Metrics::new().render();
    let found = samples(&text);
    let mut expected = Vec::new();
    for &route in Route::ALL {
        expected.push(format!("request_duration_seconds_count{{route=\"{route}\"}}"));
        for code in route.codes() {
            expected.push(format!("requests_total{{code=\"{code}\",route=\"{route}\"}}"));
        }
    }
    let labelled = |name: &str, label: &str, value: &str| format!("{name}{{{label}=\"{value}\"}}");
    expected.extend(Stage::ALL.iter().map(|s| labelled("stage_duration_seconds_sum", "stage", s.label())));
    expected.extend(RejectReason::ALL.iter().map(|r| labelled("rejected_total", "reason", r.label())));
    expected.extend(ExpiryStage::ALL.iter().map(|s| labelled("expired_total", "stage", s.label())));
    expected.extend(MemoryKind::ALL.iter().map(|k| labelled("memory_bytes", "kind", k.label())));
    for name in [
        "requests_in_flight",
        "queue_depth",
        "queue_tokens",
        "queue_capacity",
        "concurrency_limit",
        "cancelled_total",
        "batch_size_count",
        "batch_tokens_count",
        "batch_duration_seconds_count",
        "batch_padding_tokens_total",
        "input_tokens_total",
        "input_tokens_count",
        "truncated_total",
        "inference_errors_total",
        "cgroup_memory_limit_bytes",
        "threads",
        "selfcheck_cosine",
        "selfcheck_drift",
        "ready",
        "model_load_seconds",
    ] {
        expected.push(name.to_owned());
    }
    for name in &expected {
        assert!(found.contains_key(name), "{name} is missing from\n{text}");
    }
    #[cfg(target_os = "linux")]
    assert!(found["process_resident_memory_bytes"] > 0.0 && found["memory_bytes{kind=\"rss\"}"] > 0.0);
}

#[test]
fn every_family_has_help_and_a_conventional_name() {
    let metrics = Metrics::new();
    metrics.set_build_info("1", "avx2");
    metrics.set_model(&ModelInfo::default(), Duration::ZERO);
    for family in metrics.registry.gather() {
        let (name, help) = (family.name(), family.help());
        assert!(help.ends_with('.') && help.len() > 15, "{name}: {help}");
        if !name.starts_with("process_") {
            assert!(name.starts_with(PREFIX), "{name}");
            let is_counter = family.get_field_type() == prometheus::proto::MetricType::COUNTER;
            assert_eq!(name.ends_with("_total"), is_counter, "{name}");
        }
    }
}

#[test]
fn events_reach_their_series() {
    let metrics = Metrics::new();
    let ms = Duration::from_millis;
    let in_flight = metrics.in_flight();
    let response = |route, code| ResponseStats { route, code, duration: ms(3), request_id: "r", trace_id: None };
    events::response_sent(&metrics, &response(Route::Embed, 200));
    events::response_sent(&metrics, &response(Route::Embed, 200));
    events::response_sent(&metrics, &response(Route::Health, 418));
    events::stage_passed(&metrics, Stage::Infer, ms(2));
    events::rejected(&metrics, RejectReason::Memory);
    events::expired(&metrics, ExpiryStage::Queue);
    events::cancelled(&metrics);
    events::truncated(&metrics);
    events::sequence_admitted(&metrics, 17);
    let batch = BatchStats { worker: 0, n_seqs: 3, n_tokens: 40, queue_wait: ms(1), compute: ms(9) };
    events::batch_finished(&metrics, &batch);
    events::inference_failed(&metrics, &std::fmt::Error);
    events::engine_started("m", 2, 1000, 64);
    events::self_checked(&metrics, "m", 0.998, 0.99, 0.001);
    events::self_checked(&metrics, "n", 0.999, 0.99, 0.0005);
    events::reloaded(&metrics, "m", None, ms(1));
    events::reload_refused(&metrics, "m", "damaged");
    events::reload_refused(&metrics, "m", "damaged");
    metrics.model_counters("m").batch(2, 30);
    let model = ModelInfo { model: "a \"b\"".to_owned(), ..ModelInfo::default() };
    events::model_loaded(&metrics, &model, ms(80));
    events::ready(&metrics, ([127, 0, 0, 1], 1).into(), None, None);
    let reading = |depth, tokens| Some(QueueReading { depth, tokens, capacity: 1000, inputs: 64 });
    metrics.queue_source("m", move || reading(4, 99));
    metrics.queue_source("n", move || reading(1, 1));
    metrics.queue_source("n", || None);
    metrics.set_threads(2);
    metrics.set_build_info("1", "avx2");
    metrics.set_build_info("1", "portable");
    metrics.memory_source(MemoryKind::Workspace, || Some(1));
    metrics.memory_source(MemoryKind::Workspace, || Some(77));
    metrics.memory_source(MemoryKind::Tokenizer, || None);

    let found = samples(&metrics.render());
    for (name, value) in [
        ("requests_total{code=\"200\",route=\"/embed\"}", 2.0),
        ("requests_total{code=\"418\",route=\"/health\"}", 1.0),
        ("request_duration_seconds_bucket{route=\"/embed\",le=\"0.0016\"}", 0.0),
        ("request_duration_seconds_bucket{route=\"/embed\",le=\"0.0032\"}", 2.0),
        ("stage_duration_seconds_count{stage=\"infer\"}", 1.0),
        ("rejected_total{reason=\"memory\"}", 1.0),
        ("rejected_total{reason=\"deadline\"}", 1.0),
        ("expired_total{stage=\"queue\"}", 1.0),
        ("cancelled_total", 1.0),
        ("truncated_total", 1.0),
        ("input_tokens_total", 17.0),
        ("input_tokens_bucket{le=\"16\"}", 0.0),
        ("input_tokens_bucket{le=\"32\"}", 1.0),
        ("batch_size_sum", 3.0),
        ("batch_tokens_sum", 40.0),
        ("batch_duration_seconds_count", 1.0),
        ("batch_padding_tokens_total", 0.0),
        ("inference_errors_total", 1.0),
        ("queue_capacity", 2000.0),
        ("concurrency_limit", 128.0),
        ("selfcheck_drift", 0.001),
        ("queue_depth", 5.0),
        ("queue_tokens", 100.0),
        ("model_queue_tokens{model=\"m\"}", 99.0),
        ("model_queue_depth{model=\"n\"}", 1.0),
        ("model_queue_capacity{model=\"n\"}", 1000.0),
        ("model_sequences_total{model=\"m\"}", 2.0),
        ("model_tokens_total{model=\"m\"}", 30.0),
        ("model_reloads_total{model=\"m\",result=\"swapped\"}", 1.0),
        ("model_reloads_total{model=\"m\",result=\"refused\"}", 2.0),
        ("threads", 2.0),
        ("selfcheck_cosine", 0.998),
        ("ready", 1.0),
        ("requests_in_flight", 1.0),
        ("memory_bytes{kind=\"workspace\"}", 78.0),
        ("memory_bytes{kind=\"tokenizer\"}", 0.0),
        ("build_info{isa=\"portable\",version=\"1\"}", 1.0),
        ("model_info{attention=\"\",family=\"\",model=\"a \\\"b\\\"\",precision=\"\",scheme=\"\"}", 1.0),
        ("model_load_seconds", 0.08),
    ] {
        assert_eq!(found.get(name), Some(&value), "{name}");
    }
    assert!(!found.contains_key("build_info{isa=\"avx2\",version=\"1\"}"));
    drop(in_flight);
    assert_eq!(metrics.requests_in_flight(), 0);
    events::draining(&metrics, ms(1));
    assert_eq!(samples(&metrics.render())["ready"], 0.0);
}
