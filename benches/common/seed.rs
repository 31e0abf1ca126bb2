//! Relays that make real servers look like the nodes of a cluster: each answers that all of them are
//! the masters of one cluster, and passes everything else on to its server. Two hundred real cluster nodes would keep the
//! machine busy with talking to each other.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

/// Puts a relay in front of each server, on threads that end with the process. Returns the addresses of two of them.
pub fn cluster_of(ports: &[u16]) -> String {
    let listeners: Vec<TcpListener> =
        ports.iter().map(|_| TcpListener::bind("127.0.0.1:0").expect("a free port")).collect();
    let fronts: Vec<u16> = listeners.iter().map(|l| l.local_addr().expect("it is bound").port()).collect();
    let slots = cluster_slots(&fronts);
    for (listener, &port) in listeners.into_iter().zip(ports) {
        let slots = slots.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let slots = slots.clone();
                std::thread::spawn(move || relay(client, port, &slots));
            }
        });
    }
    seeds(&fronts)
}

/// The answer to CLUSTER SLOTS of masters at these ports that share the slots evenly.
pub fn cluster_slots(ports: &[u16]) -> String {
    let mut slots = format!("*{}\r\n", ports.len());
    for (place, port) in ports.iter().enumerate() {
        let edge = |n: usize| 16_384 * n / ports.len();
        slots.push_str(&format!("*3\r\n:{}\r\n:{}\r\n", edge(place), edge(place + 1) - 1));
        slots.push_str(&format!("*3\r\n$9\r\n127.0.0.1\r\n:{port}\r\n$5\r\n{port:05}\r\n"));
    }
    slots
}

/// The addresses of the first and the last, for a URL.
pub fn seeds(ports: &[u16]) -> String {
    format!("127.0.0.1:{},127.0.0.1:{}", ports[0], ports[ports.len() - 1])
}

/// The client sends a command about the cluster on its own, and waits for the answer.
fn relay(mut client: TcpStream, port: u16, slots: &str) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)) else { return };
    let (Ok(mut from_server), Ok(mut to_client)) = (server.try_clone(), client.try_clone()) else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_server, &mut to_client);
    });
    let mut chunk = vec![0; 64 << 10];
    while let Ok(length @ 1..) = client.read(&mut chunk) {
        let text = String::from_utf8_lossy(&chunk[..length]);
        let sent = match text.strip_prefix("*2\r\n$7\r\nCLUSTER\r\n") {
            Some(what) if what.contains("SLOTS") => client.write_all(slots.as_bytes()),
            Some(_) => client.write_all(b"$16\r\ncluster_state:ok\r\n"),
            None => server.write_all(&chunk[..length]),
        };
        if sent.is_err() {
            return;
        }
    }
}
