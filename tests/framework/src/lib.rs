//! Boots guests, joins namespaces and reads the guest's heartbeat: what tests and bench share.
