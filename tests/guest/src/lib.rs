//! Static programs that run inside the test guest.
