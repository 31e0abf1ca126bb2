//! From the pieces that were drawn to figures about all of them.
//!
//! Of `all` pieces `drawn` were looked at. What a class of keys counts in all is `all / drawn` times what it counts in those, whatever
//! the pieces are like; its variance is `all^2 (1 - drawn/all) s^2 / drawn`, with `s^2` the variance among the pieces. So keys that lie
//! together, such as those of one hash slot, make the error larger and the estimate no worse.

/// Errors are given for this share of cases: 1.96 standard errors.
const STANDARD_ERRORS: f64 = 1.96;

/// Where none was seen in a sample there are fewer than this many in as much of the whole, in 19 of 20 cases.
const UNSEEN: f64 = 3.0;

/// A number of keys with its variance.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Estimate {
    /// The estimated number, scaled from the sample.
    pub keys: f64,
    /// Its variance; 0 where all keys were looked at.
    pub variance: f64,
}

impl Estimate {
    /// In 19 of 20 cases the truth is no further away than this.
    pub(crate) fn error(&self) -> f64 {
        STANDARD_ERRORS * self.variance.sqrt()
    }
}

/// Adds the estimate of other keys; the errors of the two are independent.
impl std::ops::AddAssign for Estimate {
    fn add_assign(&mut self, other: Self) {
        self.keys += other.keys;
        self.variance += other.variance;
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
    /// Takes in what a piece holds.
    pub(crate) fn add(&mut self, keys: u64) {
        self.sum += keys as f64;
        self.squares += (keys as f64).powi(2);
    }

    /// The estimate, with so many pieces looked at of so many.
    pub(crate) fn estimate(&self, (drawn, all): (f64, f64)) -> Estimate {
        if drawn < 1.0 {
            return Estimate::default();
        }
        if self.sum == 0.0 && drawn < all {
            // So many may have been missed in one of twenty draws.
            return Estimate { keys: 0.0, variance: (UNSEEN * all / drawn / STANDARD_ERRORS).powi(2) };
        }
        let spread = if drawn > 1.0 { (self.squares - self.sum * self.sum / drawn) / (drawn - 1.0) } else { 0.0 };
        let variance = all * all * (1.0 - drawn / all) * spread.max(0.0) / drawn;
        Estimate { keys: self.sum * all / drawn, variance }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_counted_whole_has_no_error() {
        let mut sums = Sums::default();
        [3, 0, 9].into_iter().for_each(|keys| sums.add(keys));
        assert_eq!(sums.estimate((3.0, 3.0)), Estimate { keys: 12.0, variance: 0.0 });
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
}
