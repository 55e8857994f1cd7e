"""The interpreter: runs a function's jaxpr on factored weights.

`interpreter` walks the equations. Rules of primitives: `views`, with `arithmetic`, `joins`, and `moves` over devices;
`contract`, of products and lookups; `control`, calls and loops. `factored` is the value between variants and rules;
`products` and `ends` compute with it, `copies` shares what products read, `lookup` reads a gather's axes. `quantised`
is a base of few bits, `stored` its views, `eightbits` its products by hardware. `manual` and `places` know meshes.
`sites` is the same walk with axis bookkeeping only. `traced` makes the trace, whose errors are the user's. `compat` has
what differs between JAX versions.
"""
