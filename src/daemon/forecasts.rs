//! Makes a forecast of each instance every `[forecast] every`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use jiff::tz::TimeZone;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::forecast;
use crate::forecast::{ForecastRequest, ReadFrom};
use crate::settings::serve::ServeSettings;
use crate::store::Store;

/// Time between two checks for due forecasts.
const CHECK_EVERY: Duration = Duration::from_secs(60);
/// Pause before the next attempt after a forecast failed.
const RETRY_AFTER: Duration = Duration::from_secs(3600);
/// Longest time that one forecast may take.
const WITHIN: Duration = Duration::from_secs(300);

/// Makes the due forecasts, one at a time, until `stop`.
pub(super) async fn make(store: Store, settings: watch::Receiver<Arc<ServeSettings>>, stop: CancellationToken) {
    let mut not_before: BTreeMap<String, Instant> = BTreeMap::new();
    let work = async {
        loop {
            let now = settings.borrow().clone();
            if !now.forecast_every.is_zero() {
                make_all(&store, &now, &mut not_before).await;
            }
            tokio::time::sleep(CHECK_EVERY).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = stop.cancelled() => {}
    }
}

async fn make_all(store: &Store, settings: &ServeSettings, not_before: &mut BTreeMap<String, Instant>) {
    let every = SignedDuration::try_from(settings.forecast_every).unwrap_or(SignedDuration::MAX);
    let after = store.now().checked_sub(every).unwrap_or(jiff::Timestamp::MIN);
    let recent = match store.forecasts_after(after).await {
        Ok(recent) => recent,
        Err(error) => return tracing::error!(%error, "cannot read the times of the last forecasts"),
    };
    for instance in settings.instances.iter().filter(|instance| !recent.contains(&instance.id)) {
        if not_before.get(&instance.id).is_some_and(|at| *at > Instant::now()) {
            continue;
        }
        let request = ForecastRequest::new(ReadFrom::AnyReplica, TimeZone::system());
        let why = match tokio::time::timeout(WITHIN, forecast::make(store, instance, request)).await {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => error.message,
            Err(_) => format!("it took longer than {WITHIN:?}"),
        };
        tracing::info!(instance = instance.id, why, "the forecast failed");
        not_before.insert(instance.id.clone(), Instant::now() + RETRY_AFTER);
    }
}
