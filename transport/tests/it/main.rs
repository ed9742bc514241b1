//! Tests of the transport over real sockets, and of its wire format against files.

#[cfg(test)]
mod common;
#[cfg(test)]
mod handshake;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod pages;
#[cfg(test)]
mod pages_wire;
#[cfg(test)]
mod protocol_doc;
#[cfg(test)]
mod relay;
#[cfg(test)]
mod rogue;
#[cfg(test)]
mod sessions;
#[cfg(test)]
mod wire;
