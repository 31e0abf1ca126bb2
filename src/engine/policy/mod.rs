//! The rules of a sweep. Pure: nothing here sends, sleeps, or imports from `sweep`.

pub(crate) mod cursor_loop;
pub(crate) mod depth;
pub(crate) mod expiry_guard;
pub(crate) mod foreground;
pub mod hidden_keys;
pub(crate) mod keep_pace;
pub(crate) mod key_names;
pub(crate) mod ledger;
pub(crate) mod observation;
pub mod pacer;
pub(crate) mod profile;
pub(crate) mod retry_budget;
pub(crate) mod segments;
mod server_clock;
pub(crate) mod throttle;
pub(crate) mod touch_audit;
pub(crate) mod verdict;
