//! The pure parts of a batch: reading the reply, judging it, pacing. `cargo bench --bench batch`.
//!
//! For comparison the redis crate's parser, which allocates each key name, reads the same bytes.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ttlsweep::engine::policy::hidden_keys::hidden;
use ttlsweep::engine::policy::pacer::{Pacer, Wait};
use ttlsweep::model::bounds::Bounds;
use ttlsweep::model::shard::ScanPosition;
use ttlsweep::model::slots::CursorSpace;
use ttlsweep::model::throttle::Limits;
use ttlsweep::node::conn::{Reading, Reply};
use ttlsweep::node::wire::{Names, ScanReader, ScanReply, frame_len};
use ttlsweep::settings::Tuning;

/// A SCAN reply with typical names.
fn reply(names: usize) -> Vec<u8> {
    let mut bytes = format!("*2\r\n$7\r\n1234567\r\n*{names}\r\n").into_bytes();
    for i in 0..names {
        let name = format!("session:user:{i:012}");
        bytes.extend_from_slice(format!("${}\r\n{name}\r\n", name.len()).as_bytes());
    }
    bytes
}

/// Reads a whole reply.
fn whole(bytes: &[u8], mut names: Option<&mut Names>) -> ScanReply {
    let (mut reader, mut at) = (ScanReader::default(), 0);
    loop {
        let (eaten, reply) = reader.feed(&bytes[at..], names.as_deref_mut()).expect("a good reply");
        at += eaten;
        if let Some(reply) = reply {
            return reply;
        }
    }
}

fn reading(c: &mut Criterion) {
    let bytes = reply(100);
    let mut group = c.benchmark_group("reply_of_100_names");
    group.throughput(Throughput::Elements(100));
    group.bench_function("names_dropped", |b| {
        b.iter(|| whole(black_box(&bytes), None));
    });
    let mut names = Names::default();
    group.bench_function("names_kept", |b| {
        b.iter(|| {
            names.clear();
            whole(black_box(&bytes), Some(&mut names))
        });
    });
    group.bench_function("length_only", |b| b.iter(|| frame_len(black_box(&bytes)).unwrap()));
    group.bench_function("redis_crate", |b| b.iter(|| redis::parse_redis_value(black_box(&bytes)).unwrap()));
    group.finish();
}

fn deciding(c: &mut Criterion) {
    let batch = Reply {
        to: ScanPosition::from_reply(1234),
        returned: 97,
        before: Reading { keys: 1000, expired: None },
        after: Reading { keys: 997, expired: None },
    };
    c.bench_function("judge_one_batch", |b| {
        b.iter(|| hidden(&CursorSpace::OneTable, black_box(ScanPosition::from_reply(77)), 100, black_box(&batch)));
    });
    let tuning = Tuning {
        intensity: 0.5,
        min_intensity: 0.5,
        max_keys_per_sec: Some(1_000_000),
        limits: Limits::NONE,
        bounds: Bounds::default(),
    };
    let mut pacer = Pacer::new(100, Duration::from_micros(75), tuning, Duration::from_micros(20));
    c.bench_function("pace_one_batch", |b| {
        b.iter(|| {
            let waited = black_box(Duration::from_micros(90));
            pacer.worked(black_box(100), Wait { own: waited, since_sent: waited, waited_for: true });
            pacer.charge(100);
            (pacer.may_send(true), pacer.count())
        });
    });
}

criterion_group!(benches, reading, deciding);
criterion_main!(benches);
