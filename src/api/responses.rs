//! The errors that a call may answer, as the OpenAPI description lists them: each set is named once and used by many calls.

use std::collections::BTreeMap;

use utoipa::openapi::response::{Response, ResponseBuilder};
use utoipa::openapi::{ContentBuilder, Ref, RefOr};
use utoipa::{IntoResponses, ToSchema as _};

use crate::api::error::ErrorBody;

macro_rules! responses {
    ($($(#[$doc:meta])* $name:ident: $($status:literal $what:literal),+;)+) => {$(
        $(#[$doc])*
        pub(super) struct $name;

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                BTreeMap::from([$((stringify!($status).to_owned(), error($what)),)+])
            }
        }
    )+};
}

responses! {
    /// A parameter or the body is not valid.
    Invalid: 400 "A parameter or the body is not valid.";
    /// The role of the caller does not allow the call.
    Forbidden: 403 "The role of the caller does not allow it.";
    /// What the path names does not exist, or belongs to another project.
    Missing: 404 "What the path names does not exist.";
    /// The state of the task or instance does not allow the call.
    Conflict: 409 "The state of the task or instance does not allow it.";
    /// The servers of the instance cannot be asked.
    Unreachable: 502 "The servers of the instance cannot be asked.";
    /// What any call may answer that needs credentials and the records.
    Guarded:
        401 "The credentials are missing or wrong.", 413 "The body is too large.",
        500 "The records could not be read or written.", 503 "The daemon is busy or stopping, or its records cannot be reached.";
    /// What any call may answer that needs credentials, and no records.
    GuardedWithoutRecords:
        401 "The credentials are missing or wrong.", 413 "The body is too large.", 503 "The daemon is busy or stopping.";
}

fn error(what: &str) -> RefOr<Response> {
    let body = ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
    ResponseBuilder::new().description(what).content("application/json", body).build().into()
}
