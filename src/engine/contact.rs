//! Coming to a shard's master, and coming back to it: through lost connections, restarts and failovers.
//!
//! One rule for the positions: they are good for the process (`run_id`) that gave them. Another process, whether the
//! server was restarted or another node was promoted, begins every pass again: what was finished on the old one proves
//! nothing about the new one, which may have missed the last deletions.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::control::{Orders, stop_ordered};
use crate::engine::observe::{Observation, Observer};
use crate::engine::pacer::Pacer;
use crate::engine::pass::Pass;
use crate::engine::pause::{Others, wait};
use crate::engine::payload::Payload;
use crate::engine::roster::Found;
use crate::engine::scout::Second;
use crate::engine::seats::Seat;
use crate::engine::shard_scan::{End, Job, Reporter, ShardScan};
use crate::engine::throttle::{self, Decision};
use crate::engine::touch::Toucher;
use crate::model::failure::{Failure, FailureKind};
use crate::model::progress::ScanEventKind;
use crate::model::shard::{RunId, ScanPosition};
use crate::model::slots::CursorSpace;
use crate::model::throttle::Reason;
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::error::{Class, NodeError};
use crate::node::info::{Info, OLDEST};
use crate::node::topology::{Kind, Master};
use crate::node::wire::Names;

/// First and longest wait before another attempt.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// A master that was seen so lately is not looked for again before the first attempt.
const FRESH: Duration = Duration::from_secs(5);
/// The smallest of this many PINGs is the network's share of a round trip.
const PINGS: usize = 20;

/// A master that was reached and may be swept.
struct Reached {
    conn: Conn,
    info: Info,
    floor: Duration,
    /// What is seen before the first batch.
    before: Observation,
    master: Master,
}

/// Why a master was not reached.
enum Trouble {
    /// Perhaps the next attempt will do.
    Node(NodeError),
    /// No attempt will.
    End(End),
}

impl From<NodeError> for Trouble {
    fn from(error: NodeError) -> Self {
        Self::Node(error)
    }
}

/// Finds the shard's master, connects, and looks whether it may be swept.
async fn reach(job: &Job, last: &Master) -> Result<Reached, Trouble> {
    match job.roster.find(&job.shard.id, last).await? {
        Found::At(master) => reach_at(job, master).await,
        Found::Dissolved => Err(Trouble::End(End::Dissolved)),
    }
}

async fn reach_at(job: &Job, master: Master) -> Result<Reached, Trouble> {
    let mut conn = Conn::open(&master.addr, job.roster.topology().options()).await?;
    let info = commands::info(&mut conn).await?;
    if info.flag("loading") == Some(true) {
        return Err(Trouble::Node(loading(&conn)));
    }
    may_be_swept(job.roster.kind(), &info).map_err(|failure| refused(job, failure))?;
    let (floor, latency) = pings(&mut conn).await?;
    let before = Observation { latency: Some(latency), ..Observation::from_info(&info) };
    Ok(Reached { conn, info, floor, before, master })
}

/// A replica where the master was said to be: the word of its promotion, or of its demotion, is still on its way.
fn refused(job: &Job, failure: Failure) -> Trouble {
    if failure.kind == FailureKind::NotAMaster && job.roster.follows() {
        return Trouble::Node(no_master(failure));
    }
    Trouble::End(failure.into())
}

fn no_master(failure: Failure) -> NodeError {
    NodeError::NoMaster { problem: failure.message, hint: failure.hint, class: Class::Transient }
}

/// What a failed attempt is called while the next one is waited for; `None` where there is no next one.
fn reason_of(error: &NodeError) -> Option<Reason> {
    match (error, error.class()) {
        (_, Class::Fatal(_)) => None,
        (NodeError::NoMaster { .. }, _) => Some(Reason::NoMaster),
        (_, Class::Transient) => Some(Reason::Reconnecting),
        (_, Class::Loading) => Some(Reason::Loading),
        (_, Class::Busy) => Some(Reason::Busy),
    }
}

/// How long attempts go on, and how they thin out.
pub(super) struct Patience {
    limit: Duration,
    /// A batch takes no longer: trouble that comes later after a connection was made is other trouble.
    batch: Duration,
    since: Instant,
    /// When the last connection was made.
    connected: Option<Instant>,
    backoff: Duration,
}

impl Patience {
    fn new(limit: Duration, options: &ConnOptions) -> Self {
        let batch = options.connect_timeout * 2 + options.response_timeout * 2;
        Self { limit, batch, since: Instant::now(), connected: None, backoff: BACKOFF.0 }
    }

