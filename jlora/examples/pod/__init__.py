"""A fine-tuning job for one laptop, a TPU pod or a GPU cluster: ``python -m jlora.examples.pod``.

`processes` finds the other processes and hands signals on, `mesh` places the model, `data` the batches, `step` is what
is compiled, `metrics` what is recorded, `loop` trains, saves and resumes, `__main__` is the job.
"""
