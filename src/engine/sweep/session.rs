//! What is known of one server process. Replaced as a whole when another process answers: cursors, finished DBs, load and rights of
//! the old process say nothing about the new one.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::engine::policy::foreground::Foreground;
use crate::engine::policy::key_names::KeyNames;
use crate::engine::policy::observation::Observation;
use crate::engine::policy::profile::ServerProfile;
use crate::engine::policy::touch_audit::TouchAudit;
use crate::engine::sampler::Sampler;
use crate::model::progress::{PassCheckpoint, ServerFacts};
use crate::model::shard::{DbIndex, NodeAddr, RunId, ScanPosition};
use crate::model::slots::CursorSpace;
use crate::node::conn::{Conn, ConnOptions};
use crate::node::info::Info;
use crate::node::topology::Master;
use crate::settings::ScanSettings;

/// A master that was reached and may be swept.
pub(super) struct Reached {
    pub(super) conn: Conn,
    pub(super) info: Info,
    /// The smallest PING round trip.
    pub(super) floor: Duration,
    /// What was observed when it was reached.
    pub(super) baseline: Observation,
    pub(super) master: Master,
}

/// What is known of one server process; another process at the address begins a new session.
pub(super) struct Session {
    /// How many other processes this sweep met before.
    pub(super) number: u32,
    /// The connections, all in the same DB. The first stays for the whole session; [`super::pipeline`] opens the others.
    pub(super) conns: Vec<Conn>,
    pub(super) profile: ServerProfile,
    /// The order of its cursors.
    pub(super) space: CursorSpace,
    /// Whether its cursors follow the order of a hash table: by the profile, until a cursor proves otherwise.
    pub(super) ordered: bool,
    pub(super) run_id: Option<RunId>,
    /// The node that is swept, and the slots that it owned since the pass began.
    pub(super) master: Master,
    /// What was observed before the first batch: relative limits refer to it.
    pub(super) baseline: Observation,
    /// The last observation, on which the throttle decides.
    pub(super) seen: Observation,
    /// Whether the throttle has decided on `seen`.
    pub(super) decided: bool,
    pub(super) sampler: Sampler,
    /// The load by other clients.
    pub(super) foreground: Foreground,
    /// Keys that expired each second since the server was started; `None`: INFO does not tell.
    pub(super) expired_per_sec: Option<f64>,
    pub(super) touch: TouchAudit,
    pub(super) names: KeyNames,
    /// DBs whose pass is finished.
    pub(super) finished: BTreeSet<DbIndex>,
    /// Why DBs that were finished are swept again.
    pub(super) restart_reason: Option<String>,
    /// The most connections that the sweep may open.
    pub(super) max_conns: usize,
}

impl Session {
    /// A session of a master that was just reached.
    pub(super) fn new(number: u32, reached: Reached, settings: &ScanSettings, options: &ConnOptions) -> Self {
        let Reached { conn, info, floor: _, baseline, master } = reached;
        let profile = ServerProfile::of(&info);
        Self {
            number,
            sampler: Sampler::start(conn.addr().clone(), options.clone(), baseline.clone()),
            conns: vec![conn],
            space: space_of(&profile, &master),
            ordered: profile.ordered_cursors,
            run_id: baseline.run_id.clone(),
            master,
            seen: baseline.clone(),
            baseline,
            decided: false,
            foreground: Foreground::default(),
            expired_per_sec: lifetime_rate(&info),
            touch: TouchAudit::new(settings.touch, profile.exists_moves_lru),
            names: KeyNames::new(settings.payload, profile.type_frees_all),
            profile,
            finished: BTreeSet::new(),
            restart_reason: None,
            max_conns: max_conns(&info),
        }
    }

    /// Goes on with the same process over a new connection: only the observations are replaced.
    pub(super) fn reconnected(&mut self, reached: Reached, options: &ConnOptions) {
        let Reached { conn, info, floor: _, baseline, master } = reached;
        if conn.addr() != self.addr() {
            self.sampler = Sampler::start(conn.addr().clone(), options.clone(), baseline.clone());
        }
        self.conns = vec![conn];
        self.seen = baseline;
        self.decided = false;
        self.max_conns = max_conns(&info);
        // Slots that the node gained meanwhile were not there when the pass began: the pass does not cover them.
        self.master.slots = self.master.slots.common(&master.slots);
        self.master.addr = master.addr;
    }

    /// Whether a master that was just reached is this process.
    pub(super) fn is(&self, reached: &Reached) -> bool {
        self.run_id.is_some() && self.run_id == reached.baseline.run_id
    }

    /// The connection that stays for the whole session.
    pub(super) fn conn(&mut self) -> &mut Conn {
        &mut self.conns[0]
    }

    /// The address of the server.
    pub(super) fn addr(&self) -> &NodeAddr {
        self.conns[0].addr()
    }

    /// Identifies the process beside each position in the checkpoint.
    pub(super) fn fingerprint(&self) -> Option<u64> {
        self.run_id.as_ref().map(RunId::fingerprint)
    }

    /// Whether the position of this checkpoint came from this process.
    pub(super) fn owns(&self, checkpoint: &PassCheckpoint) -> bool {
        self.fingerprint().is_some() && checkpoint.process == self.fingerprint()
    }

    /// Where a pass with this checkpoint goes on in this process.
    pub(super) fn position_of(&self, checkpoint: &PassCheckpoint) -> ScanPosition {
        if self.owns(checkpoint) { checkpoint.position } else { ScanPosition::NotStarted }
    }

    /// Forgets the finished DBs: their passes prove nothing.
    pub(super) fn sweep_again(&mut self, why: &str) {
        self.finished.clear();
        self.restart_reason = Some(why.to_owned());
    }

    /// Product and version of the server.
    pub(super) fn facts(&self, info: &Info) -> Option<ServerFacts> {
        info.server(self.addr())
    }

    /// An observation with the load by other clients added.
    pub(super) fn with_foreground(&self, seen: Observation) -> Observation {
        Observation { others_cpu: self.foreground.cpu, ops: self.foreground.ops, ..seen }
    }
}

/// The cursors of a cluster node that has a hash table for each slot hold the slot.
fn space_of(profile: &ServerProfile, master: &Master) -> CursorSpace {
    if profile.slot_tables { CursorSpace::BySlot(master.slots.clone()) } else { CursorSpace::OneTable }
}

/// Keys that expired each second since the server was started.
fn lifetime_rate(info: &Info) -> Option<f64> {
    let (expired, uptime) = (info.parsed::<f64>("expired_keys")?, info.parsed::<f64>("uptime_in_seconds")?);
    (uptime > 0.0).then(|| expired / uptime)
}

/// The most connections that the sweep may open: a quarter of the free ones, if INFO tells.
fn max_conns(info: &Info) -> usize {
    let free = info.parsed::<usize>("maxclients").zip(info.parsed::<usize>("connected_clients"));
    free.map_or(usize::MAX, |(most, taken)| most.saturating_sub(taken) / 4).max(1)
}
