"""From torch to a device bundle: the graphs of a base, its weights once, and a manifest."""
