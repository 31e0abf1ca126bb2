//! Sends notifications of what went wrong to a webhook. Reporting an event never blocks.
//!
//! [`Notifier::notify`] puts an event into a bounded queue and returns. One [`Delivery`] takes the events out in order and posts each until
//! the webhook accepts it, refuses it for good, or the event is too old. Events in the queue are lost when the process is killed: alerts
//! on the metrics cover that case.

mod message;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{Client, StatusCode, redirect};
use secrecy::ExposeSecret;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::model::event::Event;
use crate::settings::notify::NotifySettings;
use crate::settings::serve::ServeSettings;

/// Most events that wait. One more is dropped and counted.
const QUEUE: usize = 256;
/// Timeout of a request to the webhook.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// Pause before the second attempt; each further one is twice as long, up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_secs(1);
const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// How long an event is tried: longer than the receiver takes to restart, but not so long that the events behind it become outdated.
const TRY_FOR: Duration = Duration::from_secs(1800);
/// How long a daemon that stops goes on sending what waits.
const LAST_CHANCE: Duration = Duration::from_secs(3);

/// Accepts events. Cloning is cheap.
#[derive(Debug, Clone)]
pub(crate) struct Notifier {
    queue: mpsc::Sender<Event>,
    metrics: Metrics,
}

impl Notifier {
    /// Queues an event. Never waits; if the queue is full, the event is logged, counted and dropped.
    pub(crate) fn notify(&self, event: Event) {
        if let Err(error) = self.queue.try_send(event) {
            let (mpsc::error::TrySendError::Full(event) | mpsc::error::TrySendError::Closed(event)) = error;
            tracing::error!(event = %event.kind(), instance = event.instance_id, "a notification is dropped: too many events wait");
            self.metrics.notified(event.kind(), "dropped");
        }
    }
}

/// The receiving end of the queue, which sends the events.
#[derive(Debug)]
pub(crate) struct Delivery {
    queue: mpsc::Receiver<Event>,
    settings: watch::Receiver<Arc<ServeSettings>>,
    metrics: Metrics,
}

/// Creates the queue. Events are sent as the settings in force say.
pub(crate) fn channel(settings: watch::Receiver<Arc<ServeSettings>>, metrics: Metrics) -> (Notifier, Delivery) {
    let (sender, queue) = mpsc::channel(QUEUE);
    (Notifier { queue: sender, metrics: metrics.clone() }, Delivery { queue, settings, metrics })
}

/// Why the webhook did not accept a request.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("cannot reach the webhook: {0}")]
    Unreachable(String),
    #[error("the webhook answered {status}")]
    Status { status: StatusCode, again_in: Option<Duration> },
}

impl Refusal {
    /// From an error of the HTTP client: its text with the causes, without the URL, which may be a secret.
    fn unreachable(error: reqwest::Error) -> Self {
        let error = error.without_url();
        let mut text = error.to_string();
        let mut inner = std::error::Error::source(&error);
        while let Some(cause) = inner {
            text = format!("{text}: {cause}");
            inner = cause.source();
        }
        Self::Unreachable(text)
    }

    /// Whether the webhook may accept the same request later.
    fn is_worth_a_retry(&self) -> bool {
        match self {
            Self::Unreachable(_) => true,
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(*status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS)
            }
        }
    }
}

impl Delivery {
    /// Sends events until `stop`, and then what still waits, for at most `LAST_CHANCE`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let work = async {
            while let Some(event) = self.next(&stop).await {
                self.deliver(&event, &stop).await;
            }
        };
        let late = async {
            stop.cancelled().await;
            tokio::time::sleep(LAST_CHANCE).await;
        };
        tokio::select! {
            () = work => return,
            () = late => {}
        }
        tracing::warn!(events = self.queue.len() + 1, "notifications were not delivered before the daemon stopped");
    }

    /// The next event; `None` after `stop` once the queue is empty.
    async fn next(&mut self, stop: &CancellationToken) -> Option<Event> {
        tokio::select! {
            biased;
            event = self.queue.recv() => event,
            () = stop.cancelled() => None,
        }
    }

    async fn deliver(&self, event: &Event, stop: &CancellationToken) {
        let (kind, instance) = (event.kind(), &event.instance_id);
        let began = Instant::now();
        let mut wait = FIRST_WAIT;
        loop {
            // The settings are read at each attempt: a corrected URL receives what waits.
            let settings = self.settings.borrow().notify.clone();
            let Some(settings) = settings.filter(|settings| settings.events.contains(&kind)) else { return };
            // An attempt that was under way when the daemon began to stop is not the last one.
            let is_last = stop.is_cancelled();
            let refusal = match post(&settings, event).await {
                Ok(()) => {
                    self.metrics.notified(kind, "delivered");
                    tracing::debug!(event = %kind, instance, "notification delivered");
                    return;
                }
                Err(refusal) => refusal,
            };
            if let Refusal::Status { again_in: Some(again_in), .. } = &refusal {
                wait = wait.max(*again_in).min(LONGEST_WAIT);
            }
            if !refusal.is_worth_a_retry() || is_last || began.elapsed() + wait > TRY_FOR {
                self.metrics.notified(kind, "given_up");
                tracing::error!(event = %kind, instance, "notification given up: {refusal}");
                return;
            }
            self.metrics.notified(kind, "retried");
            tracing::warn!(event = %kind, instance, again_in = ?wait, "notification not delivered yet: {refusal}");
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = stop.cancelled() => {}
            }
            wait = (wait * 2).min(LONGEST_WAIT);
        }
    }
}

