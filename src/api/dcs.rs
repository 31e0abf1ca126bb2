//! The five calls of the Distributed Cache Service (DCS) for expired-key scans, as existing clients make them: the contract.
//! All other calls are under `/api/v1`.

use axum::Json;
use axum::extract::{RawQuery, State};
use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, SchemaType, Type};

use crate::api::auth::Caller;
use crate::api::dto::{HistoryRecord, clamp, time};
use crate::api::error::ApiError;
use crate::api::responses::{Forbidden, Guarded, Invalid, Missing};
use crate::api::{App, AppState, PathParams, RawBody};
use crate::model::schedule::{AutoScan, Recurrence};
use crate::model::task::{Cause, Task, TaskState};
use crate::settings::COUNT_RANGE;
use crate::settings::serve::{Instance, MAX_INTERVAL_S, MAX_TIMEOUT_S};
use crate::store::TaskFilter;
use crate::tasks::{TaskError, TaskSpec};

/// Default `offset`, default `limit` and largest `limit` of a history.
const PAGE: (u32, u32, u32) = (0, 10, 1000);

/// A scan task, as the contract describes it.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TaskRecord {
    /// Id of the task, a UUID.
    pub id: String,
    /// Id of the instance, as the settings have it.
    pub instance_id: String,
    /// `waiting`, `running`, `success` or `failed`.
    pub status: String,
    /// `manual`, or `auto` for a scheduled scan.
    pub scan_type: String,
    /// When the task was created.
    #[schema(format = DateTime)]
    pub created_at: String,
    /// When the scan began; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime, value_type = String, required = false)]
    pub started_at: Option<String>,
    /// When the scan ended; left out before.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime, value_type = String, required = false)]
    pub finished_at: Option<String>,
}

impl From<&Task> for TaskRecord {
    fn from(task: &Task) -> Self {
        let record = HistoryRecord::from(task);
        Self {
            id: record.id,
            instance_id: record.instance_id,
            status: record.status.to_owned(),
            scan_type: record.scan_type.to_owned(),
            created_at: record.created_at,
            started_at: record.started_at,
            finished_at: record.finished_at,
        }
    }
}

/// One page of an instance's scans, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct History {
    /// The scans of this page.
    pub records: Vec<HistoryRecord>,
    /// Id of the instance, as the settings have it.
    pub instance_id: String,
    /// Expired keys that all matching scans reclaimed, over all pages; at most 2147483647.
    pub total: i32,
    /// Number of matching scans, over all pages.
    pub count: i32,
}

/// The automatic scan of an instance.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct AutoScanConfig {
    /// Id of the instance, as the settings have it.
    pub instance_id: String,
    /// Whether the automatic scan is switched on.
    pub enable_auto_scan: bool,
    /// The first due time; left out if there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime, value_type = String, required = false)]
    pub first_scan_at: Option<String>,
    /// Seconds from one due time to the next; 0: once.
    pub interval: u32,
    /// Longest time that a scan may take, in seconds.
    pub timeout: u32,
    /// COUNT of the first SCAN.
    pub scan_keys_count: u32,
    /// When the API last changed this; left out if it never did.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime, value_type = String, required = false)]
    pub updated_at: Option<String>,
}

impl AutoScanConfig {
    fn new(instance: &Instance, config: &AutoScan) -> Self {
        let (first, interval) = match &config.recurrence {
            Recurrence::Every { first, interval_s } => (*first, *interval_s),
            // The contract has no cron expressions: its clients get the next due time.
            recurrence @ Recurrence::Cron(_) => (recurrence.next_due(Timestamp::now()), 0),
        };
        Self {
            instance_id: instance.id.clone(),
            enable_auto_scan: config.enabled,
            first_scan_at: first.map(time),
            interval,
            timeout: config.timeout_s,
            scan_keys_count: config.count,
            updated_at: config.updated_at.map(time),
        }
    }
}

