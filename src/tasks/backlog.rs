//! Whether a due scan has enough to gain: compares the backlog, as `check` estimates it, with `min-backlog`.

use std::time::Duration;

use crate::check;
use crate::check::assessment::{self, DbBacklog};
use crate::model::schedule::BacklogSize;
use crate::node::conn::ConnOptions;
use crate::node::topology::Master;
use crate::settings::ScanSettings;

/// How long the estimate for one master may take.
const WITHIN: Duration = Duration::from_secs(10);

/// The backlog of all masters of an instance together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct InstanceBacklog {
    keys: u64,
    bytes: Option<u64>,
    expires: u64,
}

/// Why a sweep would gain too little to begin; `None`: it begins, also where the backlog cannot be estimated.
pub(super) async fn nothing_to_gain(
    masters: &[Master],
    options: &ConnOptions,
    settings: &ScanSettings,
    least: BacklogSize,
) -> Option<String> {
    let mut all = InstanceBacklog { bytes: Some(0), ..InstanceBacklog::default() };
    for master in masters {
        let facts = tokio::time::timeout(WITHIN, check::inspect(&master.addr, options, None)).await.ok()?.ok()?;
        let DbBacklog { size, expired, bytes } = assessment::assess(&facts, None, settings).swept;
        all.keys += expired?.keys;
        all.expires += size.expires;
        all.bytes = all.bytes.zip(bytes).map(|(sum, bytes)| sum + bytes);
    }
    too_small(all, least)
}

fn too_small(backlog: InstanceBacklog, least: BacklogSize) -> Option<String> {
    let InstanceBacklog { keys, bytes, expires } = backlog;
    let is_small = match least {
        BacklogSize::Keys(least) => keys < least,
        BacklogSize::Bytes(least) => bytes? < least,
        BacklogSize::Percent(_) if expires == 0 => true,
        BacklogSize::Percent(least) => (keys as f64) * 100.0 / (expires as f64) < least,
    };
    is_small.then(|| {
        let held = bytes.map_or_else(String::new, |bytes| format!(" holding about {} KiB", bytes >> 10));
        format!("nothing to gain: about {keys} of {expires} keys with a TTL have expired{held}; min-backlog is {least}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backlog_is_small_by_keys_bytes_or_share() {
        let backlog = InstanceBacklog { keys: 100, bytes: Some(10 << 10), expires: 1000 };
        for (least, small) in [
            (BacklogSize::Keys(100), false),
            (BacklogSize::Keys(101), true),
            (BacklogSize::Bytes(10 << 10), false),
            (BacklogSize::Bytes((10 << 10) + 1), true),
            (BacklogSize::Percent(10.0), false),
            (BacklogSize::Percent(10.1), true),
        ] {
            assert_eq!(too_small(backlog, least).is_some(), small, "{least:?}");
        }
        let unknown = InstanceBacklog { bytes: None, ..backlog };
        assert_eq!(too_small(unknown, BacklogSize::Bytes(1)), None, "unknown is not small");
        assert!(too_small(InstanceBacklog::default(), BacklogSize::Percent(0.1)).is_some(), "no key has a TTL");
    }
}
