//! The instances: list, details, history of sweeps, reset of the automatic scan, check.

#![allow(unused_qualifications, reason = "in the code that utoipa's attributes make")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::api::auth::Caller;
use crate::api::check_dto::Checked;
use crate::api::dto::time;
use crate::api::error::ApiError;
use crate::api::responses::{Conflict, Forbidden, Guarded, Invalid, Missing, Unreachable};
use crate::api::task_dto::{
    HistoryEntry, InstanceDetails, InstanceDto, InstanceList, KeepBounds, ScheduleDto, TaskDto, WindowDto, source,
};
use crate::api::{App, AppState, PathParams, QueryParams};
use crate::check;
use crate::model::bounds::Bounds;
use crate::model::schedule::AutoScan;
use crate::model::task::{TaskId, TaskState};
use crate::settings::serve::Instance;
use crate::store::{Keeps, LastSeen, ScheduleState, Standing, TaskFilter};
use crate::tasks::TaskView;

/// Largest `limit` of a list of instances.
const MOST: u32 = 1000;
/// Default and largest `limit` of a history.
const HISTORY: (u32, u32) = (20, 200);
/// Due times in the details of an instance.
const UPCOMING: usize = 5;

/// The query of a list of instances.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListInstances {
    /// Only instances whose name, id or address contains this text; case is ignored.
    pub search: Option<String>,
    /// Only instances of this project.
    pub project_id: Option<String>,
    /// Only instances whose newest task is in this state.
    pub state: Option<InstanceState>,
    /// Key to sort by; left out: the order of the settings file.
    pub sort: Option<SortBy>,
    /// Direction of the order; left out: ascending.
    pub order: Option<SortOrder>,
    /// Number of instances to skip.
    #[param(minimum = 0, maximum = 2_147_483_647)]
    pub offset: Option<u32>,
    /// Most instances to list; left out: all.
    #[param(minimum = 1, maximum = 1000)]
    pub limit: Option<u32>,
}

/// The state of an instance's newest task, or `never` if it has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the words of `TaskState`")]
pub(crate) enum InstanceState {
    Waiting,
    Running,
    Paused,
    Interrupted,
    Succeeded,
    Failed,
    Cancelled,
    /// The instance has no task.
    Never,
}

impl InstanceState {
    fn fits(self, state: Option<TaskState>) -> bool {
        state
            == match self {
                Self::Waiting => Some(TaskState::Waiting),
                Self::Running => Some(TaskState::Running),
                Self::Paused => Some(TaskState::Paused),
                Self::Interrupted => Some(TaskState::Interrupted),
                Self::Succeeded => Some(TaskState::Succeeded),
                Self::Failed => Some(TaskState::Failed),
                Self::Cancelled => Some(TaskState::Cancelled),
                Self::Never => None,
            }
    }
}

/// The key that instances are sorted by. In ascending order unknown values come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SortBy {
    /// Name of the instance; case is ignored.
    Name,
    /// When it was last swept completely.
    LastSuccess,
    /// Expired keys that its newest task reclaimed.
    Reclaimed,
    /// `used_memory` as its newest task last saw it.
    Memory,
    /// Expired keys in memory: the field `backlog` of the instance.
    Backlog,
}

/// The direction of the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "plain words")]
pub(crate) enum SortOrder {
    Asc,
    Desc,
}

/// The query of a history of sweeps.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct ListHistory {
    /// Number of the newest sweeps to skip.
    #[param(minimum = 0, maximum = 2_147_483_647)]
    pub offset: Option<u32>,
    /// Most sweeps to list; left out: 20.
    #[param(minimum = 1, maximum = 200)]
    pub limit: Option<u32>,
    /// Whether to list the shards and DBs of each sweep; left out: true.
    pub shards: Option<bool>,
}

/// The sweeps of an instance, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct HistoryList {
    /// The sweeps of this page.
    pub sweeps: Vec<HistoryEntry>,
    /// Number of sweeps, over all pages.
    pub total: u64,
    /// Expired keys that all these sweeps reclaimed.
    pub reclaimed: u64,
}

