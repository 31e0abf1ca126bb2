//! What the observations mean for the sweep. Pure: the table of tests below is its whole behaviour.

use crate::engine::observe::Observation;
use crate::model::failure::{Failure, FailureKind};
use crate::model::throttle::Reason;

/// What the loop is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Send the next batch.
    Proceed,
    /// Stand still until the next observation.
    Hold(Reason),
    /// End the sweep of this shard.
    Abort(Failure),
}

/// Decides by what was last observed.
pub fn decide(observation: &Observation) -> Decision {
    if observation.is_master == Some(false) {
        return Decision::Abort(not_a_master(observation.master.as_deref()));
    }
    if observation.loading {
        return Decision::Hold(Reason::Loading);
    }
    if observation.failover_under_way {
        return Decision::Hold(Reason::Failover);
    }
    if observation.writes_paused {
        return Decision::Hold(Reason::DeletionBlocked);
    }
    Decision::Proceed
}

/// The failure of a server that is, or has become, a replica.
pub fn not_a_master(master: Option<&str>) -> Failure {
    let failure = Failure::new(
        FailureKind::NotAMaster,
        match master {
            Some(master) => format!("the server is a replica of {master}; a replica hides expired keys and frees none"),
            None => "the server is a replica; a replica hides expired keys and frees none".to_owned(),
        },
    );
    match master {
        Some(master) => failure.hint(format!("sweep its master, redis://{master}, or let --follow find it")),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_observation_has_one_decision() {
        let calm = Observation { is_master: Some(true), ..Observation::default() };
        assert_eq!(decide(&calm), Decision::Proceed);
        assert_eq!(decide(&Observation::default()), Decision::Proceed, "an unknown role is not a replica");
        let cases = [
            (Observation { loading: true, ..calm.clone() }, Reason::Loading),
            (Observation { failover_under_way: true, ..calm.clone() }, Reason::Failover),
            (Observation { writes_paused: true, ..calm.clone() }, Reason::DeletionBlocked),
        ];
        for (observation, reason) in cases {
            assert_eq!(decide(&observation), Decision::Hold(reason));
        }
        let demoted =
            Observation { is_master: Some(false), master: Some("h:1".into()), loading: true, ..Observation::default() };
        assert!(matches!(decide(&demoted), Decision::Abort(f) if f.message.contains("h:1")));
    }
}
