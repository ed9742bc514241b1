//! Two hosts: network namespaces joined by a veth link that can be shaped, counted and cut.
//!
//! Addresses exist only inside the namespaces, so pairs do not disturb each other or the machine.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// Names of our namespaces begin with this, then the id of the test's process.
const PREFIX: &str = "godwit-ns";
/// The device in both namespaces of a [`NetnsPair`].
pub const LINK: &str = "link0";

fn output(program: &str, words: &[&str]) -> Result<String> {
    let shown = || format!("{program} {}", words.join(" "));
    let output = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("Cannot start `{}`", shown()))?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed (are we root?): {}", shown(), text.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A network namespace, removed on drop.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Creates one with its loopback up; `what` becomes part of its name.
    ///
    /// # Errors
    /// Not root.
    pub fn create(what: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        sweep();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}-{}-{count}-{what}", std::process::id());
        output("ip", &["netns", "add", &name])?;
        let netns = Self { name };
        netns.ip(&["link", "set", "lo", "up"])?;
        Ok(netns)
    }

    /// Its name, for `ip netns exec` and the like.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn ip(&self, words: &[&str]) -> Result<String> {
        output("ip", &[&["-n", &self.name], words].concat())
    }

    /// Runs any program inside and returns its stdout.
    ///
    /// # Errors
    /// It failed.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        output("ip", &[&["netns", "exec", &self.name], words].concat())
    }

    /// Ends all processes inside in an instant; threads of others that are inside go on.
    ///
    /// # Errors
    /// `ip` failed, or printed something else than numbers.
    pub fn kill_all(&self) -> Result<()> {
        for pid in output("ip", &["netns", "pids", &self.name])?.split_ascii_whitespace() {
            let pid = pid.parse().with_context(|| format!("`ip netns pids` printed {pid}"))?;
            match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                // It may have ended by itself.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => bail!("Cannot kill process {pid}: {error}"),
            }
        }
        Ok(())
    }

    /// Does `work` inside, in a thread of its own: the sockets that it opens belong to the namespace.
    ///
    /// # Errors
    /// The namespace is gone. What the work says, and that it was not let in, tells the thread's end.
    pub fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let path = format!("/run/netns/{}", self.name);
        let namespace = File::open(&path).with_context(|| format!("Cannot open {path}"))?;
        Ok(std::thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("Cannot enter a namespace")?;
            work()
        }))
    }

    /// Shapes what leaves by `device`; 0 takes the limit away.
    ///
    /// # Errors
    /// `tc` failed.
    pub fn shape(&self, device: &str, bits_per_s: u64) -> Result<()> {
        let base = ["-n", &self.name, "qdisc"];
        if bits_per_s == 0 {
            // There may be none.
            drop(output("tc", &[&base[..], &["del", "dev", device, "root"]].concat()));
            return Ok(());
        }
        let rate = format!("{bits_per_s}bit");
        // Four milliseconds of traffic, and one segmentation batch at least.
        let burst = (bits_per_s / 8 / 250).max(128 << 10).to_string();
        let words = [
            "replace", "dev", device, "root", "tbf", "rate", &rate, "burst", &burst, "latency",
            "50ms",
        ];
        output("tc", &[&base[..], &words].concat()).map(drop)
    }

    /// Bytes that `device` has (received, sent), with Ethernet headers.
    ///
    /// # Errors
    /// There is no such device.
    pub fn bytes(&self, device: &str) -> Result<(u64, u64)> {
        let text = self.ip(&["-s", "-j", "link", "show", "dev", device])?;
        let links: Value = serde_json::from_str(&text).context("`ip -j` printed no JSON")?;
        let count = |way: &str| {
            let number = links[0]["stats64"][way]["bytes"].as_u64();
            number.with_context(|| format!("`ip -s -j` counts no {way} bytes"))
        };
        Ok((count("rx")?, count("tx")?))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = output("ip", &["netns", "del", &self.name]) {
            eprintln!("{error:#}");
        }
    }
}

/// Removes namespaces of test processes that were killed.
fn sweep() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let Ok(entries) = std::fs::read_dir("/run/netns") else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let rest = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix('-'));
            let pid = rest.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
            if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
                drop(output("ip", &["netns", "del", name]));
            }
        }
    });
}

/// Joins two namespaces by a veth pair whose ends are both called `device`.
///
/// # Errors
/// Not root, or a device of this name exists.
pub fn join(one: (&Netns, Ipv4Addr), other: (&Netns, Ipv4Addr), device: &str) -> Result<()> {
    let (one, one_address) = one;
    let (other, other_address) = other;
    let words =
        ["link", "add", device, "type", "veth", "peer", "name", device, "netns", other.name()];
    one.ip(&words)?;
    for (netns, address) in [(one, one_address), (other, other_address)] {
        netns.ip(&["addr", "add", &format!("{address}/30"), "dev", device])?;
        netns.ip(&["link", "set", device, "up"])?;
    }
    Ok(())
}

/// A source and a destination host.
#[derive(Debug)]
pub struct NetnsPair {
    /// The source's namespace.
    pub source: Netns,
    /// The destination's namespace.
    pub destination: Netns,
}

impl NetnsPair {
    /// The source's address.
    pub const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    /// The destination's address.
    pub const DESTINATION: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    /// Two joined namespaces; both ends are shaped to `bits_per_s`, or not at all if it is 0.
    ///
    /// # Errors
    /// Not root.
    pub fn create(bits_per_s: u64) -> Result<Self> {
        let pair = Self { source: Netns::create("source")?, destination: Netns::create("target")? };
        join((&pair.source, Self::SOURCE), (&pair.destination, Self::DESTINATION), LINK)?;
        pair.shape(bits_per_s)?;
        Ok(pair)
    }

    /// Changes the rate of both ends; 0 takes the limit away.
    ///
    /// # Errors
    /// `tc` failed.
    pub fn shape(&self, bits_per_s: u64) -> Result<()> {
        self.source.shape(LINK, bits_per_s)?;
        self.destination.shape(LINK, bits_per_s)
    }

    /// Bytes sent by (source, destination) since the start, with Ethernet headers.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn bytes(&self) -> Result<(u64, u64)> {
        Ok((self.source.bytes(LINK)?.1, self.destination.bytes(LINK)?.1))
    }

    /// Cuts the link: both ends lose their carrier, packets vanish.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut(&self) -> Result<()> {
        self.source.ip(&["link", "set", LINK, "down"]).map(drop)
    }

    /// Mends it.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn mend(&self) -> Result<()> {
        self.source.ip(&["link", "set", LINK, "up"]).map(drop)
    }
}
