//! The state machine of a QEMU VM against a program that plays QEMU.
