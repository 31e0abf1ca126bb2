//! Spans of tasks, as an OTLP receiver gets them.

use std::collections::BTreeMap;

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;

use crate::support::daemon::{Daemon, instance};
use crate::support::hook::{Answer, Hook};
use crate::support::keyspace::Keyspace;
use crate::support::server::Server;
use crate::support::{PATIENCE, free_port, probe, ttlsweep};

fn texts(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |value: &KeyValue| match value.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => Some(text.clone()),
        Value::IntValue(number) => Some(number.to_string()),
        _ => None,
    };
    attributes.iter().map(|pair| (pair.key.clone(), text(pair).unwrap_or_default())).collect()
}

/// What a receiver got: the sender's attributes, and the spans by name, in the order in which they ended.
fn received(hook: &Hook) -> (BTreeMap<String, String>, BTreeMap<String, Vec<Span>>) {
    let (mut resource, mut spans) = (BTreeMap::new(), BTreeMap::<_, Vec<_>>::new());
    for call in hook.calls() {
        assert_eq!(call.header("content-type"), "application/x-protobuf");
        let request = ExportTraceServiceRequest::decode(call.body.as_ref()).expect("protobuf");
        for of_one in request.resource_spans {
            resource.extend(texts(&of_one.resource.expect("who sends").attributes));
            for span in of_one.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                spans.entry(span.name.clone()).or_default().push(span);
            }
        }
    }
    (resource, spans)
}

#[tokio::test]
async fn a_receiver_gets_the_task_with_its_shards_passes_and_holds() {
    let (hook, server) = (Hook::start(&[]).await, Server::start().await);
    Keyspace::of(&server, 0).expired(300, "expired:").await;
    Keyspace::of(&server, 3).live_ttl(50, "live:").await;
    let gone = instance("gone", &format!("redis://127.0.0.1:{}", free_port()), "retry-for = \"1ms\"");
    let mut daemon = Daemon::prepare(&(instance("cache", &server.url(), "") + gone.as_str()))
        .launched(|mut command| {
            command.env("OTEL_EXPORTER_OTLP_ENDPOINT", hook.url()).env("OTEL_RESOURCE_ATTRIBUTES", "rack=7");
            command
        })
        .await;
    let slow = daemon.create(serde_json::json!({"instance_id": "cache", "max_keys_per_sec": 100})).await;
    daemon.until(&slow, "running").await;
    daemon.post(&format!("/api/v1/tasks/{slow}/pause")).await.ok();
    probe("the hold began", PATIENCE, async || daemon.task(&slow).await["holds"][0]["reason"] == "paused").await;
    daemon.post(&format!("/api/v1/tasks/{slow}/resume")).await.ok();
    daemon.hurry(&slow).await;
    daemon.until(&slow, "succeeded").await;
    let failed = daemon.scan("gone").await;
    let why = daemon.until(&failed, "failed").await["failure"]["message"].clone();
    // The remaining spans are sent before the end.
    assert_eq!(daemon.stop().await, Some(0));

    let (resource, spans) = received(&hook);
    assert_eq!((resource["service.name"].as_str(), resource["rack"].as_str()), ("ttlsweep", "7"));
    let [task, broken] = &spans["task"][..] else { panic!("{spans:#?}") };
    let about = texts(&task.attributes);
    assert_eq!((&about["ttlsweep.task.id"], about["ttlsweep.task.state"].as_str()), (&slow, "succeeded"));
    assert_eq!((about["ttlsweep.instance.id"].as_str(), about["ttlsweep.keys.reclaimed"].as_str()), ("cache", "300"));
    let inside = |outer: &Span, inner: &Span| {
        inner.parent_span_id == outer.span_id
            && inner.trace_id == outer.trace_id
            && outer.start_time_unix_nano <= inner.start_time_unix_nano
            && inner.end_time_unix_nano <= outer.end_time_unix_nano
    };
    let shard = &spans["shard"][0];
    assert!(inside(task, shard), "{task:#?} {shard:#?}");
    assert_eq!(spans["pass"].len(), 2);
    assert!(spans["pass"].iter().all(|pass| inside(shard, pass)));
    assert_eq!(texts(&spans["pass"][0].attributes)["ttlsweep.keys.reclaimed"], "300");
    let hold = spans["hold"].iter().find(|hold| texts(&hold.attributes)["ttlsweep.hold.reason"] == "paused");
    assert!(inside(shard, hold.expect("it was paused")));
    let status = broken.status.as_ref().expect("it failed");
    assert_eq!((status.code(), status.message.as_str()), (StatusCode::Error, why.as_str().expect("a reason")));
    assert_ne!(broken.trace_id, task.trace_id);
}

#[tokio::test]
async fn a_receiver_that_never_answers_or_is_not_there_changes_no_sweep() {
    let (hook, server) = (Hook::start(&[Answer::Never; 9]).await, Server::start().await);
    let nobody = format!("http://127.0.0.1:{}", free_port());
    for receiver in [hook.url(), &nobody] {
        Keyspace::of(&server, 0).expired(300, "expired:").await;
        let mut scan = ttlsweep();
        scan.args(["scan", &server.url(), "--json"]).env("OTEL_EXPORTER_OTLP_ENDPOINT", receiver);
        let began = std::time::Instant::now();
        let run = tokio::task::spawn_blocking(move || scan.output().expect("it runs")).await.expect("no panic");
        let report: serde_json::Value = serde_json::from_slice(&run.stdout).expect("JSON");
        assert_eq!((run.status.code(), &report["num"]), (Some(0), &300.into()), "{report}");
        assert!(began.elapsed() < std::time::Duration::from_secs(8), "{:?}", began.elapsed());
    }
}
