//! LD_PRELOAD library that hands QEMU's userfaultfd to the engine.
