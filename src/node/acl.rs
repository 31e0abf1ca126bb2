//! The rights that a user needs, as ACL rules that grant them.

/// Creates a user with exactly the rights that a sweep needs: no key, no channel, no command that writes. AUTH needs no
/// right; CLIENT SETNAME only helps who reads CLIENT LIST. Quoted for a shell, which would take the bar for a pipe, and
/// for redis-cli's prompt.
pub const ACL_LINE: &str = "ACL SETUSER ttlsweep on '>PASSWORD' resetkeys resetchannels -@all +scan +dbsize +info +ping +select '+client|setname'";

/// The rights that a cluster needs beside that: CLUSTER SLOTS names the masters; CLUSTER INFO, which is optional, tells
/// whether the cluster is well.
pub const ACL_CLUSTER: &str = "'+cluster|slots' '+cluster|info'";

/// The rights that the touch needs beside that. EXISTS and TTL have a key, so the user needs a right to the names too.
pub const ACL_TOUCH: &str = "ACL SETUSER ttlsweep '~*' +exists +ttl";

/// The right that the user of the sentinels needs.
pub const ACL_SENTINEL: &str = "'+sentinel|get-master-addr-by-name'";

/// The hint where the server refuses a command for lack of a right.
pub(super) fn right_hint(command: &str, code: &str) -> String {
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
