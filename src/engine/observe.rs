//! Samplers: they look at a master on their own connection and tick, and write down what they see. They decide nothing.

use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::model::shard::{NodeAddr, RunId};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::info::{CommandStat, Info};

/// How often INFO is read. It costs a server some 50 microseconds.
const EVERY: Duration = Duration::from_secs(1);

/// What was last seen of a master. What a right or a version hides is `None` or its harmless value.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Observation {
    /// Whether it is a master.
    pub is_master: Option<bool>,
    /// A replica's master as `host:port`.
    pub master: Option<String>,
    /// The process.
    pub run_id: Option<RunId>,
    /// It loads its data set.
    pub loading: bool,
    /// `master_failover_state` is something else than `no-failover`.
    pub failover_under_way: bool,
    /// Writes are paused (`paused_actions` of INFO clients, on servers that tell).
    pub writes_paused: bool,
    /// `cmdstat_scan`.
    pub scan_stat: Option<CommandStat>,
    /// `used_memory` in bytes.
    pub used_memory: Option<u64>,
    /// Objects that are still to be freed in the background.
    pub lazyfree_pending: u64,
}

impl Observation {
    /// Reads what INFO says.
    pub fn from_info(info: &Info) -> Self {
        Self {
            is_master: info.is_master(),
            master: info.master_addr(),
            run_id: info.get("run_id").map(|id| RunId(id.to_owned())),
            loading: info.flag("loading") == Some(true),
            failover_under_way: info.get("master_failover_state").is_some_and(|state| state != "no-failover"),
            writes_paused: info.get("paused_actions").is_some_and(|actions| actions != "none"),
            scan_stat: info.scan_stat(),
            used_memory: info.parsed("used_memory"),
            lazyfree_pending: info.parsed("lazyfree_pending_objects").unwrap_or(0),
        }
    }
}

/// A running sampler. It ends when this is dropped.
#[derive(Debug)]
pub struct Observer {
    seen: watch::Receiver<Observation>,
    _stop: DropGuard,
}

impl Observer {
    /// Starts sampling. `first` is what was seen when the sweep connected, so that there is an observation from the
    /// first batch on. A server that cannot be reached leaves the last observation in place: the sweep's own
    /// connection meets the same trouble and says so.
    pub fn start(addr: NodeAddr, options: ConnOptions, first: Observation) -> Self {
        let (sender, seen) = watch::channel(first);
        let stop = CancellationToken::new();
        let token = stop.clone();
        tokio::spawn(async move {
            token.run_until_cancelled(sample(addr, options, sender)).await;
        });
        Self { seen, _stop: stop.drop_guard() }
    }

    /// The observation, if there is one that was not taken yet.
    pub fn take_new(&mut self) -> Option<Observation> {
        // An error means that the sampler has ended, which only happens with this observer.
        self.seen.has_changed().unwrap_or(false).then(|| self.seen.borrow_and_update().clone())
    }

    /// Whether there is an observation that was not taken yet.
    pub fn has_new(&self) -> bool {
        self.seen.has_changed().unwrap_or(false)
    }

    /// Waits for the next observation.
    pub async fn next(&mut self) -> Observation {
        if self.seen.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        self.seen.borrow_and_update().clone()
    }
}

async fn sample(addr: NodeAddr, options: ConnOptions, sender: watch::Sender<Observation>) {
    let mut conn: Option<Conn> = None;
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let mut open = match conn.take() {
            Some(open) => open,
            None => match Conn::open(&addr, &options).await {
                Ok(open) => open,
                Err(error) => {
                    tracing::debug!(%addr, %error, "the sampler cannot connect");
                    continue;
                }
            },
        };
        match commands::info(&mut open).await {
            Ok(info) => {
                sender.send_replace(Observation::from_info(&info));
                conn = Some(open);
            }
            Err(error) => tracing::debug!(%addr, %error, "the sampler cannot read INFO"),
        }
    }
}
