//! A bare SCAN loop, for comparison.

use std::io::{Read, Write};
use std::net::TcpStream;

/// The least that a client can do: one blocking socket, and parsing of lengths only. `around` is sent before and
/// after each SCAN; its reply must be one line.
pub fn bare(addr: &str, count: u32, around: &str) {
    let mut stream = TcpStream::connect(addr).expect("the server is there");
    stream.set_nodelay(true).expect("a TCP socket");
    let (mut buf, mut end) = (vec![0_u8; 64 << 10], 0);
    let mut cursor = b"0".to_vec();
    loop {
        let mut out = format!("{around}*4\r\n$4\r\nSCAN\r\n${}\r\n", cursor.len()).into_bytes();
        out.extend_from_slice(&cursor);
        out.extend_from_slice(format!("\r\n$5\r\nCOUNT\r\n${}\r\n{count}\r\n", count.to_string().len()).as_bytes());
        out.extend_from_slice(around.as_bytes());
        let mut lines = if around.is_empty() { 0 } else { 2 };
        stream.write_all(&out).expect("the server reads");
        let (mut at, mut next, mut left) = (0, Vec::new(), None::<u64>);
        loop {
            // Header lines: *2, $n, the cursor, *n, then $n and a name for each.
            let line_end = |buf: &[u8], at: usize| buf[at..].windows(2).position(|w| w == b"\r\n").map(|p| at + p);
            let number = |line: &[u8]| std::str::from_utf8(&line[1..]).ok().and_then(|t| t.parse::<u64>().ok());
            let mut stuck = true;
            while let Some(stop) = line_end(&buf[..end], at) {
                let line = &buf[at..stop];
                match (line[0], left) {
                    (b':', _) => {
                        lines -= 1;
                        at = stop + 2;
                    }
                    (b'*', None) if next.is_empty() => at = stop + 2,
                    (b'*', None) => {
                        left = number(line);
                        at = stop + 2;
                    }
                    (b'$', _) => {
                        let len = number(line).expect("a length") as usize;
                        if end < stop + 2 + len + 2 {
                            break;
                        }
                        if left.is_none() {
                            next = buf[stop + 2..stop + 2 + len].to_vec();
                        }
                        left = left.map(|n| n - 1);
                        at = stop + 2 + len + 2;
                    }
                    other => panic!("no SCAN reply: {other:?}"),
                }
                if left == Some(0) && lines == 0 {
                    stuck = false;
                    break;
                }
            }
            if !stuck {
                break;
            }
            if end == buf.len() {
                buf.resize(buf.len() * 2, 0);
            }
            let n = stream.read(&mut buf[end..]).expect("the server answers");
            assert!(n > 0, "the server closed the connection");
            end += n;
        }
        end = 0;
        cursor = next;
        if cursor == b"0" {
            return;
        }
    }
}