/// Posts one event. Each request has its own client: requests are rare, and the system's certificates may have been renewed.
async fn post(settings: &NotifySettings, event: &Event) -> Result<(), Refusal> {
    let mut client = Client::builder()
        .timeout(ANSWER_WITHIN)
        // A redirect would lose the body, or send it to another host than the settings name.
        .redirect(redirect::Policy::none())
        .user_agent(concat!("ttlsweep/", env!("CARGO_PKG_VERSION")));
    if settings.url.expose_secret().starts_with("http://") {
        // Without TLS no certificates are loaded: the system may have none.
        client = client.tls_certs_only([]);
    }
    let client = client.build().map_err(Refusal::unreachable)?;
    let body = message::body(event, settings.format).to_string();
    let second = Timestamp::now().as_second();
    let mut request = client
        .post(settings.url.expose_secret())
        .header(CONTENT_TYPE, "application/json")
        .header("webhook-id", event.id.to_string())
        .header("webhook-timestamp", second.to_string());
    let secret = settings.secret.as_ref().map(ExposeSecret::expose_secret);
    if let Some(signature) = secret.and_then(|secret| message::signature(event.id, second, body.as_bytes(), secret)) {
        request = request.header("webhook-signature", signature);
    }
    let response = request.body(body).send().await.map_err(Refusal::unreachable)?;
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let again_in = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Err(Refusal::Status { status, again_in: again_in.map(Duration::from_secs) })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::model::event::EventKind;
    use crate::settings::serve;

    fn settings(text: &str) -> watch::Receiver<Arc<ServeSettings>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        watch::Sender::new(Arc::new(serve::load(file.path(), |_| Vec::new()).unwrap())).subscribe()
    }

    fn event() -> Event {
        Event::not_swept("cache", "shop", None, Duration::from_secs(1), Timestamp::now())
    }

    fn counted(metrics: &Metrics, outcome: &str) -> u64 {
        let series = format!("notifications_total{{event=\"{}\",outcome=\"{outcome}\"}} ", EventKind::NotSwept);
        let text = metrics.encode();
        text.lines().find_map(|line| line.strip_prefix("ttlsweep_")?.strip_prefix(&series)?.parse().ok()).unwrap()
    }

    #[tokio::test]
    async fn events_beyond_the_queue_are_dropped_and_counted() {
        let metrics = Metrics::default();
        let (notifier, _delivery) = channel(settings(""), metrics.clone());
        (0..QUEUE + 7).for_each(|_| notifier.notify(event()));
        assert_eq!(counted(&metrics, "dropped"), 7);
    }

    #[tokio::test(start_paused = true)]
    async fn a_webhook_that_stays_away_is_given_up_after_half_an_hour_and_not_before() {
        crate::node::tls::install_provider();
        let metrics = Metrics::default();
        let (notifier, delivery) = channel(settings("[notify]\nurl = \"http://127.0.0.1:1/\""), metrics.clone());
        let began = Instant::now();
        notifier.notify(event());
        let stop = CancellationToken::new();
        let running = tokio::spawn(delivery.run(stop.clone()));
        while counted(&metrics, "given_up") == 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let tried_for = began.elapsed();
        assert!(tried_for > TRY_FOR - LONGEST_WAIT && tried_for <= TRY_FOR + ANSWER_WITHIN, "{tried_for:?}");
        assert!(counted(&metrics, "retried") > 8);
        stop.cancel();
        running.await.unwrap();
    }

    #[tokio::test]
    async fn an_attempt_that_is_under_way_when_the_daemon_begins_to_stop_is_not_the_last() {
        crate::node::tls::install_provider();
        let (stop, asked) = (CancellationToken::new(), Arc::new(AtomicU32::new(0)));
        let (stops, asks) = (stop.clone(), asked.clone());
        let answer = move || {
            stops.cancel();
            let is_first = asks.fetch_add(1, Ordering::Relaxed) == 0;
            async move { if is_first { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::NO_CONTENT } }
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let server = axum::Router::new().route("/", axum::routing::post(answer));
        let server = tokio::spawn(async move { axum::serve(listener, server).await });
        let metrics = Metrics::default();
        let (notifier, delivery) = channel(settings(&format!("[notify]\nurl = \"{url}\"")), metrics.clone());
        notifier.notify(event());
        delivery.run(stop).await;
        assert_eq!((asked.load(Ordering::Relaxed), counted(&metrics, "delivered")), (2, 1));
        server.abort();
    }
}
