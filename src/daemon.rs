//! The daemon: connects store, tasks, scheduler and API, and decides in which order they start and stop.
//!
//! Start: store, recovery of unfinished tasks, scheduler, API. Stop: scheduler, tasks (each ends its batch and writes
//! its checkpoint), API (replies under way are finished) and notifications, store.

mod files;
mod forecasts;

pub(crate) use files::load;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::api::listen::{self, ListenOptions, TlsListenError};
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

/// Time between two removals of ended tasks that are no longer kept.
const PRUNE_EVERY: Duration = Duration::from_secs(3600);
/// File descriptors reserved for the store, the connections to instances and the log.
const OWN_FILES: u64 = 256;

/// What distinguishes this daemon from others with the same settings file.
#[derive(Debug, Default)]
pub(crate) struct Identity {
    /// Overrides `[daemon] name`; `None`: the settings decide.
    pub name: Option<String>,
    /// Override `[daemon] labels`, unless empty.
    pub labels: Vec<String>,
}

/// Runs until a signal. Calls `ready` with the address of the API once it answers.
///
/// # Errors
/// If the daemon cannot start. Once it runs, errors are logged.
pub(crate) async fn run(
    path: PathBuf,
    settings: ServeSettings,
    identity: Identity,
    ready: impl FnOnce(SocketAddr),
) -> anyhow::Result<()> {
    // First of all: from here on a signal stops the daemon in order.
    let signals = Signals::listen().context("cannot install the signal handlers")?;
    let connections = connections(&settings);
    let options = listen_options(&settings).map_err(|problems| {
        let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
        anyhow::anyhow!("cannot set up TLS: {}", problems.join("; "))
    })?;
    let listener = TcpListener::bind(settings.api.listen).await;
    let listener = listener.with_context(|| format!("cannot listen on {}", settings.api.listen))?;
    let address = listener.local_addr()?;

    let store = Store::open(&settings.store.location).await?;
    let metrics = Metrics::default();
    let at_once = settings.at_once;
    let (settings, in_force) = watch::channel(Arc::new(settings));
    let first_settings = in_force.borrow().clone();
    let (notifier, delivery) = notify::channel(in_force.clone(), metrics.clone());
    let mut service = TaskService::with_at_once(store.clone(), metrics.clone(), at_once).telling(notifier.clone());
    first_settings.instances.iter().for_each(|instance| metrics.introduce(&instance.id));
    service.show_successes().await?;
    let membership = membership(&first_settings, identity, address, &store);
    let changed = Arc::new(Notify::new());
    service.join(membership, in_force.clone(), changed.clone()).await.context("cannot join the other daemons")?;
    service.recover(&first_settings).await.context("cannot resume the unfinished tasks")?;
    let (options, options_in_force) = watch::channel(options);
    let reload = Reloader {
        path,
        settings: Arc::new(settings),
        options: Arc::new(options),
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
    let api = tokio::spawn(listen::serve(listener, options_in_force, router(app), connections, stop_listening.clone()));
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

/// The record of this daemon and the lease with which it joins those that share its database.
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

/// Most connections of clients: `max-connections`, or fewer if the limit of open files, raised as far as the system allows, is lower.
fn connections(settings: &ServeSettings) -> usize {
    let wanted = settings.api.max_connections;
    let files = rlimit::increase_nofile_limit(wanted as u64 + OWN_FILES).unwrap_or(1024);
    let allowed = usize::try_from(files.saturating_sub(OWN_FILES).max(16)).unwrap_or(usize::MAX);
    if allowed < wanted {
        tracing::warn!(wanted, allowed, "the limit of open files allows fewer connections than the settings");
    }
    wanted.min(allowed)
}

/// The options for new connections, with the certificate read from its file now.
fn listen_options(settings: &ServeSettings) -> Result<ListenOptions, Vec<TlsListenError>> {
    let tls = settings.api.tls.as_ref().map(|(cert, key)| listen::tls(cert, key)).transpose()?;
    Ok(ListenOptions { tls, header_within: settings.api.request_timeout })
}

/// Puts changed settings in force.
#[derive(Clone)]
struct Reloader {
    path: PathBuf,
    settings: Arc<watch::Sender<Arc<ServeSettings>>>,
    options: Arc<watch::Sender<ListenOptions>>,
    service: TaskService,
    metrics: Metrics,
}

impl Reloader {
    /// Reads the settings file again and puts it in force; an invalid one changes nothing. Running tasks keep the settings that they
    /// began with.
    fn reload(&self) -> Result<(), Vec<Problem>> {
        let changed = load(&self.path).and_then(|new| {
            let old = self.settings.borrow().clone();
            let problems = needs_restart(&old, &new);
            if !problems.is_empty() {
                return Err(problems);
            }
            let problem = |error: &TlsListenError| Problem { origin: None, message: error.to_string() };
            let options = listen_options(&new).map_err(|errors| errors.iter().map(problem).collect::<Vec<_>>())?;
            Ok((new, options))
        });
        match changed {
            Ok((new, options)) => {
                tracing::info!(instances = new.instances.len(), "settings reloaded");
                self.options.send_replace(options);
                self.service.set_at_once(new.at_once);
                new.instances.iter().for_each(|instance| self.metrics.introduce(&instance.id));
                self.settings.send_replace(Arc::new(new));
                Ok(())
            }
            Err(problems) => {
                for problem in &problems {
                    tracing::error!("settings not reloaded, the old ones stay in force: {problem}");
                }
                Err(problems)
            }
        }
    }
}

/// A problem for each changed setting that only a restart can change.
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
        .map(|(what, _)| Problem { origin: None, message: format!("{what} was changed, which needs a restart") })
        .collect()
}

/// Removes ended tasks that are no longer kept: now, every hour, and when the settings change.
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
                    tracing::error!(%error, "cannot remove ended tasks");
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
