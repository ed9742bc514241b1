//! The binary `migrate`.
fn main() {}
