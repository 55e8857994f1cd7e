"""What stands in a wrapped tree: nodes, their fields and axes, the kernels they are made of, and where they lie."""
