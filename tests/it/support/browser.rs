//! A real browser: Chromium without a window, driven as WebDriver defines it.
//!
//! There is one at a time, since each takes a processor for itself. It waits by probing, sees what a person would see, and ends with
//! its handle.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use thirtyfour::common::capabilities::chromium::ChromiumLikeCapabilities;
use thirtyfour::prelude::*;
use thirtyfour::{LoggingPrefsLogLevel, WebDriver};
use tokio::sync::{Mutex, MutexGuard};

use super::clients::{client_if_there, root};
use super::daemon::provide_crypto;
use super::{probe, skipped};

/// How long a test waits for the browser, which shares two processors with everything else.
const PATIENCE: Duration = Duration::from_secs(60);
/// The reader's time zone: not that of any server, and with an offset that is not a whole hour.
pub const ZONE: &str = "Asia/Kabul";

static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// A browser with one page.
pub struct Browser {
    session: Option<WebDriver>,
    _process: Process,
    _turn: MutexGuard<'static, ()>,
}

/// The driver's process and the browser's, which it starts.
struct Process {
    child: Child,
    _folder: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The session ends with its processes: quitting would block here, and is impossible in a test that panics.
        if let Some(session) = self.session.take() {
            let _ = session.leak();
        }
    }
}

impl Browser {
    /// Starts a browser. `None`: there is none, which is reported as skipped.
    pub async fn start() -> Option<Self> {
        let (Some(chromium), Some(chromedriver)) = (client_if_there("chromium"), client_if_there("chromedriver"))
        else {
            skipped("no Chromium with a driver on this machine (make clients gets them)");
            return None;
        };
        provide_crypto();
        let turn = ONE_AT_A_TIME.lock().await;
        let folder = tempfile::Builder::new().prefix("ttlsweep-browser-").tempdir().expect("a temporary folder");
        let mut command = Command::new(chromedriver);
        command.args(["--port=0", "--log-level=SEVERE"]).env("TZ", ZONE).env("HOME", folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut child = command.spawn().expect("the driver starts");
        let out = child.stdout.take().expect("its output");
        let process = Process { child, _folder: folder };
        let (found, port) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let mut lines = BufReader::new(out).lines().map_while(Result::ok);
            let port = lines.find_map(|line| line.split("successfully on port ").nth(1).map(str::to_owned));
            let _ = found.send(port);
            // Output that is not read would block the process in the end.
            lines.for_each(drop);
        });
        let port = port.await.expect("its output is read").expect("the driver says its port");
        let port = port.trim_end_matches('.');
        let mut wishes = DesiredCapabilities::chrome();
        wishes.set_binary(&chromium.display().to_string()).expect("a path");
        wishes.set_browser_log_level(LoggingPrefsLogLevel::All).expect("a level");
        let profile = format!("--user-data-dir={}", process._folder.path().join("profile").display());
        // Root may not use the sandbox; a small /dev/shm is common in containers; animations are off.
        for argument in [
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--force-prefers-reduced-motion",
            "--lang=en-US",
            "--window-size=1360,900",
            &profile,
        ] {
            wishes.add_arg(argument).expect("an argument");
        }
        let driver = WebDriver::new(format!("http://127.0.0.1:{port}"), wishes).await.expect("the browser starts");
        Some(Self { session: Some(driver), _process: process, _turn: turn })
    }

    fn driver(&self) -> &WebDriver {
        self.session.as_ref().expect("it is taken at the end")
    }

    /// Opens a view of the page and waits until it is ready. `view`: the page's name for it.
    pub async fn open(&self, url: &str, view: &str) {
        self.driver().goto(url).await.expect("it loads");
        self.ready(view).await;
    }

    /// Waits until a view is shown with its data.
    pub async fn ready(&self, view: &str) {
        self.until(&format!("document.getElementById('main')?.dataset.ready === '{view}'")).await;
    }

    /// Runs a script, which may `return` something.
    pub async fn run(&self, script: &str) -> Value {
        let ran = self.driver().execute(script, Vec::<Value>::new()).await;
        ran.unwrap_or_else(|error| panic!("{script}: {error}")).json().clone()
    }

    /// The value of an expression.
    pub async fn value(&self, expression: &str) -> Value {
        self.run(&format!("return {expression};")).await
    }

    /// Waits until an expression is true.
    pub async fn until(&self, expression: &str) {
        probe(expression, PATIENCE, async || self.value(&format!("Boolean({expression})")).await == true).await;
    }

    /// Waits until an element's text holds this.
    pub async fn until_text(&self, css: &str, text: &str) {
        let (css, text) = (json!(css), json!(text));
        self.until(&format!("document.querySelector({css})?.textContent.includes({text})")).await;
    }

    /// The texts of all elements that match.
    pub async fn texts(&self, css: &str) -> Vec<String> {
        let found =
            self.value(&format!("[...document.querySelectorAll({})].map((e) => e.textContent)", json!(css))).await;
        serde_json::from_value(found).expect("texts")
    }

    /// The element that matches, as soon as there is one.
    async fn element(&self, css: &str) -> WebElement {
        self.until(&format!("document.querySelector({})", json!(css))).await;
        self.driver().find(By::Css(css)).await.unwrap_or_else(|error| panic!("{css}: {error}"))
    }

    /// Clicks where a person would, who scrolls an element out from under the header that stays on top.
    pub async fn click(&self, css: &str) {
        let mut last = String::new();
        let scrolled = async || {
            let element = self.element(css).await;
            element.scroll_into_view().await?;
            element.click().await
        };
        // A view may be redrawn between finding the element and the click.
        probe(&format!("{css} is clicked"), PATIENCE, async || match scrolled().await {
            Ok(()) => true,
            Err(error) => {
                last = error.to_string();
                false
            }
        })
        .await;
    }

    /// Clicks the button with this text.
    pub async fn press(&self, text: &str) {
        let mark = format!(
            "(() => {{ const found = [...document.querySelectorAll('button')].find((b) => b.textContent.trim() === {} && b.offsetParent); \
             document.querySelectorAll('[data-pressed]').forEach((b) => delete b.dataset.pressed); \
             if (found) found.dataset.pressed = ''; return Boolean(found && !found.disabled); }})()",
            json!(text)
        );
        self.until(&mark).await;
        self.click("[data-pressed]").await;
    }

    /// Replaces the content of a field.
    pub async fn fill(&self, css: &str, text: &str) {
        let field = self.element(css).await;
        field.clear().await.expect("it can be cleared");
        field.send_keys(text).await.expect("it takes keys");
    }

    /// Types into the element that has the focus.
    pub async fn keys(&self, keys: impl Into<TypingData>) {
        self.driver().action_chain().send_keys(keys).perform().await.expect("it takes keys");
    }

    /// Shows the page on a screen of this size, in dark mode if `dark`.
    pub async fn screen(&self, width: u32, height: u32, dark: bool) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        let scheme = if dark { "dark" } else { "light" };
        let scheme = json!({"features": [
            {"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": "reduce"},
        ]});
        let cdp = self.driver().cdp();
        cdp.send_raw("Emulation.setDeviceMetricsOverride", size).await.expect("a size");
        cdp.send_raw("Emulation.setEmulatedMedia", scheme).await.expect("a scheme");
    }

    /// Saves a picture below target/screenshots.
    pub async fn picture(&self, name: &str) {
        let folder = folder();
        std::fs::create_dir_all(&folder).expect("a folder");
        self.driver().screenshot(&folder.join(format!("{name}.png"))).await.expect("a picture");
    }

    /// Panics if axe finds an accessibility problem, or if the page is wider than the screen.
    pub async fn assert_accessible(&self, what: &str) {
        let wide = self.value("document.documentElement.scrollWidth > window.innerWidth").await;
        assert_eq!(wide, false, "{what}: it is wider than the screen");
        let Some(axe) = client_if_there("axe") else {
            skipped("no axe on this machine (make clients gets it)");
            return;
        };
        if self.value("typeof window.axe").await != "object" {
            self.run(&std::fs::read_to_string(axe).expect("the script")).await;
        }
        let ran = self.driver().execute_async(
            "const done = arguments[0]; axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', \
             'best-practice']}).then((found) => done(found.violations.map((v) => ({id: v.id, help: v.help, nodes: v.nodes.map((n) => \
             n.html.slice(0, 160) + ' | ' + n.failureSummary)}))), (error) => done(String(error)));",
            Vec::<Value>::new(),
        );
        let found = ran.await.expect("axe runs").json().clone();
        assert_eq!(found, json!([]), "{what}: {found:#}");
    }

    /// Panics if the page logged an error, or something that its policy forbids. Unsuccessful answers of the API are logged by
    /// the browser; those with one of these codes are wanted.
    pub async fn assert_no_errors(&self, wanted: &[u16]) {
        let log = self.driver().browser_log().await.expect("its log");
        let is_wanted = |text: &str| wanted.iter().any(|code| text.contains(&format!("status of {code} ")));
        let is_bad = |level: &str| ["SEVERE", "WARNING"].contains(&level);
        let bad: Vec<_> = log.iter().filter(|entry| is_bad(&entry.level) && !is_wanted(&entry.message)).collect();
        assert!(bad.is_empty(), "{bad:#?}");
    }
}

fn folder() -> PathBuf {
    root().join("target/screenshots")
}
