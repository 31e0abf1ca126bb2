//! How long, and how often, the sweep tries to reconnect.

use std::time::Duration;

use tokio::time::Instant;

use crate::model::failure::Failure;
use crate::model::throttle::Reason;
use crate::node::conn::ConnOptions;
use crate::node::error::NodeError;

/// The first and the longest wait before another attempt.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// The budget of one outage.
pub(crate) struct RetryBudget {
    limit: Duration,
    /// A batch takes no longer than this, so an error later than this after a connection belongs to another outage.
    batch: Duration,
    since: Instant,
    /// When the last connection was made.
    connected: Option<Instant>,
    backoff: Duration,
}

impl RetryBudget {
    /// A budget of `limit`, for connections with these timeouts.
    pub(crate) fn new(limit: Duration, options: &ConnOptions) -> Self {
        let batch = options.connect_timeout * 2 + options.response_timeout * 2;
        Self { limit, batch, since: Instant::now(), connected: None, backoff: BACKOFF.0 }
    }

    /// Notes when a connection was made: one that lasts longer than `batch` begins a new budget.
    pub(crate) fn connected(&mut self) {
        self.connected = Some(Instant::now());
    }

    /// The wait before the next attempt.
    ///
    /// # Errors
    /// The budget is used up: `error` as a failure.
    pub(crate) fn next(&mut self, reason: Reason, error: NodeError) -> Result<Duration, Failure> {
        // The time of an attempt counts in full: it may ask many nodes, each of which may not answer.
        let is_another = self.connected.take().is_some_and(|connected| connected.elapsed() > self.batch);
        if is_another || matches!(reason, Reason::Loading | Reason::Busy) {
            // A server that is loading or busy answers: only the task's own timeout limits how long it may stay so.
            self.since = Instant::now();
        }
        if self.since.elapsed() >= self.limit {
            let mut failure = error.into_failure();
            failure.message = format!("{} (tried again for {:?})", failure.message, self.limit);
            return Err(failure);
        }
        let wait = self.backoff;
        self.backoff = (self.backoff * 2).min(BACKOFF.1);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::error::Class;

    #[tokio::test(start_paused = true)]
    async fn long_attempts_use_the_budget_up_and_a_connection_in_between_renews_it() {
        let second = Duration::from_secs(1);
        let options = ConnOptions::plain(Default::default(), second, second);
        let mut budget = RetryBudget::new(Duration::from_secs(60), &options);
        let mut trouble = |reason| {
            let error = NodeError::NoMaster { problem: "nobody".into(), hint: None, class: Class::Transient };
            budget.next(reason, error).map_err(|failure| failure.message)
        };
        assert!(trouble(Reason::NoMaster).is_ok());
        tokio::time::advance(second * 40).await;
        assert!(trouble(Reason::NoMaster).is_ok());
        tokio::time::advance(second * 40).await;
        assert_eq!(trouble(Reason::NoMaster).unwrap_err(), "nobody (tried again for 60s)");
        budget.connected();
        tokio::time::advance(second * 5).await;
        let error = NodeError::NoMaster { problem: "nobody".into(), hint: None, class: Class::Transient };
        assert!(budget.next(Reason::NoMaster, error).is_ok());
    }
}
