//! The testbed, the comparison with QEMU's own migration, and its report.
