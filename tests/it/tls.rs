//! Encrypted connections to real servers, and the errors when one fails.

use std::net::SocketAddr;

use crate::support::{
    PATIENCE,
    certs::{Authority, Identity, Validity},
    cluster::Cluster,
    free_port,
    keyspace::Keyspace,
    probe,
    proxy::{Mode, Proxy},
    run::{Run, Running, run},
    server::Server,
};

/// A server that speaks TLS on one port and plain RESP on another.
struct TlsServer {
    server: Server,
    authority: Authority,
    port: u16,
}

impl TlsServer {
    /// `None`: the server under test was built without TLS, which is reported as skipped.
    async fn start(names: &[&str], validity: Validity, more: &[(&str, &str)]) -> Option<Self> {
        if !Server::has_tls() {
            return None;
        }
        let authority = Authority::new();
        let Identity { cert, key } = authority.issue("server", names, validity);
        let port = free_port();
        let mut options = Server::options()
            .with_config("tls-port", &port.to_string())
            .with_config("tls-cert-file", cert.to_str().unwrap())
            .with_config("tls-key-file", key.to_str().unwrap())
            .with_config("tls-ca-cert-file", authority.cacert().to_str().unwrap())
            .with_config("tls-auth-clients", "no");
        for (name, value) in more {
            options = options.with_config(name, value);
        }
        Some(Self { server: options.start().await, authority, port })
    }

    fn url(&self, host: &str) -> String {
        format!("rediss://{host}:{}", self.port)
    }

    async fn scan(&self, host: &str, more: &[&str]) -> Run {
        let cacert = self.authority.cacert();
        let url = self.url(host);
        let fixed = ["scan", &url, "--json", "--connect-timeout", "2s", "--cacert", cacert.to_str().unwrap()];
        run(fixed.iter().chain(more)).await
    }
}

