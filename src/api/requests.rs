//! What requests about tasks say: which to list, and how one is to sweep.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::api::error::ApiError;
use crate::model::task::{Cause, SweepTexts, TaskState};
use crate::settings::raw::Problem;

/// What a sweep is asked for. What is left out is as the instance's settings say.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTask {
    /// The instance to sweep.
    pub instance_id: String,
    /// Share of the master's time, above 0 and up to 1.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub intensity: Option<f64>,
    /// Ceiling in keys per second; 0 for none.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub max_keys_per_sec: Option<u32>,
    /// Above which load to hold.
    #[serde(default, deserialize_with = "object")]
    pub limits: LimitWishes,
    /// COUNT to begin with.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 10, maximum = 1000)]
    pub count: Option<u32>,
    /// DBs to sweep; empty: each that holds keys with a TTL.
    #[schema(value_type = Option<Vec<DbNumber>>)]
    pub db: Option<Vec<DbNumber>>,
    /// `auto`, `none`, `exists` or `ttl`.
    pub touch: Option<TouchWord>,
    /// How long it may take, in seconds.
    #[serde(default, deserialize_with = "whole")]
    // As `LONGEST_S`.
    #[schema(minimum = 1, maximum = 31_536_000)]
    pub timeout_s: Option<u32>,
    /// Sweep only while the instance's window is open.
    #[serde(default)]
    pub respect_window: bool,
}

/// Whether each key that SCAN returned is asked for.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of the setting")]
pub enum TouchWord {
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

/// Other limits for a task that has not ended.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TuneTask {
    /// Share of the master's time, above 0 and up to 1.
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub intensity: Option<f64>,
    /// Ceiling in keys per second; 0 for none.
    #[serde(default, deserialize_with = "whole")]
    #[schema(minimum = 0, maximum = 2_147_483_647)]
    pub max_keys_per_sec: Option<u32>,
    /// Above which load to hold.
    #[serde(default, deserialize_with = "object")]
    pub limits: LimitWishes,
}

/// Above which load a sweep holds or gives up, and how far it gives way: `off`, `auto`, or a value, as the settings of the same
/// names (`_` for `-`) take it. What is left out stays.
#[derive(Debug, Default, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
#[allow(missing_docs, reason = "the names are those of the settings")]
pub struct LimitWishes {
    #[schema(minimum = 0.000_001, maximum = 1)]
    pub min_intensity: Option<f64>,
    pub throttle: Option<bool>,
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub max_latency: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub max_replica_lag: Option<String>,
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub max_replica_silence: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub max_replica_buffer: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,15})$")]
    pub max_lazyfree: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,15})$")]
    pub max_ops: Option<String>,
    #[schema(pattern = "^(off|auto|1|0[.][0-9]{0,3}[1-9])$")]
    pub max_cpu: Option<String>,
    #[schema(pattern = "^(hold|go)$")]
    pub during_fork: Option<String>,
    #[schema(pattern = "^(off|auto|[1-9][0-9]{0,5}(us|ms|s|min))$")]
    pub abort_latency: Option<String>,
    #[schema(pattern = "^(off|auto|[0-9]{1,9}(B|KiB|MiB|GiB)?)$")]
    pub abort_replica_lag: Option<String>,
}

/// An object, and no list: serde would take one for the fields in their order.
fn object<'de, D: Deserializer<'de>, T: serde::de::DeserializeOwned>(deserializer: D) -> Result<T, D::Error> {
    let fields = serde_json::Map::deserialize(deserializer)?;
    T::deserialize(Value::Object(fields)).map_err(serde::de::Error::custom)
}

/// The settings texts of a request for other limits: a field is a setting, with `_` for `-`.
pub(super) fn tuning_texts(intensity: Option<f64>, max_keys_per_sec: Option<u32>, limits: &LimitWishes) -> SweepTexts {
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

/// What is wrong with the settings of a request.
pub(super) fn invalid_settings(problems: Vec<Problem>) -> ApiError {
    let problems: Vec<_> = problems.into_iter().map(|problem| problem.message).collect();
    ApiError::invalid(format_args!("settings ({})", problems.join("; ")))
}

/// The number of a logical database.
#[derive(Debug, Clone, Copy, Deserialize, ToSchema)]
#[schema(value_type = u32, minimum = 0, maximum = 2_147_483_647)]
pub struct DbNumber(#[serde(deserialize_with = "whole_number")] pub u32);

/// The longest that may be asked for a task, in seconds: a year.
pub(super) const LONGEST_S: u32 = 31_536_000;

/// A whole number in JSON's sense: 60.0 is one.
fn whole_number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let number = f64::deserialize(deserializer)?;
    if number.fract() == 0.0 && (0.0..=f64::from(i32::MAX)).contains(&number) {
        // Exact: a double holds every whole number of 32 bits.
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

/// Which tasks to list.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListTasks {
    /// Of this instance.
    pub instance_id: Option<String>,
    /// In this state.
    pub state: Option<StateWord>,
    /// Asked for by this.
    pub cause: Option<CauseWord>,
    /// Older than this task: the last one of the list before.
    #[param(value_type = Option<uuid::Uuid>)]
    pub before: Option<uuid::Uuid>,
    /// At most so many.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
}

/// Our own states.
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

/// Who asked.
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
