//! Connecting to a shard's master, and reconnecting after lost connections, restarts and failovers.
//!
//! One rule for positions: they are valid for the server process (`run_id`) that gave them. On another process, after a restart or a
//! failover, every pass begins again: what was finished on the old process proves nothing about the new one, which may have missed the
//! last deletions.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::control::{ControlState, stop_requested};
use crate::engine::policy::ledger::{Doing, Ledger};
use crate::engine::policy::observation::Observation;
use crate::engine::policy::pacer::Pacer;
use crate::engine::policy::profile::may_be_swept;
use crate::engine::policy::retry_budget::RetryBudget;
use crate::engine::policy::throttle::{self, Decision};
use crate::engine::shards::permits::Permit;
use crate::engine::shards::shard_map::Location;
use crate::engine::sweep::lap_state::LapState;
use crate::engine::sweep::pass::Pass;
use crate::engine::sweep::session::{Reached, Session};
use crate::engine::sweep::shard::{End, Reporter, ShardJob, ShardSweep};
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::ScanEventKind;
use crate::model::shard::ScanPosition;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::Conn;
use crate::node::error::{Class, NodeError};
use crate::node::info::Info;
use crate::node::topology::Master;

/// The first attempt uses the address of the topology if it was read no longer ago than this.
const FRESH: Duration = Duration::from_secs(5);
/// The smallest round trip of this many PINGs is the network's share of each exchange.
const PINGS: usize = 20;

/// Why a master was not reached.
enum Trouble {
    /// Another attempt may succeed while the retry budget lasts.
    Node(NodeError),
    /// No attempt can succeed: the sweep of the shard ends.
    End(End),
}

impl From<NodeError> for Trouble {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

/// Finds the shard's master, connects, and checks that it may be swept.
async fn reach(job: &ShardJob, last: &Master) -> Result<Reached, Trouble> {
    match job.map.find(&job.shard.id, last).await? {
        Location::At(master) => reach_at(job, master).await,
        Location::Dissolved => Err(Trouble::End(End::Dissolved)),
    }
}

async fn reach_at(job: &ShardJob, master: Master) -> Result<Reached, Trouble> {
    let mut conn = Conn::open(&master.addr, job.map.topology().options()).await?;
    let info = commands::info(&mut conn).await?;
    if info.flag("loading") == Some(true) {
        return Err(Trouble::Node(loading(&conn)));
    }
    may_be_swept(job.map.kind(), &info).map_err(|failure| refused(job, failure))?;
    let (floor, latency) = pings(&mut conn).await?;
    let baseline = Observation { latency: Some(latency), ..Observation::from_info(&info) };
    Ok(Reached { conn, info, floor, baseline, master })
}

/// The node may not be swept. A replica in the place of a master may be a failover that the topology does not show yet: tried again.
fn refused(job: &ShardJob, failure: Failure) -> Trouble {
    if failure.kind == FailureKind::NotAMaster && job.map.follows() {
        return Trouble::Node(no_master(failure));
    }
    Trouble::End(failure.into())
}

fn no_master(failure: Failure) -> NodeError {
    NodeError::NoMaster { problem: failure.message, hint: failure.hint, class: Class::Transient }
}

fn loading(conn: &Conn) -> NodeError {
    NodeError::Server {
        addr: conn.addr().clone(),
        command: "SCAN",
        code: "LOADING".to_owned(),
        message: "the server is loading its data set".to_owned(),
    }
}

/// The reason of the hold until the next attempt; `None`: there is no next attempt.
fn reason_of(error: &NodeError) -> Option<Reason> {
    match (error, error.class()) {
        (_, Class::Fatal(_)) => None,
        (NodeError::NoMaster { .. }, _) => Some(Reason::NoMaster),
        (_, Class::Transient) => Some(Reason::Reconnecting),
        (_, Class::Loading) => Some(Reason::Loading),
        (_, Class::Busy) => Some(Reason::Busy),
    }
}

/// Sleeps, unless a stop is requested.
async fn wait(control: &mut watch::Receiver<ControlState>, duration: Duration) -> Result<(), End> {
    tokio::select! {
        () = tokio::time::sleep(duration) => Ok(()),
        reason = stop_requested(control) => Err(End::Stopped(reason)),
    }
}

impl ShardSweep {
    /// Connects for the first time, and begins with the server process that answers.
    pub(super) async fn connect(
        mut job: ShardJob,
        reporter: Reporter,
        control: watch::Receiver<ControlState>,
    ) -> Result<Self, End> {
        let mut ledger = Ledger::default();
        let (reached, permit) = Self::first_contact(&mut job, &reporter, control.clone(), &mut ledger).await?;
        let tuning = control.borrow().tuning;
        let pacer = Pacer::new(job.settings.count, job.settings.max_slice, tuning, reached.floor);
        let keep = job.settings.tuning.bounds.any().then(|| LapState::new(tuning.bounds, job.shard.kept));
        Ok(Self {
            keep,
            session: Session::new(0, reached, &job.settings, job.map.topology().options()),
            pacer,
            ledger,
            hold: None,
            requested_hold: false,
            retry: None,
            permit: Some(permit),
            job,
            reporter,
            control,
        })
    }