/// The body to change the automatic scan. With `enable_auto_scan` true the other fields are required.
#[derive(Debug, ToSchema)]
#[schema(as = UpdateAutoScanConfig)]
#[allow(dead_code, reason = "the schema of a body that is read by hand, for the contract's error codes")]
pub(crate) struct UpdateConfig {
    /// Whether to switch the automatic scan on. False leaves all other fields unchanged.
    pub enable_auto_scan: bool,
    /// The first due time in UTC, later than now.
    #[schema(example = "2030-06-15T02:21:18.669Z")]
    pub first_scan_at: Option<String>,
    /// Seconds from one due time to the next; 0: once.
    #[schema(required = false, schema_with = interval_schema)]
    pub interval: Option<i64>,
    /// Longest time that a scan may take, in seconds: at least twice the interval.
    #[schema(required = false, schema_with = timeout_schema)]
    pub timeout: Option<i64>,
    /// COUNT of the first SCAN.
    #[schema(required = false, schema_with = count_schema)]
    pub scan_keys_count: Option<i64>,
}

/// A whole number or null, without a range. The range applies only if the scan is switched on: otherwise the field is
/// ignored, and the schema must not say that such a body is refused.
fn unbound(description: &str) -> Object {
    let kinds = SchemaType::from_iter([Type::Integer, Type::Null]);
    ObjectBuilder::new().schema_type(kinds).description(Some(description)).build()
}

fn interval_schema() -> Object {
    unbound("Seconds from one due time to the next, 0 to 2592000; 0: once. Ignored with `enable_auto_scan` false.")
}

fn timeout_schema() -> Object {
    unbound(
        "Longest time that a scan may take, in seconds, 2 to 5184000 and at least twice the interval. Ignored with \
         `enable_auto_scan` false.",
    )
}

fn count_schema() -> Object {
    unbound("COUNT of the first SCAN, 10 to 1000. Ignored with `enable_auto_scan` false.")
}

/// Creates an expired-key scan of an instance.
#[utoipa::path(
    post, path = "/v2/{project_id}/instances/{instance_id}/scan-expire-keys-task", tag = "contract",
    operation_id = "CreateAutoExpireScanTask",
    params(("project_id" = String, Path), ("instance_id" = String, Path)),
    responses((status = 200, body = TaskRecord), Invalid, Forbidden, Missing, Guarded)
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Caller,
    PathParams((project, id)): PathParams<(String, String)>,
) -> Result<Json<TaskRecord>, ApiError> {
    let instance = app.instance_in(&caller, &project, &id)?;
    app.must_be_scannable(&instance).await?;
    let spec = TaskSpec::of(&instance, &instance.settings, Cause::Api)?;
    match app.service.submit(spec, None).await {
        Ok(task) => {
            tracing::info!(task = %task.id, instance = instance.id, caller = caller.0.name, "task created");
            Ok(Json((&task).into()))
        }
        Err(TaskError::Unfinished(_)) => Err(ApiError::still_running()),
        Err(error) => Err(error.into()),
    }
}

/// Creates an expired-key scan of an instance: the other name of the same call.
#[utoipa::path(
    post, path = "/v2/{project_id}/instances/{instance_id}/auto-expire/scan", tag = "contract",
    operation_id = "ScanExpireKey",
    params(("project_id" = String, Path), ("instance_id" = String, Path)),
    responses((status = 200, body = TaskRecord), Invalid, Forbidden, Missing, Guarded)
)]
pub(crate) async fn scan(
    state: State<App>,
    caller: Caller,
    at: PathParams<(String, String)>,
) -> Result<Json<TaskRecord>, ApiError> {
    create(state, caller, at).await
}

