//! The daemon: wires store, tasks, scheduler and API together, and owns the order in which they start and stop.
//!
//! Start: store, recovery of what was unfinished, scheduler, API. Stop: scheduler, tasks (each ends its batch and keeps
//! its checkpoint), API (answers under way end) and notifications, store.

mod files;
mod forecasts;

pub use files::load;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::api::listen::{self, Terms, TlsListenError};
use crate::api::{AppState, router};
use crate::keeper::Keeper;
use crate::metrics::Metrics;
use crate::notify;
use crate::overdue::Overdue;
use crate::scheduler::Scheduler;
use crate::settings::raw::Problem;
use crate::settings::serve::{ServeSettings, StoreSettings};
use crate::shutdown::Signals;
use crate::store::{DaemonId, DaemonRecord, Store};
use crate::tasks::{Membership, TaskService};

/// How often ended tasks that are kept no longer are looked for.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
/// File descriptors that are not for clients: the store, the instances, the log.
const OWN_FILES: u64 = 256;

/// What tells this daemon apart from others with the same settings file.
#[derive(Debug, Default)]
pub struct Identity {
    /// In place of `[daemon] name`.
    pub name: Option<String>,
    /// In place of `[daemon] labels`.
    pub labels: Vec<String>,
}

/// Runs until a signal. `ready` is told the address once requests are answered.
///
/// # Errors
/// Where it cannot start; running, it fails no more.
pub async fn run(
    path: PathBuf,
    settings: ServeSettings,
    identity: Identity,
    ready: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    // Before anything that a signal would leave half done.
    let signals = Signals::listen().context("signals cannot be listened to")?;
    let connections = connections(&settings);
    let terms = terms(&settings).map_err(|problems| {
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("TLS cannot be set up: {}", problems.join("; "))
    })?;
    let listener = TcpListener::bind(settings.api.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", settings.api.listen))?;
    let address = listener.local_addr()?;

    let store = Store::open(&settings.store.location).await?;
    let metrics = Metrics::default();
    let at_once = settings.at_once;
    let (settings, in_force) = watch::channel(Arc::new(settings));
    let begun_with = in_force.borrow().clone();
    let (notifier, delivery) = notify::channel(in_force.clone(), metrics.clone());
    let mut service = TaskService::with_slots(store.clone(), metrics.clone(), at_once).telling(notifier.clone());
    begun_with.instances.iter().for_each(|instance| metrics.introduce(&instance.id));
    service.show_successes().await?;
    let membership = membership(&begun_with, identity, address, &store);
    let changed = Arc::new(Notify::new());
    service.join(membership, in_force.clone(), changed.clone()).await.context("the other daemons cannot be joined")?;
    service.recover(&begun_with).await.context("unfinished tasks cannot be taken up")?;
    let (terms, terms_in_force) = watch::channel(terms);
    let reload = Reloader {
        path,
        settings: Arc::new(settings),
        terms: Arc::new(terms),
        service: service.clone(),
        metrics: metrics.clone(),
    };
    let stop = CancellationToken::new();
    tokio::spawn(signals.obey(stop.clone(), {
        let reload = reload.clone();
        move || drop(reload.reload())
    }));

    let scheduler = Scheduler {
        service: service.clone(),
        settings: in_force.clone(),
        changed: changed.clone(),
        metrics: metrics.clone(),
    };
    let scheduler = tokio::spawn(scheduler.run(stop.clone()));
    let (keeps, keeps_changed) = watch::channel(());
    let keeper = Keeper {
        service: service.clone(),
        settings: in_force.clone(),
        changed: keeps_changed,
        metrics: metrics.clone(),
        notifier: notifier.clone(),
    };
    let keeper = tokio::spawn(keeper.run(stop.clone()));
    let overdue = Overdue { service: service.clone(), settings: in_force.clone(), notifier };
    let overdue = tokio::spawn(overdue.run(stop.clone()));
    let stop_telling = CancellationToken::new();
    let delivery = tokio::spawn(delivery.run(stop_telling.clone()));
    let pruner = tokio::spawn(prune(store.clone(), metrics.clone(), in_force.clone(), stop.clone()));

    let app_settings = in_force.clone();
    let app = Arc::new(AppState {
        service: service.clone(),
        settings: in_force,
        metrics,
        schedule_changed: changed,
        keep_changed: keeps,
        reload: Box::new(move || reload.reload()),
        stopping: stop.clone(),
    });
    let forecaster = tokio::spawn(forecasts::make(store.clone(), app_settings, stop.clone()));
    let stop_listening = CancellationToken::new();
    let api = tokio::spawn(listen::serve(listener, terms_in_force, router(app), connections, stop_listening.clone()));
    tracing::info!(%address, "ready");
    ready(address);

    stop.cancelled().await;
    let _ = scheduler.await;
    let _ = keeper.await;
    let _ = overdue.await;
    service.close().await;
    stop_listening.cancel();
    stop_telling.cancel();
    let _ = api.await;
    let _ = delivery.await;
    let _ = pruner.await;
    let _ = forecaster.await;
    store.close().await;
    tracing::info!("stopped");
    Ok(())
}

/// On what terms this daemon joins others.
fn membership(settings: &ServeSettings, identity: Identity, address: SocketAddr, store: &Store) -> Membership {
    let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
    let record = DaemonRecord {
        id: DaemonId::generate(),
        name: identity.name.or_else(|| settings.daemon.name.clone()).unwrap_or_else(host),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        address: address.to_string(),
        labels: if identity.labels.is_empty() { settings.daemon.labels.clone() } else { identity.labels },
        settings: settings.hash.clone(),
        started_at: store.now(),
    };
    Membership { record, lease: settings.daemon.lease }
}

/// As many connections as the settings say and the limit of open files allows, after raising that as far as it goes.
fn connections(settings: &ServeSettings) -> usize {
    let wanted = settings.api.max_connections;
    let files = rlimit::increase_nofile_limit(wanted as u64 + OWN_FILES).unwrap_or(1024);
    let allowed = usize::try_from(files.saturating_sub(OWN_FILES).max(16)).unwrap_or(usize::MAX);
    if allowed < wanted {
        tracing::warn!(wanted, allowed, "the limit of open files allows fewer connections than the settings");
    }
    wanted.min(allowed)
}

/// How clients are met, with the certificate as it is now.
fn terms(settings: &ServeSettings) -> Result<Terms, Vec<TlsListenError>> {
    let tls = settings.api.tls.as_ref().map(|(cert, key)| listen::tls(cert, key)).transpose()?;
    Ok(Terms { tls, header_within: settings.api.request_timeout })
}

/// Takes changed settings in.
#[derive(Clone)]
struct Reloader {
    path: PathBuf,
    settings: Arc<watch::Sender<Arc<ServeSettings>>>,
    terms: Arc<watch::Sender<Terms>>,
    service: TaskService,
    metrics: Metrics,
}

impl Reloader {
    /// Puts the file's settings in force. Running tasks go on with the settings that they began with.
    fn reload(&self) -> Result<(), Vec<Problem>> {
        let changed = load(&self.path).and_then(|new| {
            let old = self.settings.borrow().clone();
            let problems = needs_restart(&old, &new);
            if !problems.is_empty() {
                return Err(problems);
            }
            let problem = |error: &TlsListenError| Problem { origin: None, message: error.to_string() };
            let terms = terms(&new).map_err(|errors| errors.iter().map(problem).collect::<Vec<_>>())?;
            Ok((new, terms))
        });
        match changed {
            Ok((new, terms)) => {
                tracing::info!(instances = new.instances.len(), "settings read again");
                self.terms.send_replace(terms);
                self.service.set_slots(new.at_once);
                new.instances.iter().for_each(|instance| self.metrics.introduce(&instance.id));
                self.settings.send_replace(Arc::new(new));
                Ok(())
            }
            Err(problems) => {
                for problem in &problems {
                    tracing::error!("settings not read again, nothing was changed: {problem}");
                }
                Err(problems)
            }
        }
    }
}

/// What cannot be changed while the daemon runs.
fn needs_restart(old: &ServeSettings, new: &ServeSettings) -> Vec<Problem> {
    let fixed = [
        ("[api] listen", old.api.listen != new.api.listen),
        ("[api] TLS", old.api.tls.is_some() != new.api.tls.is_some()),
        ("[api] max-connections", old.api.max_connections != new.api.max_connections),
        ("[store] url or path", !old.store.location.is(&new.store.location)),
        ("[daemon]", old.daemon != new.daemon),
    ];
    let changed = fixed.into_iter().filter(|(_, changed)| *changed);
    changed
        .map(|(what, _)| Problem { origin: None, message: format!("{what} was changed: that needs a restart") })
        .collect()
}

/// Removes what is kept no longer: now, every hour, and when the settings may say otherwise.
async fn prune(
    store: Store,
    metrics: Metrics,
    mut settings: watch::Receiver<Arc<ServeSettings>>,
    stop: CancellationToken,
) {
    loop {
        let StoreSettings { keep_for, keep_tasks, .. } = settings.borrow_and_update().store.clone();
        let before = jiff::SignedDuration::try_from(keep_for).ok().and_then(|kept| store.now().checked_sub(kept).ok());
        loop {
            match store.prune(before.unwrap_or(Timestamp::MIN), keep_tasks).await {
                Ok(0) => break,
                Ok(tasks) => tracing::info!(tasks, "ended tasks removed"),
                Err(error) => {
                    metrics.store_failed();
                    tracing::error!(%error, "ended tasks could not be removed");
                    break;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PRUNE_EVERY) => {}
            changed = settings.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}
