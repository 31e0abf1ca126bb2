//! The workers of a pass: each has a connection, and at most one exchange with the server under way.
//!
//! Each worker needs a connection of its own. The count of a batch is exact because the server runs its commands back to back, which
//! it does because they arrive in one write. If batches shared a connection, the network could split their stream anywhere, and
//! another client's command could run between a SCAN and its DBSIZE.

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

/// A request that a worker has sent and whose reply is to come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exchange {
    pub(super) purpose: Purpose,
    /// The SCAN; for a touch, the SCAN before it.
    pub(super) request: Request,
    pub(super) segment: SegmentId,
}

/// Walks one segment at a time. Its connection has the same index in [`Session::conns`].
#[derive(Debug, Default)]
pub(super) struct Worker {
    pub(super) exchange: Option<Exchange>,
    /// The segment that the worker has claimed.
    pub(super) segment: Option<SegmentId>,
    /// The keys of a batch that is to be touched.
    pub(super) names: Names,
}

/// The workers of one pass.
pub(super) struct Pipeline {
    pub(super) workers: Vec<Worker>,
    pub(super) depth: Depth,
    pub(super) timer: Timer,
    /// When the last reply was read, whichever worker's it was.
    pub(super) last_read: Option<Instant>,
    /// Connections that are being opened.
    opening: Option<JoinHandle<Vec<Conn>>>,
}

impl Pipeline {
    /// A pipeline of one worker, for a sweep at this intensity.
    pub(super) fn new(intensity: f64) -> Self {
        Self {
            workers: vec![Worker::default()],
            depth: Depth::new(usize::MAX, intensity),
            timer: Timer::default(),
            last_read: None,
            opening: None,
        }
    }

    /// Forgets the workers, and the connections that are being opened.
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

    /// The worker whose reply comes next: a server answers in the order in which requests arrive.
    pub(super) fn next(&self, session: &Session) -> Option<usize> {
        let under_way = self.workers.iter().enumerate().filter(|(_, worker)| worker.exchange.is_some());
        under_way.map(|(number, _)| number).min_by_key(|&number| session.conns[number].sent_at())
    }

    /// Adds the connections that have been opened, and opens more until there are `wanted`, or as many as the session may open.
    pub(super) async fn grow(&mut self, wanted: usize, session: &mut Session, options: &ConnOptions, db: DbIndex) {
        if let Some(opening) = self.opening.take_if(|opening| opening.is_finished()) {
            let asked = session.conns.len();
            session.conns.extend(opening.await.unwrap_or_default());
            if session.conns.len() == asked {
                tracing::debug!(addr = %session.addr(), asked, "the server accepts no more connections");
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

/// Opens another connection to the same server process, in the same DB. `None`: another process answers.
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
