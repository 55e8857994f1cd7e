"""The interpreter: runs a function's jaxpr on factored weights.

`interpreter` walks the equations; `views`, `contract` and `control` hold the rules of the primitives; `factored` is the
value that stands between variants and primitives, `products` and `ends` compute with it; `sites` is the same walk with
axis bookkeeping only; `compat` holds what differs between JAX versions.
"""
