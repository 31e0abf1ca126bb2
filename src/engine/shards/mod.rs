//! Which shards there are, and which of them may be swept now.

pub(super) mod permits;
pub(super) mod shard_map;
