//! What is known of the keys of a DB, counted and estimated.

use crate::forecast::estimate::Estimate;
use crate::model::progress::TTL_BOUNDS_S;

/// What is known of one DB, or of all of them together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outlook {
    /// Keys by DBSIZE, expired ones included.
    pub keys: u64,
    /// Keys with a TTL by INFO, expired ones included.
    pub expires: u64,
    /// Keys that were looked at.
    pub looked_at: u64,
    /// Live keys with a TTL.
    pub with_ttl: Estimate,
    /// Live keys without a TTL.
    pub without_ttl: Estimate,
    /// Keys that expire within the bound of the same index of [`TTL_BOUNDS_S`], and not within the one before.
    pub within: [Estimate; TTL_BOUNDS_S.len()],
    /// Keys that live longer than the last bound.
    pub later: Estimate,
    /// The time ahead in parts of equal length.
    pub bins: Vec<Estimate>,
    /// Bytes that a key takes on the average.
    pub bytes_per_key: Option<f64>,
}

impl Outlook {
    /// Expired keys that are still in memory: those with a TTL less those that live.
    pub(crate) fn expired(&self) -> Estimate {
        Estimate { keys: (self.expires as f64 - self.with_ttl.keys).max(0.0), ..self.with_ttl }
    }

    /// Bytes that so many keys take.
    pub(crate) fn bytes(&self, keys: f64) -> Option<u64> {
        self.bytes_per_key.map(|each| (each * keys) as u64)
    }

    /// Adds what is known of another DB, or of the same DB on another master.
    pub(crate) fn add(&mut self, other: &Self) {
        let bytes = |outlook: &Self| outlook.bytes_per_key.map(|each| each * outlook.keys as f64);
        let bytes = match (bytes(self), bytes(other)) {
            (Some(one), Some(another)) => Some(one + another),
            (None, another) if self.keys == 0 => another,
            _ => None,
        };
        self.keys += other.keys;
        self.bytes_per_key = bytes.map(|bytes| bytes / self.keys.max(1) as f64);
        self.expires += other.expires;
        self.looked_at += other.looked_at;
        self.with_ttl += other.with_ttl;
        self.without_ttl += other.without_ttl;
        self.later += other.later;
        self.within.iter_mut().zip(other.within).for_each(|(sum, part)| *sum += part);
        self.bins.resize(self.bins.len().max(other.bins.len()), Estimate::default());
        self.bins.iter_mut().zip(&other.bins).for_each(|(sum, part)| *sum += *part);
    }
}
