//! What is known of one server process. Replaced whole when another process answers: nothing that was learnt of the old one, not
//! its cursors, what it finished, its load, its rights, says anything about the new one.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::engine::policy::foreground::Foreground;
use crate::engine::policy::key_names::KeyNames;
use crate::engine::policy::observation::Observation;
use crate::engine::policy::profile::ServerProfile;
use crate::engine::policy::touch_audit::TouchAudit;
use crate::engine::sampler::Sampler;
use crate::model::progress::{PassFigures, ServerFacts};
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
    /// What is seen before the first batch.
    pub(super) baseline: Observation,
    pub(super) master: Master,
}

/// One server process.
pub(super) struct Session {
    /// Which one of those that this sweep has met, from 0 on.
    pub(super) number: u32,
    /// The connections, all in the same DB. The first is there from the beginning to the end; [`super::pipeline`] has the others.
    pub(super) conns: Vec<Conn>,
    pub(super) profile: ServerProfile,
    /// How its cursors are to be read.
    pub(super) space: CursorSpace,
    /// Whether its cursors follow the order of a hash table. Not what the profile says, once others were seen.
    pub(super) ordered: bool,
    pub(super) run_id: Option<RunId>,
    /// The node that is swept, and the slots that it owned since the pass began.
    pub(super) master: Master,
    /// What was seen before the first batch: limits are relative to it.
    pub(super) baseline: Observation,
    /// What was seen last.
    pub(super) seen: Observation,
    /// Whether that was decided upon.
    pub(super) decided: bool,
    pub(super) sampler: Sampler,
    /// What others need of it.
    pub(super) foreground: Foreground,
    /// Keys that expired each second before the sweep, as far as the server tells.
    pub(super) expired_per_sec: Option<f64>,
    pub(super) touch: TouchAudit,
    pub(super) names: KeyNames,
    /// DBs that are finished.
    pub(super) finished: BTreeSet<DbIndex>,
    /// Why DBs that were finished are swept again.
    pub(super) restart_reason: Option<String>,
    /// Most connections that it lends us.
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

    /// The same process over a new connection. What was seen of it before says nothing about it now, but what it is stays.
    pub(super) fn reconnected(&mut self, reached: Reached, options: &ConnOptions) {
        let Reached { conn, info, floor: _, baseline, master } = reached;
        if conn.addr() != self.addr() {
            self.sampler = Sampler::start(conn.addr().clone(), options.clone(), baseline.clone());
        }
        self.conns = vec![conn];
        self.seen = baseline;
        self.decided = false;
        self.max_conns = max_conns(&info);
        // Slots that came meanwhile were not there when the pass began: they are not covered by it.
        self.master.slots = self.master.slots.common(&master.slots);
        self.master.addr = master.addr;
    }

    /// Whether a master that was just reached is this process.
    pub(super) fn is(&self, reached: &Reached) -> bool {
        self.run_id.is_some() && self.run_id == reached.baseline.run_id
    }

    /// The first connection.
    pub(super) fn conn(&mut self) -> &mut Conn {
        &mut self.conns[0]
    }

    /// Where it is.
    pub(super) fn addr(&self) -> &NodeAddr {
        self.conns[0].addr()
    }

    /// The process, as it is kept with positions.
    pub(super) fn fingerprint(&self) -> Option<u64> {
        self.run_id.as_ref().map(RunId::fingerprint)
    }

    /// Whether a position came from this process.
    pub(super) fn owns(&self, figures: &PassFigures) -> bool {
        self.fingerprint().is_some() && figures.process == self.fingerprint()
    }

    /// Where a pass goes on in this process, by figures that another may have made.
    pub(super) fn position_of(&self, figures: &PassFigures) -> ScanPosition {
        if self.owns(figures) { figures.position } else { ScanPosition::NotStarted }
    }

    /// What was finished is worth nothing.
    pub(super) fn sweep_again(&mut self, why: &str) {
        self.finished.clear();
        self.restart_reason = Some(why.to_owned());
    }

    /// What it is, for people.
    pub(super) fn facts(&self, info: &Info) -> Option<ServerFacts> {
        info.server(self.addr())
    }

    /// An observation with what others need beside it.
    pub(super) fn with_foreground(&self, seen: Observation) -> Observation {
        Observation { others_cpu: self.foreground.cpu, ops: self.foreground.ops, ..seen }
    }
}

/// A cluster node that has a table for each slot has the slot in its cursors.
fn space_of(profile: &ServerProfile, master: &Master) -> CursorSpace {
    if profile.slot_tables { CursorSpace::BySlot(master.slots.clone()) } else { CursorSpace::OneTable }
}

/// Keys that expired each second since the server was started.
fn lifetime_rate(info: &Info) -> Option<f64> {
    let (expired, uptime) = (info.parsed::<f64>("expired_keys")?, info.parsed::<f64>("uptime_in_seconds")?);
    (uptime > 0.0).then(|| expired / uptime)
}

/// Most connections for us: a quarter of those that are free, where the server tells.
fn max_conns(info: &Info) -> usize {
    let free = info.parsed::<usize>("maxclients").zip(info.parsed::<usize>("connected_clients"));
    free.map_or(usize::MAX, |(most, taken)| most.saturating_sub(taken) / 4).max(1)
}