    /// Connects to the master. A server that is loading or busy is waited for. One that cannot be reached fails the sweep, unless a
    /// cluster or sentinels can name another master: then a failover may be under way.
    async fn first_contact(
        job: &mut ShardJob,
        reporter: &Reporter,
        mut control: watch::Receiver<ControlState>,
        ledger: &mut Ledger,
    ) -> Result<(Reached, Permit), End> {
        let mut budget: Option<RetryBudget> = None;
        let mut held: Option<(Reason, Instant)> = None;
        let ended = loop {
            let attempt = async {
                let permit = match job.turn.take() {
                    Some(turn) => {
                        let permit = turn.await;
                        // The time in the queue belongs to the other shards.
                        *ledger = Ledger::default();
                        permit
                    }
                    None => job.permits.take(&job.shard.master.addr).await,
                };
                let reached = if held.is_none() && job.shard.seen.elapsed() < FRESH {
                    reach_at(job, job.shard.master.clone()).await
                } else {
                    reach(job, &job.shard.master).await
                };
                reached.map(|reached| (reached, permit))
            };
            let attempt = tokio::select! {
                attempt = attempt => attempt,
                reason = stop_requested(&mut control) => break Err(End::Stopped(reason)),
            };
            let error = match attempt {
                Ok(reached) => break Ok(reached),
                Err(Trouble::End(end)) => break Err(end),
                Err(Trouble::Node(error)) => error,
            };
            let reason = match reason_of(&error) {
                Some(reason @ (Reason::Loading | Reason::Busy)) => reason,
                Some(reason) if job.map.follows() => reason,
                _ => break Err(error.into_failure().into()),
            };
            if held.is_none() {
                held = Some((reason, Instant::now()));
                ledger.turn_to(Doing::Holding(reason));
                let detail = Some(error.to_string());
                reporter.say(ScanEventKind::HoldStarted { reason, detail }).await;
            }
            // The budget starts with the first failure: waiting for a permit is none.
            let limit = job.settings.retry_for;
            let options = job.map.topology().options();
            let pause = match budget.get_or_insert_with(|| RetryBudget::new(limit, options)).next(reason, error) {
                Ok(pause) => pause,
                Err(failure) => break Err(failure.into()),
            };
            if let Err(end) = wait(&mut control, pause).await {
                break Err(end);
            }
        };
        if let Some((reason, since)) = held {
            ledger.turn_to(Doing::Exchanging);
            reporter.say(ScanEventKind::HoldEnded { reason, lasted: since.elapsed() }).await;
        }
        ended
    }

    /// Sleeps, unless a stop is requested.
    pub(super) async fn wait(&mut self, duration: Duration) -> Result<(), End> {
        wait(&mut self.control, duration).await
    }

    /// Reads INFO outside of a pass, and reconnects as often as needed.
    pub(super) async fn info(&mut self) -> Result<Info, End> {
        loop {
            match commands::info(self.session.conn()).await {
                Ok(info) => return Ok(info),
                Err(error) => self.recover(error, None).await?,
            }
        }
    }

    /// Reads INFO during a pass, and reconnects as often as needed. The new connection is in the DB of the pass.
    pub(super) async fn info_in(&mut self, pass: &mut Pass) -> Result<Info, End> {
        loop {
            match commands::info(self.session.conn()).await {
                Ok(info) => return Ok(info),
                Err(error) => self.recover(error, Some(pass)).await?,
            }
        }
    }

