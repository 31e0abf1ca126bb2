//! The files that run the program: their flags exist, their paths match, they parse, and everything is checked that can be
//! checked without Docker, Kubernetes and systemd. `make containers` runs Docker and systemd.

use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::clients::{client, root};
use crate::support::{skipped, ttlsweep};

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The documents of a YAML file, by the parser of the Python that `make clients` has fetched.
fn yaml(path: &str) -> Vec<Value> {
    let program = "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    let parsed = Command::new(client("python")).args(["-c", program]).arg(root().join(path)).output();
    let parsed = parsed.expect("it runs");
    assert!(parsed.status.success(), "{path}: {}", String::from_utf8_lossy(&parsed.stderr));
    serde_json::from_slice(&parsed.stdout).expect("JSON")
}

/// Panics unless the program accepts these arguments: with `--help` after them it must only print its help, which it
/// does not do for an unknown subcommand or flag.
#[track_caller]
fn check_arguments(arguments: &[&str]) {
    let run = ttlsweep().args(arguments).arg("--help").output().expect("it runs");
    assert!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
    let help = String::from_utf8_lossy(&run.stdout).into_owned();
    let flags = arguments.iter().filter(|argument| argument.starts_with("--"));
    for flag in flags.map(|flag| flag.split('=').next().unwrap_or(flag)) {
        assert!(help.contains(flag), "{flag} is no flag of {}", arguments[0]);
    }
}

fn words(value: &Value) -> Vec<&str> {
    value.as_array().expect("a list").iter().map(|word| word.as_str().expect("a word")).collect()
}

#[test]
fn every_unit_starts_the_program_with_flags_that_exist() {
    let mut commands = 0;
    for unit in ["ttlsweep.service", "ttlsweep-scan.service"] {
        let text = read(&format!("deploy/systemd/{unit}"));
        // Without this line the filter kills the process, for example when a sweep lowers its priority, which it need not do.
        assert!(text.contains("SystemCallFilter=") && text.contains("SystemCallErrorNumber=EPERM"), "{unit}");
        for line in text.lines().filter(|line| line.starts_with("ExecStart")) {
            let (_, command) = line.split_once('=').expect("a setting");
            let command: Vec<_> = command.split(' ').collect();
            assert_eq!(command[0], "/usr/local/bin/ttlsweep");
            check_arguments(&command[1..]);
            commands += 1;
        }
    }
    assert_eq!(commands, 3);
    let daemon = read("deploy/systemd/ttlsweep.service");
    assert!(daemon.contains("StateDirectory=ttlsweep") && daemon.contains("WorkingDirectory=/var/lib/ttlsweep"));
    assert!(read("deploy/systemd/ttlsweep-scan.timer").contains("OnCalendar="));
}

#[test]
fn the_manifests_start_the_program_with_flags_that_exist() {
    let objects = yaml("deploy/kubernetes/cronjob.yaml");
    let (cron, policy) = (&objects[0], &objects[1]);
    let labels = &cron["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"];
    assert_eq!((&policy["kind"], &policy["spec"]["podSelector"]["matchLabels"]), (&json!("NetworkPolicy"), labels));
    let pod = &cron["spec"]["jobTemplate"]["spec"]["template"]["spec"];
    check_arguments(&words(&pod["containers"][0]["args"]));
    assert_eq!((&cron["kind"], &cron["apiVersion"]), (&"CronJob".into(), &"batch/v1".into()));
    assert_eq!(pod["restartPolicy"], "Never");
    for env in pod["containers"][0]["env"].as_array().expect("a list") {
        let name = env["name"].as_str().expect("a name");
        let help = ttlsweep().args(["scan", "--help"]).output().expect("it runs");
        let help = String::from_utf8_lossy(&help.stdout).into_owned();
        assert!(help.contains(name), "{name} is read by scan");
    }

    let daemon = yaml("deploy/kubernetes/deployment.yaml");
    let kinds: Vec<_> = daemon.iter().map(|object| object["kind"].as_str().expect("a kind")).collect();
    assert_eq!(kinds, ["Deployment", "PersistentVolumeClaim", "Service", "NetworkPolicy"]);
    let pod = &daemon[0]["spec"]["template"];
    let container = &pod["spec"]["containers"][0];
    let arguments = words(&container["args"]);
    check_arguments(&arguments);
    let mounts = container["volumeMounts"].as_array().expect("a list");
    let config = arguments[2].rsplit_once('/').expect("a path").0;
    assert!(mounts.iter().any(|mount| mount["mountPath"] == config), "the settings are mounted");
    for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
        assert_eq!(container[probe]["httpGet"]["path"], path);
    }
    assert_eq!(daemon[0]["spec"]["selector"]["matchLabels"], pod["metadata"]["labels"]);
    assert_eq!(daemon[2]["spec"]["selector"], pod["metadata"]["labels"]);
    assert_eq!(daemon[3]["spec"]["podSelector"]["matchLabels"], pod["metadata"]["labels"]);
    for pod in [&pod["spec"], &cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]] {
        check_confined(pod);
    }
}

