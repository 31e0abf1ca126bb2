//! The pace of a keep run on one master, and where in the lap it is.

use std::collections::BTreeSet;

use tokio::time::Instant;

use crate::engine::policy::keep_pace::KeepPace;
use crate::model::bounds::{Bounds, KeepFigures};
use crate::model::shard::DbIndex;

/// The pace, and where in the lap the DB begins that is walked now.
pub(super) struct LapState {
    pub(super) pace: KeepPace,
    /// Share of the lap before the present DB, and that of the DB itself.
    pub(super) span: (f64, f64),
    /// Keys in the other DBs when the lap began.
    pub(super) other_keys: u64,
    /// The DBs that were walked at all.
    begun: BTreeSet<DbIndex>,
}

impl LapState {
    pub(super) fn new(bounds: Bounds, before: KeepFigures) -> Self {
        Self {
            pace: KeepPace::new(bounds, before, Instant::now()),
            span: (0.0, 0.0),
            other_keys: 0,
            begun: BTreeSet::new(),
        }
    }

    /// Whether a DB is walked for the first time.
    pub(super) fn begins(&mut self, db: DbIndex) -> bool {
        self.begun.insert(db)
    }

    /// A share of the present DB, which has so many keys now, is walked, and a batch has freed so many.
    pub(super) fn walked(&mut self, share: f64, reclaimed: u64, keys: u64) {
        self.pace.resize(self.other_keys + keys);
        let (before, own) = self.span;
        self.pace.walked(before + own * share, reclaimed, Instant::now());
    }
}