    /// Reconnects after `error`, or ends the sweep if that cannot help. Forgets the workers of the pass. Afterwards the pass is at its
    /// last position if the server process is the same, or else at its beginning.
    pub(super) async fn recover(&mut self, error: NodeError, mut pass: Option<&mut Pass>) -> Result<(), End> {
        if let Some(pass) = pass.as_deref_mut() {
            pass.forget_workers();
        }
        self.session.conns.truncate(1);
        let mut error = error;
        loop {
            let Some(reason) = reason_of(&error) else { return Err(error.into_failure().into()) };
            let detail = error.to_string();
            // The budget lasts until a batch is answered: a server that accepts connections and answers no batch is away as well.
            let (limit, options) = (self.job.settings.retry_for, self.job.map.topology().options());
            let budget = self.retry.get_or_insert_with(|| RetryBudget::new(limit, options));
            let pause = budget.next(reason, error)?;
            self.begin_hold(reason, Some(detail)).await;
            self.wait(pause).await?;
            error = match self.reconnect(pass.as_deref_mut()).await {
                Ok(()) => {
                    if let Some(budget) = &mut self.retry {
                        budget.connected();
                    }
                    return Ok(());
                }
                Err(Trouble::Node(error)) => error,
                Err(Trouble::End(end)) => return Err(end),
            };
        }
    }

    /// The server has become a replica. Finds the new master, if the instance can name one.
    pub(super) async fn demoted(&mut self, failure: Failure, pass: &mut Pass) -> Result<(), End> {
        pass.go_back();
        match refused(&self.job, failure) {
            Trouble::Node(error) => self.recover(error, Some(pass)).await,
            Trouble::End(end) => Err(end),
        }
    }

    /// Confirms the end of a pass: it is complete only if the server is still a master that may delete. If not, the pass has gone back.
    pub(super) async fn confirm(&mut self, pass: &mut Pass) -> Result<bool, End> {
        let info = match commands::info(self.session.conn()).await {
            Ok(info) => info,
            Err(error) => {
                pass.go_back();
                return self.recover(error, Some(pass)).await.map(|()| false);
            }
        };
        if let Err(failure) = may_be_swept(self.job.map.kind(), &info) {
            return self.demoted(failure, pass).await.map(|()| false);
        }
        match throttle::impossible(&Observation::from_info(&info)) {
            None => Ok(true),
            Some(Decision::Abort(failure)) => Err(failure.into()),
            Some(_) => {
                pass.go_back();
                Ok(false)
            }
        }
    }

    async fn reconnect(&mut self, pass: Option<&mut Pass>) -> Result<(), Trouble> {
        let mut control = self.control.clone();
        let db = pass.as_ref().map(|pass| pass.db);
        let attempt = async {
            let mut reached = reach(&self.job, &self.session.master).await?;
            if let Some(db) = db {
                reached.conn.select(db).await?;
            }
            Ok::<_, Trouble>(reached)
        };
        let reached = tokio::select! {
            reached = attempt => reached?,
            reason = stop_requested(&mut control) => return Err(Trouble::End(End::Stopped(reason))),
        };
        self.pacer.set_floor(reached.floor);
        self.end_hold().await;
        let options = self.job.map.topology().options();
        if self.session.is(&reached) {
            self.session.reconnected(reached, options);
            return Ok(());
        }
        let why = if reached.master.is_same_node(&self.session.master) {
            "the server was restarted".to_owned()
        } else {
            format!("{} is the master now", reached.master.addr)
        };
        let server = reached.info.server(reached.conn.addr());
        self.session = Session::new(self.session.number + 1, reached, &self.job.settings, options);
        if let Some(keep) = &mut self.keep {
            keep.pace.forget(Instant::now());
        }
        if let Some(pass) = pass {
            pass.figures.checkpoint.space = self.session.space.clone();
            pass.figures.checkpoint.process = self.session.fingerprint();
            let begun = pass.figures.checkpoint.position != ScanPosition::NotStarted;
            self.cut(pass, ScanPosition::NotStarted);
            if begun {
                self.begin_again(pass, why).await;
            }
        }
        if let Some(server) = server {
            self.reporter.say(ScanEventKind::ServerChanged { server }).await;
        }
        Ok(())
    }
}

/// The smallest and the median round trip of some PINGs.
async fn pings(conn: &mut Conn) -> Result<(Duration, Duration), NodeError> {
    let mut round_trips = Vec::with_capacity(PINGS);
    for _ in 0..PINGS {
        let begun = std::time::Instant::now();
        commands::ping(conn).await?;
        round_trips.push(begun.elapsed());
    }
    round_trips.sort();
    Ok((round_trips[0], round_trips[PINGS / 2]))
}
