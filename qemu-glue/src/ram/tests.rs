//! Tests of guest RAM.
