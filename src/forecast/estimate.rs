//! From the pieces that were drawn to figures about all of them.
//!
//! Of the `all` pieces of a stratum `drawn` were looked at. What a class of keys counts in the stratum is `all / drawn` times what it
//! counts in those, whatever the pieces are like; its variance is `all^2 (1 - drawn/all) s^2 / drawn`, with `s^2` the variance among the
//! pieces. So keys that lie together make the error larger and the estimate no worse. Both are summed up over the strata.

/// Errors are given for this share of cases: 1.96 standard errors.
const STANDARD_ERRORS: f64 = 1.96;

/// Where none was seen in a sample there are fewer than this many in as much of the whole, in 19 of 20 cases.
const UNSEEN: f64 = 3.0;

/// A number of keys, and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Estimate {
    /// The estimated number, scaled from the sample.
    pub keys: f64,
    /// Its variance; 0 where all keys were looked at.
    pub variance: f64,
    /// So many keys at most, in 19 of 20 cases, were missed where the sample holds none.
    pub missed: f64,
}

impl Estimate {
    /// In 19 of 20 cases the truth is no further away than this.
    pub(crate) fn error(&self) -> f64 {
        (STANDARD_ERRORS * self.variance.sqrt()).hypot(self.missed)
    }

    /// One standard error.
    pub(crate) fn standard_error(&self) -> f64 {
        self.error() / STANDARD_ERRORS
    }
}

/// Adds the estimate of other keys; the errors of the two are independent.
impl std::ops::AddAssign for Estimate {
    fn add_assign(&mut self, other: Self) {
        self.keys += other.keys;
        self.variance += other.variance;
        // The chance to see none of some keys is the same whether they lie in one stratum or in several.
        self.missed = self.missed.max(other.missed);
    }
}

impl std::iter::Sum for Estimate {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), |mut sum, part| {
            sum += part;
            sum
        })
    }
}

/// The sum and the sum of squares over the pieces of what one class counts in each.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sums {
    sum: f64,
    squares: f64,
}

impl Sums {
    /// Takes in what a piece holds. One that holds none need not be taken in.
    pub(crate) fn add(&mut self, keys: u64) {
        self.sum += keys as f64;
        self.squares += (keys as f64).powi(2);
    }

    /// The estimate, with so many pieces looked at of so many.
    pub(crate) fn estimate(&self, (drawn, all): (f64, f64)) -> Estimate {
        if drawn < 1.0 {
            return Estimate::default();
        }
        let spread = if drawn > 1.0 { (self.squares - self.sum * self.sum / drawn) / (drawn - 1.0) } else { 0.0 };
        let variance = all * all * (1.0 - drawn / all) * spread.max(0.0) / drawn;
        let missed = if self.sum == 0.0 && drawn < all { UNSEEN * all / drawn } else { 0.0 };
        Estimate { keys: self.sum * all / drawn, variance, missed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::forecast::sample::Tables;

    #[test]
    fn what_was_counted_whole_has_no_error() {
        let mut sums = Sums::default();
        [3, 0, 9].into_iter().for_each(|keys| sums.add(keys));
        assert_eq!(sums.estimate((3.0, 3.0)), Estimate { keys: 12.0, ..Estimate::default() });
    }

    #[test]
    fn the_truth_is_within_the_error_in_nineteen_of_twenty_draws() {
        fastrand::seed(7);
        // Some pieces hold far more than others.
        let pieces: Vec<u64> = (0..2_000).map(|n| if n % 50 == 0 { 200 } else { fastrand::u64(..20) }).collect();
        let truth: u64 = pieces.iter().sum();
        let (mut hits, mut total, draws) = (0, 0.0, 1_000);
        for _ in 0..draws {
            let mut sums = Sums::default();
            fastrand::choose_multiple(pieces.iter(), 200).into_iter().for_each(|keys| sums.add(*keys));
            let estimate = sums.estimate((200.0, 2_000.0));
            hits += u32::from((estimate.keys - truth as f64).abs() <= estimate.error());
            total += estimate.keys;
        }
        assert!((920..=980).contains(&hits), "{hits} of {draws}");
        let mean = total / f64::from(draws);
        assert!((mean / truth as f64 - 1.0).abs() < 0.01, "no bias: {mean} of {truth}");
    }

    #[test]
    fn what_was_not_seen_anywhere_is_missed_once_however_many_strata_there_are() {
        let unseen = Sums::default().estimate((10.0, 100.0));
        let sum: Estimate = [unseen; 9].into_iter().sum();
        assert_eq!((sum.keys, sum.error()), (0.0, unseen.error()));
        assert_eq!(unseen.error(), 30.0);
    }

    /// A DB of which six of many slots hold most keys, and how many keys of a class each piece holds: about 100 in every second one of
    /// those slots, and hardly one in the others.
    fn heavy_slots() -> (Tables, Vec<u64>) {
        let heavy = [40_000, 30_000, 20_000, 12_000, 6_000, 3_000];
        let sizes = (0..5_000).map(|slot| (slot, heavy.get(usize::from(slot)).copied().unwrap_or(2)));
        let tables = Tables::by_slot(sizes.clone().map(|(_, keys)| keys).sum(), sizes);
        let mut counts = Vec::new();
        for (place, stratum) in tables.draw(u64::MAX).iter().enumerate() {
            let count = || match place {
                0 | 2 | 4 => fastrand::u64(80..120),
                1 | 3 | 5 => 0,
                _ => u64::from(fastrand::u8(..5) == 0),
            };
            counts.extend(stratum.drawn.iter().map(|_| count()));
        }
        (tables, counts)
    }

    #[test]
    fn where_few_slots_hold_most_keys_the_error_by_strata_is_far_smaller_and_as_honest() {
        fastrand::seed(11);
        let (tables, counts) = heavy_slots();
        let truth = counts.iter().sum::<u64>() as f64;
        let (mut hits, mut total, draws) = (0, 0.0, 1_000);
        let (mut by_strata, mut at_random) = (0.0, 0.0);
        for _ in 0..draws {
            let mut estimate = Estimate::default();
            let mut looked_at = 0;
            for stratum in tables.draw(16_000) {
                let mut sums = Sums::default();
                stratum.drawn.iter().for_each(|piece| sums.add(counts[*piece as usize]));
                estimate += sums.estimate(stratum.part());
                looked_at += stratum.drawn.len();
            }
            hits += u32::from((estimate.keys - truth).abs() <= estimate.error());
            total += estimate.keys;
            by_strata += estimate.error();
            let mut sums = Sums::default();
            fastrand::choose_multiple(counts.iter(), looked_at).into_iter().for_each(|keys| sums.add(*keys));
            at_random += sums.estimate((looked_at as f64, counts.len() as f64)).error();
        }
        assert!((920..=980).contains(&hits), "{hits} of {draws}");
        let mean = total / f64::from(draws);
        assert!((mean / truth - 1.0).abs() < 0.005, "no bias: {mean} of {truth}");
        assert!(by_strata < at_random / 3.0, "{by_strata} and {at_random}, of {draws} draws");
    }
}
