"""How fast each implementation of each operation is on this machine, beside what the machine can do: see
`python -m megapt_kernels.bench --help` and docs/kernels-bench.md."""
