//! The rules of a sweep. Pure: nothing here sends, sleeps, or imports from `sweep`.

pub mod cursor_loop;
pub mod depth;
pub mod expiry_guard;
pub mod foreground;
pub mod hidden_keys;
pub mod keep;
pub mod key_names;
pub mod ledger;
pub mod observation;
pub mod pacer;
pub mod profile;
pub mod retry_budget;
pub mod segments;
pub mod throttle;
pub mod touch_audit;
pub mod verdict;
