//! Files of the kernel, up to a limit.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

/// Most bytes of a file that are read: /proc/stat and /proc/net/dev have a line for each processor and interface.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A file's text. One that is longer than the limit is refused.
///
/// # Errors
/// What the kernel says.
pub fn text(path: impl AsRef<Path>) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other("it is too long"));
    }
    Ok(text)
}

/// What a file says; in words why nothing is known.
///
/// # Errors
/// The file's name and what is wrong.
pub fn figure<T>(
    path: impl AsRef<Path>,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T, String> {
    let path = path.as_ref();
    let text = text(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    parse(&text).ok_or_else(|| format!("{} has an unknown form", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::parse;

    #[test]
    fn this_machine_is_understood() {
        assert!(figure("/proc/stat", parse::cpu_time).unwrap().processors > 0);
        let memory = figure("/proc/meminfo", parse::host_memory).unwrap();
        assert!(memory.total_mib >= memory.available_mib && memory.available_mib > 0.0);
        assert!(
            figure("/proc/net/dev", |text| Some(parse::interfaces(text)))
                .unwrap()
                .contains_key("lo")
        );
        assert!(figure("/proc/self/schedstat", parse::thread_waited_ns).is_ok());
        assert!(figure("/proc/self/statm", parse::resident_pages).unwrap() > 0);
        assert!(figure("/proc/self/stat", parse::process_ticks).is_ok());
    }

    #[test]
    fn what_is_wrong_is_named() {
        let missing = figure("/proc/none", parse::number).unwrap_err();
        assert!(missing.starts_with("/proc/none cannot be read: No such file"), "{missing}");
        let other = figure("/proc/stat", parse::number).unwrap_err();
        assert_eq!(other, "/proc/stat has an unknown form");
    }
}
