//! Hotspots out of series of figures.
