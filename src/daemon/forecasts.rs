//! A forecast of each instance now and then, where the settings want that.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::SignedDuration;
use jiff::tz::TimeZone;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::forecast;
use crate::forecast::{Place, Request};
use crate::settings::serve::ServeSettings;
use crate::store::Store;

/// How often it is looked which are due.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// One that could not be made is tried again after this long.
const TRY_AGAIN: Duration = Duration::from_secs(3600);
/// How long one may take.
const WITHIN: Duration = Duration::from_secs(300);

/// Makes forecasts, one at a time, until told to stop.
pub(super) async fn make(store: Store, settings: watch::Receiver<Arc<ServeSettings>>, stop: CancellationToken) {
    let mut not_before: BTreeMap<String, Instant> = BTreeMap::new();
    let work = async {
        loop {
            let now = settings.borrow().clone();
            if !now.forecast_every.is_zero() {
                make_all(&store, &now, &mut not_before).await;
            }
            tokio::time::sleep(LOOK_EVERY).await;
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
    let young = match store.forecasts_after(after).await {
        Ok(young) => young,
        Err(error) => return tracing::error!(%error, "the last forecasts cannot be looked up"),
    };
    for instance in settings.instances.iter().filter(|instance| !young.contains(&instance.id)) {
        if not_before.get(&instance.id).is_some_and(|at| *at > Instant::now()) {
            continue;
        }
        let request = Request::new(Place::AnyReplica, TimeZone::system());
        let why = match tokio::time::timeout(WITHIN, forecast::make(store, instance, request)).await {
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => error.message,
            Err(_) => format!("it was not made within {WITHIN:?}"),
        };
        tracing::info!(instance = instance.id, why, "no forecast");
        not_before.insert(instance.id.clone(), Instant::now() + TRY_AGAIN);
    }
}
