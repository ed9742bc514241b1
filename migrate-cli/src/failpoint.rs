//! Named places where the failure tests can stop or kill the engine.
//!
//! Only with the cargo feature `failpoints`, never in a release. The directory in
//! `GODWIT_FAILPOINTS` holds a file per armed place: `kill` in it makes the engine SIGKILL itself
//! there; `hold` makes it create `NAME.reached` and wait until the file `NAME` is gone. A file
//! called `no-second-look` switches correctness rule 6 off, to show the corruption it prevents.

/// Passes the place `name`, or stops there if a test armed it.
#[cfg(feature = "failpoints")]
pub async fn hit(name: &str) {
    let Some(dir) = std::env::var_os("GODWIT_FAILPOINTS").map(std::path::PathBuf::from) else {
        return;
    };
    let file = dir.join(name);
    match std::fs::read_to_string(&file).as_deref().map(str::trim) {
        Ok("kill") => {
            let _gone =
                nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::Signal::SIGKILL);
        }
        Ok("hold") => {
            let _note = std::fs::write(dir.join(format!("{name}.reached")), "");
            while file.exists() {
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        }
        _ => {}
    }
}

/// Passes the place `name`.
#[cfg(not(feature = "failpoints"))]
#[expect(clippy::unused_async, reason = "the same shape as with the feature")]
pub async fn hit(_name: &str) {}

/// Whether a test switched `name` on.
#[cfg(feature = "failpoints")]
pub fn is_set(name: &str) -> bool {
    std::env::var_os("GODWIT_FAILPOINTS")
        .is_some_and(|dir| std::path::Path::new(&dir).join(name).exists())
}

/// Whether a test switched `name` on: never in a release.
#[cfg(not(feature = "failpoints"))]
pub fn is_set(_name: &str) -> bool {
    false
}
