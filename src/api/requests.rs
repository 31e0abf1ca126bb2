//! The bodies and query parameters of requests about tasks.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::api::error::ApiError;
use crate::model::task::{Cause, SweepTexts, TaskState};
use crate::settings::raw::Problem;

/// The body to create a task. Fields that are left out have the values of the instance's settings.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct CreateTask {
    /// Id of the instance to sweep.
    pub instance_id: String,
    /// Largest share of the master's time, above 0 and up to 1.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub intensity: Option<f64>,
    /// Most keys to scan per second on each master; 0: no ceiling.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub max_keys_per_sec: Option<u32>,
    /// Limits on the load of the server.
    #[serde(default, deserialize_with = "object")]
    pub limits: LimitOverrides,
    /// COUNT of the first SCAN.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 10, maximum = 1000)]
    pub count: Option<u32>,
    /// DBs to sweep; empty: each that holds keys with a TTL.
    #[schema(value_type = Option<Vec<DbNumber>>)]
    pub db: Option<Vec<DbNumber>>,
    /// Command to send for each key that SCAN returned.
    pub touch: Option<TouchWord>,
    /// Longest time that the sweep may take, in seconds.
    #[serde(default, deserialize_with = "whole")]
    // The maximum is `LONGEST_S`: the attribute takes only a literal.
    #[schema(minimum = 1, maximum = 31_536_000)]
    pub timeout_s: Option<u32>,
    /// Sweep only while the instance's window is open.
    #[serde(default)]
    pub respect_window: bool,
}

/// Command to send for each key that SCAN returned.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of the setting")]
pub(crate) enum TouchWord {
    Auto,
    None,
    Exists,
    Ttl,
}

impl TouchWord {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::Exists => "exists",
            Self::Ttl => "ttl",
        }
    }
}

/// The body to change the limits of an unfinished task.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct TuneTask {
    /// Largest share of the master's time, above 0 and up to 1.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub intensity: Option<f64>,
    /// Most keys to scan per second on each master; 0: no ceiling.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub max_keys_per_sec: Option<u32>,
    /// Limits on the load of the server.
    #[serde(default, deserialize_with = "object")]
    pub limits: LimitOverrides,
}

/// Limits on the load, above which a sweep holds or fails, and the least intensity. The values are those of the settings of the same
/// names (`_` for `-`): `off`, `auto`, or a value. Limits that are left out stay as they are.
// The forms of the page show these fields with their descriptions.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[schema(as = LimitWishes)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct LimitOverrides {
    /// Smallest share of the master's time while other clients keep it busy.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub min_intensity: Option<f64>,
    /// Watch the load; otherwise the intensity is fixed and no limit applies.
    pub throttle: Option<bool>,
    /// Hold while a PING takes longer, such as 20ms; auto, off.
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub max_latency: Option<String>,
    /// Hold while a replica is further behind, such as 16MiB; auto, off.
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub max_replica_lag: Option<String>,
    /// Hold while a replica has been silent for longer, such as 10s; auto, off.
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub max_replica_silence: Option<String>,
    /// Hold while more waits to be sent to replicas, such as 32MiB; auto, off.
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub max_replica_buffer: Option<String>,
    /// Hold while more objects wait to be freed in the background, such as 100000; auto, off.
    #[schema(pattern = "^(off|auto|[0-9]{1,15})$")]
    pub max_lazyfree: Option<String>,
    /// Hold while other clients send more commands per second, such as 50000; off.
    #[schema(pattern = "^(off|auto|[0-9]{1,15})$")]
    pub max_ops: Option<String>,
    /// Hold while other clients take a larger share of the main thread's time, such as 0.7; off.
    #[schema(pattern = "^(off|auto|1|0[.][0-9]{0,3}[1-9])$")]
    pub max_cpu: Option<String>,
    /// While the server saves, rewrites its AOF or sends a replica all its data: hold or go.
    #[schema(pattern = "^(hold|go)$")]
    pub during_fork: Option<String>,
    /// Give up when a PING takes longer, such as 1s; off.
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub abort_latency: Option<String>,
    /// Give up when a replica is further behind, such as 1GiB; off.
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub abort_replica_lag: Option<String>,
}

/// Accepts only a JSON object: serde would also accept an array of the fields in their order.
fn object<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let fields = serde_json::Map::deserialize(deserializer)?;
    T::deserialize(Value::Object(fields)).map_err(serde::de::Error::custom)
}