#[test]
fn several_daemons_are_spread_out_and_wait_for_a_lease_to_be_ready() {
    let objects = yaml("deploy/kubernetes/fleet.yaml");
    let kinds: Vec<_> = objects.iter().map(|object| object["kind"].as_str().expect("a kind")).collect();
    assert_eq!(kinds, ["Deployment", "PodDisruptionBudget", "Service", "NetworkPolicy"]);
    let helm = optional("helm").map(|helm| rendered(helm, "fleet", &[]).unwrap_or_else(|refused| panic!("{refused}")));
    let mut daemons = vec![&objects[0]];
    daemons.extend(helm.iter().flat_map(|objects| of_kind(objects, "Deployment")));
    for daemon in daemons {
        assert_eq!(daemon["spec"]["replicas"], 3);
        let strategy = &daemon["spec"]["strategy"];
        assert_eq!((&strategy["type"], &strategy["rollingUpdate"]["maxUnavailable"]), (&Value::Null, &json!(1)));
        let pod = &daemon["spec"]["template"]["spec"];
        check_confined(pod);
        assert!(pod["affinity"]["podAntiAffinity"].is_object());
        let container = &pod["containers"][0];
        check_arguments(&words(&container["args"]));
        for (probe, path) in [("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")] {
            assert_eq!(container[probe]["httpGet"]["path"], path);
        }
        // A volume that only one node can mount would keep the other pods from starting.
        assert!(pod["volumes"].as_array().expect("a list").iter().any(|volume| volume["emptyDir"].is_object()));
    }
}

/// Panics unless a pod has only the rights that it needs, and reads its secrets from files.
#[track_caller]
fn check_confined(pod: &Value) {
    let container = &pod["containers"][0];
    assert_eq!(container["securityContext"]["allowPrivilegeEscalation"], false);
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    assert_eq!(container["securityContext"]["capabilities"], json!({"drop": ["ALL"]}));
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(pod["automountServiceAccountToken"], false);
    for env in container["env"].as_array().into_iter().flatten() {
        let name = env["name"].as_str().expect("a name");
        assert!(env["valueFrom"].is_null() || name == "TTLSWEEP_URL", "{name} is a secret in the environment");
    }
    assert!(container["envFrom"].is_null());
}

