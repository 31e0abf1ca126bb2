//! Whether a due scan has anything to gain: the backlog as `check` estimates it, against what the operator asks for.

use std::time::Duration;

use crate::check;
use crate::check::verdict::{self, DbBacklog};
use crate::model::schedule::BacklogSize;
use crate::node::conn::ConnOptions;
use crate::node::topology::Master;
use crate::settings::ScanSettings;

/// How long the look at one master may take.
const WITHIN: Duration = Duration::from_secs(10);

/// What the masters hold together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Backlog {
    keys: u64,
    bytes: Option<u64>,
    expires: u64,
}

/// Why a sweep is not worth beginning, if it is not. A backlog that cannot be estimated may be any: the sweep begins.
pub(super) async fn nothing_to_gain(
    masters: &[Master],
    options: &ConnOptions,
    settings: &ScanSettings,
    least: BacklogSize,
) -> Option<String> {
    let mut all = Backlog { bytes: Some(0), ..Backlog::default() };
    for master in masters {
        let facts = tokio::time::timeout(WITHIN, check::inspect(&master.addr, options, None)).await.ok()?.ok()?;
        let DbBacklog { size, expired, bytes } = verdict::assess(&facts, None, settings).swept;
        all.keys += expired?.keys;
        all.expires += size.expires;
        all.bytes = all.bytes.zip(bytes).map(|(sum, bytes)| sum + bytes);
    }
    too_small(all, least)
}

fn too_small(backlog: Backlog, least: BacklogSize) -> Option<String> {
    let Backlog { keys, bytes, expires } = backlog;
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
        let backlog = Backlog { keys: 100, bytes: Some(10 << 10), expires: 1000 };
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
        let unknown = Backlog { bytes: None, ..backlog };
        assert_eq!(too_small(unknown, BacklogSize::Bytes(1)), None, "unknown is not small");
        assert!(too_small(Backlog::default(), BacklogSize::Percent(0.1)).is_some(), "no key has a TTL");
    }
}
