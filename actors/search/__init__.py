"""Step-level search as pure functions over one tree: no model, no Ray, no torch."""
