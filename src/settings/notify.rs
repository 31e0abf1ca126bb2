//! `[notify]`: the webhook that is notified of what went wrong.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use secrecy::SecretString;

use crate::model::event::EventKind;
use crate::model::words::words;
use crate::settings::table::Table;
use crate::settings::values::positive_duration;

/// The form of a notification's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// An object of our own with everything that is known.
    Json,
    /// `{"text": ...}`, for Slack, Mattermost, Rocket.Chat and Google Chat.
    Slack,
    /// `{"content": ...}`, as Discord wants it.
    Discord,
    /// An adaptive card, for a workflow of Microsoft Teams.
    Teams,
}

words!(Format, "format", Json = "json", Slack = "slack", Discord = "discord", Teams = "teams");

/// The checked settings of `[notify]`.
#[derive(Debug, Clone)]
pub struct NotifySettings {
    /// URL of the webhook. It is a secret: with many chats whoever knows it may post there.
    pub url: SecretString,
    /// The form of the body.
    pub format: Format,
    /// The secret that requests are signed with; `None`: they are not signed.
    pub secret: Option<SecretString>,
    /// The kinds of events to report.
    pub events: Vec<EventKind>,
    /// How long an instance may be without a complete sweep, unless it has a limit of its own.
    pub not_swept_for: Duration,
}

/// Reads the table. `Some(None)`: no notifications are sent. `None`: the table has problems.
pub(super) fn read(table: &Table<'_>) -> Option<Option<NotifySettings>> {
    let named = ["url", "url-env", "url-file"].into_iter().filter(|key| table.has(key)).collect::<Vec<_>>();
    if let [_, second, ..] = named[..] {
        table.complain(second, format!("{second}: give one of url, url-env and url-file"));
    }
    let url = table.optional("url", |text| is_url(text).map(|()| SecretString::from(text)));
    let url = url.or(table.secret("url-env", "url-file", is_url));
    let format = table.read("format", |text| {
        Format::from_str(text).map_err(|_| format!("`{text}` is not one of {}", listed(Format::ALL)))
    });
    let secret = table.secret("secret-env", "secret-file", is_key);
    let events = table.read("events", |text| {
        let words = text.split(',').filter(|word| !word.is_empty());
        let known = |word: &str| {
            EventKind::from_str(word).map_err(|_| format!("`{word}` is not one of {}", listed(EventKind::ALL)))
        };
        words.map(known).collect::<Result<Vec<_>, _>>()
    });
    let not_swept_for = table.read("not-swept-for", positive_duration);
    table.no_more();
    let (format, events, not_swept_for) = (format?, events?, not_swept_for?);
    Some(url.map(|url| NotifySettings { url, format, secret, events, not_swept_for }))
}

fn is_url(text: &str) -> Result<(), String> {
    match url::Url::parse(text) {
        Ok(url) if matches!(url.scheme(), "http" | "https") => Ok(()),
        _ => Err("is not a URL such as https://chat.example/hooks/1".to_owned()),
    }
}

/// A secret with this prefix is base64 of the signing key, as the Standard Webhooks specification has it.
pub const KEY_PREFIX: &str = "whsec_";

/// The key to sign with. `None`: the secret has the prefix, and the rest of it is not base64.
pub fn signing_key(secret: &str) -> Option<Vec<u8>> {
    use base64::Engine as _;
    match secret.strip_prefix(KEY_PREFIX) {
        Some(encoded) => base64::engine::general_purpose::STANDARD.decode(encoded).ok(),
        None => Some(secret.as_bytes().to_vec()),
    }
}

fn is_key(secret: &str) -> Result<(), String> {
    signing_key(secret).map(drop).ok_or_else(|| format!("what follows {KEY_PREFIX} is not base64"))
}

fn listed(words: &[impl fmt::Display]) -> String {
    words.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
