"""The roles of a run with a saboteur in each; a file a role, so that none loads what only another needs."""
