//! The commands that we send, each in one place.

use crate::node::conn::Conn;
use crate::node::error::NodeError;
use crate::node::info::Info;

/// The line that gives a user exactly what a sweep needs: no key, no channel, no command that writes. AUTH needs no
/// right; CLIENT SETNAME is a courtesy.
pub const ACL_LINE: &str = "ACL SETUSER ttlsweep on '>PASSWORD' resetkeys resetchannels -@all +scan +dbsize +info +ping +select +client|setname";

/// What a cluster needs beside that: to be asked who its masters are, and (it works without) whether it is well.
pub const ACL_CLUSTER: &str = "+cluster|slots +cluster|info";

/// What the touch needs beside that: the commands ask about a key, so the user must be allowed the names.
pub const ACL_TOUCH: &str = "ACL SETUSER ttlsweep ~* +exists +ttl";

/// INFO of the default sections and of `commandstats`, in one write.
///
/// # Errors
/// [`NodeError`] of the connection or of the plain INFO; a refused `commandstats` only leaves its fields out.
pub async fn info(conn: &mut Conn) -> Result<Info, NodeError> {
    let plain = redis::cmd("INFO");
    let commandstats = redis::cmd("INFO").arg("commandstats").to_owned();
    let [plain, commandstats] = conn.pipeline::<String, 2>("INFO", [&plain, &commandstats]).await?;
    let mut text = plain?;
    if let Ok(more) = commandstats {
        text.push_str(&more);
    }
    Ok(Info::parse(&text))
}

/// One PING.
///
/// # Errors
/// [`NodeError`].
pub async fn ping(conn: &mut Conn) -> Result<(), NodeError> {
    conn.call::<String>("PING", &redis::cmd("PING")).await.map(drop)
}

/// Keys of the selected DB, expired ones that still hold memory included.
///
/// # Errors
/// [`NodeError`].
pub async fn dbsize(conn: &mut Conn) -> Result<u64, NodeError> {
    conn.call("DBSIZE", &redis::cmd("DBSIZE")).await
}