/// The limits of a request as texts of settings, by key: the name of a field with `-` for `_`.
pub(super) fn tuning_texts(
    intensity: Option<f64>,
    max_keys_per_sec: Option<u32>,
    limits: &LimitOverrides,
) -> SweepTexts {
    let pace = json!({ "intensity": intensity, "max_keys_per_sec": max_keys_per_sec });
    let mut texts = SweepTexts::new();
    for fields in [pace, json!(limits)] {
        for (name, value) in fields.as_object().into_iter().flatten() {
            let text = match value {
                Value::String(text) => Some(text.clone()),
                // As it would be typed: 1, and not 1.0.
                Value::Number(number) => number.as_f64().map(|number| number.to_string()),
                Value::Bool(on) => Some(on.to_string()),
                Value::Null | Value::Array(_) | Value::Object(_) => None,
            };
            texts.extend(text.map(|text| (name.replace('_', "-"), text)));
        }
    }
    texts
}

/// The error for invalid settings in a request.
pub(super) fn invalid_settings(problems: Vec<Problem>) -> ApiError {
    let problems: Vec<_> = problems.into_iter().map(|problem| problem.message).collect();
    ApiError::invalid(format_args!("settings ({})", problems.join("; ")))
}

/// The number of a logical database.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(value_type = u32, minimum = 0, maximum = 2_147_483_647)]
pub(crate) struct DbNumber(#[serde(deserialize_with = "whole_number")] pub u32);

/// Largest `timeout_s` of a request: a year, in seconds.
pub(super) const LONGEST_S: u32 = 31_536_000;

/// Accepts a whole number as JSON Schema defines it: 60.0 is one too.
fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let number = f64::deserialize(deserializer)?;
    if number.fract() == 0.0 && (0.0..=f64::from(i32::MAX)).contains(&number) {
        // The cast is exact: f64 represents every 32-bit integer.
        Ok(number as u32)
    } else {
        Err(serde::de::Error::custom(format_args!("{number} is not a whole number of 31 bits")))
    }
}

fn whole<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    #[derive(Deserialize)]
    struct Whole(#[serde(deserialize_with = "whole_number")] u32);
    Ok(Option::<Whole>::deserialize(deserializer)?.map(|Whole(number)| number))
}

/// The query of a list of tasks.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListTasks {
    /// Only tasks of this instance.
    pub instance_id: Option<String>,
    /// Only tasks in this state.
    pub state: Option<StateWord>,
    /// Only tasks with this cause.
    pub cause: Option<CauseWord>,
    /// Only tasks older than this one; for the next page, the last task of the page before.
    #[param(value_type = Option<uuid::Uuid>)]
    pub before: Option<uuid::Uuid>,
    /// Most tasks to list; left out: 50.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
}

/// The state of a task.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of `TaskState`")]
pub enum StateWord {
    Waiting,
    Running,
    Paused,
    Interrupted,
    Succeeded,
    Failed,
    Cancelled,
}

impl From<StateWord> for TaskState {
    fn from(word: StateWord) -> Self {
        match word {
            StateWord::Waiting => Self::Waiting,
            StateWord::Running => Self::Running,
            StateWord::Paused => Self::Paused,
            StateWord::Interrupted => Self::Interrupted,
            StateWord::Succeeded => Self::Succeeded,
            StateWord::Failed => Self::Failed,
            StateWord::Cancelled => Self::Cancelled,
        }
    }
}

/// Who created a task: the command line, the API, a schedule, or the keeper.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of `Cause`")]
pub enum CauseWord {
    Cli,
    Api,
    Schedule,
    Keep,
}

impl From<CauseWord> for Cause {
    fn from(word: CauseWord) -> Self {
        match word {
            CauseWord::Cli => Self::Cli,
            CauseWord::Api => Self::Api,
            CauseWord::Schedule => Self::Schedule,
            CauseWord::Keep => Self::Keep,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::raw::TUNE_KEYS;

    #[test]
    fn every_setting_that_may_change_is_a_field_of_a_request() {
        for key in TUNE_KEYS.iter() {
            let value = match *key {
                "intensity" | "min-intensity" | "max-keys-per-sec" => json!(1),
                "throttle" => json!(false),
                "during-fork" => json!("go"),
                _ => json!("auto"),
            };
            let name = key.replace('-', "_");
            let body = match *key {
                "intensity" | "max-keys-per-sec" => json!({ name: value }),
                _ => json!({ "limits": { name: value } }),
            };
            let request: TuneTask = serde_json::from_value(body).unwrap_or_else(|error| panic!("{key}: {error}"));
            let texts = tuning_texts(request.intensity, request.max_keys_per_sec, &request.limits);
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            assert_eq!(texts, SweepTexts::from([((*key).to_owned(), text)]));
        }
    }
}
