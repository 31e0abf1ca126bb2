//! What the program tells about itself: the log on stderr, as lines for people, or as one JSON object a line for what collects logs of
//! containers; and spans of tasks for a receiver of OTLP, where the environment names one. No secret and no key name is in any of
//! them, at any level.
//!
//! Set up once, by `cli`, before anything else runs. Figures are in `metrics`, not here.

use std::io::{self, IsTerminal};
use std::time::Duration;

use clap::ValueEnum;
use opentelemetry::{KeyValue, global};
use opentelemetry_otlp::{Protocol, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::EnvFilter;

/// The environment variable whose filter takes the place of the level: `debug`, or `ttlsweep::engine=trace`.
pub const FILTER: &str = "TTLSWEEP_LOG";

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line: `timestamp`, `level`, `message`, `target`, and the facts beside them.
    Json,
}

/// Begins to log. `verbose`: 0 for nothing, 1 for what an operator wants to know, 2 for more.
pub fn init(verbose: u8, format: LogFormat) {
    let level = match verbose {
        0 => "off",
        1 => "ttlsweep=info",
        _ => "ttlsweep=debug",
    };
    // What is wrong with a receiver of spans is told as well.
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
        // It would say so on the same stderr, and panic where that cannot be written either: a full disk.
        .log_internal_errors(false);
    match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).init(),
        LogFormat::Json => {
            lines.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
            // Without this a panic is several lines of text among the objects.
            std::panic::set_hook(Box::new(|panic| tracing::error!(%panic, "the program broke")));
        }
    }
    if let Some(error) = wrong {
        tracing::warn!(%error, "{FILTER} is no filter such as debug or ttlsweep::engine=trace");
    }
}

/// Variables of which one names a receiver of spans. The others that begin with OTEL_ are read too, as OpenTelemetry defines them.
const RECEIVERS: [&str; 2] = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"];
/// How long the end of the program waits for the last spans to be taken.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// Spans on their way to a receiver. Those that wait are sent when this is dropped.
#[derive(Debug)]
pub struct Traces(Option<SdkTracerProvider>);

/// Begins to send spans, if the environment says where to. They wait in a bounded queue of another thread and hold nobody; what a
/// receiver does not take is lost. Needs a provider of TLS, and that [`init`] was called.
pub fn trace() -> Traces {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    if !RECEIVERS.into_iter().any(set) || std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value == "true") {
        return Traces(None);
    }
    let exporter = match SpanExporter::builder().with_http().with_protocol(Protocol::HttpBinary).build() {
        Ok(exporter) => exporter,
        Err(error) => {
            tracing::error!(%error, "spans cannot be sent");
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