/// Lists the scans of an instance, newest first.
#[utoipa::path(
    get, path = "/v2/{project_id}/instances/{instance_id}/auto-expire/histories", tag = "contract",
    operation_id = "ShowExpireKeyScanInfo",
    params(
        ("project_id" = String, Path), ("instance_id" = String, Path),
        ("offset" = Option<i64>, Query, minimum = 0, maximum = 2_147_483_647),
        ("limit" = Option<i64>, Query, minimum = 1, maximum = 1000),
        ("status" = Option<ContractStatus>, Query),
    ),
    responses((status = 200, body = History), Invalid, Missing, Guarded)
)]
pub(crate) async fn history(
    State(app): State<App>,
    caller: Caller,
    PathParams((project, id)): PathParams<(String, String)>,
    RawQuery(query): RawQuery,
) -> Result<Json<History>, ApiError> {
    let instance = app.instance_in(&caller, &project, &id)?;
    let (offset, limit, states) = page_of(query.as_deref().unwrap_or(""))?;
    // Records of an instance that moved here from another project have that project's id: they are not shown.
    let projects = Some(vec![instance.project_id.clone()]);
    let filter = TaskFilter { projects, instance_id: Some(instance.id.clone()), states, ..TaskFilter::default() };
    let page = app.service.store().page(&filter, offset, limit).await?;
    Ok(Json(History {
        records: page.tasks.iter().map(HistoryRecord::from).collect(),
        instance_id: instance.id.clone(),
        total: clamp(page.total),
        count: clamp(page.count),
    }))
}

/// The contract's states of a scan.
#[derive(Debug, ToSchema)]
#[schema(rename_all = "lowercase")]
#[allow(dead_code, reason = "the schema of a parameter that is read by hand, for the contract's error codes")]
pub(crate) enum ContractStatus {
    /// The scan has not begun.
    Waiting,
    /// The scan is running, paused or interrupted.
    Running,
    /// The scan has swept every DB.
    Success,
    /// The scan failed or was cancelled.
    Failed,
}

fn page_of(query: &str) -> Result<(u32, u32, Vec<TaskState>), ApiError> {
    let (mut offset, mut limit, most) = PAGE;
    let mut states = Vec::new();
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match key.as_ref() {
            "offset" => match value.parse() {
                Ok(number) if number <= i32::MAX as u32 => offset = number,
                _ => return Err(ApiError::invalid("offset")),
            },
            "limit" => match value.parse() {
                Ok(number) if (1..=most).contains(&number) => limit = number,
                _ => return Err(ApiError::invalid("limit")),
            },
            "status" => {
                states = TaskState::ALL.iter().copied().filter(|state| state.contract_word() == value).collect();
                if states.is_empty() {
                    return Err(ApiError::invalid("status"));
                }
            }
            // Other parameters are ignored, as the contract does.
            _ => {}
        }
    }
    Ok((offset, limit, states))
}

/// Shows the automatic scan of an instance.
#[utoipa::path(
    get, path = "/v2/{project_id}/instances/{instance_id}/scan-expire-keys/autoscan-config", tag = "contract",
    operation_id = "ShowExpireAutoScanConfig",
    params(("project_id" = String, Path), ("instance_id" = String, Path)),
    responses((status = 200, body = AutoScanConfig), Missing, Guarded)
)]
pub(crate) async fn show_config(
    State(app): State<App>,
    caller: Caller,
    PathParams((project, id)): PathParams<(String, String)>,
) -> Result<Json<AutoScanConfig>, ApiError> {
    let instance = app.instance_in(&caller, &project, &id)?;
    let config = app.service.auto_scan(&instance).await?;
    Ok(Json(AutoScanConfig::new(&instance, &config)))
}

