//! End-to-end tests: real guests, real links, real failures.
