//! Tests: what holds for every policy on any cluster.