/// The output of a checker, and whether it succeeded. `None`: it is not on this machine, which is reported as skipped.
fn checked(mut checker: Command) -> Option<(String, bool)> {
    match checker.output() {
        Ok(run) => {
            let said = [run.stdout, run.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
            Some((said, run.status.success()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            skipped(&format!("{} is not on this machine", checker.get_program().display()));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn systemd_itself_finds_nothing_wrong_with_the_units() {
    let verify = |change: fn(String) -> String| {
        // The path of the installed program does not exist here; that of the program under test does.
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut systemd = Command::new("systemd-analyze");
        systemd.args(["verify", "--man=no"]);
        for unit in ["ttlsweep.service", "ttlsweep-scan.service", "ttlsweep-scan.timer"] {
            let text = read(&format!("deploy/systemd/{unit}"));
            let text = change(text.replace("/usr/local/bin/ttlsweep", env!("CARGO_BIN_EXE_ttlsweep")));
            std::fs::write(folder.path().join(unit), text).expect("it is written");
            systemd.arg(folder.path().join(unit));
        }
        checked(systemd)
    };
    let Some((said, content)) = verify(|text| text) else { return };
    // The checker only prints a line for an unknown setting. Lines about units of the system do not count.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("ttlsweep")).collect();
    assert!(content && ours.is_empty(), "{said}");
    let (said, _) = verify(|text| text.replace("NoNewPrivileges", "NoNewPrivilege")).expect("it is there");
    assert!(said.contains("NoNewPrivilege"), "it would have been found: {said}");
}

#[test]
fn systemd_rates_the_services_as_well_confined() {
    for unit in ["ttlsweep.service", "ttlsweep-scan.service"] {
        let mut security = Command::new("systemd-analyze");
        security.args(["security", "--offline=true", "--no-pager", "--threshold=20"]);
        security.arg(root().join("deploy/systemd").join(unit));
        let Some((said, content)) = checked(security) else { return };
        // In tenths: 2.0 of 10, where 10 means no confinement at all.
        assert!(content, "{unit}: {}", said.lines().last().unwrap_or_default());
    }
}

#[test]
fn the_manifests_are_of_the_schemas_of_kubernetes() {
    check_schemas(["cronjob", "deployment", "fleet"].map(|name| root().join(format!("deploy/kubernetes/{name}.yaml"))));
}

/// Panics unless these files match the schemas of an old Kubernetes that is still in use and of the newest that the checker knows.
#[track_caller]
fn check_schemas(files: impl IntoIterator<Item = PathBuf> + Clone) {
    for version in ["1.30", "1.37.0"] {
        let mut validate = Command::new(client("python").with_file_name("kubernetes-validate"));
        validate.args(["--strict", "--quiet", "-k", version]).args(files.clone());
        let (said, content) = checked(validate).expect("it lies beside python");
        // Kinds of operators are in no schema of Kubernetes.
        let known = said.lines().all(|line| line.contains("api version monitoring.coreos.com/v1"));
        assert!(content && known, "{version}: {said}");
    }
}

/// A program that `make clients` cannot fetch everywhere. `None`: it is missing, which is reported as skipped.
fn optional(name: &str) -> Option<Command> {
    let output = Command::new(root().join("scripts/clients.sh")).arg(name).output().expect("clients.sh runs");
    let path = String::from_utf8(output.stdout).expect("a path");
    if path.trim().is_empty() {
        skipped(&format!("{name} is not on this machine"));
        return None;
    }
    Some(Command::new(path.trim()))
}

/// The chart, rendered by Helm with values of `deploy/helm/ttlsweep/ci`, or Helm's error.
fn rendered(mut helm: Command, values: &str, more: &[&str]) -> Result<Vec<Value>, String> {
    let chart = root().join("deploy/helm/ttlsweep");
    helm.args(["template", "shop"]).arg(&chart).arg("--values").arg(chart.join(format!("ci/{values}.yaml"))).args(more);
    let run = helm.output().expect("it runs");
    if !run.status.success() {
        return Err(String::from_utf8_lossy(&run.stderr).into_owned());
    }
    let file = tempfile::Builder::new().suffix(".yaml").tempfile().expect("a file");
    std::fs::write(file.path(), &run.stdout).expect("it is written");
    check_schemas([file.path().to_owned()]);
    Ok(yaml(file.path().to_str().expect("a path")))
}

/// The objects of a kind.
fn of_kind<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["kind"] == kind).collect()
}

#[test]
fn the_chart_is_well_formed_and_starts_the_program_with_flags_that_exist() {
    for values in ["full", "tls", "scans", "fleet"] {
        let Some(mut lint) = optional("helm") else { return };
        lint.args(["lint", "--strict", "--values", &format!("ci/{values}.yaml"), "."]);
        lint.current_dir(root().join("deploy/helm/ttlsweep"));
        let (said, content) = checked(lint).expect("it is there");
        assert!(content, "{said}");
        let helm = optional("helm").expect("it is there");
        let objects = rendered(helm, values, &[]).unwrap_or_else(|refused| panic!("{refused}"));
        let daemons = of_kind(&objects, "Deployment");
        let daemons = daemons.iter().map(|daemon| &daemon["spec"]["template"]);
        let scans = of_kind(&objects, "CronJob");
        let pods: Vec<_> =
            daemons.chain(scans.iter().map(|scan| &scan["spec"]["jobTemplate"]["spec"]["template"])).collect();
        assert!(!pods.is_empty());
        for pod in pods {
            check_confined(&pod["spec"]);
            check_arguments(&words(&pod["spec"]["containers"][0]["args"]));
            for policy in of_kind(&objects, "NetworkPolicy") {
                for (label, value) in policy["spec"]["podSelector"]["matchLabels"].as_object().expect("labels") {
                    assert_eq!(&pod["metadata"]["labels"][label], value, "the policy is of this pod");
                }
            }
        }
        assert!(of_kind(&objects, "Secret").is_empty(), "secrets are only referred to");
    }
}

#[test]
fn the_chart_carries_the_settings_the_alerts_and_the_dashboard() {
    let Some(helm) = optional("helm") else { return };
    let objects = rendered(helm, "full", &[]).unwrap_or_else(|refused| panic!("{refused}"));
    let maps = of_kind(&objects, "ConfigMap");
    let data = |key: &str| maps.iter().find_map(|map| map["data"][key].as_str()).expect("the key");
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), data("ttlsweep.toml")).expect("it is written");
    let run = ttlsweep().args(["settings", "check"]).arg(file.path()).output().expect("it runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let dashboard: Value = serde_json::from_str(data("ttlsweep.json")).expect("JSON");
    assert_eq!(dashboard, serde_json::from_str::<Value>(&read("deploy/grafana/ttlsweep.json")).expect("JSON"));
    let out = of_kind(&objects, "NetworkPolicy")[0]["spec"]["egress"].as_array().expect("rules").clone();
    assert!(
        out.iter().any(|rule| rule["ports"] == json!([{"protocol": "TCP", "port": 443}])),
        "the webhook's: {out:?}"
    );
    let (rules, alerts) = (of_kind(&objects, "PrometheusRule"), yaml("deploy/prometheus/alerts.yml"));
    assert_eq!(rules[0]["spec"], alerts[0]);
    // The alerts query job="ttlsweep": that is the value of this label.
    let (monitors, services) = (of_kind(&objects, "ServiceMonitor"), of_kind(&objects, "Service"));
    let job = monitors[0]["spec"]["jobLabel"].as_str().expect("a label");
    assert_eq!(services[0]["metadata"]["labels"][job], "ttlsweep");
    assert!(read("deploy/prometheus/alerts.yml").contains("job=\"ttlsweep\""));
    let daemons = of_kind(&objects, "Deployment");
    let image = &daemons[0]["spec"]["template"]["spec"]["containers"][0]["image"];
    assert!(image.as_str().expect("a name").starts_with("registry.example/ttlsweep@sha256:"), "{image}");
}

#[test]
fn the_chart_refuses_values_that_cannot_work() {
    for (values, wrong, word) in [
        ("full", "daemon.setings=x", "setings"),
        ("full", "daemon.settings=", "[[api.tokens]]"),
        ("full", "daemon.replicas=2", "postgres"),
        ("fleet", "daemon.postgres.url=postgres://me:secret@db/x", "url"),
        ("full", "image.digest=sha256:12", "digest"),
        ("full", "metrics.serviceMonitor.tokenSecret.name=", "tokenSecret"),
        ("scans", "scans[0].url=redis://user:secret@cache", "url"),
        ("scans", "scans[0].timeout=4", "timeout"),
        ("scans", "scans[0].schedule=", "schedule"),
    ] {
        let Some(helm) = optional("helm") else { return };
        let refused = rendered(helm, values, &["--set", wrong]).expect_err(wrong);
        assert!(refused.contains(word), "{wrong}: {refused}");
    }
}

#[test]
fn compose_itself_takes_the_example() {
    let Some(mut compose) = optional("compose") else { return };
    compose.args(["--profile", "unswept", "config", "--quiet"]).current_dir(root());
    let (said, content) = checked(compose).expect("it is there");
    assert!(content && said.is_empty(), "{said}");
}

#[test]
fn the_image_and_the_example_fit_together() {
    let image = read("Dockerfile");
    let rust_version =
        read("Cargo.toml").lines().find_map(|line| line.strip_prefix("rust-version = ")).map(str::to_owned);
    assert!(image.contains(&format!("FROM rust:{}-slim", rust_version.expect("a version").trim_matches('"'))));
    for line in image.lines().filter(|line| line.starts_with("COPY ") && !line.contains("--from")) {
        let sources: Vec<_> = line.split(' ').skip(1).collect();
        for source in &sources[..sources.len() - 1] {
            assert!(root().join(source).exists(), "{source} is copied");
        }
    }
    let command = image.lines().find_map(|line| line.strip_prefix("CMD ")).expect("a command");
    let command: Value = serde_json::from_str(command).expect("JSON");
    check_arguments(&words(&command));
    assert!(image.lines().any(|line| line == "USER 10001"));

    let compose = &yaml("docker-compose.yml")[0];
    let services = compose["services"].as_object().expect("services");
    for (name, service) in services {
        assert_eq!(service["restart"], "unless-stopped", "{name}: what is killed comes back");
        assert!(service["healthcheck"]["test"].is_array(), "{name} says whether it is well");
        for volume in service["volumes"].as_array().into_iter().flatten() {
            let volume = volume.as_str().expect("a text");
            let (source, rest) = volume.split_once(':').expect("a mount");
            if source.starts_with('.') {
                assert!(root().join(source).is_file(), "{source} is mounted");
            } else {
                assert!(compose["volumes"].as_object().expect("volumes").contains_key(source), "{source}");
                assert!(image.contains(&format!("VOLUME {rest}")));
            }
        }
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(
                port.as_str().expect("a text").starts_with("127.0.0.1:"),
                "{name}: {port} is for this machine only"
            );
        }
    }
    let health = words(&services["ttlsweep"]["healthcheck"]["test"]);
    check_arguments(&health[2..]);
    let mounted = |service: &str, target: &str| {
        let volumes = words(&services[service]["volumes"]);
        volumes.iter().any(|volume| volume.split(':').nth(1) == Some(target))
    };
    let prometheus = &yaml("deploy/compose/prometheus.yml")[0];
    assert_eq!(prometheus["scrape_configs"][0]["static_configs"][0]["targets"][0], "ttlsweep:8080");
    assert!(words(&prometheus["rule_files"]).iter().all(|file| mounted("prometheus", file)));
    let folder = &yaml("deploy/compose/grafana/dashboards.yml")[0]["providers"][0]["options"]["path"];
    assert!(mounted("grafana", &format!("{}/ttlsweep.json", folder.as_str().expect("a path"))));
    assert_eq!(yaml("deploy/compose/grafana/datasource.yml")[0]["datasources"][0]["url"], "http://prometheus:9090");
}

#[test]
fn the_release_workflow_runs_what_is_there() {
    let workflow = &yaml(".github/workflows/release.yml")[0];
    let jobs = workflow["jobs"].as_object().expect("jobs");
    let steps = jobs.values().flat_map(|job| job["steps"].as_array().expect("steps"));
    let commands: Vec<_> = steps.filter_map(|step| step["run"].as_str()).collect();
    let words: Vec<_> = commands.iter().flat_map(|command| command.split([' ', '(', ')', '"'])).collect();
    let (make, mut found) = (read("Makefile"), 0);
    for script in words.iter().filter(|word| word.starts_with("scripts/")) {
        assert!(root().join(script).is_file(), "{script}");
        found += 1;
    }
    for targets in commands.iter().filter_map(|command| command.strip_prefix("make ")) {
        for target in targets.split(' ') {
            assert!(make.contains(&format!("\n{target}: ")), "make {target}");
            found += 1;
        }
    }
    assert!(found >= 7, "{commands:?}");
    assert!(commands.iter().any(|command| command.contains("-unknown-linux-musl")), "an archive for any Linux");
}

#[test]
fn everything_that_is_shipped_is_of_one_version() {
    let version = env!("CARGO_PKG_VERSION");
    for (path, line) in [
        ("Dockerfile", format!("#   docker build -t ttlsweep:{version} .")),
        ("docker-compose.yml", format!("    image: ttlsweep:{version}")),
        ("deploy/kubernetes/deployment.yaml", format!("          image: ttlsweep:{version}")),
        ("deploy/kubernetes/fleet.yaml", format!("          image: ttlsweep:{version}")),
        ("deploy/kubernetes/cronjob.yaml", format!("              image: ttlsweep:{version}")),
        ("deploy/helm/ttlsweep/Chart.yaml", format!("appVersion: {version}")),
        ("deploy/helm/ttlsweep/Chart.yaml", format!("version: {version}")),
    ] {
        assert!(read(path).lines().any(|found| found == line), "{path} has no line `{line}`");
    }
    let changes = read("CHANGELOG.md");
    let mut headings = changes.lines().filter_map(|line| line.strip_prefix("## ")).filter(|of| *of != "Unreleased");
    let newest = headings.next().expect("a version");
    assert!(newest.starts_with(&format!("{version} - ")), "the newest version of CHANGELOG.md is {newest}");
}

#[test]
fn the_settings_files_that_are_shipped_are_valid() {
    for path in ["deploy/ttlsweep.toml", "deploy/compose/ttlsweep.toml", "deploy/deb/ttlsweep.toml"] {
        let run = ttlsweep().args(["settings", "check"]).arg(root().join(path)).output().expect("it runs");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }
    use sha2::{Digest, Sha256};
    let known = crate::support::hex(&Sha256::digest(b"try-me"));
    assert!(read("deploy/compose/ttlsweep.toml").contains(&known), "the token of docker-compose.yml");
    assert!(read("docker-compose.yml").contains("X-Auth-Token: try-me"));
}

#[test]
fn the_package_holds_what_a_user_needs_and_no_more() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["package", "--list", "--allow-dirty", "--offline"]).current_dir(root());
    let run = cargo.output().expect("it runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let files = String::from_utf8(run.stdout).expect("text");
    for file in
        ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE", "Cargo.lock", "src/settings/default.toml"]
    {
        assert!(files.lines().any(|line| line == file), "{file} is lacking");
    }
    // The files that the code includes when it is compiled; its tests need a checkout.
    for file in files.lines().filter(|file| file.ends_with(".rs")) {
        let text = read(file);
        let code = text.split("#[cfg(test)]").next().expect("there is a first part");
        for part in code.split("include_str!(\"").skip(1) {
            let named = part.split('"').next().expect("a path");
            let path = std::path::Path::new(file).with_file_name(named);
            assert!(files.lines().any(|line| path == std::path::Path::new(line)), "{file} takes {named} in");
        }
    }
    assert!(
        files.contains("src/store/migrations/sqlite/0001_tasks.sql") && files.contains("src/api/assets/index.html")
    );
    let known = ["README.md", "CHANGELOG.md", "LICENSE-", "Cargo.", ".cargo_vcs_info.json", "src/"];
    let more: Vec<_> = files.lines().filter(|file| !known.iter().any(|known| file.starts_with(known))).collect();
    assert!(more.is_empty() && !files.contains("snapshots"), "{more:?}");
}