#[track_caller]
fn refused(run: Run, what: &str, hint: &str) {
    let run = run.expect(3);
    assert!(run.stderr.contains(what) && run.stderr.contains(hint), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_by_tls_is_exact() {
    let Some(tls) = TlsServer::start(&["localhost", "127.0.0.1"], Validity::Now, &[]).await else { return };
    let keys = Keyspace::of(&tls.server, 0);
    keys.live(500, "live").await;
    keys.expired(3_000, "expired").await;
    let run = tls.scan("localhost", &[]).await.expect(0);
    assert_eq!(run.num(), 3_000);
    assert_eq!(run.json()["report"]["target"], tls.url("localhost"));
    assert_eq!(tls.server.dbsize(0).await, 500);
    // The certificate names the address too.
    assert_eq!(tls.scan("127.0.0.1", &[]).await.expect(0).num(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_hangs_up_during_the_handshake_for_a_while_is_waited_for() {
    let Some(tls) = TlsServer::start(&["127.0.0.1"], Validity::Now, &[]).await else { return };
    Keyspace::of(&tls.server, 0).expired(6_000, "expired").await;
    let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], tls.port))).await;
    let (url, cacert) = (format!("rediss://{}", proxy.addr()), tls.authority.cacert());
    let running =
        Running::scan(&url, &["--max-keys-per-sec", "3000", "--cacert", cacert.to_str().expect("a path in UTF-8")]);
    probe("it sweeps", PATIENCE, async || tls.server.expired_keys().await > 500).await;
    proxy.set(Mode::HangUp);
    proxy.cut().await;
    let accepted = proxy.accepted();
    // The sampler reconnects too.
    probe("it has come back again and again", PATIENCE, async || proxy.accepted() > accepted + 4).await;
    proxy.set(Mode::Pass);
    running.end().await.expect(0);
    assert_eq!(tls.server.dbsize(0).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_our_certificate_gets_it() {
    let asks = [("tls-auth-clients", "yes")];
    let Some(tls) = TlsServer::start(&["localhost"], Validity::Now, &asks).await else { return };
    Keyspace::of(&tls.server, 0).expired(1_000, "expired").await;
    refused(tls.scan("localhost", &[]).await, "does not accept our certificate", "--cert FILE");
    let Identity { cert, key } = tls.authority.issue("client", &["sweeper"], Validity::Now);
    let mine = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
    assert_eq!(tls.scan("localhost", &mine).await.expect(0).num(), 1_000);
    let stranger = Authority::new();
    let Identity { cert, key } = stranger.issue("stranger", &["sweeper"], Validity::Now);
    let strange = ["--cert", cert.to_str().unwrap(), "--key", key.to_str().unwrap()];
    refused(tls.scan("localhost", &strange).await, "does not accept our certificate", "an authority that it trusts");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_name_is_refused_unless_that_name_is_given() {
    let Some(tls) = TlsServer::start(&["cache.example"], Validity::Now, &[]).await else { return };
    refused(tls.scan("localhost", &[]).await, "its certificate is for cache.example, not for localhost", "--sni NAME");
    tls.scan("localhost", &["--sni", "cache.example"]).await.expect(0);
    tls.scan("localhost", &["--insecure"]).await.expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_untrusted_authority_is_named_as_the_problem() {
    let Some(tls) = TlsServer::start(&["localhost"], Validity::Now, &[]).await else { return };
    let other = Authority::new();
    let url = tls.url("localhost");
    let run = run(["scan", &url, "--cacert", other.cacert().to_str().unwrap()]).await;
    refused(run, "not signed by the authority of that name", "--cacert FILE");
    // The system's authorities did not sign this certificate. A machine may have no authorities.
    let run = self::run(["scan", &url]).await;
    match run.code {
        Some(2) => assert!(run.stderr.contains("no certificate authorities to trust"), "{}", run.stderr),
        _ => refused(run, "an authority that is not trusted here", "--cacert FILE"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_certificate_is_refused_with_its_date() {
    let Some(tls) = TlsServer::start(&["localhost"], Validity::Past, &[]).await else { return };
    refused(tls.scan("localhost", &[]).await, "its certificate expired at 2020-02-01T00:00:00Z", "renew");
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_to_a_plain_port_and_plain_to_a_tls_port_are_told_apart() {
    let server = Server::start().await;
    let url = format!("rediss://localhost:{}", server.port());
    let run_plain = run(["scan", &url, "--insecure", "--connect-timeout", "1s"]).await.expect(3);
    // A plain server may answer with an error line, or wait for a line end that never comes.
    let said = ["something that is no TLS", "did not answer the TLS handshake"]
        .iter()
        .any(|text| run_plain.stderr.contains(text));
    assert!(said, "{}", run_plain.stderr);

    let Some(tls) = TlsServer::start(&["localhost"], Validity::Now, &[]).await else { return };
    let url = format!("redis://localhost:{}", tls.port);
    refused(run(["scan", &url]).await, "in place of an answer to the first command", "rediss://");
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_no_certificates_are_refused_before_anything_is_sent() {
    let authority = Authority::new();
    let Identity { cert, key } = authority.issue("one", &["one"], Validity::Now);
    let other = authority.issue("two", &["two"], Validity::Now);
    let (cert, key, other) = (cert.to_str().unwrap(), key.to_str().unwrap(), other.key.to_str().unwrap());
    for (args, said) in [
        (["--cacert", "/nonexistent.pem", "--sni", "x"], "--cacert: cannot read a certificate from /nonexistent.pem"),
        (["--cacert", key, "--sni", "x"], "--cacert: cannot read a certificate"),
        (["--cert", cert, "--key", cert], "--key: cannot read a private key"),
        (["--cert", cert, "--key", other], "--key: "),
    ] {
        let run = run(["scan", "rediss://127.0.0.1:1"].iter().chain(&args)).await.expect(2);
        assert!(run.stderr.contains(said), "{said}: {}", run.stderr);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_swept_by_tls_from_seed_to_last_master() {
    if !Server::has_tls() {
        return;
    }
    let authority = Authority::new();
    let Identity { cert, key } = authority.issue("node", &["node.example"], Validity::Now);
    let file = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let tls_only = Server::options()
        .with_config("tls-cluster", "yes")
        .with_config("tls-replication", "yes")
        .with_config("tls-cert-file", &file(&cert))
        .with_config("tls-key-file", &file(&key))
        .with_config("tls-ca-cert-file", &file(&authority.cacert()))
        .with_config("tls-auth-clients", "no");
    let cluster = Cluster::start_with_tls(3, tls_only).await;
    let live = cluster.fill(300, 1_500).await;
    let (cacert, url) = (file(&authority.cacert()), format!("rediss://127.0.0.1:{}", cluster.tls_port(0)));
    // The nodes are announced by address, and their certificate has a name: --sni is for that.
    let fixed = ["scan", &url, "--json", "--cacert", &cacert];
    refused(run(fixed).await, "its certificate is for node.example, not for 127.0.0.1", "--sni NAME");
    let run = run(fixed.iter().chain(&["--sni", "node.example"])).await.expect(0);
    assert_eq!(run.num(), 1_500);
    cluster.assert_only(&live).await;
    let addrs = run.json()["report"]["shards"].to_string();
    for place in 0..3 {
        assert!(addrs.contains(&format!("127.0.0.1:{}", cluster.tls_port(place))), "{addrs}");
    }
}
