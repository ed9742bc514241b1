//! Identity, sessions and lanes over QUIC, and the wire format.
