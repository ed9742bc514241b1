//! Tests of dirty tracking.
