//! The body of a notification in each form, and its signature. Pure functions.
//!
//! Ids, times and signature follow the Standard Webhooks specification, for which most languages have libraries.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use jiff::Timestamp;
use serde_json::{Value, json};
use sha2::Sha256;
use uuid::Uuid;

use crate::model::event::{Event, Happened};
use crate::settings::notify::{Format, signing_key};
use crate::settings::show_duration;

/// Longest message that Discord accepts, in characters.
const DISCORD_AT_MOST: usize = 2000;

/// The body of the notification of an event.
pub(super) fn body(event: &Event, format: Format) -> Value {
    let text = sentence(event);
    match format {
        Format::Json => json!({
            "type": event.kind().as_str(),
            "id": event.id.to_string(),
            "timestamp": time(event.at),
            "text": text,
            "data": data(event),
        }),
        // In Slack's markup these three characters begin links, mentions and entities.
        Format::Slack => json!({"text": text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")}),
        // No mentions: the text may contain a server's message.
        Format::Discord => {
            json!({"content": text.chars().take(DISCORD_AT_MOST).collect::<String>(), "allowed_mentions": {"parse": []}})
        }
        Format::Teams => json!({
            "type": "message",
            "attachments": [{
                "contentType": "application/vnd.microsoft.card.adaptive",
                "content": {
                    "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
                    "type": "AdaptiveCard",
                    "version": "1.4",
                    "body": [{"type": "TextBlock", "text": text, "wrap": true}],
                },
            }],
        }),
    }
}

/// The event in one sentence, for people.
fn sentence(event: &Event) -> String {
    let instance = &event.instance_id;
    match &event.what {
        Happened::TaskFailed(task) => {
            let why = task.failure.as_ref().map_or("for a reason that is not on record", |why| why.message.as_str());
            let freed = match task.num {
                0 => String::new(),
                keys => format!("; {keys} expired keys were reclaimed before"),
            };
            let hint = task.failure.as_ref().and_then(|why| why.hint.as_ref());
            let hint = hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            format!("ttlsweep: the sweep of {instance} failed: {why}{freed}{hint}")
        }
        Happened::NotSwept { last_success, allowed } => {
            let last = match last_success {
                Some(at) => format!("the last complete sweep ended at {at:.0}"),
                None => "there has been no complete sweep yet".to_owned(),
            };
            format!("ttlsweep: {instance} has not been swept for more than {}: {last}", show_duration(*allowed))
        }
        Happened::BoundMissed { missed, message, .. } => {
            format!("ttlsweep: the bound of {instance} has been missed for {}: {message}", show_duration(*missed))
        }
    }
}

/// The facts of the event, named as in the API.
fn data(event: &Event) -> Value {
    let mut data = json!({"instance_id": event.instance_id, "project_id": event.project_id});
    match &event.what {
        Happened::TaskFailed(task) => {
            data["task"] = json!({
                "id": task.id.to_string(),
                "cause": task.cause.as_str(),
                "created_at": time(task.created_at),
                "started_at": task.started_at.map(time),
                "finished_at": task.finished_at.map(time),
                "reclaimed": task.num,
                "failure": task.failure.as_ref().map(|failure| json!({
                    "kind": failure.kind.as_str(), "message": failure.message, "hint": failure.hint,
                })),
            });
        }
        Happened::NotSwept { last_success, allowed } => {
            data["last_success_at"] = json!(last_success.map(time));
            data["allowed_s"] = json!(allowed.as_secs_f64());
        }
        Happened::BoundMissed { task, missed, message } => {
            data["task"] = json!({"id": task.id.to_string(), "started_at": task.started_at.map(time)});
            data["max_backlog"] = json!(task.sweep.get("max-backlog"));
            data["max_delay"] = json!(task.sweep.get("max-delay"));
            data["missed_s"] = json!(missed.as_secs_f64());
            data["message"] = json!(message);
        }
    }
    data
}

/// The value of `webhook-signature` for a body that is sent at this second, in seconds since 1970. `None`: the secret is invalid, which
/// the settings exclude.
pub(super) fn signature(id: Uuid, second: i64, body: &[u8], secret: &str) -> Option<String> {
    let mut mac = Hmac::<Sha256>::new_from_slice(&signing_key(secret)?).ok()?;
    mac.update(format!("{id}.{second}.").as_bytes());
    mac.update(body);
    Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}

/// A time as the API writes it: UTC with milliseconds.
fn time(at: Timestamp) -> String {
    format!("{at:.3}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::failure::{Failure, FailureKind};
    use crate::model::task::{Cause, Task, TaskId, TaskState};

    fn failed() -> Event {
        Event::task_failed(&task(), "2026-01-31T02:05:01Z".parse().unwrap())
    }

    fn task() -> Task {
        let at = |time: &str| Some(time.parse().unwrap());
        Task {
            id: TaskId("01890a5d-ac96-774b-bcce-b302099a8057".parse().unwrap()),
            instance_id: "cache".to_owned(),
            project_id: "shop".to_owned(),
            target: "redis://cache:6379".to_owned(),
            sweep: Default::default(),
            respect_window: false,
            cause: Cause::Schedule,
            state: TaskState::Failed,
            created_at: at("2026-01-31T02:00:00Z").unwrap(),
            started_at: at("2026-01-31T02:00:01Z"),
            finished_at: at("2026-01-31T02:05:00Z"),
            num: 1234,
            spent: Default::default(),
            failure: Some(Failure::new(FailureKind::CannotConnect, "lost <a> & b").hint("is it up?")),
            note: None,
            owner: None,
            fence: 0,
            place: String::new(),
        }
    }

    #[test]
    fn every_form_of_every_event() {
        let last = "2026-01-29T02:00:00Z".parse().unwrap();
        let now = "2026-01-31T02:00:00Z".parse().unwrap();
        let late = |last| Event::not_swept("cache", "shop", last, Duration::from_secs(2 * 86_400), now);
        let mut shown = String::new();
        let bounds = [("max-backlog", "5%"), ("max-delay", "off")].map(|(key, text)| (key.to_owned(), text.to_owned()));
        let kept = Task { sweep: bounds.into(), ..task() };
        let message = "about 9 expired keys are in memory, and 5 are allowed".to_owned();
        let missed = Event::bound_missed(&kept, Duration::from_secs(30), message, now);
        for event in [failed(), late(Some(last)), late(None), missed] {
            for format in Format::ALL {
                let body = serde_json::to_string_pretty(&body(&event, *format)).unwrap();
                shown.push_str(&format!("{} as {format}: {body}\n", event.kind()));
            }
        }
        insta::assert_snapshot!(shown);
    }

    #[test]
    fn the_same_fact_has_the_same_id_and_another_has_another() {
        assert_eq!(failed().id, failed().id);
        let allowed = Duration::from_secs(1);
        let late = |id, last: &str| Event::not_swept(id, "p", last.parse().ok(), allowed, Timestamp::now()).id;
        assert_eq!(late("a", "2026-01-31T02:00:00Z"), late("a", "2026-01-31T02:00:00Z"));
        assert_ne!(late("a", "2026-01-31T02:00:00Z"), late("b", "2026-01-31T02:00:00Z"));
        assert_ne!(late("a", "2026-01-31T02:00:00Z"), late("a", "2026-02-01T02:00:00Z"));
    }

    #[test]
    fn a_secret_is_taken_as_it_is_or_by_its_prefix_as_base64() {
        let sign = |secret| signature(Uuid::nil(), 1_614_265_330, b"{\"test\": 2432232314}", secret);
        // Computed with the Python library of the specification.
        let known = "v1,Y5/uRWupLQOPxe4D5mBYrd9dRGhY+xtWrnxDwy59WDE=";
        assert_eq!(sign("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").as_deref(), Some(known));
        assert_ne!(sign("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").as_deref(), Some(known));
        assert_eq!(sign("whsec_?"), None);
    }
}