/// Changes the automatic scan of an instance.
#[utoipa::path(
    put, path = "/v2/{project_id}/instances/{instance_id}/scan-expire-keys/autoscan-config", tag = "contract",
    operation_id = "UpdateExpireAutoScanConfig",
    params(("project_id" = String, Path), ("instance_id" = String, Path)),
    request_body = UpdateConfig,
    responses((status = 200, body = AutoScanConfig), Invalid, Forbidden, Missing, Guarded)
)]
pub(crate) async fn update_config(
    State(app): State<App>,
    caller: Caller,
    PathParams((project, id)): PathParams<(String, String)>,
    RawBody(body): RawBody,
) -> Result<Json<AutoScanConfig>, ApiError> {
    let instance = app.instance_in(&caller, &project, &id)?;
    let now = app.service.store().now();
    let wanted = parse_update(&body, now)?;
    let config = match wanted {
        Some(config) => {
            app.must_be_scannable(&instance).await?;
            config
        }
        // Switched off: the other fields keep their values.
        None => AutoScan { enabled: false, updated_at: Some(now), ..app.service.auto_scan(&instance).await? },
    };
    app.set_auto_scan(&instance, Some(&config), now).await?;
    tracing::info!(instance = instance.id, caller = caller.0.name, enabled = config.enabled, "automatic scan changed");
    Ok(Json(AutoScanConfig::new(&instance, &config)))
}

/// Parses and checks the body of a PUT. `None`: switch the automatic scan off.
fn parse_update(body: &[u8], now: Timestamp) -> Result<Option<AutoScan>, ApiError> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Err(ApiError::empty_body());
    }
    let value: Value = serde_json::from_slice(body).map_err(|_| ApiError::not_json())?;
    let Value::Object(fields) = value else { return Err(ApiError::not_json()) };
    let enabled = match field(&fields, "enable_auto_scan") {
        Some(Value::Bool(enabled)) => *enabled,
        _ => return Err(ApiError::invalid("enable_auto_scan")),
    };
    let first = match field(&fields, "first_scan_at") {
        None => None,
        Some(Value::String(text)) => Some(text),
        Some(_) => return Err(ApiError::invalid("first_scan_at")),
    };
    let interval = whole(&fields, "interval")?;
    let timeout = whole(&fields, "timeout")?;
    let count = whole(&fields, "scan_keys_count")?;
    if !enabled {
        return Ok(None);
    }
    let first = first.and_then(|text| parse_time(text)).filter(|first| *first > now);
    let first = first.ok_or_else(ApiError::first_scan_at)?;
    let interval_s = small(interval, 0, MAX_INTERVAL_S).ok_or_else(ApiError::interval)?;
    let timeout_s = small(timeout, 2, MAX_TIMEOUT_S).filter(|timeout| *timeout / 2 >= interval_s);
    let timeout_s = timeout_s.ok_or_else(ApiError::timeout)?;
    let count = small(count, *COUNT_RANGE.start(), *COUNT_RANGE.end()).ok_or_else(ApiError::scan_keys_count)?;
    let recurrence = Recurrence::Every { first: Some(first), interval_s };
    Ok(Some(AutoScan { enabled, recurrence, timeout_s, count, updated_at: Some(now) }))
}

/// The value of a field; `None` if it is missing or null.
fn field<'a>(fields: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    fields.get(name).filter(|value| !value.is_null())
}

fn whole(fields: &Map<String, Value>, name: &str) -> Result<Option<i128>, ApiError> {
    match field(fields, name) {
        None => Ok(None),
        Some(Value::Number(number)) => match (number.as_i128(), number.as_f64()) {
            (Some(whole), _) => Ok(Some(whole)),
            // A whole number in the form 60.0, or one too large for any integer type.
            (None, Some(number)) if number.fract() == 0.0 => Ok(Some(number as i128)),
            _ => Err(ApiError::invalid(name)),
        },
        Some(_) => Err(ApiError::invalid(name)),
    }
}

fn small(number: Option<i128>, least: u32, most: u32) -> Option<u32> {
    number.and_then(|n| u32::try_from(n).ok()).filter(|n| (least..=most).contains(n))
}

/// Parses an ISO date and time in UTC, with `Z`, `z` or no zone. Truncated to milliseconds, as it is stored and shown.
fn parse_time(text: &str) -> Option<Timestamp> {
    let civil = text.strip_suffix(['z', 'Z']).unwrap_or(text);
    let (_, clock) = civil.split_once(['T', 't'])?;
    // The parser below would accept an offset or a zone after the clock time, and ignore it.
    if !clock.chars().all(|c| c.is_ascii_digit() || c == ':' || c == '.') {
        return None;
    }
    let time = civil.parse::<DateTime>().ok()?.to_zoned(TimeZone::UTC).ok()?.timestamp();
    Timestamp::from_millisecond(time.as_millisecond()).ok()
}

