//! Tests of the transport over real sockets, and of its wire format against files.

#[cfg(test)]
mod common;
#[cfg(test)]
mod sessions;
