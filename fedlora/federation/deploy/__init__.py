"""A federation on real devices: what starts its processes."""
