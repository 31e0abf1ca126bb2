//! The rights that a user needs, as the lines that grant them.

/// The line that gives a user exactly what a sweep needs: no key, no channel, no command that writes. AUTH needs no
/// right; CLIENT SETNAME is a courtesy. Quoted for a shell, which would take the bar for a pipe, and for redis-cli's prompt.
pub const ACL_LINE: &str = "ACL SETUSER ttlsweep on '>PASSWORD' resetkeys resetchannels -@all +scan +dbsize +info +ping +select '+client|setname'";

/// What a cluster needs beside that: to be asked who its masters are, and (it works without) whether it is well.
pub const ACL_CLUSTER: &str = "'+cluster|slots' '+cluster|info'";

/// What the touch needs beside that: the commands ask about a key, so the user must be allowed the names.
pub const ACL_TOUCH: &str = "ACL SETUSER ttlsweep '~*' +exists +ttl";

/// What the user of the sentinels needs.
pub const ACL_SENTINEL: &str = "'+sentinel|get-master-addr-by-name'";

/// What to do where the server refuses a command.
pub(super) fn missing_right(command: &str, code: &str) -> String {
    match command {
        _ if code == "DENIED" => {
            "the server is in protected mode: connect through its loopback address, or give it a password".to_owned()
        }
        "EXISTS" | "TTL" => format!("sweep without it (--touch none), or grant what the touch needs: {ACL_TOUCH}"),
        _ if command.starts_with("CLUSTER") => {
            format!("grant on every node what the sweep of a cluster needs: {ACL_LINE} {ACL_CLUSTER}")
        }
        _ if command.starts_with("SENTINEL") => {
            format!("grant the sentinels' user what is asked of them: {ACL_SENTINEL}")
        }
        _ => format!("grant what a sweep needs: {ACL_LINE}"),
    }
}
