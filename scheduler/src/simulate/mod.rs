//! Clusters that exist on paper only: the same policies and detectors, events instead of hosts.
