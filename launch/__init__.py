"""Starting runs on clusters: a SLURM script, and a launcher that fills it, checks it and keeps what it sent."""
