"""From patterns to leaves: paths, patterns, layers, conventions, selection, and the plan of what each leaf becomes."""