/// Lists the instances that the caller may see.
#[utoipa::path(
    get, path = "/api/v1/instances", tag = "instances", operation_id = "list_instances", params(ListInstances),
    responses((status = 200, body = InstanceList), Invalid, Guarded)
)]
pub(crate) async fn list_instances(
    State(app): State<App>,
    caller: Caller,
    QueryParams(list): QueryParams<ListInstances>,
) -> Result<Json<InstanceList>, ApiError> {
    let offset = bounded("offset", list.offset.unwrap_or(0), 0..=i32::MAX as u32)?;
    let limit = list.limit.map(|limit| bounded("limit", limit, 1..=MOST)).transpose()?;
    let settings = app.settings.borrow().clone();
    let visible = || settings.instances.iter().filter(|instance| caller.0.allows(&instance.project_id));
    let projects: BTreeSet<_> = visible().map(|instance| instance.project_id.clone()).collect();
    let search = list.search.as_deref().unwrap_or("").trim().to_lowercase();
    let holds = |text: &str| text.to_lowercase().contains(&search);
    let is_meant = |instance: &&Arc<Instance>| {
        list.project_id.as_ref().is_none_or(|project| *project == instance.project_id)
            && (search.is_empty()
                || holds(&instance.name)
                || holds(&instance.id)
                || holds(&instance.settings.target.to_string()))
    };
    let meant: Vec<&Arc<Instance>> = visible().filter(is_meant).collect();
    let standings = app.standings(&meant).await?;
    let state_of = |instance: &Instance| standings.get(&instance.id).map(|standing| standing.state);
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    for instance in &meant {
        *counts.entry(state_of(instance).map_or("never", TaskState::as_str)).or_default() += 1;
    }
    let mut meant = meant;
    meant.retain(|instance| list.state.is_none_or(|state| state.fits(state_of(instance))));
    app.sort(&mut meant, &standings, list.sort, list.order).await?;
    let total = meant.len();
    let page: Vec<_> = meant.into_iter().skip(offset as usize).take(limit.map_or(usize::MAX, |n| n as usize)).collect();
    let (schedules, keeps) = (app.service.store().schedules().await?, app.service.store().keeps().await?);
    let instances = app.describe(&page, &standings, &schedules, &keeps).await?;
    Ok(Json(InstanceList { instances, total: total as u64, counts, projects: projects.into_iter().collect() }))
}

/// Shows an instance with its schedule and settings.
#[utoipa::path(
    get, path = "/api/v1/instances/{instance_id}", tag = "instances", operation_id = "get_instance",
    params(("instance_id" = String, Path)),
    responses((status = 200, body = InstanceDetails), Missing, Guarded)
)]
pub(crate) async fn get_instance(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
) -> Result<Json<InstanceDetails>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    Ok(Json(app.details(&instance).await?))
}

/// Lists the sweeps of an instance with their results and holds, newest first.
#[utoipa::path(
    get, path = "/api/v1/instances/{instance_id}/history", tag = "instances", operation_id = "list_history",
    params(("instance_id" = String, Path), ListHistory),
    responses((status = 200, body = HistoryList), Invalid, Missing, Guarded)
)]
pub(crate) async fn list_history(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
    QueryParams(list): QueryParams<ListHistory>,
) -> Result<Json<HistoryList>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let offset = bounded("offset", list.offset.unwrap_or(0), 0..=i32::MAX as u32)?;
    let limit = bounded("limit", list.limit.unwrap_or(HISTORY.0), 1..=HISTORY.1)?;
    // Tasks from when the instance belonged to another project are not shown.
    let projects = Some(vec![instance.project_id.clone()]);
    let filter = TaskFilter { projects, instance_id: Some(instance.id.clone()), ..TaskFilter::default() };
    // The sweep that came after the newest one of the page is read too.
    let newer = offset.min(1);
    let page = app.service.store().page(&filter, offset - newer, limit + newer).await?;
    let views = app.service.views(page.tasks).await?;
    let with_shards = list.shards.unwrap_or(true);
    let next_of = |place: usize| place.checked_sub(1).map(|next| views[next].as_ref());
    let entry = |(place, view): (usize, &Arc<TaskView>)| HistoryEntry::new(view, next_of(place), with_shards);
    let sweeps = views.iter().enumerate().skip(newer as usize).map(entry).collect();
    Ok(Json(HistoryList { sweeps, total: page.count, reclaimed: page.total }))
}