    fn connected(&mut self) {
        self.connected = Some(Instant::now());
    }

    /// The next wait, or the failure once there were enough.
    fn next(&mut self, reason: Reason, error: NodeError) -> Result<Duration, Failure> {
        // However long an attempt takes: it may ask many nodes, each of which may say nothing.
        let other_trouble = self.connected.take().is_some_and(|connected| connected.elapsed() > self.batch);
        if other_trouble || matches!(reason, Reason::Loading | Reason::Busy) {
            // It answers: only the task's own time limits how long it may stay so.
            self.since = Instant::now();
        }
        if self.since.elapsed() >= self.limit {
            let mut failure = error.into_failure();
            failure.message = format!("{} (tried again for {:?})", failure.message, self.limit);
            return Err(failure);
        }
        let wait = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        Ok(wait)
    }
}

impl ShardScan {
    pub(super) async fn connect(
        mut job: Job,
        reporter: Reporter,
        orders: watch::Receiver<Orders>,
    ) -> Result<Self, End> {
        let (reached, seat) = Self::first_contact(&mut job, &reporter, orders.clone()).await?;
        let Reached { conn, info, floor, before, master } = reached;
        let tuning = orders.borrow().tuning;
        let version = info.redis_version();
        let options = job.roster.topology().options().clone();
        Ok(Self {
            observer: Observer::start(conn.addr().clone(), options, before.clone()),
            seen: before.clone(),
            others: Others::default(),
            decided: false,
            flow: lifetime_flow(&info),
            payload: Payload::new(job.settings.payload, info.server(conn.addr()).as_ref(), version),
            redis_version: version,
            conn,
            second: Second::default(),
            run_id: before.run_id.clone(),
            before,
            process: 0,
            done: Default::default(),
            judges: may_judge(&info),
            out_of_order: false,
            space: space_of(&info, &master),
            pacer: Pacer::new(job.settings.count, job.settings.max_slice, tuning, floor),
            toucher: Toucher::new(job.settings.touch, version),
            names: Names::default(),
            hold: None,
            ordered_hold: false,
            patience: None,
            redo: None,
            seat: Some(seat),
            master,
            job,
            reporter,
            orders,
        })
    }

    /// A server that is loading or busy is waited for. One that cannot be reached when the sweep begins is the
    /// operator's to mend, unless somebody can say who takes its place: a failover may be under way.
    async fn first_contact(
        job: &mut Job,
        reporter: &Reporter,
        mut orders: watch::Receiver<Orders>,
    ) -> Result<(Reached, Seat), End> {
        let mut patience: Option<Patience> = None;
        let mut held: Option<(Reason, Instant)> = None;
        let ended = loop {
            let attempt = async {
                let seat = match job.line.take() {
                    Some(line) => line.await,
                    None => job.seats.take(&job.shard.master.addr).await,
                };
                let reached = if held.is_none() && job.shard.seen.elapsed() < FRESH {
                    reach_at(job, job.shard.master.clone()).await
                } else {
                    reach(job, &job.shard.master).await
                };
                reached.map(|reached| (reached, seat))
            };
            let attempt = tokio::select! {
                attempt = attempt => attempt,
                reason = stop_ordered(&mut orders) => break Err(End::Stopped(reason)),
            };
            let error = match attempt {
                Ok(reached) => break Ok(reached),
                Err(Trouble::End(end)) => break Err(end),
                Err(Trouble::Node(error)) => error,
            };
            let reason = match reason_of(&error) {
                Some(reason @ (Reason::Loading | Reason::Busy)) => reason,
                Some(reason) if job.roster.follows() => reason,
                _ => break Err(error.into_failure().into()),
            };
            if held.is_none() {
                held = Some((reason, Instant::now()));
                let detail = Some(error.to_string());
                reporter.say(ScanEventKind::HoldStarted { reason, detail }).await;
            }
            // From the first failure on: waiting in line for a seat is nobody's failure.
            let limit = job.settings.retry_for;
            let options = job.roster.topology().options();
            let pause = match patience.get_or_insert_with(|| Patience::new(limit, options)).next(reason, error) {
                Ok(pause) => pause,
                Err(failure) => break Err(failure.into()),
            };
            if let Err(end) = wait(&mut orders, pause).await {
                break Err(end);
            }
        };
        if let Some((reason, since)) = held {
            reporter.say(ScanEventKind::HoldEnded { reason, lasted: since.elapsed() }).await;
        }
        ended
    }

