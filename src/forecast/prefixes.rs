//! Keys by the first parts of their names: which kind of key has a TTL, which expires soon, which never does.
//!
//! The sample bounds the memory: there are no more groups than keys in it, so that a map is enough and no sketch that would add an
//! error of its own. A key's last part is never shown, and neither is more of a name than `LONGEST` bytes.

use std::collections::HashMap;
use std::time::Duration;

use crate::forecast::estimate::{Estimate, Sums};
use crate::forecast::sample::Piece;

/// A key expires soon where that is within this.
pub(crate) const SOON: Duration = Duration::from_secs(3600);
/// Longer beginnings are cut here.
const LONGEST: usize = 64;

/// How keys are grouped by their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct By {
    /// What stands between two parts of a name.
    pub separator: Vec<u8>,
    /// How many parts count. The last part of a name never does.
    pub depth: usize,
    /// How many groups are wanted.
    pub top: usize,
}

impl Default for By {
    fn default() -> Self {
        Self { separator: b":".to_vec(), depth: 1, top: 20 }
    }
}

/// The keys whose names begin alike.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct PrefixGroup {
    /// The beginning, with the separator behind it, as text; empty: names of one part.
    pub prefix: String,
    /// Live keys of the group.
    pub keys: Estimate,
    /// Live keys with a TTL.
    pub with_ttl: Estimate,
    /// Those that expire within [`SOON`].
    pub soon: Estimate,
    /// Live keys without a TTL.
    pub without_ttl: Estimate,
}

/// Groups while they are counted.
pub(crate) struct PrefixGroups {
    by: By,
    all: HashMap<Vec<u8>, PrefixGroup>,
    /// What the pieces of the present stratum hold of each group.
    sums: HashMap<Vec<u8>, [Sums; 4]>,
}

impl PrefixGroups {
    pub(crate) fn new(by: By) -> Self {
        Self { by, all: HashMap::new(), sums: HashMap::new() }
    }

    /// Takes in a piece.
    pub(crate) fn add(&mut self, piece: &Piece) {
        let mut counts: HashMap<&[u8], [u64; 4]> = HashMap::new();
        for key in piece {
            let count = counts.entry(beginning(&key.name, &self.by)).or_default();
            count[0] += 1;
            count[1] += u64::from(key.ttl.is_some());
            count[2] += u64::from(key.ttl.is_some_and(|ttl| ttl <= SOON));
            count[3] += u64::from(key.ttl.is_none());
        }
        for (prefix, counts) in counts {
            let sums = self.sums.entry(prefix.to_owned()).or_default();
            sums.iter_mut().zip(counts).for_each(|(sums, keys)| sums.add(keys));
        }
    }

    /// Ends a stratum, with so many pieces taken in of so many.
    pub(crate) fn end_stratum(&mut self, drawn: (f64, f64)) {
        for (prefix, sums) in self.sums.drain() {
            let group = self.all.entry(prefix).or_insert_with_key(|prefix| PrefixGroup {
                prefix: prefix.escape_ascii().to_string(),
                keys: Estimate::default(),
                with_ttl: Estimate::default(),
                soon: Estimate::default(),
                without_ttl: Estimate::default(),
            });
            let of = [&mut group.keys, &mut group.with_ttl, &mut group.soon, &mut group.without_ttl];
            of.into_iter().zip(sums).for_each(|(estimate, sums)| *estimate += sums.estimate(drawn));
        }
    }

    /// The groups of most keys, the largest first, at most `By::top`.
    pub(crate) fn largest(self) -> Vec<PrefixGroup> {
        let mut groups: Vec<_> = self.all.into_values().collect();
        groups.sort_by(|one, other| {
            other.keys.keys.total_cmp(&one.keys.keys).then_with(|| one.prefix.cmp(&other.prefix))
        });
        groups.truncate(self.by.top);
        groups
    }
}

/// The first parts of a name, with the separator behind each.
fn beginning<'a>(name: &'a [u8], by: &By) -> &'a [u8] {
    let mut end = 0;
    for _ in 0..by.depth {
        let rest = &name[end..];
        let Some(at) = rest.windows(by.separator.len()).position(|part| part == by.separator) else { break };
        end += at + by.separator.len();
    }
    &name[..end.min(LONGEST)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::sample::Key;

    fn by(depth: usize) -> By {
        By { depth, ..By::default() }
    }

    #[test]
    fn the_last_part_of_a_name_is_never_shown() {
        let of = |name: &'static str, depth| beginning(name.as_bytes(), &by(depth));
        assert_eq!(of("user:1:name", 1), b"user:");
        assert_eq!(of("user:1:name", 2), b"user:1:");
        assert_eq!(of("user:1:name", 9), b"user:1:");
        assert_eq!(of("alone", 1), b"");
        assert_eq!(beginning("x".repeat(200).as_bytes(), &by(1)), b"");
        assert_eq!(beginning(format!("{}:y", "x".repeat(200)).as_bytes(), &by(1)).len(), LONGEST);
        assert_eq!(beginning(b"a--b", &By { separator: b"--".to_vec(), ..By::default() }), b"a--");
    }

    #[test]
    fn groups_are_counted_and_the_largest_come_first() {
        let key = |name: &str, ttl| Key { name: name.into(), ttl };
        let hour = Some(Duration::from_secs(3600));
        let piece =
            vec![key("a:1", None), key("a:2", hour), key("b:1", Some(Duration::from_secs(3601))), key("a:3", None)];
        let mut groups = PrefixGroups::new(By { top: 1, ..By::default() });
        groups.add(&piece);
        groups.end_stratum((1.0, 10.0));
        let largest = groups.largest();
        assert_eq!((largest.len(), largest[0].prefix.as_str()), (1, "a:"));
        let keys = |estimate: Estimate| estimate.keys;
        let group = &largest[0];
        assert_eq!(
            [keys(group.keys), keys(group.with_ttl), keys(group.soon), keys(group.without_ttl)],
            [30.0, 10.0, 10.0, 20.0]
        );
    }
}