/// Removes the automatic scan that the API set: that of the settings file applies again.
#[utoipa::path(
    delete, path = "/api/v1/instances/{instance_id}/auto-scan", tag = "instances", operation_id = "reset_auto_scan",
    params(("instance_id" = String, Path)),
    responses((status = 200, body = InstanceDetails), Forbidden, Missing, Guarded)
)]
pub(crate) async fn reset_auto_scan(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
) -> Result<Json<InstanceDetails>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    app.set_auto_scan(&instance, None, app.service.store().now()).await?;
    tracing::info!(instance = instance.id, caller = caller.0.name, "automatic scan reset to that of the settings file");
    Ok(Json(app.details(&instance).await?))
}

/// Inspects an instance without changing anything: backlog, rights, what a sweep would meet.
#[utoipa::path(
    post, path = "/api/v1/instances/{instance_id}/check", tag = "instances", operation_id = "check_instance",
    params(("instance_id" = String, Path)),
    responses((status = 200, body = Checked), Forbidden, Missing, Conflict, Unreachable, Guarded)
)]
pub(crate) async fn check_instance(
    State(app): State<App>,
    caller: Caller,
    PathParams(id): PathParams<String>,
) -> Result<Json<Checked>, ApiError> {
    let instance = app.instance_of(&caller, &id)?;
    let settings = &instance.settings;
    let (view, options) = crate::tasks::masters(settings).await.map_err(ApiError::of_instance)?;
    let order = format!("ttlsweep task create {id}");
    let look =
        check::instance::inspect(&view, &options, &settings.scan, &order).await.map_err(ApiError::of_instance)?;
    Ok(Json(Checked::new(&look, settings, &order).with_report(look.text(&settings.scan, &order))))
}

fn bounded(name: &str, number: u32, range: std::ops::RangeInclusive<u32>) -> Result<u32, ApiError> {
    if range.contains(&number) { Ok(number) } else { Err(ApiError::invalid(name)) }
}

impl AppState {
    /// The instance with this id, if the caller may see it.
    pub(super) fn instance_of(&self, caller: &Caller, id: &str) -> Result<Arc<Instance>, ApiError> {
        let settings = self.settings.borrow();
        let instance = settings.instance(id).filter(|instance| caller.0.allows(&instance.project_id));
        instance.cloned().ok_or_else(ApiError::no_instance)
    }

    /// The current standing of these instances. One that was never swept in its project is left out.
    async fn standings(&self, instances: &[&Arc<Instance>]) -> Result<BTreeMap<String, Standing>, ApiError> {
        let ids: Vec<_> = instances.iter().map(|instance| instance.id.as_str()).collect();
        let mut standings = self.service.store().standings(&ids).await?;
        for view in self.service.active_views().into_values() {
            let view = view.borrow();
            // The records are up to a second older than the view of a running task.
            if let Some(standing) = standings.get_mut(&view.task.instance_id)
                && standing.latest == view.task.id
            {
                (standing.state, standing.reclaimed) = (view.task.state, view.task.num);
            }
        }
        // The newest task may be from when the instance belonged to another project.
        for instance in instances {
            if standings.get(&instance.id).is_some_and(|standing| standing.project_id != instance.project_id) {
                standings.remove(&instance.id);
            }
        }
        Ok(standings)
    }

    async fn sort(
        &self,
        instances: &mut [&Arc<Instance>],
        standings: &BTreeMap<String, Standing>,
        by: Option<SortBy>,
        order: Option<SortOrder>,
    ) -> Result<(), ApiError> {
        let standing = |instance: &Instance| standings.get(&instance.id);
        let name = |instance: &Instance| (instance.name.to_lowercase(), instance.id.clone());
        match by {
            None => {}
            Some(SortBy::Name) => instances.sort_by_cached_key(|instance| name(instance)),
            Some(SortBy::LastSuccess) => {
                instances.sort_by_cached_key(|one| (standing(one).and_then(|seen| seen.last_success), name(one)));
            }
            Some(SortBy::Reclaimed) => {
                instances.sort_by_cached_key(|one| (standing(one).map(|seen| seen.reclaimed), name(one)));
            }
            Some(by @ (SortBy::Memory | SortBy::Backlog)) => {
                let newest: Vec<TaskId> =
                    instances.iter().filter_map(|instance| Some(standing(instance)?.latest)).collect();
                let last_seen = self.service.store().last_seen(&newest).await?;
                let figure = |instance: &Instance| {
                    let seen = standing(instance)?;
                    let last = last_seen.get(&seen.latest).copied();
                    if by == SortBy::Memory { last?.used_memory } else { backlog(seen, last) }
                };
                instances.sort_by_cached_key(|instance| (figure(instance), name(instance)));
            }
        }
        if order == Some(SortOrder::Desc) {
            instances.reverse();
        }
        Ok(())
    }

