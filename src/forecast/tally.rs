//! Counts the keys of the pieces that were drawn, by when they expire.

use std::collections::BTreeMap;

use crate::forecast::bins::Bins;
use crate::forecast::estimate::Sums;
use crate::forecast::outlook::Outlook;
use crate::forecast::sample::Piece;
use crate::model::progress::TTL_BOUNDS_S;

/// What was counted in the pieces of one stratum.
pub(crate) struct Tally {
    bins: Bins,
    looked_at: u64,
    with_ttl: Sums,
    without_ttl: Sums,
    within: [Sums; TTL_BOUNDS_S.len()],
    later: Sums,
    in_bins: BTreeMap<usize, Sums>,
}

impl Tally {
    pub(crate) fn new(bins: Bins) -> Self {
        Self {
            bins,
            looked_at: 0,
            with_ttl: Sums::default(),
            without_ttl: Sums::default(),
            within: Default::default(),
            later: Sums::default(),
            in_bins: BTreeMap::new(),
        }
    }

    /// Counts the keys of a piece of the sample.
    pub(crate) fn add(&mut self, piece: &Piece) {
        let (mut within, mut later) = ([0_u64; TTL_BOUNDS_S.len()], 0);
        let mut in_bins: BTreeMap<usize, u64> = BTreeMap::new();
        let ttls: Vec<_> = piece.iter().filter_map(|key| key.ttl).collect();
        for ttl in &ttls {
            match TTL_BOUNDS_S.iter().position(|bound| ttl.as_secs_f64() <= *bound as f64) {
                Some(class) => within[class] += 1,
                None => later += 1,
            }
            if let Some(bin) = self.bins.of(*ttl) {
                *in_bins.entry(bin).or_default() += 1;
            }
        }
        self.looked_at += piece.len() as u64;
        self.with_ttl.add(ttls.len() as u64);
        self.without_ttl.add((piece.len() - ttls.len()) as u64);
        self.within.iter_mut().zip(within).for_each(|(sums, keys)| sums.add(keys));
        self.later.add(later);
        in_bins.into_iter().for_each(|(bin, keys)| self.in_bins.entry(bin).or_default().add(keys));
    }

    /// What that says about the whole stratum, with so many pieces looked at of so many.
    pub(crate) fn outlook(&self, drawn: (f64, f64)) -> Outlook {
        let mut bins = vec![Sums::default().estimate(drawn); self.bins.number];
        for (bin, sums) in &self.in_bins {
            bins[*bin] = sums.estimate(drawn);
        }
        Outlook {
            looked_at: self.looked_at,
            with_ttl: self.with_ttl.estimate(drawn),
            without_ttl: self.without_ttl.estimate(drawn),
            within: self.within.map(|sums| sums.estimate(drawn)),
            later: self.later.estimate(drawn),
            bins,
            ..Outlook::default()
        }
    }
}
