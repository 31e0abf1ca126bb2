//! The workers of a pass: each has a connection, and one exchange with the server under way at most.
//!
//! Each worker needs a connection of its own. The count of a batch is exact because its commands are run back to back, and they
//! are since they come in one write that nothing else is in: on a shared connection the network may cut what is sent where it
//! likes, so that another client's command gets between a SCAN and its DBSIZE.

use std::time::Instant;

use tokio::task::JoinHandle;

use crate::engine::policy::depth::Depth;
use crate::engine::policy::segments::SegmentId;
use crate::engine::policy::verdict::Purpose;
use crate::engine::sweep::session::Session;
use crate::engine::sweep::timer::Timer;
use crate::model::shard::{DbIndex, NodeAddr, RunId};
use crate::node::commands;
use crate::node::conn::{Conn, ConnOptions, Request};
use crate::node::error::NodeError;
use crate::node::wire::Names;

/// What a worker has under way.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    pub(super) purpose: Purpose,
    /// The SCAN of it; of a touch, the SCAN before it.
    pub(super) request: Request,
    pub(super) segment: SegmentId,
}

/// Who walks a segment. Its connection has the same number in [`Session::conns`].
#[derive(Debug, Default)]
pub(super) struct Worker {
    pub(super) exchange: Option<Exchange>,
    /// The segment that it walks.
    pub(super) segment: Option<SegmentId>,
    /// The names of a batch that is to be touched.
    pub(super) names: Names,
}

/// The workers of one pass.
pub(super) struct Pipeline {
    pub(super) workers: Vec<Worker>,
    pub(super) depth: Depth,
    pub(super) timer: Timer,
    /// When the last reply was read, of any worker.
    pub(super) last_read: Option<Instant>,
    opening: Option<JoinHandle<Vec<Conn>>>,
}

impl Pipeline {
    /// Workers that begin at an intensity.
    pub(super) fn new(intensity: f64) -> Self {
        Self {
            workers: vec![Worker::default()],
            depth: Depth::new(usize::MAX, intensity),
            timer: Timer::default(),
            last_read: None,
            opening: None,
        }
    }

    /// Forgets what the workers do, and the connections that are being made.
    pub(super) fn forget(&mut self) {
        self.workers = vec![Worker::default()];
        if let Some(opening) = self.opening.take() {
            opening.abort();
        }
    }

    /// How many exchanges are under way.
    pub(super) fn under_way(&self) -> usize {
        self.workers.iter().filter(|worker| worker.exchange.is_some()).count()
    }

    /// The worker whose reply comes next: a server works things off in the order in which they come.
    pub(super) fn next(&self, session: &Session) -> Option<usize> {
        let under_way = self.workers.iter().enumerate().filter(|(_, worker)| worker.exchange.is_some());
        under_way.map(|(number, _)| number).min_by_key(|&number| session.conns[number].sent_at())
    }

    /// Takes in connections that were made, and has as many made as are wanted and lent.
    pub(super) async fn grow(&mut self, wanted: usize, session: &mut Session, options: &ConnOptions, db: DbIndex) {
        if let Some(opening) = self.opening.take_if(|opening| opening.is_finished()) {
            let asked = session.conns.len();
            session.conns.extend(opening.await.unwrap_or_default());
            if session.conns.len() == asked {
                tracing::debug!(addr = %session.addr(), asked, "the server lends no more connections");
                session.max_conns = asked;
            }
        }
        while self.workers.len() < session.conns.len() {
            self.workers.push(Worker::default());
        }
        self.depth.limit(session.max_conns);
        let more = wanted.min(session.max_conns).saturating_sub(session.conns.len());
        if more > 0 && self.opening.is_none() {
            let (addr, run_id) = (session.addr().clone(), session.run_id.clone());
            let options = options.clone();
            let open = async move {
                let one = || open(&addr, &options, run_id.as_ref(), db);
                let made = futures_util::future::join_all((0..more).map(|_| one())).await;
                made.into_iter()
                    .filter_map(|conn| conn.inspect_err(|error| tracing::debug!(%error)).ok().flatten())
                    .collect()
            };
            self.opening = Some(tokio::spawn(open));
        }
    }
}

/// Another connection to the same process, in the same DB; `None` where another process answers.
async fn open(
    addr: &NodeAddr,
    options: &ConnOptions,
    run_id: Option<&RunId>,
    db: DbIndex,
) -> Result<Option<Conn>, NodeError> {
    let mut conn = Conn::open(addr, options).await?;
    if run_id.is_none() || commands::run_id(&mut conn).await?.as_ref() != run_id {
        return Ok(None);
    }
    conn.select(db).await?;
    Ok(Some(conn))
}
