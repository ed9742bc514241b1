//! Random numbers from the kernel.

use std::fs::File;
use std::io::Read;

use crate::error::EngineError;

/// `N` unpredictable bytes.
///
/// # Errors
/// If `/dev/urandom` cannot be read.
pub fn bytes<const N: usize>() -> Result<[u8; N], EngineError> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| EngineError::Internal(format!("no random numbers: {error}")))?;
    Ok(bytes)
}

/// An unpredictable number.
///
/// # Errors
/// As [`bytes()`].
pub fn number() -> Result<u64, EngineError> {
    Ok(u64::from_le_bytes(bytes()?))
}
