//! Three private servers that form a cluster of three masters.

use std::path::Path;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::cli::demo::server::DemoServer;
use crate::model::slots::{SLOTS, slot_of};
use crate::node::conn::Conn;
use crate::node::error::NodeError;

const MASTERS: u16 = 3;
/// Hash tags for each master: its keys lie in at most this many slots.
const TAGS: usize = 64;
/// Longest time until the nodes agree that they are a cluster. On one machine this takes a few seconds.
const AGREE_WITHIN: Duration = Duration::from_secs(30);
/// Time between two CLUSTER INFO to the same node.
const AGREE_TICK: Duration = Duration::from_millis(50);

/// Starts the servers, all with the same password, and waits until each says that the cluster is complete.
///
/// # Errors
/// A server that does not start, or nodes that do not agree.
pub(super) async fn start(program: &Path) -> anyhow::Result<Vec<DemoServer>> {
    let password = Uuid::new_v4().to_string();
    let mut servers = Vec::new();
    for _ in 0..MASTERS {
        servers.push(DemoServer::start_as(program, &password, true).await?);
    }
    let mut conns = Vec::new();
    for (place, server) in servers.iter().enumerate() {
        let mut conn = Conn::open(&server.addr(), &server.conn_options()).await?;
        let mut add = redis::cmd("CLUSTER");
        add.arg("ADDSLOTS").arg((0..SLOTS).filter(|&slot| master_of(slot) == place).collect::<Vec<_>>());
        conn.call::<()>("CLUSTER ADDSLOTS", &add).await?;
        // Different epochs from the start: equal ones would collide, and the nodes would have to resolve that first.
        let epoch = redis::cmd("CLUSTER").arg("SET-CONFIG-EPOCH").arg(place + 1).to_owned();
        conn.call::<()>("CLUSTER SET-CONFIG-EPOCH", &epoch).await?;
        conns.push(conn);
    }
    for server in &servers[1..] {
        let meet = redis::cmd("CLUSTER").arg("MEET").arg("127.0.0.1").arg(server.port()).to_owned();
        conns[0].call::<()>("CLUSTER MEET", &meet).await?;
    }
    let deadline = Instant::now() + AGREE_WITHIN;
    for conn in &mut conns {
        while !is_well(conn).await? {
            anyhow::ensure!(
                Instant::now() < deadline,
                "the three servers did not become a cluster in {AGREE_WITHIN:?}"
            );
            sleep(AGREE_TICK).await;
        }
    }
    Ok(servers)
}

/// Hash tags whose slots belong to the master at this place, 0 to 2.
pub(super) fn tags(place: usize) -> Vec<String> {
    let all = (0_u32..).map(|number| number.to_string());
    all.filter(|tag| master_of(slot_of(tag.as_bytes())) == place).take(TAGS).collect()
}

fn master_of(slot: u16) -> usize {
    usize::from(slot) * usize::from(MASTERS) / usize::from(SLOTS)
}

async fn is_well(conn: &mut Conn) -> Result<bool, NodeError> {
    let info = redis::cmd("CLUSTER").arg("INFO").to_owned();
    let text: String = conn.call("CLUSTER INFO", &info).await?;
    let known = format!("cluster_known_nodes:{MASTERS}");
    Ok(text.contains("cluster_state:ok") && text.lines().any(|line| line.trim() == known))
}
