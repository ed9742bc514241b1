//! The command migrate: moves running QEMU virtual machines between hosts.
