//! Where each shard's master is, and which shards may be swept now.

pub(super) mod permits;
pub(super) mod shard_map;