    /// Brings the connection back after `error`, or ends the sweep where that cannot help. Afterwards the position is
    /// the last one where the process is the same, else the beginning.
    pub(super) async fn recover(&mut self, error: NodeError, mut pass: Option<&mut Pass>) -> Result<(), End> {
        let mut error = error;
        loop {
            let Some(reason) = reason_of(&error) else { return Err(error.into_failure().into()) };
            let detail = error.to_string();
            // Kept until a batch is answered: a server that lets us in and answers no batch is away as well.
            let (limit, options) = (self.job.settings.retry_for, self.job.roster.topology().options());
            let patience = self.patience.get_or_insert_with(|| Patience::new(limit, options));
            let pause = patience.next(reason, error)?;
            self.begin_hold(pass.as_deref_mut(), reason, Some(detail)).await;
            wait(&mut self.orders, pause).await?;
            error = match self.reconnect(pass.as_deref_mut()).await {
                Ok(()) => {
                    if let Some(patience) = &mut self.patience {
                        patience.connected();
                    }
                    return Ok(());
                }
                Err(Trouble::Node(error)) => error,
                Err(Trouble::End(end)) => return Err(end),
            };
        }
    }

    /// The server is a replica, or has become one. Looks for its master where that is wanted.
    pub(super) async fn demoted(&mut self, failure: Failure, pass: &mut Pass) -> Result<(), End> {
        pass.go_back();
        match refused(&self.job, failure) {
            Trouble::Node(error) => self.recover(error, Some(pass)).await,
            Trouble::End(end) => Err(end),
        }
    }