impl AppState {
    /// An instance of a project that the caller may see.
    pub(super) fn instance_in(&self, caller: &Caller, project: &str, id: &str) -> Result<Arc<Instance>, ApiError> {
        caller.project(project)?;
        let settings = self.settings.borrow();
        let instance = settings.instance(id).filter(|instance| instance.project_id == project);
        instance.cloned().ok_or_else(ApiError::no_instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn code(body: &str) -> String {
        match parse_update(body.as_bytes(), now()) {
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("{} {}", error.code, error.message),
        }
    }

    #[test]
    fn every_rule_of_the_configuration_has_its_code() {
        let with = |field: &str, value: &str| {
            let mut fields = std::collections::BTreeMap::from([
                ("enable_auto_scan", "true"),
                ("first_scan_at", "\"2026-01-02T00:00:00Z\""),
                ("interval", "86400"),
                ("timeout", "172800"),
                ("scan_keys_count", "50"),
            ]);
            if value.is_empty() {
                fields.remove(field)
            } else {
                fields.insert(field, value)
            };
            let fields: Vec<_> = fields.iter().map(|(key, value)| format!("\"{key}\": {value}")).collect();
            format!("{{{}}}", fields.join(", "))
        };
        let cases = [
            ("", ""),
            ("enable_auto_scan", ""),
            ("enable_auto_scan", "1"),
            ("first_scan_at", ""),
            ("first_scan_at", "5"),
            ("first_scan_at", "\"soon\""),
            ("first_scan_at", "\"2025-12-31T00:00:00Z\""),
            ("first_scan_at", "\"2026-01-01T00:00:00Z\""),
            ("first_scan_at", "\"2026-01-02T00:00:00+01:00\""),
            ("first_scan_at", "\"2026-01-02\""),
            ("first_scan_at", "\"2026-01-02T00:00:00\""),
            ("first_scan_at", "\"2026-01-02T00:00:00.123z\""),
            ("interval", ""),
            ("interval", "-1"),
            ("interval", "2592001"),
            ("interval", "\"60\""),
            ("interval", "0"),
            ("interval", "86401"),
            ("timeout", ""),
            ("timeout", "172799"),
            ("timeout", "5184001"),
            ("timeout", "1e99"),
            ("scan_keys_count", ""),
            ("scan_keys_count", "9"),
            ("scan_keys_count", "1001"),
            ("scan_keys_count", "10.5"),
            ("scan_keys_count", "1000"),
        ];
        let table = cases.map(|(field, value)| format!("{field:<16} {value:<32} {}", code(&with(field, value))));
        let bodies = ["", " \n", "{", "[]", "\"x\"", "{}", "{\"enable_auto_scan\": false}", "\u{fffd}"];
        let bodies = bodies.map(|body| format!("{body:<49} {}", code(body)));
        let once = with("interval", "0").replace("172800", "1");
        insta::assert_snapshot!([table.join("\n"), bodies.join("\n"), code(&once)].join("\n---\n"));
    }

    #[test]
    fn pages_have_bounds() {
        assert_eq!(page_of("").unwrap(), (0, 10, vec![]));
        assert_eq!(page_of("offset=3&limit=1000&other=x").unwrap(), (3, 1000, vec![]));
        assert_eq!(page_of("status=success").unwrap().2, [TaskState::Succeeded]);
        assert_eq!(page_of("status=failed").unwrap().2, [TaskState::Failed, TaskState::Cancelled]);
        for bad in ["offset=-1", "offset=x", "limit=0", "limit=1001", "limit=", "status=done", "status="] {
            assert_eq!(page_of(bad).unwrap_err().code, "DCS.4800", "{bad}");
        }
    }
}