    /// Converts these instances, in a number of statements that does not grow with them.
    async fn describe(
        &self,
        instances: &[&Arc<Instance>],
        standings: &BTreeMap<String, Standing>,
        schedules: &ScheduleState,
        keeps: &Keeps,
    ) -> Result<Vec<InstanceDto>, ApiError> {
        let store = self.service.store();
        let now = store.now();
        let standing = |instance: &Instance| standings.get(&instance.id);
        let newest: Vec<_> = instances.iter().filter_map(|instance| Some(standing(instance)?.latest)).collect();
        let tasks = store.tasks(&newest).await?;
        let last_seen = store.last_seen(&newest).await?;
        let on_hand = self.service.active_views();
        let describe = |instance: &&Arc<Instance>| {
            let seen = standing(instance);
            let latest = seen.and_then(|seen| match on_hand.get(&seen.latest) {
                Some(view) => Some(TaskDto::from(&view.borrow().task)),
                None => tasks.get(&seen.latest).map(TaskDto::from),
            });
            let set = schedules.auto_scan(&instance.id, &instance.project_id);
            let auto_scan = set.unwrap_or(&instance.auto_scan);
            let bounds = keeps.get(&instance.id, &instance.project_id).unwrap_or(instance.keep);
            let window = instance.window.as_ref();
            InstanceDto {
                id: instance.id.clone(),
                project_id: instance.project_id.clone(),
                name: instance.name.clone(),
                target: instance.settings.target.to_string(),
                window_open: window.map(|window| window.is_open(now)),
                window_changes_at: window.and_then(|window| window.next_change(now)).map(time),
                next_scan_at: due_times(auto_scan, now).next().map(time),
                last_success_at: seen.and_then(|seen| seen.last_success).map(time),
                used_memory: seen.and_then(|seen| last_seen.get(&seen.latest)?.used_memory),
                backlog: seen.and_then(|seen| backlog(seen, last_seen.get(&seen.latest).copied())),
                keep: Some(bounds).filter(Bounds::any).map(KeepBounds::from),
                latest,
            }
        };
        Ok(instances.iter().map(describe).collect())
    }

    pub(super) async fn details(&self, instance: &Arc<Instance>) -> Result<InstanceDetails, ApiError> {
        let store = self.service.store();
        let (schedules, keeps) = (store.schedules().await?, store.keeps().await?);
        let standings = self.standings(&[instance]).await?;
        let described = self.describe(&[instance], &standings, &schedules, &keeps).await?;
        let instance_dto = described.into_iter().next().ok_or_else(ApiError::internal)?;
        let set = schedules.auto_scan(&instance.id, &instance.project_id);
        let auto_scan = set.unwrap_or(&instance.auto_scan);
        Ok(InstanceDetails {
            instance: instance_dto,
            upcoming: due_times(auto_scan, store.now()).take(UPCOMING).map(time).collect(),
            window: instance.window.as_ref().map(WindowDto::from),
            schedule: ScheduleDto::new(auto_scan, set.is_some()),
            keep_source: source(keeps.get(&instance.id, &instance.project_id).is_some()),
            settings: instance.settings.sweep_texts.as_ref().clone(),
        })
    }
}

/// Expired keys in memory as the newest task last knew them: the estimate of a keep run, or what a complete sweep found and reclaimed.
fn backlog(standing: &Standing, last_seen: Option<LastSeen>) -> Option<u64> {
    let kept = last_seen.and_then(|seen| seen.backlog);
    kept.or((standing.state == TaskState::Succeeded).then_some(standing.reclaimed))
}

/// The due times of a schedule after `now`, without an end unless it runs once; none if it is switched off.
fn due_times(auto_scan: &AutoScan, now: jiff::Timestamp) -> impl Iterator<Item = jiff::Timestamp> {
    let next = |at: jiff::Timestamp| auto_scan.enabled.then(|| auto_scan.recurrence.next_due(at)).flatten();
    std::iter::successors(next(now), move |at| next(*at))
}
