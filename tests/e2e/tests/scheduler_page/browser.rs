//! Chromium without a window, driven over its debugging pipe (the Chrome DevTools protocol).

use std::env;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A page is loaded, or a command answered, within this time even on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(50);

/// File descriptors 3 and 4 are the debugging pipe: what the shell has as its own input and output.
const BEGIN: &str = "exec \"$0\" \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1";

/// A browser with one page.
#[derive(Debug)]
pub(crate) struct Browser {
    process: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    session: Option<String>,
    asked: u64,
    /// What the page threw, logged as an error, or opened by itself.
    complaints: Vec<String>,
    _profile: TempDir,
}

impl Browser {
    /// Starts it. `GODWIT_CHROMIUM` names another than Debian's.
    pub(crate) fn begin() -> Result<Self> {
        let program =
            env::var("GODWIT_CHROMIUM").unwrap_or_else(|_| "chromium-headless-shell".to_owned());
        let profile = TempDir::new()?;
        let mut process = Command::new("sh")
            .args(["-c", BEGIN, program.as_str()])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args([
                "--remote-debugging-pipe",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
            ])
            .args([
                "--no-first-run",
                "--disable-extensions",
                "--window-size=1400,1000",
                "--lang=en",
            ])
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = process.stdin.take().context("No pipe to the browser")?;
        let output = process.stdout.take().context("No pipe from the browser")?;
        let (sender, messages) = channel();
        thread::spawn(move || {
            for message in BufReader::new(output).split(0).map_while(Result::ok) {
                let parsed = serde_json::from_slice(&message);
                if parsed.is_ok_and(|message| sender.send(message).is_err()) {
                    break;
                }
            }
        });
        let mut browser = Self {
            process,
            input,
            messages,
            session: None,
            asked: 0,
            complaints: Vec::new(),
            _profile: profile,
        };
        browser.attach().context("No Chromium: `cargo xtask setup` installs it")?;
        Ok(browser)
    }

    fn attach(&mut self) -> Result<()> {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let id = target["targetId"].clone();
        let attached =
            self.call("Target.attachToTarget", json!({ "targetId": id, "flatten": true }))?;
        self.session = attached["sessionId"].as_str().map(ToOwned::to_owned);
        ensure!(self.session.is_some(), "no session: {attached}");
        for domain in ["Page", "Runtime", "Log"] {
            self.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(())
    }

    fn call(&mut self, method: &str, params: Value) -> Result<Value> {
        self.asked += 1;
        let mut message = json!({ "id": self.asked, "method": method, "params": params });
        if let Some(session) = &self.session {
            message["sessionId"] = json!(session);
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.input.write_all(&bytes).context("The browser has ended")?;
        let until = Instant::now() + WITHIN;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let answer = self.messages.recv_timeout(left);
            let answer = answer.with_context(|| format!("No answer to {method}"))?;
            if answer["id"] != json!(self.asked) {
                self.note(&answer);
                continue;
            }
            ensure!(answer["error"].is_null(), "{method}: {}", answer["error"]);
            return Ok(answer["result"].clone());
        }
    }

    fn note(&mut self, event: &Value) {
        let params = &event["params"];
        let complaint = match event["method"].as_str() {
            Some("Runtime.exceptionThrown") => params["exceptionDetails"].to_string(),
            // Requests that fail are part of some tests; the page tells them itself.
            Some("Log.entryAdded") if params["entry"]["source"] != "network" => {
                params["entry"].to_string()
            }
            Some("Page.javascriptDialogOpening") => format!("a dialog: {}", params["message"]),
            _ => return,
        };
        self.complaints.push(complaint);
    }

    /// Goes to an address.
    pub(crate) fn open(&mut self, url: &str) -> Result<()> {
        let went = self.call("Page.navigate", json!({ "url": url }))?;
        ensure!(went["errorText"].is_null(), "{url}: {}", went["errorText"]);
        Ok(())
    }

    /// What an expression is in the page.
    pub(crate) fn value(&mut self, expression: &str) -> Result<Value> {
        let params =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", params)?;
        if !answer["exceptionDetails"].is_null() {
            bail!("{expression}: {}", answer["exceptionDetails"]);
        }
        Ok(answer["result"]["value"].clone())
    }

    /// The text of the first element of a selector; none if there is no such element.
    pub(crate) fn text(&mut self, selector: &str) -> Result<Option<String>> {
        let text =
            self.value(&format!("document.querySelector({})?.textContent", json!(selector)))?;
        Ok(text.as_str().map(ToOwned::to_owned))
    }

    /// How many elements a selector has.
    pub(crate) fn count(&mut self, selector: &str) -> Result<u64> {
        let count =
            self.value(&format!("document.querySelectorAll({}).length", json!(selector)))?;
        count.as_u64().context("no number")
    }

    /// Waits until an expression is true.
    pub(crate) fn wait(&mut self, expression: &str) -> Result<()> {
        let until = Instant::now() + WITHIN;
        // While a page is being loaded there may be nothing to ask.
        while !matches!(self.value(expression), Ok(Value::Bool(true))) {
            if Instant::now() > until {
                let body = self.value("document.body.innerText.slice(0, 3000)");
                bail!("Not so: {expression}\n{body:?}\n{:?}", self.complaints);
            }
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits until an element's text contains something.
    pub(crate) fn wait_text(&mut self, selector: &str, text: &str) -> Result<()> {
        let (selector, text) = (json!(selector), json!(text));
        self.wait(&format!("!!document.querySelector({selector})?.textContent.includes({text})"))
    }

    /// Presses the mouse's button on the middle of an element: what lies above it gets the press.
    pub(crate) fn click(&mut self, selector: &str) -> Result<()> {
        let selected = json!(selector);
        self.wait(&format!("!!document.querySelector({selected})"))?;
        let middle = self.value(&format!(
            "(() => {{ const element = document.querySelector({selected}); \
             element.scrollIntoView({{ block: 'center', behavior: 'instant' }}); \
             const box = element.getBoundingClientRect(); \
             return [box.left + box.width / 2, box.top + box.height / 2]; }})()"
        ))?;
        for kind in ["mousePressed", "mouseReleased"] {
            let params = json!({
                "type": kind, "x": middle[0], "y": middle[1], "button": "left", "clickCount": 1,
            });
            self.call("Input.dispatchMouseEvent", params)?;
        }
        Ok(())
    }

    /// Presses a key that writes nothing, such as `Tab` or `ArrowRight`, or Enter.
    pub(crate) fn press(&mut self, key: &str) -> Result<()> {
        let code = match key {
            "Enter" => 13,
            "Escape" => 27,
            "ArrowRight" => 39,
            "ArrowDown" => 40,
            "Tab" => 9,
            _ => bail!("{key} is no key that is known here"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut params =
                json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if key == "Enter" && kind == "keyDown" {
                params["text"] = json!("\r");
            }
            self.call("Input.dispatchKeyEvent", params)?;
        }
        Ok(())
    }

    /// Fails if the page threw something, broke its own policy or opened a dialog by itself.
    pub(crate) fn assert_quiet(&mut self) -> Result<()> {
        // What has been said by now comes before the answer.
        self.value("0")?;
        ensure!(self.complaints.is_empty(), "The page complains: {:#?}", self.complaints);
        Ok(())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended already.
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}
