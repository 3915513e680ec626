"""A run as a Slurm job: submitted once, requeued until it is finished."""
