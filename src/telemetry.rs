//! The log on stderr, as text or as JSON lines, and the spans of tasks for an OTLP receiver, if the environment names one. Neither
//! contains a secret or a key name, at any level.
//!
//! `cli` sets both up once, before anything else runs. Metrics are in `metrics`.

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::ValueEnum;
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::EnvFilter;

/// The environment variable with a filter that overrides the level, such as `debug` or `ttlsweep::engine=trace`.
pub(crate) const FILTER: &str = "TTLSWEEP_LOG";

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LogFormat {
    /// Lines of text, for people
    #[default]
    Text,
    /// One JSON object per line: `timestamp`, `level`, `message`, `target`, and the fields of the event
    Json,
}

/// Starts the log. `verbose`: 0 logs nothing, 1 the level info, 2 and more the level debug.
pub(crate) fn init(verbose: u8, format: LogFormat) {
    let level = match verbose {
        0 => "off",
        1 => "ttlsweep=info",
        _ => "ttlsweep=debug",
    };
    // The exporter's own warnings tell when the receiver of spans cannot be reached.
    let level =
        if verbose > 0 { format!("{level},opentelemetry_sdk=warn,opentelemetry-otlp=warn") } else { level.to_owned() };
    let (filter, wrong) = match std::env::var(FILTER).map(EnvFilter::try_new) {
        Ok(Ok(filter)) => (filter, None),
        Ok(Err(error)) => (EnvFilter::new(level), Some(error)),
        Err(_) => (EnvFilter::new(level), None),
    };
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        // The subscriber would report a failed write on the same stderr, and panic if that fails too, as on a full disk.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
            // By default a panic prints several lines of text among the JSON objects.
            std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the program panicked")));
        }
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "{FILTER} is not a filter such as debug or ttlsweep::engine=trace");
    }
}

/// Spans are sent if one of these variables is set. The exporter reads the other OTEL_ variables as OpenTelemetry defines them.
const RECEIVERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
/// How long the program waits at its end until the last spans are sent.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// The exporter of spans. Dropping it sends the spans that still wait.
#[derive(Debug)]
pub(crate) struct Traces(Option<SdkTracerProvider>);

/// Starts to send spans, if the environment names a receiver. They wait in a bounded queue of another thread and never block the
/// sweep; spans that the receiver does not take are lost. A TLS provider must be installed and [`init`] called before.
pub(crate) fn trace() -> Traces {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if !RECEIVERS.into_iter().any(set) || std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value == "true") {
        return Traces(None);
    }
    let exporter = match SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).build() {
        Ok(exporter) => exporter,
        Err(error) => {
            tracing::error!(%error, "cannot send spans");
            return Traces(None);
        }
    };
    let mut resource = Resource::builder().with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let named = std::env::var("OTEL_RESOURCE_ATTRIBUTES").is_ok_and(|given| given.contains("service.name="));
    if !named && !set("OTEL_SERVICE_NAME") {
        resource = resource.with_service_name("ttlsweep");
    }
    let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
    global::set_tracer_provider(provider.clone());
    Traces(Some(provider))
}

impl Drop for Traces {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.as_ref().map(|provider| provider.shutdown_with_timeout(LAST_SPANS)) {
            tracing::warn!(%error, "the last spans may be lost");
        }
    }
}