    /// A pass is complete only where its server was a master that may delete, to the end. Returns whether it was; if not,
    /// the sweep has gone back.
    pub(super) async fn confirm(&mut self, pass: &mut Pass) -> Result<bool, End> {
        let info = match commands::info(&mut self.conn).await {
            Ok(info) => info,
            Err(error) => {
                pass.go_back();
                return self.recover(error, Some(pass)).await.map(|()| false);
            }
        };
        if let Err(failure) = may_be_swept(self.job.roster.kind(), &info) {
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

    async fn reconnect(&mut self, mut pass: Option<&mut Pass>) -> Result<(), Trouble> {
        let mut orders = self.orders.clone();
        let attempt = async {
            let mut reached = reach(&self.job, &self.master).await?;
            if let Some(pass) = &pass {
                reached.conn.select(pass.db).await?;
            }
            Ok::<_, Trouble>(reached)
        };
        let reached = tokio::select! {
            reached = attempt => reached?,
            reason = stop_ordered(&mut orders) => return Err(Trouble::End(End::Stopped(reason))),
        };
        let Reached { conn, info, floor, before, master } = reached;
        self.conn = conn;
        self.second = Second::default();
        self.pacer.set_floor(floor);
        self.judges = may_judge(&info) && !self.out_of_order;
        // What was seen of it before the connection was lost says nothing about it now.
        self.seen = before.clone();
        self.decided = false;
        self.end_hold(pass.as_deref_mut()).await;
        if master.addr != self.master.addr {
            let options = self.job.roster.topology().options().clone();
            self.observer = Observer::start(master.addr.clone(), options, before.clone());
        }
        if before.run_id.is_some() && before.run_id == self.run_id {
            // Slots that came meanwhile were not there when the pass began: they are not covered by it.
            self.master.slots = self.master.slots.common(&master.slots);
            self.master.addr = master.addr;
            return Ok(());
        }
        let why = if master.is_same_node(&self.master) {
            "the server was restarted".to_owned()
        } else {
            format!("{} is the master now", master.addr)
        };
        self.run_id = before.run_id.clone();
        self.before = before;
        self.others = Others::default();
        self.flow = lifetime_flow(&info);
        self.redis_version = info.redis_version();
        let server = info.server(self.conn.addr());
        self.payload = Payload::new(self.job.settings.payload, server.as_ref(), self.redis_version);
        self.process += 1;
        self.space = space_of(&info, &master);
        self.master = master;
        if let Some(pass) = pass {
            pass.scout = None;
            pass.figures.space = self.space.clone();
            pass.figures.process = self.run_id.as_ref().map(RunId::fingerprint);
            if pass.figures.position != ScanPosition::NotStarted {
                self.begin_again(pass, why).await;
            }
        }
        if let Some(server) = server {
            self.reporter.say(ScanEventKind::ServerChanged { server }).await;
        }
        Ok(())
    }
}

/// Whether cursors walk tables in the way that the arithmetic on hidden keys knows.
fn may_judge(info: &Info) -> bool {
    matches!(info.mode(), Some("standalone" | "cluster"))
}

/// From Redis 7.4 and Valkey 8 on a cluster node has a table for each slot, and its cursors hold the slot.
fn space_of(info: &Info, master: &Master) -> CursorSpace {
    let by_slot = match info.valkey_version() {
        Some(version) => version >= (8, 0),
        None => info.redis_version().is_some_and(|version| version >= (7, 4)),
    };
    if by_slot && info.mode() == Some("cluster") {
        CursorSpace::BySlot(master.slots.clone())
    } else {
        CursorSpace::OneTable
    }
}

fn loading(conn: &Conn) -> NodeError {
    NodeError::Server {
        addr: conn.addr().clone(),
        command: "SCAN",
        code: "LOADING".to_owned(),
        message: "the server is loading its data set".to_owned(),
    }
}

/// Whether a server, by its INFO, is one that can be swept.
///
/// # Errors
/// Why it is not.
pub fn may_be_swept(kind: Kind, info: &Info) -> Result<(), Failure> {
    match info.redis_version() {
        None => {
            let failure =
                Failure::new(FailureKind::Unsupported, "INFO names no redis_version: this is no Redis or Valkey");
            return Err(failure.hint("check the port"));
        }
        Some(version) if version < OLDEST => {
            let (major, minor) = version;
            let message =
                format!("Redis {major}.{minor} cannot be swept; {}.{} is the oldest (DCS.4818)", OLDEST.0, OLDEST.1);
            return Err(Failure::new(FailureKind::Unsupported, message).hint("upgrade the server"));
        }
        Some(_) => {}
    }
    match info.mode() {
        Some("sentinel") => {
            let failure = Failure::new(FailureKind::Unsupported, "this is a sentinel; it holds no keys");
            return Err(failure.hint("give the master that it watches: redis+sentinel://HOST:26379/MASTER"));
        }
        // It was busy or loading when we asked what it is, and now it answers.
        Some("cluster") if kind == Kind::Standalone => {
            let message = "this is a node of a cluster, which it could not say when the sweep began";
            return Err(Failure::new(FailureKind::Unsupported, message).hint("start again: the whole cluster is swept"));
        }
        _ => {}
    }
    match info.is_master() {
        Some(false) => Err(throttle::not_a_master(info.master_addr().as_deref())),
        Some(true) | None => Ok(()),
    }
}

/// Keys that expired each second since the server was started.
fn lifetime_flow(info: &Info) -> Option<f64> {
    let (expired, uptime) = (info.parsed::<f64>("expired_keys")?, info.parsed::<f64>("uptime_in_seconds")?);
    (uptime > 0.0).then(|| expired / uptime)
}

/// The smallest round trip of some PINGs, and the one in their middle.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_not_be_swept_is_refused_with_the_reason() {
        let refused = |text: &str| {
            let failure = may_be_swept(Kind::Standalone, &Info::parse(text)).unwrap_err();
            format!("[{}] {}\n  hint: {}", failure.kind, failure.message, failure.hint.unwrap_or("-".into()))
        };
        let cases = [
            "redis_version:3.2.12\r\nrole:master\r\n",
            "some_other_engine:1\r\n",
            "redis_version:7.0.15\r\nredis_mode:sentinel\r\n",
            "redis_version:7.0.15\r\nredis_mode:cluster\r\nrole:master\r\n",
            "redis_version:7.0.15\r\nrole:slave\r\nmaster_host:10.0.0.1\r\nmaster_port:6379\r\n",
        ];
        insta::assert_snapshot!(cases.map(refused).join("\n"));
        assert_eq!(may_be_swept(Kind::Standalone, &Info::parse("redis_version:4.0.0\r\nrole:master\r\n")), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_that_take_long_are_no_other_trouble_and_trouble_after_a_connection_is() {
        let second = Duration::from_secs(1);
        let options = ConnOptions::plain(Default::default(), second, second);
        let mut patience = Patience::new(Duration::from_secs(60), &options);
        let mut trouble = |reason| {
            let error = NodeError::NoMaster { problem: "nobody".into(), hint: None, class: Class::Transient };
            patience.next(reason, error).map_err(|failure| failure.message)
        };
        assert!(trouble(Reason::NoMaster).is_ok());
        tokio::time::advance(second * 40).await;
        assert!(trouble(Reason::NoMaster).is_ok());
        tokio::time::advance(second * 40).await;
        assert_eq!(trouble(Reason::NoMaster).unwrap_err(), "nobody (tried again for 60s)");
        patience.connected();
        tokio::time::advance(second * 5).await;
        let error = NodeError::NoMaster { problem: "nobody".into(), hint: None, class: Class::Transient };
        assert!(patience.next(Reason::NoMaster, error).is_ok());
    }
}
